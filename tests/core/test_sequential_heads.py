"""Heads whose gradients are computed at once give the loss and the gradients of the plain graph, and keep less in memory."""

import copy
import gc
from dataclasses import replace

import pytest
import torch
from allocations import Allocations
from models import VOCABULARY, build
from peft import LoraConfig, inject_adapter_in_model
from torch._subclasses import FakeTensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.flop_counter import FlopCounterMode

from caftune.core.attach import ATTRIBUTE, attach_heads
from caftune.core.backbone import Backbone
from caftune.core.heads import AuxiliaryHeads, HeadsConfig
from caftune.core.objective import IGNORED, Sample, horizon_targets
from caftune.core.sequential_heads import weighted_sum
from caftune.training.trained_heads import make_trainable, merged_state

IDS = torch.randint(3, VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(5))
LABELS = IDS.clone()
LABELS[0, :4] = LABELS[1, 7:] = IGNORED
WEIGHTS = torch.tensor([0.8, 0.3, 0.5], dtype=torch.float64)
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]] * 2)
LEFT = torch.ones_like(IDS).index_fill(1, torch.tensor([0, 1, 2]), 0)
LAYOUTS = {
    "plain": {},
    "left": {"attention_mask": LEFT, "position_ids": (LEFT.cumsum(-1) - 1).clamp(min=0)},
    "packed": {"position_ids": PACKED},
}


def carrying(family="llama", kind="decoder", count=3, **options):
    model = build(family, **{"attention": "sdpa", **options})
    backbone = Backbone.of(model)
    heads = AuxiliaryHeads.build(backbone, HeadsConfig(count, kind))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    attach_heads(backbone, heads)
    return model, backbone, heads


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def at_once(model, *, labels=LABELS, weights=WEIGHTS, main=0.5, **options):
    """Loss and gradients of both the model's own loss and the heads', as in training."""
    model.zero_grad()
    outputs = model(input_ids=IDS, labels=labels, auxiliary="add", auxiliary_weights=weights, **options)
    (main * outputs.loss + outputs["auxiliary"]["loss"]).backward()
    return outputs["auxiliary"], gradients_of(model)


def by_formula(model, backbone, heads, *, labels=LABELS, weights=WEIGHTS, main=0.5, **inputs):
    """The same from the definition: every head's whole layer, in a plain graph, and logits of all rows."""
    model.zero_grad()
    with backbone.capture() as call:
        outputs = model(input_ids=IDS, labels=labels, use_cache=False, **inputs)
    total, losses = main * outputs.loss, []
    for index, weight in enumerate(weights):
        targets = horizon_targets(labels, index + 2, **inputs)
        logits = backbone.unembedding().logits(heads.hidden(index, backbone, call))
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        total = total + weight * losses[-1]
    total.backward()
    return torch.stack(losses).detach(), gradients_of(model)


def assert_same(found, expected, tolerance=1e-9):
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance * largest, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["decoder", "mlp"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "qwen3", "olmo2"])
def test_losses_and_gradients_are_those_of_the_definition(family, kind, layout):
    model, backbone, heads = carrying(family, kind)
    expected, gradients = by_formula(model, backbone, heads, **LAYOUTS[layout])
    scores, found = at_once(model, **LAYOUTS[layout])
    torch.testing.assert_close(scores["nll"], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scores["loss"].detach(), (WEIGHTS * expected).sum(), rtol=1e-9, atol=1e-9)
    assert_same(found, gradients)
    assert any(name.startswith(ATTRIBUTE) for name in found)


def test_softcap_scale_and_a_tied_unembedding_keep_their_gradients():
    for family, options in (("gemma2", {"attention": "eager"}), ("cohere", {"tie_word_embeddings": True})):
        model, backbone, heads = carrying(family, **options)
        expected, gradients = by_formula(model, backbone, heads)
        scores, found = at_once(model)
        torch.testing.assert_close(scores["nll"], expected, rtol=1e-9, atol=1e-9)
        assert_same(found, gradients, tolerance=1e-7)  # their attention computes in float32


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model, backbone, heads = carrying()
    expected, gradients = by_formula(model, backbone, heads)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    scores, found = at_once(model)
    torch.testing.assert_close(scores["nll"], expected, rtol=1e-9, atol=1e-9)
    assert_same(found, gradients)
    assert all(head.gradient_checkpointing for head in heads.heads)


def wrapped(layers):
    """As FSDP's own activation checkpointing wraps layers, heads among them."""
    for place, layer in enumerate(layers):
        layers[place] = checkpoint_wrapper(layer, preserve_rng_state=False)


@pytest.mark.parametrize("weights", [WEIGHTS, None], ids=["at_once", "in_the_graph"])
def test_layers_in_fsdps_wrapper_for_recomputing_change_nothing(weights):
    model, backbone, heads = carrying()
    expected, gradients = by_formula(model, backbone, heads)
    for layers in (model.model.layers, heads.heads):
        wrapped(layers)
    model.zero_grad()
    outputs = model(input_ids=IDS, labels=LABELS, auxiliary="add", auxiliary_weights=weights)
    scores = outputs["auxiliary"]
    (0.5 * outputs.loss + scores.get("loss", (WEIGHTS * scores["nll"]).sum())).backward()
    torch.testing.assert_close(scores["nll"], expected, rtol=1e-9, atol=1e-9)
    assert_same({k.replace("_checkpoint_wrapped_module.", ""): g for k, g in gradients_of(model).items()}, gradients)


def test_a_lora_in_fsdps_wrapper_for_recomputing_is_merged():
    _, _, heads = carrying()
    make_trainable(heads, lora_rank=2)
    with torch.no_grad():
        for name, parameter in heads.named_parameters():
            parameter.add_(0.1 * ("lora_B" in name))
    expected = merged_state(heads)
    wrapped(heads.heads)
    found = merged_state(heads)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_model_gets_the_same_gradient_from_frozen_heads_as_from_trained_ones():
    model, backbone, heads = carrying()
    expected, gradients = by_formula(model, backbone, heads)
    own = {name for name in gradients if name.startswith(ATTRIBUTE)}
    assert own
    for train_heads in (True, False):
        heads.requires_grad_(train_heads)
        scores, found = at_once(model)
        torch.testing.assert_close(scores["nll"], expected, rtol=1e-9, atol=1e-9)
        assert_same(found, gradients if train_heads else {n: g for n, g in gradients.items() if n not in own})


def test_a_heads_lora_is_its_merged_weights_to_the_model_and_has_the_gradients_of_the_chain_rule():
    """W + s B A with s = alpha / r: dB = s dW A^T, dA = s B^T dW, where dW is the gradient of a head with merged weights."""
    model, _, heads = carrying()
    make_trainable(heads, lora_rank=None, adapters={"mine": LoraConfig(r=2, lora_alpha=6)})
    heads.double()
    factors = {name: parameter for name, parameter in heads.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for parameter in factors.values():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    assert {name for name, parameter in heads.named_parameters() if parameter.requires_grad} == factors.keys()
    plain, plain_backbone, plain_heads = carrying()
    plain_heads.load_state_dict(merged_state(heads))
    expected, gradients = by_formula(plain, plain_backbone, plain_heads)
    scores, found = at_once(model)
    torch.testing.assert_close(scores["nll"], expected, rtol=1e-9, atol=1e-9)
    wanted = {name: gradient for name, gradient in gradients.items() if not name.startswith(ATTRIBUTE)}
    for name in factors:
        layer, part = name.split(".lora_")
        of_weight = gradients[f"{ATTRIBUTE}.{layer}.weight"]
        a, b = (factors[f"{layer}.lora_{each}.mine.weight"] for each in "AB")
        wanted[f"{ATTRIBUTE}.{name}"] = 3 * (of_weight @ a.T if part.startswith("B") else b.T @ of_weight)
    assert_same(found, {name: gradient.detach() for name, gradient in wanted.items()})


def test_a_lora_on_the_heads_gets_their_gradient():
    model, backbone, heads = carrying()
    model.requires_grad_(False)
    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["q_proj", "o_proj", "up_proj"], init_lora_weights=False), heads
    )
    _, gradients = by_formula(model, backbone, heads, main=0.0)
    _, found = at_once(model, main=0.0)
    assert_same(found, gradients)
    assert all("lora_" in name for name in found)
    assert len(found) == 3 * 6


@pytest.mark.parametrize("trained", ["model.layers.0", "model.norm", "lm_head", ATTRIBUTE])
def test_only_what_is_trained_gets_a_gradient(trained):
    model, backbone, heads = carrying()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    _, gradients = by_formula(model, backbone, heads, main=0.0)
    _, found = at_once(model, main=0.0)
    assert_same(found, gradients)


def test_in_bfloat16_the_gradients_are_near_those_of_float32():
    model, backbone, heads = carrying(dtype=torch.float32)
    expected, gradients = by_formula(model, backbone, heads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, found = at_once(model, weights=WEIGHTS.float() * 1e-6, main=0.0)
    torch.testing.assert_close(scores["nll"], expected, rtol=0.05, atol=0.0)
    _, gradients = by_formula(model, backbone, heads, main=0.0)
    for name, gradient in gradients.items():
        error = (1e6 * found[name] - gradient).norm() / gradient.norm()
        assert error < 0.2 or gradient.norm() < 1e-3, name


def test_a_batch_without_targets_gives_zero_and_zero_gradients():
    model, _, heads = carrying()
    scores, found = at_once(model, labels=torch.full_like(LABELS, IGNORED), main=0.0)
    assert scores["loss"] == 0
    assert {name for name in found if name.startswith(ATTRIBUTE)} == {
        f"{ATTRIBUTE}.{n}" for n, _ in heads.named_parameters()
    }
    assert not any(gradient.any() for name, gradient in found.items() if name.startswith(ATTRIBUTE))


def test_weights_of_zero_give_zero_gradients():
    model, _, _ = carrying()
    scores, found = at_once(model, weights=torch.zeros(3, dtype=torch.float64), main=0.0)
    assert scores["loss"] == 0
    assert not any(gradient.any() for gradient in found.values())


def test_fewer_weights_leave_the_other_heads_unscored():
    model, backbone, heads = carrying()
    expected, gradients = by_formula(model, backbone, heads, weights=WEIGHTS[:2])
    scores, found = at_once(model, weights=WEIGHTS[:2])
    assert {name: value.shape for name, value in scores.items()} == {
        **dict.fromkeys(("nll", "count", "correct"), (2,)),
        "loss": (),
    }
    torch.testing.assert_close(scores["nll"], expected, rtol=1e-9, atol=1e-9)
    assert_same(found, gradients)


def test_states_in_a_container_of_the_models_own_keep_their_gradient():
    model, backbone, heads = carrying("gemma4_shared_kv", dtype=torch.float32)
    expected, gradients = by_formula(model, backbone, heads, weights=WEIGHTS.float())
    scores, found = at_once(model, weights=WEIGHTS.float())
    torch.testing.assert_close(scores["nll"], expected, rtol=1e-5, atol=1e-4)
    assert_same(found, gradients, tolerance=1e-4)


# What it saves.


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_frozen_heads_and_a_frozen_unembedding_cost_no_weight_gradient():
    model, _, heads = carrying(dtype=torch.float32, hidden_size=64, intermediate_size=128, num_attention_heads=4)
    model.requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    forward = flops(lambda: model(input_ids=IDS, labels=LABELS, auxiliary="only"))
    trunk = flops(lambda: model.model(input_ids=IDS))
    through_heads = forward - trunk
    with_heads = flops(lambda: at_once(model, weights=WEIGHTS.float(), main=0.0))
    heads.requires_grad_(True)
    trained = flops(lambda: at_once(model, weights=WEIGHTS.float(), main=0.0))
    # of every product in a head one more is for its input's gradient, and one for its weight's; attention's own are more
    assert trained - with_heads == pytest.approx(through_heads, rel=0.35)
    assert trained - with_heads > 0.3 * through_heads


def test_memory_between_the_passes_does_not_grow_with_the_number_of_heads():
    kept = {}
    for count in (1, 8):
        model, _, _ = carrying(count=count, dtype=torch.float32)
        model.requires_grad_(False)
        model.model.layers[0].requires_grad_(True)
        outputs = model(input_ids=IDS, labels=LABELS, auxiliary="add", auxiliary_weights=torch.ones(count))
        gc.collect()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        # Other tests leave fake ones, which have no place.
        tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)]
        own = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        kept[count] = sum(size for place, size in own.items() if place not in weights)
        del outputs, tensors, own
    assert kept[8] < 1.1 * kept[1] + 4096


def test_gradients_do_not_lie_there_twice_in_the_backward_pass():
    parameters = [torch.full((1 << 16,), float(i), requires_grad=True) for i in range(8)]

    def score(index, tensors):
        return (tensors[0] * parameters[index]).sum(), torch.zeros(())

    factor = torch.tensor(3.0, requires_grad=True)
    with Allocations() as watch:
        loss, _, _ = weighted_sum(score, 2 ** torch.arange(8.0), [factor], [[own] for own in parameters])
        (2 * loss).backward()
    assert all((own.grad == 3 * 2 * 2**i).all() for i, own in enumerate(parameters))
    assert factor.grad == sum(2 * 2**i * i for i in range(8)) * (1 << 16)
    assert watch.bytes < (8 + 3) * parameters[0].nbytes


def test_gradients_of_shared_inputs_are_not_added_up_twice():
    one, other = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    shared = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def score(index, tensors):  # the sum passes one and the same gradient on to both inputs
        return ((tensors[0] + tensors[1]) * shared * (index + 1)).sum(), torch.tensor(index)

    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    loss, _, others = weighted_sum(score, weights, [one, other], [[shared], [shared]])
    (3 * loss).backward()
    expected = (one + other) * shared
    torch.testing.assert_close(loss, 2 * expected.sum())
    torch.testing.assert_close(one.grad, 6 * shared.detach())
    torch.testing.assert_close(other.grad, 6 * shared.detach())
    torch.testing.assert_close(shared.grad, 6 * (one + other).detach())
    assert others.tolist() == [0, 1]


# A sample of the rows.


def sampled(model, step, share, **options):
    return at_once(model, auxiliary_sample=Sample(share, (7, step)), main=0.0, **options)


def test_a_sample_of_all_rows_is_exact():
    model, _, _ = carrying()
    exact, gradients = at_once(model, main=0.0)
    scores, found = sampled(model, 0, 1.0)
    assert torch.equal(scores["nll"], exact["nll"])
    assert_same(found, gradients, tolerance=0)


def test_the_expectation_of_loss_and_gradient_is_exact():
    """Over 150 draws no coordinate's mean is further than 5.5 standard errors from the exact value.

    The chance of one coordinate to be so, were it normal, is 4e-8; there are some hundred here.
    """
    model, _, _ = carrying(count=2)
    weights = WEIGHTS[:2]
    model.requires_grad_(False)
    watched = [model.model.layers[0].self_attn.q_proj, model.model.norm, model.auxiliary_heads.heads[1].mlp.up_proj]
    for module in watched:
        module.requires_grad_(True)
    exact, gradients = at_once(model, main=0.0, weights=weights)

    def row(scores, found):
        values = [scores["nll"], scores["correct"].double(), *(found[name].flatten() for name in sorted(found))]
        return torch.cat(values)

    draws = torch.stack([row(*sampled(model, step, 0.25, weights=weights)) for step in range(150)])
    error = draws.std(0) / 150**0.5
    away = (draws.mean(0) - row(exact, gradients)).abs()
    assert (away <= 5.5 * error + 1e-12).all()
    assert (error > 0).double().mean() > 0.9, "nothing was drawn"


def test_the_counts_of_a_sample_are_those_of_all_targets():
    model, _, _ = carrying()
    exact, _ = at_once(model)
    scores, _ = sampled(model, 3, 0.25)
    assert torch.equal(scores["count"], exact["count"])


def test_a_draw_is_the_same_for_the_same_seed_and_another_for_every_other_and_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    drawn = {seed: Sample(0.25, seed).of(40, 2)[0].tolist() for seed in [(1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 0, 0)]}
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(value) for value in drawn.values()}) == 4
    assert Sample(0.25, (1, 0, 0)).of(40, 2)[0].tolist() == drawn[1, 0, 0]
    assert Sample(0.25, (1, 0, 0)).of(40, 3)[0].tolist() != drawn[1, 0, 0]


@pytest.mark.parametrize(("rows", "share", "drawn"), [(40, 0.25, 10), (41, 0.25, 11), (1, 0.25, 1), (0, 0.25, 0)])
def test_a_share_is_rounded_up_and_the_factor_makes_up_for_it(rows, share, drawn):
    found, factor = Sample(share, (0,)).of(rows, 2)
    assert len(found) == len(set(found.tolist())) == drawn
    assert factor * drawn == pytest.approx(rows)


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got"):
        Sample(share, (0,))


def test_a_deep_copy_and_another_mixer_do_not_matter():
    model, backbone, heads = carrying()
    twin = copy.deepcopy(model)
    _, expected = at_once(model)
    _, found = at_once(twin)
    assert_same(found, expected, tolerance=0)
    whole = replace(backbone, mixer=None)
    with whole.capture() as call:
        model(input_ids=IDS, use_cache=False)
    rows = torch.tensor([0, 3, 14])
    torch.testing.assert_close(heads.hidden_at(1, whole, call, rows), heads.hidden_at(1, backbone, call, rows))


def second_backward(kind, *, retain):
    """Gradients after two backward passes through the losses of heads, and after one of twice the loss."""
    model, *_ = carrying(kind=kind)

    def loss():
        model.zero_grad()
        outputs = model(input_ids=IDS, labels=LABELS, auxiliary="add", auxiliary_weights=WEIGHTS)
        return 0.5 * outputs.loss + outputs["auxiliary"]["loss"]

    found = loss()
    found.backward(retain_graph=retain)
    found.backward()
    twice = gradients_of(model)
    (2 * loss()).backward()
    return twice, gradients_of(model)


@pytest.mark.parametrize("kind", ["decoder", "mlp"])
def test_a_second_backward_pass_through_a_retained_graph_adds_the_same_gradient(kind):
    twice, expected = second_backward(kind, retain=True)
    assert twice.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(twice[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["decoder", "mlp"])
def test_a_second_backward_pass_through_a_freed_graph_is_refused_in_torchs_words(kind):
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        second_backward(kind, retain=False)
