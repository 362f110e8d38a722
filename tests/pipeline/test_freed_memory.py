"""What was trained or asked before leaves no memory behind: an engine of vLLM starts only where the GPU is nearly free."""

import gc
import json
import weakref

import pytest
import torch

from caftune.compare.runner import compare
from caftune.demo.chemistry import completion, molecules, prompt
from caftune.demo.run import BASE
from caftune.generation.backends import Answer
from caftune.pipeline import base_model, finetune
from caftune.pipeline.base_model import BaseModel
from caftune.pipeline.evaluate import evaluate_model
from caftune.pipeline.schema import Recipe


@pytest.fixture
def values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("train", 5), ("first", 6), ("second", 7)):
        drawn = molecules(8, seed=seed, substituents=(0, 1))
        lines = [json.dumps({"prompt": prompt(m), "completion": completion(m)}) + "\n" for m in drawn]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    asked = {"tasks": ["exact_match"], "data": {"exact_match": "first.jsonl"}, "max_new_tokens": 12, "model": "base"}
    return {"output": "out", "model": {"name": str(BASE)}, "eval": asked}


@pytest.fixture
def uncollected():
    """Nothing is collected that is not asked for."""
    gc.disable()
    yield
    gc.enable()


def test_an_engine_is_gone_before_the_next_is_opened(values, monkeypatch, uncollected):
    pytest.importorskip("rdkit")
    engines, emptied = [], []

    class Engine:
        def __init__(self):
            self.worker = self  # alive until it is collected

        def __call__(self, prompts, _seeds):
            yield from ((place, Answer([1], "stop")) for place in range(len(prompts)))

    def opened(*_given):
        assert not any(engine() for engine in engines)
        assert emptied[-1] == len(engines)
        engine = Engine()
        engines.append(weakref.ref(engine))
        return engine

    monkeypatch.setattr(base_model, "vllm_backend", opened)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(engines)))
    asked = {**values["eval"], "tasks": ["exact_match", "molecules"], "backend": "vllm"}
    asked |= {"data": {**asked["data"], "molecules": "second.jsonl"}}
    asked |= {"columns": {"description": "prompt", "smiles": "completion"}}
    evaluate_model(Recipe.model_validate({**values, "eval": asked}))
    assert [engine() for engine in engines] == [None, None]
    assert emptied[-1] == 2


def test_a_training_is_gone_before_its_model_is_asked(values, heads, monkeypatch, uncollected):
    events, models = [], []
    train, load = finetune.run_training, BaseModel.load

    def trained(trainer, **options):
        train(trainer, **options)
        models.append(weakref.ref(trainer.model))
        events.append("trained")

    def loaded(*given):
        assert (events[-1], models[0]()) == ("emptied", None)
        events.append("asked")
        return load(*given)

    monkeypatch.setattr(finetune, "run_training", trained)
    monkeypatch.setattr(BaseModel, "load", loaded)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("emptied"))
    training = {"per_device_train_batch_size": 4, "max_steps": 1, "use_cpu": True, "save_strategy": "no"}
    parts = {"data": {"train": "train.jsonl", "max_length": 96}, "heads": {"path": heads}, "trainer": training}
    compare(
        Recipe.model_validate({**values, **parts, "compare": {"arms": ["ntp", "caft"], "seeds": 1}}), only="caft/42"
    )
    assert {"trained", "asked"} <= set(events)
    assert events[-1] == "emptied"
