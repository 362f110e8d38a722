"""One training up to the end of its first step: benchmarks/startup.py runs it. Prints when that step began and ended, as JSON.

startup_worker.py caftune RECIPE [KEY=VALUE...]     `caftune train`, by its own command line
startup_worker.py sft RECIPE                        the same as a script of SFTTrainer
startup_worker.py build FOLDER SHAPE                a model (LAYERSxWIDTH, or demo), its heads, rows and recipe
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import transformers.trainer
from transformers import TrainerCallback

ROWS, LENGTH, VOCABULARY = 1500, 192, 32000
OPTIONS = {"max_steps": 1, "per_device_train_batch_size": 16, "gradient_checkpointing": False, "learning_rate": 5e-4}
OPTIONS |= {"use_cpu": True, "bf16": False, "dataloader_pin_memory": False, "report_to": []}


class Clock(TrainerCallback):
    """Wall clock, and processor seconds of this process since it began; ends it after the first step."""

    def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """The first step begins."""
        self.begun = (time.time(), time.process_time())

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        """It has ended."""
        print(json.dumps([self.begun, (time.time(), time.process_time())]), flush=True)
        os._exit(0)


def by_caftune(arguments: list[str]) -> None:
    """The command line as it is."""
    from caftune.cli import app

    app(["train", *arguments])


def by_sft(recipe: str) -> None:
    """What one would write with TRL for the same."""
    import yaml
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    given = yaml.safe_load(Path(recipe).read_text())
    rows = load_dataset("json", data_files=given["data"]["train"], split="train")
    args = SFTConfig(given["output"], max_length=given["data"]["max_length"], **given["trainer"])
    SFTTrainer(given["model"]["name"], args, train_dataset=rows).train()


def build(folder: Path, shape: str) -> None:
    """Everything that a training of this shape needs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from caftune import AuxiliaryHeads, Backbone, HeadsConfig, save_heads
    from caftune.demo.chemistry import completion, molecules, prompt
    from caftune.demo.run import BASE
    from caftune.pipeline.recipe import save_recipe

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    if shape == "demo":
        model: Any = AutoModelForCausalLM.from_pretrained(BASE)
    else:
        layers, width = map(int, shape.split("x"))
        sizes = {"hidden_size": width, "intermediate_size": width * 43 // 16, "num_attention_heads": 8}
        ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **sizes, **ends)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    backbone = Backbone.of(model)
    save_heads(folder / "heads", AuxiliaryHeads.build(backbone, HeadsConfig(4)), backbone, tokenizer)
    rows = [{"prompt": prompt(m), "completion": completion(m)} for m in molecules(ROWS, seed=1, substituents=(2, 4))]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "output": str(folder / "run"),
        "model": {"name": str(folder / "base")},
        "heads": {"path": str(folder / "heads")},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": LENGTH},
        "trainer": OPTIONS,
    }
    save_recipe(folder / "recipe.yaml", recipe)


def main() -> None:
    """Do what the first argument says."""
    what, *arguments = sys.argv[1:]
    if what == "build":
        build(Path(arguments[0]), arguments[1])
        return
    transformers.trainer.DEFAULT_CALLBACKS.append(Clock)
    if what == "sft":
        by_sft(arguments[0])
    else:
        by_caftune(arguments)


if __name__ == "__main__":
    main()
