"""A base by its hub id, from the labels to the answers of the tuned model."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hub import files_in, serve_hub
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from caftune.checkpoints.fingerprint import model_fingerprint
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.pipeline.evaluate import evaluate_model
from caftune.pipeline.finetune import export_checkpoint, finetune_model
from caftune.pipeline.label import label_prompts
from caftune.pipeline.pretrain import pretrain_heads
from caftune.pipeline.schema import Recipe

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
    label_prompts(recipe)
    heads = pretrain_heads(recipe)
    assert json.loads((heads / "heads.json").read_text())["base"]["revision"] == commit
    model = finetune_model(recipe)
    (result,) = evaluate_model(recipe)
    assert result.examples == 8
    (of_base,) = evaluate_model(recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"model": "base"})}))
    assert of_base.model == "base"
    published, tuned = load_file(hub.folder(NAME, commit) / "model.safetensors"), load_file(model / "model.safetensors")
    assert published.keys() == tuned.keys()
    moved = max(float((published[name] - tuned[name]).abs().max()) for name in published)
    assert 0 < moved < 1e-3  # from this commit's weights, not the other's


def test_a_run_stays_with_the_commit_that_it_began_with(hub, tmp_path):
    recipe = recipe_in(tmp_path, tuning="lora")
    recipe = recipe.model_copy(update={"loss": recipe.loss.model_copy(update={"weight": 0.0})})
    began = load_file(finetune_model(recipe) / "model.safetensors")
    hub.record(NAME, "third", files_in(hub.folder(NAME, next(iter(hub.commits[NAME])))))
    on = load_file(export_checkpoint(recipe) / "model.safetensors")
    assert all(torch.equal(on[name], began[name]) for name in began)
    (other := tmp_path / "other").mkdir()
    fresh = load_file(finetune_model(recipe.model_copy(update={"output": str(other)})) / "model.safetensors")
    assert float((fresh["model.norm.weight"] - began["model.norm.weight"]).abs().max()) > 1e-3
    named = recipe_in(tmp_path, tuning="lora", revision=next(iter(hub.commits[NAME])))
    with pytest.raises(CaftuneError, match=r"holds the train stage of another recipe \(model.revision: "):
        finetune_model(named.model_copy(update={"loss": recipe.loss}))


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


@pytest.fixture
def configurations(monkeypatch):
    """Which package reads a configuration through AutoConfig, call by call."""
    readers, real = [], AutoConfig.from_pretrained

    def read(*given, **more):
        readers.append(sys._getframe(1).f_globals["__name__"].partition(".")[0])
        return real(*given, **more)

    monkeypatch.setattr(AutoConfig, "from_pretrained", read)
    return readers


def test_a_training_queries_the_hub_once_for_its_base_and_once_for_its_heads(hub, heads, tmp_path, configurations):
    hub.private["owner/heads"] = False
    hub.record("owner/heads", "first", files_in(Path(heads)))
    recipe = recipe_in(tmp_path, name=NAME)
    chosen = {"path": "owner/heads", "force": True}  # of the first commit, which has other weights
    recipe = recipe.model_copy(update={"heads": type(recipe.heads).model_validate(chosen)})
    finetune_model(recipe)
    of_base = [request for request in hub.requests if re.search(rf"{NAME}/(resolve|tree)", request)]
    of_heads = [request for request in hub.requests if "owner/heads" in request]
    main = f"/{NAME}/resolve/main/config.json"
    assert [request for request in of_base if "main" in request] == [f"HEAD {main}", f"GET {main}"]  # then the commit
    assert [request for request in of_heads if "main" in request] == ["GET /api/models/owner/heads/revision/main"]
    assert max(Counter(of_base).values()) == max(Counter(of_heads).values()) == 1  # no file is queried twice
    assert configurations == ["caftune", "trl"]  # TRL reads it once more when it loads the weights


def test_an_evaluation_reads_the_configuration_of_its_model_once(hub, tmp_path, configurations):
    recipe = recipe_in(tmp_path)
    evaluate_model(recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"model": "base"})}))
    assert [request.split()[0] for request in hub.requests if "main" in request] == ["HEAD", "GET"]
    assert configurations == ["caftune", "transformers"]  # which reads it once more when it loads the weights
