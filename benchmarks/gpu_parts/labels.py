"""Tokens a second of the labels' two ways of batching, next to transformers' own `generate` on padded batches.

A 0.6B shape with random weights, of whose tokens one in a hundred ends an answer: lengths differ as those of real answers do.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from caftune.data.prompts import Prompt
from caftune.generation.backends import Sampling, end_tokens, padding_token, transformers_backend, until_end
from gpu_parts.shapes import rows_of, shapes, tokenizer, vocabularies
from gpu_parts.step import free_memory

TITLE = "Labels of a 0.6B shape: 64 answers at a time, sampled, at most 256 tokens"
ROWS = ("generate", "static", "continuous")
SIZE = 64


def measured(way: str, *, small: bool, device: str) -> dict[str, float]:
    """Answers to prompts of 64 to 128 tokens."""
    free_memory(device)
    shape, vocabulary = shapes(small)["0.6B"], vocabularies(small)["150k"]
    model = shape.model(vocabulary, shape.num_hidden_layers, device).eval().to(torch.bfloat16)
    model.generation_config.eos_token_id = list(range(1, vocabulary, 100))
    count, longest, new = (6, 16, 8) if small else (4 * SIZE, 128, 256)
    ids = rows_of(vocabulary, count, longest, 1.0, 1)["input_ids"]
    prompts = [row[: longest // 2 + number % (longest // 2)] for number, row in enumerate(ids)]
    sampling = Sampling(new, temperature=1.0)
    answer = partial(_generate if way == "generate" else _ours, model, sampling=sampling, way=way)
    answer(prompts[: SIZE // 8])  # warm
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    tokens = sum(map(len, answer(prompts)))
    seconds = time.perf_counter() - began
    return {"answers": count, "tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}


def _ours(model: Any, prompts: list[list[int]], *, sampling: Sampling, way: Any) -> list[list[int]]:
    backend = transformers_backend(model, tokenizer(), sampling, batching=way, batch_size=SIZE)
    return [answer.ids for _, answer in backend([Prompt(ids) for ids in prompts], range(len(prompts)))]


def _generate(model: Any, prompts: list[list[int]], *, sampling: Sampling, way: str) -> list[list[int]]:  # noqa: ARG001
    any_tokenizer = tokenizer()
    eos = end_tokens(model.generation_config, any_tokenizer)
    config = sampling.generation_config(eos, padding_token(any_tokenizer))
    answers: list[list[int]] = []
    for start in range(0, len(prompts), SIZE):
        batch = {"input_ids": prompts[start : start + SIZE]}
        encoded = any_tokenizer.pad(batch, padding_side="left", return_tensors="pt").to(model.device)
        with torch.inference_mode():
            output = model.generate(**encoded, generation_config=config)
        written = output[:, encoded["input_ids"].shape[1] :].tolist()
        answers += [until_end(row, set(eos)).ids for row in written]
    return answers


def rows(small: bool, device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The rows by name."""
    for way in ROWS:
        yield way, partial(measured, way, small=small, device=device)


def lines(found: Mapping[str, Any], _plans: Mapping[str, Any]) -> list[str]:
    """A row a way of batching."""
    table = ["| batching | tokens a second | answers | tokens |", "|---|---|---|---|"]
    for way in ROWS:
        values = found.get(way, "not measured")
        names = {
            "generate": "`generate` on padded batches",
            "static": "caftune, static",
            "continuous": "caftune, continuous",
        }
        cells = [str(values), "", ""]
        if isinstance(values, dict):
            cells = [f"{values['tokens_per_s']:.0f}", str(values["answers"]), str(values["tokens"])]
        table.append(f"| {names[way]} | {' | '.join(cells)} |")
    return table
