"""Answers that came as text: token ids to text, as servers decode, and back."""

import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from caftune.generation.spellings import find_spelling

TEXT = [
    "def area(width, height):\n    return width * height\n",
    "Once upon a time there was a little girl. She had 7 cats, and 42 dogs!",
    "    for number in range(10):\n        print(number)\n  two",
    "Ask for the weather: sun. The capital of France: Paris.",
    "naïve café, über, 你好",
] * 5


def words(*special):
    """Byte pairs within words, each with the space before it; what is in no word are bytes."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    raw.train_from_iterator(
        [line for text in TEXT[:4] for line in text.split("\n")] * 5,
        trainers.BpeTrainer(vocab_size=200, show_progress=False),
    )
    model = json.loads(raw.to_str())["model"]
    names = [*special, *(f"<0x{number:02X}>" for number in range(256)), *model["vocab"]]
    merges = [tuple(pair) for pair in model["merges"]]
    vocabulary = {name: number for number, name in enumerate(names)}
    raw = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return raw


def llama():
    """As Llama 2's: a space is part of the word behind it, and the decoder drops the first one."""
    raw = words("<unk>", "<s>", "</s>")
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return finished(raw)


def metaspace():
    """As newer conversions of the same: the space is put before the text by the pre-tokenizer."""
    raw = words("<unk>", "<s>", "</s>")
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return finished(raw)


def byte_level():
    """As GPT-2's and most since."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        special_tokens=["<unk>", "<s>", "</s>"],
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(TEXT, trainer)
    raw.decoder = decoders.ByteLevel()
    return finished(raw)


def finished(raw):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<call>", "</call>"]})
    return tokenizer


KINDS = {"llama": llama, "metaspace": metaspace, "byte_level": byte_level}


@pytest.fixture(scope="module", params=[*KINDS, "stories260k"])
def tokenizer(request):
    if request.param == "stories260k":
        return AutoTokenizer.from_pretrained(request.getfixturevalue("shared") / "models" / "stories260k")
    return KINDS[request.param]()


def behind(tokenizer, prompt, ids):
    """The text of an answer as a server decodes it, which has the prompt's tokens before it."""
    before, whole = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (prompt, [*prompt, *ids]))
    return whole[len(before) :]


def back(tokenizer, before, text, *, prompt=None, **options):
    prompt = tokenizer(before)["input_ids"] if prompt is None else prompt
    return find_spelling(text, prompt, before, tokenizer, ends=[tokenizer.eos_token_id], **options)


PROMPT = 'def area(width, height):\n    """Area."""\n'


@pytest.mark.parametrize(
    ("before", "text"),
    [
        (PROMPT, "    return width * height"),
        (PROMPT, "  two"),
        (PROMPT, "return"),
        (PROMPT, "\n    return width"),
        ("Once upon", " a time"),
        ("Once upon", "  a time"),
        ("Once upon", ". There"),
        ("Once upon", "\nThere"),
        ("Once upon", "7 cats"),
        ("Once upon", " 7 cats"),
        ("Once upon", "é"),
        ("Ask for the weather: ", "sun"),
        ("Ask for the weather: ", " sun"),
        ("Ask for the weather:", " sun"),
        ("a\n", "a"),
        ("", "Once upon"),
        ("Ask", ": sun "),
    ],
)
def test_an_answer_is_the_text_behind_its_prompt(tokenizer, before, text):
    prompt = tokenizer(before)["input_ids"] or [tokenizer.bos_token_id]
    for decoding in ("behind", "unknown"):
        ids = back(tokenizer, before, text, prompt=prompt, decoding=decoding)
        assert behind(tokenizer, prompt, ids) == text, tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize("kind", ["llama", "metaspace"])
def test_the_space_that_decoding_alone_dropped_is_put_back(kind):
    tokenizer = KINDS[kind]()
    for before, answer in (("Once upon", " a time"), (PROMPT, "    return width")):
        prompt = tokenizer(before)["input_ids"]
        ids = tokenizer(before + answer)["input_ids"][len(prompt) :]
        alone = tokenizer.decode(ids)
        assert alone == answer[1:]
        if answer == " a time":
            assert back(tokenizer, before, alone, decoding="unknown") == ids
            assert back(tokenizer, before, alone, decoding="alone") == ids
        assert back(tokenizer, before, answer, decoding="behind") == ids


def test_answers_drawn_at_random_keep_their_text(tokenizer):
    drawn = random.Random(5)
    prompts = [PROMPT, "Once upon", "Ask for the weather: ", "She had", "a\n"]
    usual = [token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids]
    others = 0
    for number in range(300):
        before = prompts[number % len(prompts)]
        prompt = tokenizer(before)["input_ids"]
        ids = drawn.choices(usual, k=drawn.randint(1, 8))
        text = behind(tokenizer, prompt, ids)
        if "\N{REPLACEMENT CHARACTER}" in text:
            continue
        found = back(tokenizer, before, text, decoding="behind", lengths=[len(ids)])
        assert behind(tokenizer, prompt, found) == text
        others += found != ids
    assert others < 300  # tokens drawn at random are seldom those that the tokenizer would write


def test_what_the_tokenizer_writes_comes_back_as_it_is(tokenizer):
    drawn = random.Random(6)
    for _ in range(200):
        line = drawn.choice(TEXT[:4])
        cut = drawn.randint(1, len(line) - 2)
        ids = tokenizer(line)["input_ids"]
        prompt = tokenizer(line[:cut])["input_ids"]
        if ids[: len(prompt)] != prompt:
            continue
        answer = ids[len(prompt) :]
        text = behind(tokenizer, prompt, answer)
        assert back(tokenizer, line[:cut], text, decoding="behind", lengths=[len(answer)]) == answer


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_token_in_a_text_is_that_token(kind):
    tokenizer = KINDS[kind]()
    call, end = tokenizer.convert_tokens_to_ids(["<call>", "</call>"])
    ids = back(tokenizer, "Ask", ": <call>sun</call>")
    assert call in ids
    assert ids[-1] == end
    assert tokenizer.decode(ids).replace(" ", "") == ":<call>sun</call>"


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_of_text_that_is_spelled_out_ends_nothing(kind):
    tokenizer = KINDS[kind]()
    ids = back(tokenizer, "Ask", " a</s> time")
    assert tokenizer.eos_token_id not in ids
    assert behind(tokenizer, tokenizer("Ask")["input_ids"], ids) == " a</s> time"


def test_the_servers_count_decides_between_spellings_of_one_text():
    words = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "\n": 3, ".": 4, "|": 5, "</s>": 6, "ba": 7}, [("b", "a")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    assert back(tokenizer, "b", "ab") == [0, 1]
    assert back(tokenizer, "b", "ab", lengths=[2]) == [0, 1]


def test_a_text_that_no_tokens_write_has_none():
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2, "</s>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    assert back(tokenizer, "a", " b") == [1]
    assert back(tokenizer, "a", " zebra") is None


def test_an_empty_text_is_no_tokens(tokenizer):
    assert back(tokenizer, "Once upon", "") == []
