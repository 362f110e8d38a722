"""The whole path on real models and real data. Skipped, with the reason, where they are absent."""

import gzip
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from caftune.pipeline.finetune import finetune_model
from caftune.pipeline.label import label_prompts
from caftune.pipeline.pretrain import pretrain_heads
from caftune.pipeline.schema import Recipe

FAST = {"per_device_train_batch_size": 8, "use_cpu": True, "gradient_checkpointing": False, "logging_steps": 5}


def smiles_rows(shared, count):
    """SMILES of 12 to 60 characters, the first four as the prompt."""
    with gzip.open(shared / "data" / "smiles" / "smiles_canonical.txt.gz", "rt") as file:
        lines = [line.strip() for line in file]
    return [{"prompt": s[:4], "completion": s[4:]} for s in lines if 12 <= len(s) <= 60][:count]


@pytest.fixture(params=["stories260k", "smiles-gpt2-0.5m"])
def recipe(request, shared, tmp_path):
    base = str(shared / "models" / request.param)
    if request.param == "stories260k":
        prompts, length = str(shared / "data" / "instructions" / "rasbt-instruction-data.json"), 160
        data = {
            "train": str(shared / "data" / "gsm8k" / "train.jsonl"),
            "columns": {"prompt": "question", "completion": "answer"},
        }
        data |= {"max_length": 512, "limit": 20}
    else:
        prompts, length = str(tmp_path / "smiles.jsonl"), 60
        (tmp_path / "smiles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in smiles_rows(shared, 120)))
        data = {"train": prompts, "max_length": 74, "limit": 40}
    return Recipe.model_validate(
        {
            "output": str(tmp_path / "run"),
            "model": {"name": base},
            "labels": {"prompts": prompts, "limit": 60, "max_new_tokens": length}
            | {"skip_long_prompts": True, "keep_truncated": True},
            "pretrain": {**FAST, "max_steps": 30, "learning_rate": 2e-3},
            "data": data,
            "trainer": {**FAST, "max_steps": 6},
        }
    )


def test_a_real_model_goes_the_whole_path(recipe, tmp_path):
    label_prompts(recipe)
    pretrain_heads(recipe)
    folder = finetune_model(recipe)
    result = next(
        json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines() if "quality" in line
    )
    for horizon in (2, 3, 4, 5):
        losses = [result["quality"][kind]["loss"][str(horizon)] for kind in ("heads", "untrained")]
        assert losses[0] < 0.75 * losses[1]
    base = load_file(f"{recipe.model.name}/model.safetensors")
    exported = load_file(folder / "model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in exported.items()} == {k: (v.shape, v.dtype) for k, v in base.items()}
    checkpoint = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "train" / "checkpoint-6").eval()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)("CCO", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, checkpoint(ids).logits)
    assert model.generate(ids, max_new_tokens=8, do_sample=False).shape[1] > ids.shape[1]
