"""Trying a model's code: what it refuses is an answer, what the machine lacks is an error."""

import pytest
import torch
from models import build

from caftune.core.backbone import Backbone, UnsupportedModelError
from caftune.core.heads import AuxiliaryHeads, HeadsConfig
from caftune.core.probes import is_machine_error, try_call
from caftune.core.speculative import SpeculativeDecoding
from caftune.errors import CaftuneError
from caftune.pipeline import plan

CPU = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
MACHINE = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    MemoryError(),
    RuntimeError(CPU),
    RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
]
MODEL = [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), TypeError("missing 1 argument"), KeyError("phases")]


def named(error):
    return f"{type(error).__name__} {error}"[:40]


class Fails:
    """A hook that raises `error` at its n-th call, and counts them."""

    def __init__(self, error=None, at=-1):
        self.error, self.at, self.calls = error, at, 0

    def __call__(self, *_):
        self.calls += 1
        if self.calls == self.at:
            raise self.error


def probed(model, hook):
    model.model.layers[-1].register_forward_pre_hook(hook)
    backbone = Backbone.of(model)
    SpeculativeDecoding(backbone, AuxiliaryHeads.build(backbone, HeadsConfig(1)))
    return backbone


def calls_of_last_layer():
    probed(build("llama", dtype=torch.float32), counted := Fails())
    return counted.calls


@pytest.mark.parametrize("error", MACHINE, ids=named)
def test_what_the_machine_lacks_is_raised_from_every_call_of_a_probe(error):
    for call in range(1, calls_of_last_layer() + 1):
        with pytest.raises(type(error)) as caught:
            probed(build("llama", dtype=torch.float32), Fails(error, call))
        assert caught.value is error, f"call {call}"


@pytest.mark.parametrize("error", MODEL, ids=named)
def test_what_the_model_refuses_is_an_answer_about_it(error):
    """The third call replays the last layer; those behind it try the layer at some of its positions."""
    replayed = 4
    refused = probed_alone(Fails(error, replayed))
    assert "a second time gives another result" in refused.copy_refusal
    with pytest.raises(UnsupportedModelError, match="Use MLP heads"):
        AuxiliaryHeads.build(refused, HeadsConfig(1))
    partly = probed_alone(Fails(error, replayed + 1))
    assert (partly.copy_refusal, partly.mixer) == (None, None)


def probed_alone(hook):
    model = build("llama", dtype=torch.float32)
    model.model.layers[-1].register_forward_pre_hook(hook)
    return Backbone.of(model)


@pytest.mark.parametrize("error", [*MACHINE, *MODEL], ids=named)
def test_an_error_of_the_machine_is_found_behind_the_error_that_it_caused(error):
    expected = any(error is one for one in MACHINE)

    def raised(how):
        try:
            raise error
        except Exception as cause:
            if how == "from":
                raise ValueError("the layer failed") from cause
            raise TypeError("no such argument")  # noqa: B904

    for how in ("from", "while"):
        with pytest.raises((ValueError, TypeError), match="layer failed|no such argument") as behind:
            raised(how)
        assert is_machine_error(behind.value) is expected


def test_an_attempt_gives_what_it_computes_or_none():
    assert try_call(lambda: 3) == 3
    assert try_call(lambda: {}["no"]) is None
    with pytest.raises(ZeroDivisionError):  # no model's code says so of a call it does not take
        try_call(lambda: 1 / 0)


def test_a_plan_does_not_call_missing_memory_a_fault_of_the_model(monkeypatch):
    def fails(error):
        def estimate(*_):
            raise error

        monkeypatch.setattr(plan, "estimate", estimate)
        return plan._Planned("m", None, lambda: None).estimate

    setup = type("Setup", (), {"stage": "heads", "tuning": "full"})()
    with pytest.raises(MemoryError):
        fails(MemoryError())(setup)
    with pytest.raises(CaftuneError, match="model.name must be a model that runs"):
        fails(KeyError("rope"))(setup)
