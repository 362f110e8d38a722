"""Shapes of public models with random weights, and what their runs share."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Qwen3Config, TrainerCallback

import caftune.training.trainer
from caftune import AuxiliaryHeads, Backbone, HeadsConfig
from caftune.demo.run import BASE
from caftune.training.loading import Start

VOCABULARIES = {"32k": 32768, "150k": 151936}
RANK = 8
_FIRST_TOKEN = 3  # 0 to 2 begin, end and pad


@dataclass(frozen=True)
class Shape:
    """A model by its sizes, how it is trained, and its batch. `few`: two numbers of layers that stand for all of them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    tie_word_embeddings: bool
    tuning: str  # full: weights in float32; lora: in bfloat16
    batch: int
    length: int
    few: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the loaded weights."""
        return torch.float32 if self.tuning == "full" else torch.bfloat16

    def config(self, vocabulary: int, layers: int) -> Qwen3Config:
        """The model's configuration with another vocabulary and depth."""
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim", "tie_word_embeddings")
        return Qwen3Config(
            vocab_size=vocabulary,
            num_hidden_layers=layers,
            num_key_value_heads=self.num_attention_heads // (4 if self.hidden_size == 4096 else 2),
            max_position_embeddings=32768,
            **{name: getattr(self, name) for name in names},
            **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
        )

    def model(self, vocabulary: int, layers: int, device: str) -> Any:
        """Random weights, made on the device."""
        torch.manual_seed(0)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(self.config(vocabulary, layers), dtype=self.dtype)

    def lora(self) -> LoraConfig | None:
        """The adapter of the run."""
        if self.tuning == "full":
            return None
        return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")


# The sizes of Qwen3-0.6B, Qwen3-1.7B and Qwen3-8B.
SHAPES = {
    "0.6B": Shape(1024, 3072, 28, 16, 128, True, "full", 8, 1024, (4, 8)),
    "1.7B": Shape(2048, 6144, 28, 16, 128, True, "full", 8, 1024, (4, 8)),
    "8B": Shape(4096, 12288, 36, 32, 128, False, "lora", 4, 1024, (4, 8)),
}
SMALL = {
    "0.6B": Shape(16, 32, 2, 4, 4, True, "full", 2, 16, (1, 2)),
    "1.7B": Shape(24, 48, 2, 4, 6, True, "full", 2, 16, (1, 2)),
    "8B": Shape(32, 64, 4, 4, 8, False, "lora", 2, 16, (2, 3)),
}
SMALL_VOCABULARIES = {"32k": 256, "150k": 512}


def shapes(small: bool) -> dict[str, Shape]:
    """The shapes by name, or tiny ones in their place."""
    return SMALL if small else SHAPES


def vocabularies(small: bool) -> dict[str, int]:
    """Sizes of vocabularies by name."""
    return SMALL_VOCABULARIES if small else VOCABULARIES


def rows_of(vocabulary: int, batch: int, length: int, labelled: float, steps: int) -> Dataset:
    """Random tokens for some steps, of which the last part of each row is labelled."""
    ids = torch.randint(_FIRST_TOKEN, vocabulary, (batch * steps, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : round(length * (1 - labelled))] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def options_of(device: str, steps: int, batch: int) -> dict[str, Any]:
    """Options of SFTConfig that all runs have."""
    return {
        **{"max_steps": steps, "per_device_train_batch_size": batch, "max_length": None, "learning_rate": 1e-5},
        **{"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"},
        **{
            "gradient_checkpointing": False,
            "bf16": True,
            "use_cpu": device == "cpu",
            "dataloader_pin_memory": device == "cuda",
        },
    }


def tokenizer() -> Any:
    """Any tokenizer: rows are tokens already."""
    return AutoTokenizer.from_pretrained(BASE)


def train(trainer: Any, callback: TrainerCallback) -> None:
    """Train with a callback, and print nothing."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(callback)
    trainer.train()


@contextmanager
def untrained_heads(count: int) -> Iterator[None]:
    """Within the block CAFTTrainer takes new heads instead of reading a folder, which would cost minutes on large shapes."""

    def build(model: Any, _args: Any, _tokenizer: Any) -> Start:
        backbone = Backbone.of(model)
        return Start(AuxiliaryHeads.build(backbone, HeadsConfig(count)), backbone)

    before = caftune.training.trainer.load_or_build_heads
    caftune.training.trainer.load_or_build_heads = build
    try:
        yield
    finally:
        caftune.training.trainer.load_or_build_heads = before
