"""Run by torchrun from test_ranks.py: CAFT on however many ranks, on two bases; weights and every step's losses to a file."""

import os
import sys

import torch
from bases import HEADS, load_base
from datasets import Dataset
from safetensors.torch import save_file
from trainers import lora
from transformers import AutoTokenizer, Trainer

from caftune import CAFTConfig, CAFTMixin, CAFTTrainer
from caftune.demo.chemistry import completion, molecules, prompt
from caftune.demo.run import BASE

# Uneven lengths; two rows too short for horizons 3 and 4. Three steps of 8 rows, or 8, 8 and 4 where steps accumulate: without
# accumulation accelerate would fill the last batch up with rows it has shown before, so that each rank has one.
DRAWN = [{"prompt": prompt(m), "completion": completion(m)} for m in molecules(22, seed=7, substituents=(0, 2))]
ROWS = Dataset.from_list([{"prompt": "Name:", "completion": ""}] * 2 + DRAWN)
ROWS_OF = {1: 24, 2: 20}
RUNS = {
    "heads": ("llama", {"pretrain_heads": True, "num_heads": 2}),
    "llama full": ("llama", {}),
    "llama lora": ("llama", {"gradient_accumulation_steps": 2}),
    "gpt2 full": ("gpt2", {"gradient_accumulation_steps": 2, "train_heads": False}),
    "gpt2 lora": ("gpt2", {"heads_lora_rank": 0}),
    "llama own": ("llama", {"gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential"}),
}


# Of the first step, in the order of the rows: those that the second of two ranks gets have no labels.
UNLABELLED = (2, 3, 6, 7)


class Own(CAFTMixin, Trainer):
    """A plain Trainer with heads, on CAFTTrainer's rows."""


def h1_is_logged(name: str) -> bool:
    return "full" in name or "lora" in name


def main(output: str, heads: str) -> None:
    torch.set_num_threads(1)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    tensors = {}
    for name, (base, options) in RUNS.items():
        accumulated = options.get("gradient_accumulation_steps", 1)
        args = CAFTConfig(
            f"{output}.run",
            heads=None if name == "heads" else f"{heads}/{base}",
            **{"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "num_train_epochs": 1},
            **{"optim": "sgd", "learning_rate": 1e-1, "max_grad_norm": 0.0, "logging_steps": 1},
            per_device_train_batch_size=8 // accumulated // ranks,
            gradient_checkpointing=False,  # Trainer then sets find_unused_parameters
            dataloader_pin_memory=False,
            aux_weight=1.0,
            **options,
        )
        trainer = CAFTTrainer(
            load_base(base),
            args,
            train_dataset=ROWS.select(range(ROWS_OF[accumulated])),
            processing_class=AutoTokenizer.from_pretrained(BASE),
            peft_config=lora() if "lora" in name else None,
        )
        if "own" in name:
            rows = trainer.train_dataset.map(
                lambda row, number: {"labels": [-100] * len(row["labels"])} if number in UNLABELLED else {},
                with_indices=True,
            )
            given = {"train_dataset": rows, "processing_class": trainer.processing_class}
            trainer = Own(load_base(base), args, trainer.data_collator, **given)
        model = trainer.model
        tensors |= {f"{name}/start/{key}": value.clone() for key, value in model.state_dict().items()}
        trainer.train()
        tensors |= {f"{name}/end/{key}": value.clone() for key, value in model.state_dict().items()}
        horizons = range(1 if h1_is_logged(name) else 2, 4 if name == "heads" else HEADS + 2)
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        losses = [[entry[f"h{h}_loss"] for h in horizons] for entry in logs]
        tensors[f"{name}/losses"] = torch.tensor(losses, dtype=torch.float64)
    if int(os.environ.get("RANK", "0")) == 0:
        save_file(tensors, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
