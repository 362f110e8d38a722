"""Answers of a causal LM: by transformers in this process, or by vLLM offline. (Servers are in server.py.)

A *backend* is a function of prompts and of a seed for each. It yields (index, answer or failure) as answers are finished.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from caftune.data.prompts import Prompt
from caftune.errors import CaftuneError
from caftune.generation.batches import answer_in_batches, only_these_settings

_PAGE = 256  # tokens of one page of transformers' paged cache


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. `temperature` 0 is greedy; `top_k` 0 is all tokens."""

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0

    def generation_config(self, eos: Sequence[int], pad: int) -> GenerationConfig:
        """These settings for transformers' `generate`, and none of the model's own (such as a repetition penalty)."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k} if self.temperature else {}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.temperature > 0,
            eos_token_id=list(eos),
            pad_token_id=pad,
            **drawn,
        )


@dataclass(frozen=True)
class Answer:
    """Token ids, the end-of-text token included, and why they end: "stop" (the model ended) or "length" (max_new_tokens).

    `exact` is False where a server gave text only, and its tokens are those that the tokenizer writes it with.
    """

    ids: list[int]
    finish: Literal["stop", "length"]
    exact: bool = True


@dataclass(frozen=True)
class Failure:
    """No answer, and why. `is_lost`: the server is gone, busy or broken, so the prompt may be fine."""

    reason: str
    is_lost: bool = field(default=False, compare=False)


Backend = Callable[[Sequence[Prompt], Sequence[int]], Iterator[tuple[int, Answer | Failure]]]


def end_tokens(generation_config: GenerationConfig, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the model's own, else the tokenizer's."""
    eos = generation_config.eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    return [eos] if isinstance(eos, int) else list(eos or ())


def unknown_token(number: int, tokenizer: Any, embedded: int, *, place: str) -> CaftuneError:
    """The error for a token id beyond the rows of a model's embeddings; `tokenizer` may be None."""
    named = "a token" if tokenizer is None else repr(tokenizer.convert_ids_to_tokens(number))
    return CaftuneError(
        f"{place} must hold tokens with ids below {embedded}, the rows of the model's embeddings, got "
        f"{named} with id {number}. Use the tokenizer of the base, or save a base with "
        "more rows (model.resize_token_embeddings(len(tokenizer)))."
    )


def padding_token(tokenizer: Any) -> int:
    """The token that rows are padded with: the tokenizer's own, else any, as it is masked."""
    return next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)


def transformers_backend(
    model: Any,
    tokenizer: Any,
    sampling: Sampling,
    *,
    batching: Literal["auto", "continuous", "static"] = "auto",
    batch_size: int = 64,
) -> Backend:
    """transformers' continuous batching, or padded batches of `batch_size`: see docs/decisions/0003.

    In padded batches each prompt has its own random numbers where `can_refill`; otherwise all share those of the first
    prompt's seed. A token without an embedding raises CaftuneError.
    """
    eos = end_tokens(model.generation_config, tokenizer)
    embedded = model.get_input_embeddings().weight.shape[0]
    pad = padding_token(tokenizer)
    pad = pad if pad < embedded else 0
    config = sampling.generation_config(eos, pad)
    is_continuous = batching == "continuous" or (batching == "auto" and _gains_from_continuous(model))

    def answer(prompts: Sequence[Prompt], seeds: Sequence[int]) -> Iterator[tuple[int, Answer]]:
        ids = [prompt.ids for prompt in prompts]
        for number, tokens in enumerate(ids):
            if tokens and max(tokens) >= embedded:
                raise unknown_token(max(tokens), tokenizer, embedded, place=f"Prompt {number}")
        torch.manual_seed(seeds[0])
        if is_continuous:
            drawn = _answer_continuously(model, ids, config, seed=seeds[0], batch_size=batch_size)
        else:
            drawn = answer_in_batches(model, ids, config, batch_size=batch_size, seeds=seeds)
        for index, tokens in drawn:
            yield index, until_end(tokens, set(eos))

    return answer


def vllm_backend(
    name: str,
    revision: str | None,
    sampling: Sampling,
    eos: Sequence[int],
    engine: Mapping[str, Any],
    loaded: dict[str, Any] | None = None,
) -> Backend:
    """vLLM's offline engine. `engine`: arguments of `vllm.LLM`, such as tensor_parallel_size.

    Every prompt has its own seed, so an answer does not depend on the others in its batch.

    Args:
        loaded: a dict in which the engine is kept for further backends of the same model.

    Raises:
        CaftuneError: vLLM is not installed.
    """
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise CaftuneError("labels.backend=vllm needs vLLM. Install it with `pip install 'caftune[vllm]'`.") from error
    loaded = {} if loaded is None else loaded
    if "engine" not in loaded:
        # generation_config="vllm": none of the model's own defaults, as in the other backends
        loaded["engine"] = LLM(**{"model": name, "revision": revision, "generation_config": "vllm", **engine})
    model = loaded["engine"]

    def answer(prompts: Sequence[Prompt], seeds: Sequence[int]) -> Iterator[tuple[int, Answer]]:
        settings = [
            SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=seed,
                stop_token_ids=list(eos),
                detokenize=False,
            )
            for seed in seeds
        ]
        size = 1024  # answers are kept after each of these, so that a stopped run loses no more
        for start in range(0, len(prompts), size):
            batch = [{"prompt_token_ids": prompt.ids} for prompt in prompts[start : start + size]]
            outputs = model.generate(batch, settings[start : start + size], use_tqdm=False)
            for index, output in enumerate(outputs, start=start):
                (drawn,) = output.outputs
                found = until_end(list(drawn.token_ids), set(eos))
                # vLLM also ends at the tokenizer's own end-of-text token
                yield index, replace(found, finish="stop") if drawn.finish_reason == "stop" else found

    return answer


def until_end(tokens: list[int], eos: set[int]) -> Answer:
    """The tokens up to and including the first end-of-text token; without one the answer was cut off."""
    for position, token in enumerate(tokens):
        if token in eos:
            return Answer(tokens[: position + 1], "stop")
    return Answer(tokens, "length")


def _gains_from_continuous(model: Any) -> bool:
    """Continuous batching pays on accelerators. On a CPU its attention spans all requests at once."""
    is_paged = getattr(model, "_supports_attention_backend", False) and not getattr(model, "_is_stateful", False)
    return model.device.type != "cpu" and hasattr(model, "generate_batch") and is_paged


def _answer_continuously(
    model: Any, prompts: list[list[int]], config: GenerationConfig, *, seed: int, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """(index, tokens) in the order answers are finished."""
    sizes = ContinuousBatchingConfig(seed=seed)
    budget = int(config.max_new_tokens or 0)
    if model.device.type == "cpu":  # there it would size its cache by the machine's memory
        pages = -(-(max(map(len, prompts)) + budget) // _PAGE)
        sizes.num_blocks, sizes.max_requests_per_batch = pages * batch_size, batch_size
        sizes.max_batch_tokens = 8 * batch_size
    with (
        only_these_settings(model, config),
        model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=sizes
        ) as manager,
    ):
        index = {name: i for i, name in enumerate(manager.add_requests(prompts, max_new_tokens=budget))}
        while index:
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError(
                    "Generation stopped early. The answers so far are kept; run the command again to resume."
                )
            if result is None or not result.is_finished():
                continue
            if result.error is not None:
                raise RuntimeError(
                    f"Generation failed ({result.error}). The answers so far are kept; run the command again."
                )
            yield index.pop(result.request_id), list(result.generated_tokens)
