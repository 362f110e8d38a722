"""Self-generated labels: exact tokens, every way of batching, the cache, conversations."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from caftune.data.prompts import Conversation, Prompt, conversations, decoded, refuse_long_prompts
from caftune.demo.chemistry import molecules, prompt
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.generation.answers import AnswerCache, Labelling, generate_labels
from caftune.generation.backends import Answer, Failure, Sampling, transformers_backend
from caftune.generation.labels import label_dataset, read_labels, write_labels
from caftune.generation.progress import answers_progress

GREEDY = Sampling(max_new_tokens=24, temperature=0)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BASE).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def talks(tokenizer):
    rows = Dataset.from_list([{"prompt": prompt(m)} for m in molecules(10, seed=9, substituents=(0, 2))])
    return dict(enumerate(conversations(rows, tokenizer)))


def ids_of(talks, tokenizer):
    return [talk.prompt(0, [], tokenizer).ids for talk in talks.values()]


def alone(model, ids, count=24):
    output = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=2, eos_token_id=1)
    return output[0, len(ids) :].tolist()


def answered(
    model, tokenizer, talks, path, sampling=GREEDY, *, seed=0, batching="static", fingerprint="base"
) -> Labelling:
    cache = AnswerCache(path, sampling, seed=seed, fingerprint=fingerprint)
    backend = transformers_backend(model, tokenizer, sampling, batching=batching, batch_size=4) if model else None
    return generate_labels(talks, tokenizer, cache, lambda: backend, room=256)


def counting(asked, answer):
    """A backend that notes what it is asked."""

    def backend(prompts, _seed):
        asked.append([item.ids for item in prompts])
        yield from ((i, answer(item)) for i, item in enumerate(prompts))

    return backend


@pytest.mark.parametrize("batching", ["static", "continuous"])
def test_greedy_answers_are_those_of_generate_one_by_one(model, tokenizer, talks, tmp_path, batching):
    found = answered(model, tokenizer, talks, tmp_path / "cache.jsonl", batching=batching)
    assert [label.row for label in found.labels] == list(talks)
    for label, ids in zip(found.labels, ids_of(talks, tokenizer), strict=True):
        expected = alone(model, ids)
        assert label.completion_ids == expected
        assert label.prompt_ids == ids
        assert label.finish == ("stop" if expected[-1] == 1 else "length")
        assert label.exact


def test_a_cut_off_answer_gets_no_false_end(model, tokenizer, talks, tmp_path):
    labels = answered(model, tokenizer, talks, tmp_path / "cache.jsonl", Sampling(3, temperature=0)).labels
    assert {label.finish for label in labels} == {"length"}
    row = label_dataset(labels, keep_truncated=True)[0]
    assert row["labels"] == [-100] * len(labels[0].prompt_ids) + labels[0].completion_ids
    assert row["input_ids"] == labels[0].prompt_ids + labels[0].completion_ids
    assert tokenizer.eos_token_id not in row["input_ids"]


def test_cut_off_answers_are_left_out_of_training(model, tokenizer, talks, tmp_path):
    labels = answered(model, tokenizer, talks, tmp_path / "cache.jsonl", Sampling(12, temperature=0)).labels
    whole = [label.row for label in labels if label.finish == "stop"]
    assert 0 < len(whole) < len(labels)
    assert label_dataset(labels)["row"] == whole
    assert label_dataset(labels, keep_truncated=True)["row"] == list(talks)


def test_labels_without_a_finished_answer_are_refused(model, tokenizer, talks, tmp_path):
    labels = answered(model, tokenizer, talks, tmp_path / "cache.jsonl", Sampling(3, temperature=0)).labels
    with pytest.raises(CaftuneError, match="None of 10 answers was finished .* or set labels.keep_truncated=true"):
        label_dataset(labels)


def test_sampled_answers_follow_the_seed(model, tokenizer, talks, tmp_path):
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        found = answered(model, tokenizer, talks, tmp_path / name, Sampling(24, temperature=1.5), seed=seed)
        texts.append([label.completion for label in found.labels])
    assert texts[0] == texts[1] != texts[2]


def test_labels_survive_the_way_to_disk(model, tokenizer, talks, tmp_path):
    labels = answered(model, tokenizer, talks, tmp_path / "cache.jsonl").labels
    write_labels(labels, tmp_path / "labels.jsonl")
    assert read_labels(tmp_path / "labels.jsonl") == labels


def test_a_resumed_run_asks_only_for_what_is_missing(model, tokenizer, talks, tmp_path):
    path = tmp_path / "cache.jsonl"
    whole = answered(model, tokenizer, talks, path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:6]) + lines[6][:30])  # killed within a line
    again = answered(model, tokenizer, talks, path)
    assert again.queried == 4
    assert again.labels == whole.labels
    assert path.read_bytes().startswith(b"".join(lines[:6]))
    assert sorted(path.read_bytes().splitlines()) == sorted(line.strip() for line in lines)


def test_a_finished_run_asks_nothing(model, tokenizer, talks, tmp_path):
    first = answered(model, tokenizer, talks, tmp_path / "cache.jsonl")
    cache = AnswerCache(tmp_path / "cache.jsonl", GREEDY, seed=5, fingerprint="base")  # a greedy answer has no seed
    again = generate_labels(talks, tokenizer, cache, lambda: pytest.fail("asked"), room=256)
    assert (again.queried, again.labels) == (0, first.labels)


@pytest.mark.parametrize(
    ("sampling", "seed", "fingerprint", "asked"),
    [
        (Sampling(24, temperature=0.9, top_p=0.9), 0, "base", 0),
        (Sampling(24, temperature=0.8, top_p=0.9), 0, "base", 10),
        (Sampling(24, temperature=0.9, top_p=0.8), 0, "base", 10),
        (Sampling(24, temperature=0.9, top_p=0.9, top_k=3), 0, "base", 10),
        (Sampling(24, temperature=0.9, top_p=0.9), 1, "base", 10),
        (Sampling(24, temperature=0.9, top_p=0.9), 0, "other base", 10),
        (Sampling(9, temperature=0.9, top_p=0.9), 0, "base", 0),  # cut from the longer answers
        (Sampling(25, temperature=0.9, top_p=0.9), 0, "base", 10),  # keeping those that ended would favour short ones
    ],
)
def test_what_an_answer_depends_on_is_asked_anew(model, tokenizer, talks, tmp_path, sampling, seed, fingerprint, asked):
    answered(model, tokenizer, talks, tmp_path / "cache.jsonl", Sampling(24, temperature=0.9, top_p=0.9))
    again = answered(model, tokenizer, talks, tmp_path / "cache.jsonl", sampling, seed=seed, fingerprint=fingerprint)
    assert again.queried == asked


def test_more_room_asks_greedy_answers_again_only_where_they_were_cut_off(model, tokenizer, talks, tmp_path):
    short = answered(model, tokenizer, talks, tmp_path / "cache.jsonl", Sampling(12, temperature=0))
    long = answered(model, tokenizer, talks, tmp_path / "cache.jsonl", GREEDY)
    assert 0 < long.queried == sum(label.finish == "length" for label in short.labels) < 10
    assert long.labels == answered(model, tokenizer, talks, tmp_path / "other.jsonl", GREEDY).labels
    assert (
        answered(None, tokenizer, talks, tmp_path / "cache.jsonl", Sampling(12, temperature=0)).labels == short.labels
    )


def test_more_prompts_ask_only_for_the_new_ones(model, tokenizer, talks, tmp_path):
    few = {row: talks[row] for row in list(talks)[3:7]}
    answered(model, tokenizer, few, tmp_path / "cache.jsonl", Sampling(24, temperature=1.0))
    assert answered(model, tokenizer, talks, tmp_path / "cache.jsonl", Sampling(24, temperature=1.0)).queried == 6


def test_the_same_prompt_twice_is_drawn_twice_and_greedily_asked_once(tokenizer, tmp_path):
    twins = {0: Conversation(text="a"), 1: Conversation(text="b"), 2: Conversation(text="a")}
    for temperature, count in ((1.0, 3), (0.0, 2)):
        asked: list[list[list[int]]] = []
        sampling = Sampling(4, temperature=temperature)
        cache = AnswerCache(tmp_path / f"{temperature}", sampling, seed=0, fingerprint="base")
        backend = counting(asked, lambda item: Answer([3, 1], "stop"))
        found = generate_labels(twins, tokenizer, cache, lambda b=backend: b, room=64)
        assert (len(asked[0]), len(found.labels)) == (count, 3)


def test_failures_are_named_and_asked_again(tokenizer, tmp_path):
    talks = {row: Conversation(text=letter) for row, letter in enumerate("abcd")}
    bad = Conversation(text="c").prompt(0, [], tokenizer).ids
    asked: list[list[list[int]]] = []
    answers = [
        lambda item: Failure("busy") if item.ids == bad else Answer([3, 1], "stop"),
        lambda _: Answer([4, 1], "stop"),
    ]
    for number, answer in enumerate(answers):
        cache = AnswerCache(tmp_path / "cache.jsonl", GREEDY, seed=0, fingerprint="base")
        found = generate_labels(talks, tokenizer, cache, lambda a=answer: counting(asked, a), room=64)
        assert found.failures == ({2: "busy"} if number == 0 else {})
        assert [label.row for label in found.labels] == ([0, 1, 3] if number == 0 else [0, 1, 2, 3])
    assert asked[1] == [bad]


def test_a_killed_process_loses_and_repeats_no_row(tmp_path):
    data = tmp_path / "prompts.jsonl"
    rows = [{"prompt": prompt(m)} for m in molecules(400, seed=9, substituents=(2, 4))]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"output: {tmp_path}/run\nmodel: {{name: {BASE}}}\n"
        f"labels: {{prompts: {data}, max_new_tokens: 40, batch_size: 10, temperature: 0.5}}\n"
    )
    command = [sys.executable, "-m", "caftune.cli", "label", str(tmp_path / "recipe.yaml")]
    path = tmp_path / "run" / "labels" / "cache.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (path.is_file() and path.read_bytes().count(b"\n") >= 20):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = path.read_bytes()
    assert 20 <= kept.count(b"\n") < 400
    assert not (path.parent / "labels.jsonl").exists()
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    written = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert max(Counter(written).values()) == 1
    assert [label.row for label in read_labels(path.parent / "labels.jsonl")] == list(range(400))
    assert path.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])


def test_a_prompt_to_be_continued_is_not_closed():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    closing = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    rows = Dataset.from_list([{"prompt": "a b"}, {"prompt": ""}])
    assert [talk.prompt(0, [], closing).ids for talk in conversations(rows, closing)] == [[0, 2, 3], [0]]


def test_messages_need_a_chat_template(tokenizer):
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": "Hi"}]}])
    with pytest.raises(CaftuneError, match="must have a chat template for data with messages, got none"):
        conversations(rows, tokenizer)


def test_long_prompts_are_counted_and_named():
    with pytest.raises(CaftuneError, match=r"1 of 3 prompts \(rows 1, from 0\) are longer than the 4 tokens"):
        refuse_long_prompts({0: Prompt([1]), 1: Prompt([1] * 5), 2: Prompt([1] * 4)}, 4)


def test_a_line_that_is_no_label_is_named(tmp_path):
    (tmp_path / "x").write_text('{"row": 0}\n')
    with pytest.raises(CaftuneError, match="line 1: not a label"):
        read_labels(tmp_path / "x")


def test_a_line_that_is_no_answer_is_named(tmp_path):
    (tmp_path / "x").write_text(
        '{"key": "a", "max_new_tokens": 3, "ids": [1], "finish": "stop", "exact": true}\n{"key": 1}\n'
    )
    with pytest.raises(CaftuneError, match="line 2: not an answer"):
        AnswerCache(tmp_path / "x", GREEDY, seed=0, fingerprint="base")


def test_an_answer_cut_off_before_its_end_of_line_is_kept_and_the_next_one_begins_a_line(tmp_path):
    path = tmp_path / "cache.jsonl"
    for key in ("a", "b"):
        AnswerCache(path, GREEDY, seed=0, fingerprint="base").add(key, Answer([3, 1], "stop"))
        path.write_bytes(path.read_bytes()[:-1])  # killed between the two
    cache = AnswerCache(path, GREEDY, seed=0, fingerprint="base")
    assert cache.find("a") == cache.find("b") == Answer([3, 1], "stop")


def test_a_file_that_is_no_cache_stays_as_it_is(tmp_path):
    (tmp_path / "x").write_text('{"notes": 1}')
    with pytest.raises(CaftuneError, match="line 1: not an answer"):
        AnswerCache(tmp_path / "x", GREEDY, seed=0, fingerprint="base")
    assert (tmp_path / "x").read_text() == '{"notes": 1}'


def test_an_answer_asked_for_again_gets_the_same_seed_and_twins_get_their_own(tokenizer, tmp_path):
    talks = {row: Conversation(text="a") for row in range(8)}
    seen: list[list[int]] = []

    def backend(prompts, seeds):
        seen.append(list(seeds))
        yield from ((i, Answer([3, 1], "stop") if i % 2 else Failure("busy")) for i in range(len(prompts)))

    for _ in range(2):
        cache = AnswerCache(tmp_path / "cache.jsonl", Sampling(4, temperature=1.0), seed=0, fingerprint="base")
        generate_labels(talks, tokenizer, cache, lambda: backend, room=64)
    assert len(set(seen[0])) == 8
    assert seen[1] == seen[0][::2]


def test_penalties_of_the_base_do_not_enter_the_labels(model, tokenizer, talks, tmp_path):
    texts = []
    for name, penalty in (("a", None), ("b", 3.0)):
        model.generation_config.repetition_penalty = penalty
        texts.append([label.completion for label in answered(model, tokenizer, talks, tmp_path / name).labels])
    assert model.generation_config.repetition_penalty == 3.0
    model.generation_config.repetition_penalty = None
    assert texts[0] == texts[1]


def shown(capsys):
    """What the bar has shown, from the first drawing to the last."""
    return [part for part in capsys.readouterr().err.split("\r") if "labels" in part]


def test_a_burst_of_answers_is_shown_as_a_whole_with_an_honest_time_left(capsys):
    with answers_progress(1000, 0, "labels", every_s=0.1) as progress:
        time.sleep(0.6)  # a batch
        for _ in range(64):
            progress.answered(10)
        time.sleep(0.35)
        *_, last = shown(capsys)
    assert "64/1000" in last
    minutes, seconds = map(int, re.search(r"<(\d+):(\d+),", last).groups())
    assert 7 <= 60 * minutes + seconds <= 40  # 936 answers at 64 in a second; on a busy machine in more
    assert "tokens/s=" in last


def test_answers_of_an_earlier_run_are_not_in_the_pace(capsys):
    with answers_progress(1000, 900, "labels", every_s=0.1) as progress:
        time.sleep(0.5)
        progress.answered(3)
        time.sleep(0.25)
        *_, last = shown(capsys)
    assert "901/1000" in last
    minutes, seconds = map(int, re.search(r"<(\d+):(\d+),", last).groups())
    assert 60 * minutes + seconds >= 50  # one in half a second, and 99 to come


def test_failures_are_shown_and_not_waited_for(capsys):
    with answers_progress(10, 0, "labels", every_s=60) as progress:
        for number in range(10):
            progress.failed() if number < 3 else progress.answered(1)
    *_, last = shown(capsys)
    assert "7/7" in last
    assert "failed=3" in last


def test_nothing_to_ask_shows_what_is_there(capsys):
    with answers_progress(5, 5, "labels"):
        pass
    assert "5/5" in shown(capsys)[-1]


def test_a_space_before_the_first_word_of_an_answer_stays(tmp_path):
    """Llama 2's decoder drops it at the start of a text, and with it a space of an answer's indentation."""
    vocabulary = {"▁def": 0, "▁▁▁": 1, "▁return": 2, "<0x0A>": 3, ":": 4}
    raw = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    stripping = PreTrainedTokenizerFast(tokenizer_object=raw)
    assert stripping.decode([1, 2]) == "   return"
    assert decoded([0, 4, 3], [1, 2], stripping) == ("def:\n", "    return")
    texts, chats = (
        SimpleNamespace(turns=[None], prompt=lambda *_, m=messages: Prompt([0, 4, 3], messages=m))
        for messages in (None, [])
    )
    cache = AnswerCache(tmp_path / "cache.jsonl", GREEDY, seed=0, fingerprint="any")

    def backend(prompts, seeds):
        yield 0, Answer([1, 2], "stop")

    found = generate_labels({0: texts, 1: chats}, stripping, cache, lambda: backend, room=9).labels
    # In a conversation an answer begins anew, so that "[/INST] def f():" is no indented code.
    assert [(label.prompt, label.completion) for label in found] == [("def:\n", "    return"), ("def:\n", "   return")]


def test_views_of_one_cache_share_its_answers_and_keep_their_own_lengths_and_draws(tmp_path):
    def sampling(length, temperature=0.0):
        return Sampling(max_new_tokens=length, temperature=temperature)

    long = AnswerCache(tmp_path / "cache.jsonl", sampling(4), seed=1, fingerprint="x")
    short, later = long.drawn(sampling(2), seed=1), long.drawn(sampling(4, 0.5), seed=2)
    prompt = Prompt(ids=[5], text="a")
    (key,) = long.keys([prompt])
    long.add(key, Answer([1, 2, 3, 4], "length"))
    assert (short.find(key).ids, long.find(key).ids) == ([1, 2], [1, 2, 3, 4])
    alone = AnswerCache(tmp_path / "cache.jsonl", sampling(4, 0.5), seed=2, fingerprint="x")
    assert later.keys([prompt, prompt]) == alone.keys([prompt, prompt]) != long.keys([prompt, prompt])
    assert alone.find(key).ids == [1, 2, 3, 4]
