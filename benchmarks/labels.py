"""Throughput of the in-process label backend against plain batched `generate`, on the same prompts, in one run.

    python benchmarks/labels.py BASE PROMPTS.json [--limit 400] [--max-new-tokens 256] [--batch-size 64] [--rounds 5]

    generate       transformers' `generate` on padded batches of the prompts as they come
    caftune        what `caftune label` does: batches by length, answers decoded and kept on disk as they come

Greedy, so that both write the same tokens, which is checked. Rounds take turns; medians are shown. Every answer's end-of-text
counts as a token, padding after it does not.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from caftune.data.forms import load_rows
from caftune.data.prompts import Conversation, conversations
from caftune.generation.answers import AnswerCache, generate_labels
from caftune.generation.backends import Sampling, end_tokens, transformers_backend, until_end
from caftune.generation.labels import write_labels


def plain(model: Any, tokenizer: Any, talks: dict[int, Conversation], sampling: Sampling, size: int) -> list[list[int]]:
    """The prompts in their order, in padded batches."""
    asked = [talk.prompt(0, [], tokenizer).ids for talk in talks.values()]
    eos = end_tokens(model.generation_config, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    config = sampling.generation_config(eos, pad)
    answers: list[list[int]] = []
    for start in range(0, len(asked), size):
        batch = asked[start : start + size]
        encoded = tokenizer.pad({"input_ids": batch}, padding_side="left", return_tensors="pt").to(model.device)
        with torch.inference_mode():
            output = model.generate(**encoded, generation_config=config)
        answers += [until_end(row, set(eos)).ids for row in output[:, encoded["input_ids"].shape[1] :].tolist()]
    return answers


def ours(model: Any, tokenizer: Any, talks: dict[int, Conversation], sampling: Sampling, size: int) -> list[list[int]]:
    """As `caftune label` answers them, from prompts to the file of labels."""
    with tempfile.TemporaryDirectory() as folder:
        cache = AnswerCache(Path(folder, "cache.jsonl"), sampling, seed=0, fingerprint="base")
        backend = transformers_backend(model, tokenizer, sampling, batch_size=size)
        found = generate_labels(talks, tokenizer, cache, lambda: backend, room=10**6)
        write_labels(found.labels, Path(folder, "labels.jsonl"))
    return [label.completion_ids for label in found.labels]


def main() -> None:
    """Parse the options, take turns, print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("prompts")
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    model: Any = AutoModelForCausalLM.from_pretrained(options.base).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    talks = conversations(load_rows(options.prompts, limit=options.limit), tokenizer)
    room = model.config.max_position_embeddings - options.max_new_tokens
    fitting = {i: talk for i, talk in enumerate(talks) if len(talk.prompt(0, [], tokenizer).ids) <= room}
    sampling = Sampling(max_new_tokens=options.max_new_tokens, temperature=0)
    times: dict[str, list[float]] = {"generate": [], "caftune": []}
    for _ in range(options.rounds):
        answers = {}
        for name, way in (("generate", plain), ("caftune", ours)):
            start = time.perf_counter()
            answers[name] = way(model, tokenizer, fitting, sampling, options.batch_size)
            times[name].append(time.perf_counter() - start)
    same = sum(one == other for one, other in zip(*answers.values(), strict=True))
    tokens = sum(map(len, answers["caftune"]))
    print(f"{len(fitting)} prompts, {tokens} tokens, {same} answers the same, {options.threads} threads")
    for name, seconds in times.items():
        shown = f"{statistics.median(seconds):.2f} s (lowest {min(seconds):.2f}, highest {max(seconds):.2f})"
        print(f"{name:10} {shown}, {tokens / statistics.median(seconds):.0f} tokens/s")
    ratios = [one / other for one, other in zip(times["generate"], times["caftune"], strict=True)]
    print(
        f"throughput to generate's: {statistics.median(ratios):.2f} (lowest {min(ratios):.2f}, highest {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
