"""Where a prompt that is plain text ends and its answer begins: one rule for training rows and for generation.

A tokenizer may join the end of a prompt with the beginning of its answer: "Ask: sun" is the tokens `Ask`, `:`, ` sun`, and
a model trained on them has never seen `Ask`, `:`, ` `, which is "Ask: " alone. So a prompt ends at the last place where its
tokens do not depend on what follows, and the white space after it (the `gap`) begins the answer. Where a tokenizer joins
more than white space ("New Yo" and "rk"), prompt and completion are tokenized separately, in training as in generation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from caftune.errors import CaftuneError

# Beginnings of answers to try. Line breaks are not tried: after another line break, rows are tokenized separately.
_ANSWERS = ("a", " a", "1", "    a")
_TAIL = 64  # characters at the end of a prompt that decide on its last tokens
_ANCHORS = ("", "\n", "a", ".")
_ADDED: WeakKeyDictionary[Any, tuple[int, dict[int, str]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class PromptText:
    """A prompt as a model gets it (`text` without the BOS that the tokenizer adds), and the white space before its answer."""

    text: str
    gap: str
    ids: list[int]


@dataclass(frozen=True)
class PairTokens:
    """The tokens of a prompt and its completion, of which the first `prompt` are the prompt's as a model gets it.

    `apart`: the tokenizer would merge the two across the boundary, so they are tokenized separately.
    """

    ids: list[int]
    prompt: int
    apart: bool


def split_prompt(prompt: str, tokenizer: Any) -> PromptText:
    """The prompt up to where its answer begins. An empty prompt is BOS alone (EOS where the tokenizer has no BOS)."""
    return split_prompts([prompt], tokenizer)[0]


def split_prompts(prompts: Sequence[str], tokenizer: Any) -> list[PromptText]:
    """`split_prompt` for many prompts: one call of a tokenizer for many short texts is faster than one call each."""
    texts = [without_second_bos(prompt, tokenizer) for prompt in prompts]
    ends = _ends(texts, tokenizer)
    tokens = encode_all([text[:end] for text, end in zip(texts, ends, strict=True)], tokenizer)
    found = zip(texts, ends, tokens, strict=True)
    return [PromptText(text[:end], text[end:], ids or [_start(tokenizer)]) for text, end, ids in found]


def tokenize_pairs(prompts: Sequence[str], completions: Sequence[str], tokenizer: Any) -> Iterator[PairTokens]:
    """The tokens of training rows, which end with EOS: those of `split_prompts`, then those of the answer.

    Raises:
        CaftuneError: a completion that cannot be tokenized separately from its prompt.
    """
    befores = split_prompts(prompts, tokenizer)
    end = tokenizer.eos_token or ""
    answers = []
    for prompt, completion, before in zip(prompts, completions, befores, strict=True):
        answer = before.gap + (completion if prompt else without_second_bos(completion, tokenizer))
        answers.append(answer if answer.endswith(end) else answer + end)
    wholes = encode_all([before.text + answer for before, answer in zip(befores, answers, strict=True)], tokenizer)
    for before, answer, whole in zip(befores, answers, wholes, strict=True):
        yield _pair(before, answer, whole, tokenizer)


def _pair(before: PromptText, answer: str, whole: list[int], tokenizer: Any) -> PairTokens:
    if not before.text and whole[:1] != before.ids:  # the first token of an answer needs one to be predicted from
        return PairTokens(before.ids + whole, 1, apart=False)
    if whole[: len(before.ids)] == before.ids:
        return PairTokens(whole, len(before.ids), apart=False)
    return PairTokens(before.ids + _follow(before.ids, answer, whole, tokenizer), len(before.ids), apart=True)


def encode_all(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The tokens of texts to be continued: without the EOS that some tokenizers append, and without a second BOS."""
    if not texts:
        return []
    found = [list(ids) for ids in tokenizer([without_second_bos(text, tokenizer) for text in texts])["input_ids"]]
    end = [tokenizer.eos_token_id]
    if any(ids[-1:] == end for ids in found) and tokenizer("a")["input_ids"][-1:] == end:
        return [ids[:-1] if ids[-1:] == end else ids for ids in found]
    return found


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins every text with BOS."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def has_second_bos(text: str, tokenizer: Any) -> bool:
    """Whether a text already begins with the BOS that the tokenizer adds (a rendered conversation, for example)."""
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token) and adds_bos(tokenizer)


def without_second_bos(text: str, tokenizer: Any) -> str:
    """The text without leading BOS tokens, where the tokenizer adds one."""
    while has_second_bos(text, tokenizer):
        text = text.removeprefix(tokenizer.bos_token)
    return text


def plain_text(ids: Sequence[int], tokenizer: Any) -> str:
    """The text of tokens, special tokens included, with exactly the spaces that belong to it.

    Some tokenizers (Llama 2's) put a space in front of what follows an added token: "<call>sun" is `<call>`, ` sun`. That
    space is not part of the text.
    """
    exact = {
        "skip_special_tokens": False,
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
    }
    text = str(tokenizer.decode(list(ids), **exact))
    added = _added_tokens(tokenizer)
    for token in dict.fromkeys(added[i] for i in ids if i in added):
        probe = tokenizer.decode(tokenizer(f"{token}a", add_special_tokens=False)["input_ids"], **exact)
        if probe == f"{token} a":
            text = text.replace(f"{token} ", token)
    return text


def _added_tokens(tokenizer: Any) -> dict[int, str]:
    """The added tokens by id, cached: Gemma has 6,000, and making their list takes 30 ms."""
    size, found = _ADDED.get(tokenizer, (0, {}))
    if size != len(tokenizer):
        found = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
        _ADDED[tokenizer] = (len(tokenizer), found)
    return found


def _ends(texts: Sequence[str], tokenizer: Any) -> list[int]:
    """Where each prompt ends: the last place up to which its tokens are the same before every beginning of an answer."""
    places = [list(dict.fromkeys((len(text), len(text.rstrip(" \t")), len(text.rstrip())))) for text in texts]
    ends = [last for *_, last in places]
    open_rows = list(range(len(texts)))
    for turn in range(2):
        open_rows = [row for row in open_rows if turn < len(places[row]) - 1]  # the last place needs no check
        kept = _keep_tokens([(texts[row], places[row][turn]) for row in open_rows], tokenizer)
        for row, is_kept in zip(open_rows, kept, strict=True):
            if is_kept:
                ends[row] = places[row][turn]
        open_rows = [row for row, is_kept in zip(open_rows, kept, strict=True) if not is_kept]
    return ends


def _keep_tokens(places: Sequence[tuple[str, int]], tokenizer: Any) -> list[bool]:
    """Whether the tokens of each text up to a place are the same before every beginning of an answer."""
    tails = []
    for text, place in places:
        start = max(0, len(text.rstrip()) - _TAIL)
        tails += [text[start:place], *(text[start:] + answer for answer in _ANSWERS)]
    if not tails:
        return []
    every, width = tokenizer(tails, add_special_tokens=False)["input_ids"], 1 + len(_ANSWERS)
    groups = [every[i : i + width] for i in range(0, len(every), width)]
    return [all(whole[: len(ids)] == ids for whole in wholes) for ids, *wholes in groups]


def _follow(ids: list[int], answer: str, whole: list[int], tokenizer: Any) -> list[int]:
    """Tokens of the answer that, after those of the prompt, decode to the same text as the whole.

    Many tokenizers prepend a space to a text, but not after a first character, so the answer is tokenized after several
    anchors.
    """
    expected = plain_text(whole, tokenizer)
    for anchor in _ANCHORS:
        before, both = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (anchor, anchor + answer))
        found = list(both[len(before) :])
        if both[: len(before)] == before and plain_text(ids + found, tokenizer) == expected:
            return found
    raise CaftuneError(
        "The prompt and its completion must be tokenizable separately, and this tokenizer merges them at the boundary. "
        "End the prompt with a whole word."
    )


def _start(tokenizer: Any) -> int:
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
