"""A layer at some of its rows is the whole layer at those rows: in values and gradients, under every mask and position."""

import pytest
import torch
from models import VOCABULARY, build
from torch import nn

from caftune.core.backbone import Backbone
from caftune.core.replay import LayerCall, Mixer, at_positions, choose_mixer, run_at

IDS = torch.randint(3, VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(5))
ROWS = torch.tensor([1, 2, 5, 9, 10, 13, 17])
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
LEFT = torch.ones_like(IDS).index_fill(1, torch.tensor([0, 1, 2]), 0)
LAYOUTS = {
    "plain": {"input_ids": IDS},
    "left": {"input_ids": IDS, "attention_mask": LEFT, "position_ids": (LEFT.cumsum(-1) - 1).clamp(min=0)},
    "right": {"input_ids": IDS, "attention_mask": LEFT.flip(1)},
    "packed": {"input_ids": IDS, "position_ids": PACKED.expand(2, -1)},
}
# Sliding windows of 4, norms of queries and keys, shared keys, softcaps, partial rotary phases, norms behind the parts,
# parallel parts, learned positions, fused projections, experts, a state space.
FAMILIES = [
    *("llama", "qwen3", "mistral", "gemma2", "gemma3", "phi", "phi3", "olmo2", "gpt2", "gptj", "cohere2", "glm4"),
    *("smollm3", "granite", "deepseek_v3", "qwen3_moe", "falcon", "mamba2"),
]


def call_of(model, backbone, inputs):
    with backbone.capture() as call:
        model(**inputs, use_cache=False)
    return call


def gradients(hidden, layer, entering):
    factors = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=hidden.dtype)
    wanted = [entering, *(p for p in layer.parameters() if p.requires_grad)]
    return torch.autograd.grad((hidden * factors).sum(), wanted, allow_unused=True)


SINGLE = ["deepseek_v3", "qwen3_moe", "mamba2", "cohere2"]  # have parts that compute in float32 or not at all
BY_ORDER = ["mamba2", "falcon", "gptj"]  # do not tell packed documents apart


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_at_some_rows_equals_the_whole_layer_there(family, attention, layout):
    if attention == "sdpa" and family in (*BY_ORDER, "gemma2"):
        pytest.skip("has eager attention only, or softcaps that sdpa refuses")
    if layout == "packed" and family in BY_ORDER:
        pytest.skip("does not tell packed documents apart")
    inputs = {name: x for name, x in LAYOUTS[layout].items() if name != "position_ids" or family not in BY_ORDER}
    # eager attention in float64 makes rows that see nothing NaN (left padding)
    is_single = family in SINGLE or (attention, layout) == ("eager", "left")
    model = build(family, attention=attention, dtype=torch.float32 if is_single else torch.float64)
    backbone = Backbone.of(model)
    call = call_of(model, backbone, inputs)
    entering = call.input.detach().requires_grad_()
    call = call.with_input(entering)
    expected = at_positions(call.replay(backbone.layer), ROWS)
    found = run_at(backbone.layer, backbone.mixer, call, ROWS)
    tolerance = 1e-4 if is_single else 1e-9
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.detach().abs().max()))
    ours, plain = (gradients(hidden, backbone.layer, entering) for hidden in (found, expected))
    largest = max(float(gradient.abs().max()) for gradient in plain if gradient is not None)
    for one, other in zip(ours, plain, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance * largest)


def test_most_families_have_a_mixer_that_is_found_and_named():
    assert Backbone.of(build("llama")).mixer == Mixer("self_attn", "input_layernorm", "self_attn.o_proj")
    assert Backbone.of(build("olmo2")).mixer == Mixer("self_attn", None, "self_attn.o_proj")


@pytest.mark.parametrize("family", ["falcon_h1", "bloom", "gemma4"])
def test_layers_of_another_shape_have_none(family):
    assert Backbone.of(build(family, dtype=torch.float32)).mixer is None


class Layer(nn.Module):
    """Norm, mixer, perceptron; `peeks`: the perceptron looks at the row before, too."""

    def __init__(self, *, peeks):
        super().__init__()
        self.norm, self.mixer, self.perceptron = nn.LayerNorm(4), nn.GRU(4, 4, batch_first=True), nn.Linear(4, 4)
        self.peeks = peeks

    def forward(self, hidden_states):
        hidden = hidden_states + self.mixer(self.norm(hidden_states))[0]
        change = self.perceptron(hidden)
        return hidden + (change + change.roll(1, 1) if self.peeks else change)


@pytest.mark.parametrize("peeks", [False, True])
def test_a_layer_is_run_at_some_rows_only_if_nothing_but_its_mixer_looks_at_others(peeks):
    torch.manual_seed(0)
    layer, hidden = Layer(peeks=peeks), torch.randn(1, 8, 4)
    with torch.no_grad():
        found = choose_mixer(layer, LayerCall(args=(hidden,)), torch.allclose)
    assert found == (None if peeks else Mixer("mixer", "norm", None))


def test_no_hook_stays_behind_even_after_an_error():
    layer, hidden = Layer(peeks=False), torch.randn(1, 8, 4)
    call = LayerCall(args=(hidden,))
    with pytest.raises(IndexError):
        run_at(layer, Mixer("mixer", "norm", None), call, torch.tensor([9]))
    choose_mixer(layer, call, torch.allclose)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules())


class Kernel(nn.Module):
    """A mixer that in training takes the weight of its last part into a kernel, as Mamba's does, and never calls it."""

    def __init__(self):
        super().__init__()
        self.out_proj = nn.Linear(4, 4)

    def forward(self, hidden_states):
        summed = hidden_states.cumsum(1)
        return nn.functional.linear(summed, *self.out_proj.parameters()) if self.training else self.out_proj(summed)


class KernelLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(4), Kernel()

    def forward(self, hidden_states):
        return hidden_states + self.mixer(self.norm(hidden_states))


def test_a_mixer_whose_last_part_is_not_called_in_training_is_cut_behind_it():
    torch.manual_seed(0)
    layer, call, rows = KernelLayer(), LayerCall(args=(torch.randn(2, 8, 4),)), torch.tensor([1, 6, 9])
    found = choose_mixer(layer.eval(), call, torch.allclose)
    assert found == Mixer("mixer", "norm", "mixer.out_proj")
    for mode in (layer.eval(), layer.train()):
        torch.testing.assert_close(run_at(mode, found, call, rows), at_positions(call.replay(mode), rows))
