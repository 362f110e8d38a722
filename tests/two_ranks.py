"""Run by torchrun from test_ranks.py: three steps of CAFT on however many ranks, final weights to a file."""

import copy
import os
import sys

import torch
from datasets import Dataset
from safetensors.torch import save_file

from caftune import CAFTConfig, CAFTTrainer
from caftune.demo.chemistry import completion, molecules, prompt
from caftune.demo.run import BASE


def main(output: str, heads: str) -> None:
    torch.set_num_threads(1)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    drawn = molecules(24, seed=7, substituents=(0, 2))
    rows = Dataset.from_list([{"prompt": prompt(m), "completion": completion(m)} for m in drawn])
    states = {}
    for stage, options in {
        "one": {"pretrain_heads": True, "num_heads": 2},
        "two": {"heads": heads, "train_heads": True},
    }.items():
        args = CAFTConfig(
            f"{output}.{stage}",
            **{"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "max_steps": 3},
            **{"optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0.0, "per_device_train_batch_size": 8 // ranks},
            gradient_checkpointing=False,  # Trainer then sets find_unused_parameters
            dataloader_pin_memory=False,
            aux_weight=1.0,
            **options,
        )
        trainer = CAFTTrainer(str(BASE), args, train_dataset=copy.deepcopy(rows))
        trainer.train()
        states |= {
            f"{stage}.{name}": value.clone()
            for name, value in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()
        }
    if int(os.environ.get("RANK", "0")) == 0:
        save_file(states, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
