"""Short training runs on the embedded base, for the tests of the trainer."""

import torch
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from caftune import CAFTConfig
from caftune.demo.run import BASE

OPTIONS = {
    "report_to": [],
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "max_length": 128,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
}


def config(folder, **options) -> CAFTConfig:
    return CAFTConfig(str(folder), **{**OPTIONS, **options})


def stock(folder, rows, peft_config=None, **options):
    args = SFTConfig(str(folder), **{**OPTIONS, **options})
    return trained(SFTTrainer(str(BASE), args=args, train_dataset=rows, peft_config=peft_config))


def trained(trainer):
    trainer.train()
    return trainer


def numbers(trainer):
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


def logged(trainer):
    """Everything a run logs but how long it took."""
    clocks = ("runtime", "per_second")
    return [{k: v for k, v in line.items() if not k.endswith(clocks)} for line in trainer.state.log_history]


def weights(trainer):
    return {k: v for k, v in trainer.model.state_dict().items() if "auxiliary_heads" not in k}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def lora():
    return LoraConfig(r=4, target_modules="all-linear", init_lora_weights=True)
