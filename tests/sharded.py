"""Run by torchrun from test_launch.py: a short CAFT run, sharded by FSDP2 where there are several ranks.

Accelerate takes its FSDP2 path for accelerators only; here it is told that these gloo ranks are some.
"""

import json
import os
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor

from caftune import CAFTConfig, CAFTTrainer
from caftune.demo.chemistry import completion, molecules, prompt

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
RECOMPUTED = ("full_recomputed",)  # by FSDP's own activation checkpointing
# Name -> (base is tied, LoRA, modules_to_save, options).
CASES = {
    "full_tied": (True, False, None, {"train_heads": False}),
    "full_untied_heads": (False, False, None, {"gradient_checkpointing": True}),
    "full_recomputed": (False, False, None, {"heads_lora_rank": 2}),
    "lora_heads": (False, True, None, {"heads_lora_rank": 0, "heads_max_grad_norm": 0.1}),
    "lora_heads_lora": (True, True, None, {}),
    "lora_unembedding": (False, True, ["lm_head"], {"train_heads": False}),
    "stage_one": (False, False, None, {"pretrain_heads": True, "num_heads": 2}),
}


def run(name: str, folder: str, state_dict_type: str) -> None:
    """Four steps, of which the last two are taken again after a resume; then an export."""
    is_tied, is_lora, modules, options = CASES[name]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    rows = [{"prompt": prompt(m), "completion": completion(m)} for m in molecules(32, seed=7, substituents=(0, 2))]
    base = f"{folder}/{'tied' if is_tied else 'untied'}"
    heads = {} if "pretrain_heads" in options else {"heads": f"{base}-heads"}
    kind = "sharded" if ranks > 1 else "one"
    for attempt in ("whole", "resumed"):
        output = f"{folder}/{name}-{state_dict_type}-{kind}"
        args = CAFTConfig(
            f"{output}-{attempt}",
            **{"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "steps", "save_steps": 2},
            **{"adam_epsilon": 1e-2, "learning_rate": 1e-2, "max_grad_norm": 1.0, "logging_steps": 1, "max_steps": 4},
            **{"per_device_train_batch_size": 4 // ranks, "gradient_accumulation_steps": 2, "aux_weight": 1.0},
            **{"dataloader_pin_memory": False, "gradient_checkpointing": False, **heads, **options},
        )
        if ranks > 1:
            os.environ.update(FSDP2, FSDP_STATE_DICT_TYPE=state_dict_type)
            os.environ["FSDP_ACTIVATION_CHECKPOINTING"] = str(name in RECOMPUTED).lower()
            _ = args.device  # makes the state that is changed next
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        peft_config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=modules) if is_lora else None
        trainer = CAFTTrainer(base, args, train_dataset=Dataset.from_list(rows), peft_config=peft_config)
        trainer.train(resume_from_checkpoint=None if attempt == "whole" else f"{output}-whole/checkpoint-2")
        assert all(isinstance(p, DTensor) == (ranks > 1) for p in trainer.model.parameters())
        trainer.export(f"{output}-{attempt}/model")
        if is_lora:
            trainer.export(f"{output}-{attempt}/adapter", merged=False)
        if trainer.is_world_process_zero():
            steps = [entry for entry in trainer.state.log_history if "loss" in entry]
            kept = [{k: v for k, v in e.items() if k.endswith(("loss", "norm"))} for e in steps]
            with open(f"{output}-{attempt}/steps.json", "w") as file:  # noqa: PTH123
                json.dump(kept, file)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[3:]:
        run(case, sys.argv[1], sys.argv[2])
