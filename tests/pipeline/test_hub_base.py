"""A base by its hub id, from the labels to the answers of the tuned model."""

import json

import pytest
import torch
from hub import files_in, serve_hub
from safetensors.torch import load_file, save_file

from caftune.checkpoints.fingerprint import model_fingerprint
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.pipeline import stages as pipeline
from caftune.pipeline.evaluate import evaluate
from caftune.pipeline.recipe import Recipe

NAME = "owner/base"
FAST = {"per_device_train_batch_size": 8, "use_cpu": True, "gradient_checkpointing": False, "max_steps": 2}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Two commits of one base; the second is `main`, and has other weights."""
    for name, value in {"HF_HUB_CACHE": tmp_path / "cache", "ENDPOINT": "http://127.0.0.1:9"}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(value))
    weights = {name: tensor + 0.01 for name, tensor in load_file(BASE / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    files = files_in(BASE)
    with serve_hub(tmp_path / "hub") as served:
        served.private[NAME] = False
        served.record(NAME, "first", files)
        served.record(NAME, "second", files | {"model.safetensors": (tmp_path / "model.safetensors").read_bytes()})
        yield served


def recipe_in(folder, **model):
    rows = [{"prompt": f"Name: {name}\nSMILES:", "completion": f" {'C' * n}"} for n, name in enumerate("abcdefgh", 1)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = str(folder / "rows.jsonl")
    values = {
        "output": str(folder / "run"),
        "model": {"name": NAME, **model},
        "labels": {"prompts": file, "max_new_tokens": 8, "keep_truncated": True},
        "heads": {"count": 2, "held_out": 0.25},
        "pretrain": FAST,
        "data": {"train": file},
        "trainer": FAST,
        "eval": {"tasks": ["exact_match"], "data": {"exact_match": file}, "max_new_tokens": 4},
    }
    return Recipe.model_validate(values)


@pytest.mark.parametrize("number", [0, 1])
def test_a_base_on_the_hub_goes_the_whole_way_and_its_commit_is_on_record(hub, tmp_path, number):
    commit = list(hub.commits[NAME])[number]
    recipe = recipe_in(tmp_path, **({"revision": commit} if number == 0 else {}))
    pipeline.label(recipe)
    heads = pipeline.pretrain_heads(recipe)
    assert json.loads((heads / "heads.json").read_text())["base"]["revision"] == commit
    model = pipeline.finetune(recipe)
    (result,) = evaluate(recipe)
    assert result.examples == 8
    (of_base,) = evaluate(recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"model": "base"})}))
    assert of_base.model == "base"
    published, tuned = load_file(hub.folder(NAME, commit) / "model.safetensors"), load_file(model / "model.safetensors")
    assert published.keys() == tuned.keys()
    moved = max(float((published[name] - tuned[name]).abs().max()) for name in published)
    assert 0 < moved < 1e-3  # from this commit's weights, not the other's


def test_a_run_stays_with_the_commit_that_it_began_with(hub, tmp_path):
    recipe = recipe_in(tmp_path, tuning="lora")
    recipe = recipe.model_copy(update={"loss": recipe.loss.model_copy(update={"weight": 0.0})})
    began = load_file(pipeline.finetune(recipe) / "model.safetensors")
    hub.record(NAME, "third", files_in(hub.folder(NAME, next(iter(hub.commits[NAME])))))
    on = load_file(pipeline.export(recipe) / "model.safetensors")
    assert all(torch.equal(on[name], began[name]) for name in began)
    (other := tmp_path / "other").mkdir()
    fresh = load_file(pipeline.finetune(recipe.model_copy(update={"output": str(other)})) / "model.safetensors")
    assert float((fresh["model.norm.weight"] - began["model.norm.weight"]).abs().max()) > 1e-3
    named = recipe_in(tmp_path, tuning="lora", revision=next(iter(hub.commits[NAME])))
    with pytest.raises(CaftuneError, match=r"holds the train stage of another recipe \(model.revision: "):
        pipeline.finetune(named.model_copy(update={"loss": recipe.loss}))


def test_a_fingerprint_is_of_the_commit_and_needs_no_network_once_it_is_known(hub, tmp_path, monkeypatch):
    first, second = hub.commits[NAME]
    assert model_fingerprint(NAME) == f"{NAME}@{second}"
    assert model_fingerprint(NAME, first) == f"{NAME}@{first}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert model_fingerprint(NAME) == f"{NAME}@{second}"
    assert len(hub.requests) == asked


def test_a_model_that_the_hub_does_not_have_has_no_fingerprint(hub):
    with pytest.raises(OSError, match="owner/nothing"):
        model_fingerprint("owner/nothing")
