"""`caftune generate`: a model writes, its heads draft for it."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import typer
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from caftune.checkpoints.heads_folder import load_heads
from caftune.checkpoints.opening import opening
from caftune.core.backbone import Backbone
from caftune.core.speculative import Drafting, SpeculativeDecoding
from caftune.data.forms import load_rows
from caftune.data.prompts import Conversation, Prompt, conversations, decoded, is_in_conversation, report_second_bos
from caftune.errors import CaftuneError
from caftune.generation.backends import Sampling, end_tokens, padding_token, until_end
from caftune.generation.batches import only_these_settings


@dataclass(frozen=True)
class Written:
    """An answer and its cost, and with `alone` the cost of the model alone. Seconds are those of `generate`."""

    prompt: Prompt
    ids: list[int]
    drafting: Drafting
    seconds: float
    seconds_alone: float | None = None
    is_same: bool | None = None  # as the model's alone; of greedy answers


class Writer:
    """A model with its heads. These may be another fine-tuning's of the same base: they draft, and decide nothing.

    Raises:
        CaftuneError: no such model, or heads of another architecture or tokenizer.
    """

    def __init__(self, model: str, heads: str, *, revision: str | None = None, length: int | None = None) -> None:
        where = "cuda" if torch.cuda.is_available() else "cpu"
        with opening(model, "MODEL", revision=revision):
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model, revision=revision or "main")
            loaded: Any = AutoModelForCausalLM.from_pretrained(model, revision=revision or "main", dtype="auto")
        self.model: Any = loaded.to(where).eval()
        backbone = Backbone.of(self.model)
        found = load_heads(heads, backbone, self.tokenizer, force=True)
        if length is not None and length > found.config.count:
            raise CaftuneError(
                f"--draft must be at most {found.config.count}, the number of heads, got {length}. Lower it."
            )
        self.decoding = SpeculativeDecoding(backbone, found, length=length)

    def prompts(
        self, texts: Sequence[str], file: str | None, limit: int | None = None, *, chat: bool | None = None
    ) -> list[Prompt]:
        """The prompts of texts and of the first rows of a file, each up to the model's first answer.

        Args:
            chat: whether texts are user messages. None: if the model has a chat template; for a file see `is_in_conversation`.
        """
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        talks: list[Conversation] = []
        if texts:
            rows = Dataset.from_dict({"prompt": list(texts)})
            talks += conversations(rows, self.tokenizer, chat=has_template if chat is None else chat)
        if file is not None:
            rows = load_rows(file, limit=limit, chat=has_template and chat is not False)
            is_chat = is_in_conversation(rows, self.tokenizer, chat, option="--chat")
            talks += conversations(rows, self.tokenizer, chat=is_chat, source=file)
        report_second_bos([talk.text for talk in talks], self.tokenizer, "the command")
        found = [talk.prompt(0, [], self.tokenizer) for talk in talks if talk.turns]
        if not found:
            raise CaftuneError("A prompt must be given, got none. Name one, or a file with --prompts.")
        is_chat = any(prompt.messages is not None for prompt in found)
        typer.echo(f"Prompts are given {'in a conversation' if is_chat else 'as plain text'} (--chat).", err=True)
        return found

    def write(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int = 0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        alone: bool = False,
    ) -> Iterator[Written]:
        """Answers, one prompt after another. Sampled ones begin with the seed `seed` + the prompt's number.

        Args:
            stop: texts that end an answer, which keeps them.
            alone: let the model write each answer by itself, too.

        Raises:
            CaftuneError: a prompt that leaves no room for `max_new_tokens` in the model's context, a penalty of 0,
                or settings of sampling without it.
        """
        if sampling.temperature == 0 and (sampling.top_p < 1 or sampling.top_k > 0):
            raise CaftuneError("--temperature must be above 0 for --top-p and --top-k, got 0 (greedy). Raise it.")
        if repetition_penalty <= 0:
            raise CaftuneError(f"--repetition-penalty must be above 0, got {repetition_penalty}. Use 1 for none.")
        if self.room(prompts, sampling.max_new_tokens) < sampling.max_new_tokens:
            raise CaftuneError(
                f"--max-new-tokens must be at most {self.room(prompts, sampling.max_new_tokens)} (the context left by the "
                f"longest prompt), got {sampling.max_new_tokens}. Lower it."
            )
        eos = self.ends
        config = sampling.generation_config(eos, padding_token(self.tokenizer))
        config.repetition_penalty = repetition_penalty
        config.stop_strings = list(stop) or None
        more = {"tokenizer": self.tokenizer} if stop else {}

        def answer(generate: Any, prompt: Prompt, number: int) -> tuple[list[int], float]:
            ids = torch.tensor([prompt.ids], device=self.model.device)
            torch.manual_seed(seed + number)
            with torch.inference_mode(), only_these_settings(self.model, config):
                began = time.perf_counter()
                output = generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, **more)
                return until_end(output[0, ids.shape[1] :].tolist(), set(eos)).ids, time.perf_counter() - began

        for number, prompt in enumerate(prompts):
            self.decoding.total = Drafting()
            found, seconds = answer(self.decoding.generate, prompt, number)
            other, seconds_alone = answer(self.model.generate, prompt, number) if alone else (None, None)
            same = None if other is None or sampling.temperature else other == found
            yield Written(prompt, found, self.decoding.total, seconds, seconds_alone, same)

    @property
    def ends(self) -> list[int]:
        """The tokens that end an answer."""
        return end_tokens(self.model.generation_config, self.tokenizer)

    def room(self, prompts: Sequence[Prompt], wanted: int) -> int:
        """How many of the `wanted` new tokens fit the model's context after the longest prompt; none is an error."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(len(prompt.ids) for prompt in prompts)
        if context is not None and longest >= context:
            raise CaftuneError(f"A prompt must fit the model's context of {context} tokens, got {longest}. Shorten it.")
        return wanted if context is None else min(wanted, context - longest)


def print_answer(answer: Written, writer: Writer, *, as_json: bool) -> None:
    """An answer for a person, or as a line of JSON."""
    prompt, text = decoded(answer.prompt.ids, answer.ids, writer.tokenizer, writer.ends)
    if as_json:
        facts = {
            "prompt": prompt,
            "text": text,
            "ids": answer.ids,
            **asdict(answer.drafting),
            "seconds": answer.seconds,
        }
        typer.echo(json.dumps({**facts, "seconds_alone": answer.seconds_alone, "same": answer.is_same}))
    else:
        typer.secho(prompt, dim=True, nl=False)
        typer.echo(text + "\n")


def print_drafting(console: Console, written: Sequence[Written]) -> None:
    """How many passes of the model the answers took, and how often each head was right."""
    total = Drafting()
    for answer in written:
        total.add(answer.drafting)
    seconds = sum(answer.seconds for answer in written)
    shares = ", ".join(f"{a / max(d, 1):.0%} of {d}" for a, d in zip(total.accepted, total.drafted, strict=True))
    console.print(
        f"{total.tokens} tokens in {total.passes} passes of the model ({total.passes / max(total.tokens, 1):.2f} a token) and "
        f"{seconds:.2f} s. Accepted of each head's tokens, nearest first: {shares}; {total.accepted_length:.2f} a draft.",
        soft_wrap=True,
        highlight=False,
    )
    alone = [answer for answer in written if answer.seconds_alone is not None]
    if alone:
        other = sum(answer.seconds_alone or 0.0 for answer in alone)
        judged = [answer.is_same for answer in alone if answer.is_same is not None]
        same = f" The same answers: {sum(judged)} of {len(judged)}." if judged else ""
        console.print(
            f"The model alone: {other:.2f} s. With its heads it is {other / seconds:.2f} times as fast.{same}",
            soft_wrap=True,
            highlight=False,
        )
