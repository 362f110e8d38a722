"""A model by its name, resolved once: its configuration, tokenizer and weights, and a backend that answers with it."""

import gc
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from caftune.checkpoints.fingerprint import model_fingerprint
from caftune.checkpoints.opening import opening
from caftune.core.finite import refuse_not_finite
from caftune.errors import CaftuneError
from caftune.generation.backends import Backend, Sampling, end_tokens, transformers_backend, vllm_backend
from caftune.generation.server import Server, server_backend
from caftune.pipeline.schema import AnswersSection, ModelSection
from caftune.training.freed_memory import return_freed_memory

_METHODS = {"quant_method", "load_in_8bit", "load_in_4bit"}  # keys by which transformers knows a quantisation


class BaseModel:
    """The base, or a model that is evaluated in its place. Its configuration is read once, when it is first needed.

    Args:
        name: a folder or a hub id.
        revision: of the model on the hub, a commit where the run has pinned it; None: main.
        trust_remote_code: whether the model's own code may run.
        place: where the name was given, for errors.
    """

    def __init__(
        self,
        name: str,
        revision: str | None = None,
        *,
        trust_remote_code: bool | None = False,
        place: str = "model.name",
    ) -> None:
        self.name, self.revision, self.place = name, revision, place
        self.trust_remote_code = bool(trust_remote_code)

    @classmethod
    def of(cls, section: ModelSection) -> "BaseModel":
        """The model of a recipe's `model`."""
        return cls(section.name, section.revision, trust_remote_code=section.trust_remote_code)

    def other(self, name: str, place: str = "The model") -> "BaseModel":
        """The model `name`, whose code may run if this one's may; this one if it has that name."""
        return self if name == self.name else BaseModel(name, trust_remote_code=self.trust_remote_code, place=place)

    @property
    def where(self) -> dict[str, Any]:
        """What `from_pretrained` is given beyond the name."""
        return {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}

    def opening(self) -> AbstractContextManager[None]:
        """The context in which the model is opened: see `opening`."""
        return opening(self.name, self.place, revision=self.where["revision"], trust=self.trust_remote_code)

    @cached_property
    def config(self) -> Any:
        """Its configuration. Copy it before changing it."""
        with self.opening():
            config = AutoConfig.from_pretrained(self.name, **self.where)
        rounding = getattr(config, "quantization_config", None)
        # Without a method transformers cannot load it; read from GGUF it is loaded, but never saved (transformers 5.23).
        if isinstance(rounding, dict) and (rounding.get("quant_method") == "gguf" or not {*rounding} & _METHODS):
            raise CaftuneError(
                f"{self.place}: the config.json of {self.name} must have no quantization_config of GGUF or without a method, "
                f"got {rounding}, a leftover of a conversion. Remove this key if the weights are not quantised."
            )
        return config

    @property
    def context(self) -> int | None:
        """Its context in tokens; None where its configuration names none."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def fingerprint(self) -> str:
        """Its identity: its commit on the hub, or a hash of the folder's files."""
        return model_fingerprint(self.name, self.revision)

    def tokenizer(self) -> Any:
        """Its tokenizer, a new one each time, as TRL changes the one that it trains with."""
        with self.opening():
            return AutoTokenizer.from_pretrained(self.name, config=self.config, **self.where)

    def load(self) -> Any:
        """The model in the dtype it was published in, on the GPU where there is one."""
        with self.opening():
            model: Any = AutoModelForCausalLM.from_pretrained(self.name, dtype="auto", **self.where)
        what = f"model.name ({self.name})" if self.place == "model.name" else f"The model in {self.name}"
        remedy = "Its answers would be noise: use another model or checkpoint."
        refuse_not_finite(dict(model.named_parameters()), what, remedy)
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def stop_tokens(self, tokenizer: Any) -> list[int]:
        """The tokens that end its answers."""
        return end_tokens(self._generation_config, tokenizer)

    @cached_property
    def _generation_config(self) -> GenerationConfig:
        try:
            return GenerationConfig.from_pretrained(self.name, **self.where)
        except OSError:  # older models have none: it is part of their configuration
            return GenerationConfig.from_model_config(self.config)

    def engine_dtype(self, engine: Mapping[str, Any]) -> dict[str, str]:
        """The dtype for vLLM: that of `load`. By default vLLM would round a float32 model to bfloat16.

        Empty where `engine` names another model, a dtype or a quantization, which are part of `who_answers`.
        """
        if {"model", "quantization", "dtype"} & set(engine) or getattr(self.config, "quantization_config", None):
            return {}
        dtype = self.config.dtype or getattr(self.config.get_text_config(), "dtype", None)
        if dtype is None:  # transformers then takes the dtype of the weights
            model = AutoModelForCausalLM.from_pretrained(self.name, dtype="auto", device_map="meta", **self.where)
            dtype = model.dtype
        return {"dtype": str(dtype).removeprefix("torch.")}


def answer_backend(
    model: BaseModel,
    section: AnswersSection,
    tokenizer: Any,
    sampling: Sampling,
    loaded: dict[str, Any] | None = None,
) -> Backend:
    """The section's backend, which answers prompts with a model.

    Args:
        loaded: a dict in which the model is kept for further backends; clear it to free the model.
    """
    loaded = {} if loaded is None else loaded
    if not loaded:
        free_memory()
    if section.backend == "transformers":
        if "model" not in loaded:
            loaded["model"] = model.load()
        return transformers_backend(
            loaded["model"], tokenizer, sampling, batching=section.batching, batch_size=section.batch_size
        )
    eos = model.stop_tokens(tokenizer)
    if section.backend == "vllm":
        own = {"trust_remote_code": model.trust_remote_code, **model.engine_dtype(section.vllm)}
        return vllm_backend(model.name, model.where["revision"], sampling, eos, {**own, **section.vllm}, loaded)
    server = Server(**{**section.server.model_dump(), "model": section.server.model or model.name})
    return server_backend(server, tokenizer, sampling, eos)


def who_answers(section: AnswersSection) -> str:
    """What distinguishes the answers of one backend from another's, besides the model; empty if nothing does."""
    if section.backend == "server":
        return section.server.model or ""
    engine = {name: section.vllm[name] for name in ("model", "quantization", "dtype") if name in section.vllm}
    return str(engine) if engine and section.backend == "vllm" else ""


def free_memory() -> None:
    """Free models and trainers that nothing refers to any more, and memory that torch and the C library keep for later use.

    vLLM starts only where nearly the whole GPU is free.
    """
    gc.collect()
    return_freed_memory()
    torch.cuda.empty_cache()
