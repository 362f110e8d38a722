"""CAFT in a Trainer of your own: `CAFTMixin` before your class, `CAFTOptions` before its arguments. TRL is not needed.

    python examples/own_trainer.py MODEL_FOLDER      (default: the base model of the demo)

It runs stage 1 and stage 2 on a few texts, and writes an ordinary checkpoint to ./own_trainer_model.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

import caftune

TEXTS = ["Name: 2-chloropropan-1-ol\nSMILES: OCC(C)Cl", "Name: 3-methylbutanoic acid\nSMILES: OC(=O)CC(C)C"] * 8
OPTIONS = {"max_steps": 6, "logging_steps": 2, "save_strategy": "no", "report_to": "none", "use_cpu": True}


@dataclass
class OwnArguments(caftune.CAFTOptions, TrainingArguments):
    """Your TrainingArguments, with the options of CAFT."""


class OwnTrainer(caftune.CAFTMixin, Trainer):
    """Your Trainer, with auxiliary heads."""


def main(name: str, output: str = "own_trainer_model") -> list[dict[str, float]]:
    """Returns what stage 2 logged."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(name)
    data = {
        "train_dataset": Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]),
        "data_collator": DataCollatorForLanguageModeling(tokenizer, mlm=False),
        "processing_class": tokenizer,
    }
    heads = str(Path(output, "heads"))
    args = OwnArguments(f"{output}/run", pretrain_heads=True, learning_rate=1e-3, **OPTIONS)
    trainer = OwnTrainer(AutoModelForCausalLM.from_pretrained(name), args, **data)
    trainer.train()
    trainer.export(heads)

    args = OwnArguments(f"{output}/run", heads=heads, learning_rate=1e-4, **OPTIONS)
    trainer = OwnTrainer(AutoModelForCausalLM.from_pretrained(name), args, **data)
    trainer.train()
    trainer.export(output)  # with the base's keys, and without heads
    return trainer.state.log_history


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(Path(caftune.__file__).parent / "demo" / "base"))
