"""Self-generated responses: the base model answers prompts, and its answers are what the heads are pretrained on.

Rows are appended to a JSONL file as they are finished, one line each; a run that was killed goes on where it stopped.
Token ids are kept beside the text, so that stage 1 trains on exactly the tokens the model chose, its own end-of-text
included, and an answer cut off by `max_new_tokens` gets no false end.
Source: METHOD "head pretraining" of arXiv 2506.07833 (pseudo-labels written by the model itself).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import ContinuousBatchingConfig, GenerationConfig

from caftune.data import DataError
from caftune.objective import IGNORED

_NAMED_ROWS = 5
_PAGE = 256  # tokens of one page of transformers' paged cache


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. `temperature` 0 is greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    batching: Literal["auto", "continuous", "static"] = "auto"
    batch_size: int = 64
    seed: int = 0

    def generation_config(self, model: Any, tokenizer: Any) -> GenerationConfig:
        """These settings for transformers' `generate`, with the model's own end-of-text tokens."""
        eos = model.generation_config.eos_token_id
        pad = tokenizer.pad_token_id
        sampled = (
            {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k} if self.temperature else {}
        )
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.temperature > 0,
            eos_token_id=eos if eos is not None else tokenizer.eos_token_id,
            pad_token_id=pad if pad is not None else tokenizer.eos_token_id,
            **sampled,
        )


@dataclass(frozen=True)
class Label:
    """One answer. `finish` is "stop" where the model ended it, "length" where `max_new_tokens` did."""

    row: int
    prompt: str
    completion: str
    finish: str
    prompt_ids: list[int]
    completion_ids: list[int]


def encode_prompts(rows: Dataset, tokenizer: Any) -> list[list[int]]:
    """Token ids of each row's prompt, ready to be continued. `text` rows and empty prompts start from BOS alone.

    Raises:
        DataError: messages for a tokenizer without a chat template.
    """
    if is_chat(rows):
        refuse_messages_without_template(tokenizer)
        return [_encode_messages(row, tokenizer) for row in rows]
    if "prompt" in rows.column_names:
        return [_encode_text(prompt, tokenizer) for prompt in rows["prompt"]]
    return [_encode_text("", tokenizer) for _ in range(len(rows))]


def is_chat(rows: Dataset) -> bool:
    """Whether the rows hold messages, alone or as prompt and completion."""
    return "messages" in rows.column_names or ("prompt" in rows.column_names and not isinstance(rows[0]["prompt"], str))


def refuse_messages_without_template(tokenizer: Any) -> None:
    """Raise DataError where `tokenizer` cannot render messages."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"The data has messages, and {tokenizer.name_or_path} has no chat template to write them with. Use a chat "
            "model, give the tokenizer a chat_template, or use prompt and completion columns."
        )


def refuse_long_prompts(prompts: Sequence[Sequence[int]], room: int) -> None:
    """Raise DataError where a prompt is longer than the `room` that max_new_tokens leaves in the model's context."""
    long = [number for number, prompt in enumerate(prompts) if len(prompt) > room]
    if long:
        named = ", ".join(map(str, long[:_NAMED_ROWS])) + (", ..." if len(long) > _NAMED_ROWS else "")
        raise DataError(
            f"{len(long)} of {len(prompts)} prompts (rows {named}, from 0) are longer than the {room} tokens that "
            "labels.max_new_tokens leaves in the model's context. Lower it, or set labels.skip_long_prompts=true."
        )


def generate_labels(
    model: Any, tokenizer: Any, prompts: Mapping[int, list[int]], path: Path, sampling: Sampling
) -> None:
    """Answer every prompt (row -> token ids) that is not in `path` yet, appending one line per answer as it comes."""
    done = {label.row for label in read_labels(path)} if path.is_file() else set()
    todo = [row for row in prompts if row not in done]
    if not todo:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_broken_tail(path)
    config = sampling.generation_config(model, tokenizer)
    eos = {config.eos_token_id} if isinstance(config.eos_token_id, int) else set(config.eos_token_id or ())
    torch.manual_seed(sampling.seed + len(done))
    asked = [prompts[row] for row in todo]
    if _continuous(model, sampling):
        answers = _answer_continuously(model, asked, config, sampling)
    else:
        answers = answer_in_batches(model, asked, config, batch_size=sampling.batch_size)
    with (
        _only_these_settings(model, config),
        path.open("a", encoding="utf-8") as file,
        tqdm(total=len(prompts), initial=len(done), desc="labels") as bar,
    ):
        for index, answer in answers:
            ids, finish = until_end(answer, eos)
            row = todo[index]
            label = Label(
                row=row,
                prompt=tokenizer.decode(prompts[row], skip_special_tokens=True),
                completion=tokenizer.decode(ids, skip_special_tokens=True),
                finish=finish,
                prompt_ids=list(prompts[row]),
                completion_ids=ids,
            )
            file.write(json.dumps(asdict(label), ensure_ascii=False) + "\n")
            file.flush()
            bar.update()


@contextmanager
def _only_these_settings(model: Any, config: GenerationConfig) -> Iterator[None]:
    """`generate` fills what a configuration leaves open from the model's own (a repetition penalty, say): not here."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def read_labels(path: Path) -> list[Label]:
    """The finished rows of a labels file, in the order of their prompts; a last line cut off by a kill is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    labels = {}
    for number, line in enumerate(lines[:-1], start=1):
        try:
            label = Label(**json.loads(line))
        except (json.JSONDecodeError, TypeError) as error:
            raise DataError(f"{path}, line {number}: not a label ({error}). Remove the line and run again.") from error
        labels[label.row] = label
    return [labels[row] for row in sorted(labels)]


def label_dataset(labels: Sequence[Label]) -> Dataset:
    """`input_ids` and `labels` of answers: only the model's own tokens are trained on; empty answers are left out."""
    return Dataset.from_list(
        [
            {
                "input_ids": label.prompt_ids + label.completion_ids,
                "labels": [IGNORED] * len(label.prompt_ids) + label.completion_ids,
            }
            for label in labels
            if label.completion_ids
        ]
    )


def answer_in_batches(
    model: Any, prompts: Sequence[list[int]], config: GenerationConfig, *, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """(index, answer), shortest prompts first, so that the prompts of a batch need little padding.

    Answers may be followed by padding: see `until_end`.
    """
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in batch)
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in batch])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
        with torch.inference_mode():
            output = model.generate(
                ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
            )
        yield from zip(batch, output[:, width:].tolist(), strict=True)


def until_end(answer: list[int], eos: set[int]) -> tuple[list[int], str]:
    """The answer up to and with its first end-of-text token, and whether there was one ("stop") or not ("length")."""
    for position, token in enumerate(answer):
        if token in eos:
            return answer[: position + 1], "stop"
    return answer, "length"


def _continuous(model: Any, sampling: Sampling) -> bool:
    """Continuous batching pays on accelerators. On a CPU its attention spans all requests at once: docs/decisions/0003."""
    if sampling.batching == "auto":
        return model.device.type != "cpu" and hasattr(model, "generate_batch") and _has_paged_attention(model)
    return sampling.batching == "continuous"


def _has_paged_attention(model: Any) -> bool:
    return bool(getattr(model, "_supports_attention_backend", False)) and not getattr(model, "_is_stateful", False)


def _answer_continuously(
    model: Any, prompts: list[list[int]], config: GenerationConfig, sampling: Sampling
) -> Iterator[tuple[int, list[int]]]:
    """(index, answer) in the order answers are finished."""
    sizes = ContinuousBatchingConfig(seed=sampling.seed)
    if model.device.type == "cpu":  # there it would size its cache by the machine's memory
        pages = -(-(max(map(len, prompts)) + sampling.max_new_tokens) // _PAGE)
        sizes.num_blocks, sizes.max_requests_per_batch = pages * sampling.batch_size, sampling.batch_size
        sizes.max_batch_tokens = 8 * sampling.batch_size
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=sizes
    ) as manager:
        index = {
            name: i for i, name in enumerate(manager.add_requests(prompts, max_new_tokens=sampling.max_new_tokens))
        }
        while index:
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError(
                    "Generation stopped early. The rows so far are kept; run the command again to go on."
                )
            if result is None or not result.is_finished():
                continue
            if result.error is not None:
                raise RuntimeError(
                    f"Generation failed ({result.error}). The rows so far are kept; run the command again."
                )
            yield index.pop(result.request_id), list(result.generated_tokens)


def _encode_messages(row: dict[str, Any], tokenizer: Any) -> list[int]:
    """A conversation up to where the assistant speaks, rendered as SFTTrainer renders it."""
    messages = row.get("messages") or row["prompt"]
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    options = {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}
    return tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, **options)["input_ids"]


def _encode_text(prompt: str, tokenizer: Any) -> list[int]:
    ids = tokenizer(prompt)["input_ids"]
    while ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
        ids = ids[:-1]  # some tokenizers close every text with EOS; a prompt to be continued is not closed
    if ids:
        return ids
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [start]


def _drop_broken_tail(path: Path) -> None:
    """Cut off a last line that a kill left unfinished."""
    if path.is_file():
        text = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)
