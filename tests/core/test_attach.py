"""Attaching heads changes one model's forward when asked to and nothing else; detaching undoes it."""

import copy
import inspect
import types

import pytest
import torch
import transformers
from models import VOCABULARY, build
from safetensors.torch import load_file

from caftune.core.attach import ATTRIBUTE, attach_heads, detach_heads
from caftune.core.backbone import Backbone
from caftune.core.heads import AuxiliaryHeads, HeadsConfig

IDS = torch.randint(3, VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(5))
FAMILIES = ["llama", "gpt2"]


def attached(model, kind="decoder", count=2):
    backbone = Backbone.of(model)
    heads = AuxiliaryHeads.build(backbone, HeadsConfig(count, kind))
    attach_heads(backbone, heads)
    return heads


def outputs_of(model):
    with torch.no_grad():
        outputs = model(input_ids=IDS, labels=IDS)
    return outputs.logits, outputs.loss


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_argument_the_forward_is_bit_identical(family):
    model = build(family)
    expected = outputs_of(model)
    attached(model)
    assert all(torch.equal(one, other) for one, other in zip(outputs_of(model), expected, strict=True))
    assert "auxiliary" not in model(input_ids=IDS, labels=IDS)


@pytest.mark.parametrize("kind", ["decoder", "mlp"])
def test_add_leaves_the_models_own_logits_and_loss_bit_identical(kind):
    model = build("llama")
    expected = outputs_of(model)
    attached(model, kind)
    outputs = model(input_ids=IDS, labels=IDS, auxiliary="add")
    assert torch.equal(outputs.logits, expected[0])
    assert torch.equal(outputs.loss, expected[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_works_with_heads_attached(family):
    model = build(family)
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False)
    attached(model)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_save_pretrained_leaves_the_heads_out(family, tmp_path):
    model = build(family, dtype=torch.float32)
    model.save_pretrained(tmp_path / "plain")
    attached(model)
    model.save_pretrained(tmp_path / "carrying")
    plain, carrying = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "carrying"))
    assert plain.keys() == carrying.keys()
    assert (tmp_path / "plain/config.json").read_text() == (tmp_path / "carrying/config.json").read_text()


@pytest.mark.parametrize("instance_forward", [False, True], ids=["class_forward", "patched_forward"])
def test_detaching_restores_everything(instance_forward):
    model = build("llama")
    if instance_forward:  # as TRL does
        patched = types.MethodType(lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), model)
        model.forward = patched
    before, modules, keys = dict(vars(model)), dict(model._modules), list(model.state_dict())
    forwards = type(model).forward, transformers.LlamaForCausalLM.forward
    heads = attached(model)
    assert (type(model).forward, transformers.LlamaForCausalLM.forward) == forwards
    assert detach_heads(model) is heads
    assert dict(vars(model)) == before
    assert model._modules == modules
    assert list(model.state_dict()) == keys
    assert (type(model).forward, transformers.LlamaForCausalLM.forward) == forwards
    if instance_forward:
        assert model.forward is patched
    attached(model)  # and again


def test_another_model_of_the_class_is_unaffected():
    model, other = build("llama"), build("llama")
    before = dict(vars(other))
    attached(model)
    assert dict(vars(other)) == before
    assert ATTRIBUTE not in vars(other)["_modules"]
    assert "auxiliary" not in other(input_ids=IDS, labels=IDS)


def test_a_deep_copy_runs_its_own_weights_and_heads():
    model = build("llama")
    attached(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    logits = twin(input_ids=IDS).logits
    nll = twin(input_ids=IDS, labels=IDS, auxiliary="add")["auxiliary"]["nll"]
    assert not logits.any(), "the copy ran the original's weights"
    assert nll[0].item() == pytest.approx(16 * torch.tensor(float(VOCABULARY)).log().item())


def test_the_signature_stays_the_models_own():
    model = build("llama")
    before = list(inspect.signature(model.forward).parameters)
    attached(model)
    assert [name for name in inspect.signature(model.forward).parameters if name != "self"] == before


def test_attaching_twice_is_refused():
    model = build("llama")
    attached(model)
    with pytest.raises(ValueError, match=r"already carries auxiliary heads\. Call detach_heads\(model\) first"):
        attached(model)


@pytest.mark.parametrize("mode", ["add", "only"])
def test_missing_labels_are_refused(mode):
    model = build("llama")
    attached(model)
    with pytest.raises(ValueError, match="labels must be given for the auxiliary losses, got none"):
        model(input_ids=IDS, auxiliary=mode)


def test_an_unknown_mode_is_refused():
    model = build("llama")
    attached(model)
    with pytest.raises(ValueError, match="auxiliary must be"):
        model(input_ids=IDS, labels=IDS, auxiliary="ad")


def test_no_hook_stays_after_a_scored_forward_or_a_failed_one():
    model = build("llama")
    attached(model)
    model(input_ids=IDS, labels=IDS, auxiliary="add")
    with pytest.raises(IndexError):
        model(input_ids=IDS + 1000, labels=IDS, auxiliary="add")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("mode", [None, "add", "only"])
def test_more_positional_arguments_than_the_model_takes_are_refused_as_it_refuses_them(mode):
    model = build("llama")
    surplus = (IDS, None, None, None, None, IDS, *[None] * 20)
    with pytest.raises(TypeError):
        model(*surplus)
    attached(model)
    with pytest.raises(TypeError):
        model(*surplus, **({} if mode is None else {"auxiliary": mode}))


def test_an_argument_given_by_place_and_by_name_is_refused():
    model = build("llama")
    attached(model)
    for mode in ({}, {"auxiliary": "add"}):
        with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
            model(IDS, input_ids=IDS, labels=IDS, **mode)


@pytest.mark.parametrize("family", FAMILIES)
def test_positional_arguments_mean_what_they_mean_to_the_model(family):
    model = build(family)
    names = list(inspect.signature(model.forward).parameters)
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    places = [given.get(name) for name in names[: names.index("labels") + 1]]
    expected = model(**given)
    attached(model)
    assert torch.equal(model(*places).loss, expected.loss)
    by_place, by_name = model(*places, auxiliary="add"), model(**given, auxiliary="add")
    assert torch.equal(by_place.loss, expected.loss)
    assert torch.equal(by_place["auxiliary"]["nll"], by_name["auxiliary"]["nll"])


def test_labels_for_the_heads_alone_give_the_models_own_outputs():
    model = build("llama")
    expected = model(input_ids=IDS)
    attached(model)
    found, whole = model(input_ids=IDS, auxiliary="add", auxiliary_labels=IDS), model(IDS, labels=IDS, auxiliary="add")
    assert found.loss is None
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found["auxiliary"]["nll"], whole["auxiliary"]["nll"])
