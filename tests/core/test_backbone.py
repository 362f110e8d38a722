"""Backbone finds the parts of every family, refuses what it cannot replay, and leaves the model as it was."""

import types

import pytest
import torch
from families import config_of
from models import VOCABULARY, WIDTH, build
from torch import nn
from transformers import Qwen3_5ForConditionalGeneration, RwkvConfig, RwkvForCausalLM

from caftune.core.attach import attach_heads
from caftune.core.backbone import Backbone, UnsupportedModelError
from caftune.core.heads import AuxiliaryHeads, HeadsConfig

IDS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))


# Families that compute in float64 throughout; test_families.py examines all of them, in float32.
EXACT = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi", "phi3", "olmo2", "granite", "cohere"]
EXACT += ["gpt2", "gpt_neox", "opt", "opt_projected", "bloom", "mpt", "stablelm", "falcon", "glm4"]


@pytest.mark.parametrize("use_cache", [False, True], ids=["no_cache", "cache"])
@pytest.mark.parametrize("family", EXACT)
def test_replay_norm_and_unembedding_give_the_models_own_logits(family, use_cache):
    model = build(family)
    backbone = Backbone.of(model)
    with torch.no_grad(), backbone.capture() as call:
        logits = model(input_ids=IDS, use_cache=use_cache).logits
        rebuilt = backbone.unembedding().logits(backbone.close(call.replay(backbone.layer)))
    torch.testing.assert_close(rebuilt, logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_a_replay_does_not_write_to_the_cache(family):
    model = build(family)
    backbone = Backbone.of(model)
    with torch.no_grad():
        with backbone.capture() as call:
            cache = model(input_ids=IDS, use_cache=True).past_key_values
        call.replay(backbone.layer)
    assert cache.get_seq_length(1) == IDS.shape[1]


@pytest.mark.parametrize(
    ("family", "scale", "softcap"), [("gemma2", 1.0, 2.0), ("granite", 1 / 3, None), ("cohere", 0.25, None)]
)
def test_scale_and_softcap_of_the_logits_are_found(family, scale, softcap):
    backbone = Backbone.of(build(family))
    assert (backbone.scale, backbone.softcap) == (scale, softcap)


@pytest.mark.parametrize("part", ["model", "trunk", "wrapper"])
def test_a_compiled_model_is_refused_as_one(part):
    model = build("llama")
    if part == "wrapper":
        model = torch.compile(model, backend="eager")
    else:
        (model if part == "model" else model.model).compile(backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM must not be compiled .* torch_compile=True"):
        Backbone.of(model)


def test_the_parts_are_named_by_their_place_in_the_model():
    backbone = Backbone.of(model := build("llama"))
    assert (backbone.layer_name, backbone.closing_names, backbone.width) == ("model.layers.1", ("model.norm",), WIDTH)
    assert backbone.layer is model.model.layers[1]
    assert backbone.trunk is model.model


def test_a_projection_after_the_last_layer_is_part_of_the_closing():
    backbone = Backbone.of(build("opt_projected"))
    assert backbone.closing_names == ("model.decoder.project_out",)
    assert backbone.close(torch.zeros(2, 3, WIDTH, dtype=torch.float64)).shape == (2, 3, 12)


def test_a_model_without_output_embeddings_is_refused():
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no output embeddings. caftune needs a causal"):
        Backbone.of(build("llama").model)


def test_a_model_without_a_list_of_layers_carries_mlp_heads_behind_its_trunk():
    model = build("llama")
    model.config.num_hidden_layers = 7
    backbone = Backbone.of(model)
    assert (backbone.layer_name, backbone.closing_names) == ("model", ())
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no list of 7 decoder layers.*Use MLP heads"):
        AuxiliaryHeads.build(backbone, HeadsConfig(1))
    AuxiliaryHeads.build(backbone, HeadsConfig(1, "mlp"))


def test_a_model_that_does_not_call_its_last_layer_carries_mlp_heads_behind_its_trunk():
    backbone = Backbone.of(build("mllama_crossing", dtype=torch.float32))
    assert backbone.layer_name == "model"
    with pytest.raises(UnsupportedModelError, match="does not call its model.layers.1 in a forward pass, so it cannot"):
        AuxiliaryHeads.build(backbone, HeadsConfig(1))


def test_a_model_whose_layers_share_state_between_calls_carries_mlp_heads_only():
    model = build("llama")
    inner, calls = model.model.layers[1].forward, []

    def forward(self, hidden, *args, **kwargs):
        calls.append(None)
        return inner(hidden, *args, **kwargs) + 1e-7 * len(calls)

    model.model.layers[1].forward = types.MethodType(forward, model.model.layers[1])
    backbone = Backbone.of(model)
    assert (backbone.layer_name, backbone.closing_names) == ("model.layers.1", ("model.norm",))
    with pytest.raises(UnsupportedModelError, match="a second time gives another result.*so it cannot carry decoder"):
        AuxiliaryHeads.build(backbone, HeadsConfig(1))
    AuxiliaryHeads.build(backbone, HeadsConfig(1, "mlp"))


def test_a_model_that_sees_later_tokens_is_refused():
    model = build("llama", attention="sdpa")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(
        UnsupportedModelError, match="LlamaForCausalLM is not causal: changing a later token changes earlier logits"
    ):
        Backbone.of(model)


def test_parts_inside_the_modelling_head_are_part_of_the_closing():
    assert Backbone.of(build("bert_decoder")).closing_names == ("cls.predictions.transform",)
    assert Backbone.of(build("modernbert_decoder")).closing_names == ("model.final_norm", "lm_head")


def test_a_model_that_does_more_before_its_logits_is_refused():
    model = build("llama")
    model.lm_head.register_forward_pre_hook(lambda _module, args: (args[0].flip(-1),))
    with pytest.raises(UnsupportedModelError, match="does more between its last layer and its logits"):
        Backbone.of(model)


@pytest.mark.parametrize("refused", [False, True], ids=["accepted", "refused"])
def test_looking_leaves_random_state_modes_and_hooks_alone(refused):
    model = build("gpt2").train()
    model.transformer.h[0].eval()
    if refused:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)
        model.lm_head.register_forward_hook(lambda _module, _args, output: output.flip(-1))
    modes = {name: module.training for name, module in model.named_modules()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    state, grad = torch.get_rng_state(), torch.is_grad_enabled()
    if refused:
        with pytest.raises(UnsupportedModelError):
            Backbone.of(model)
    else:
        Backbone.of(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() == grad
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_capture_ends_with_its_block_also_after_an_error():
    backbone = Backbone.of(build("llama"))
    with pytest.raises(KeyError), backbone.capture():
        raise KeyError
    assert not backbone.layer._forward_hooks
    assert not backbone.layer._forward_pre_hooks


def test_layers_that_return_tuples_are_followed_like_those_that_return_tensors():
    model = build("llama")
    plain = Backbone.of(model)
    with torch.no_grad(), plain.capture() as call:
        model(input_ids=IDS)
    expected = call.hidden
    layer = model.model.layers[1]
    inner = layer.forward
    layer.forward = types.MethodType(lambda self, *args, **kwargs: (inner(*args, **kwargs), "attention"), layer)
    model.model.norm.register_forward_pre_hook(lambda _m, args: args[0] if isinstance(args[0], tuple) else args)
    norm_forward = model.model.norm.forward
    model.model.norm.forward = types.MethodType(lambda self, hidden, *_rest: norm_forward(hidden), model.model.norm)
    tupled = Backbone.of(model)
    with torch.no_grad(), tupled.capture() as call:
        model(input_ids=IDS)
    assert isinstance(call.output, tuple)
    assert torch.equal(call.hidden, expected)
    assert torch.equal(call.replay(tupled.layer), expected)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_model_with_as_many_heads_as_layers_is_still_understood(family):
    model = build(family)
    backbone = Backbone.of(model)
    attach_heads(backbone, AuxiliaryHeads.build(backbone, HeadsConfig(2)))
    assert Backbone.of(model).layer_name == backbone.layer_name


@pytest.mark.parametrize("family", ["mamba", "llama"])
def test_a_model_in_half_precision_is_accepted_as_in_full(family):
    """Mamba's final norm ends in float32, whatever its weights are."""
    model = build(family, dtype=torch.float32).to(torch.bfloat16)
    backbone = Backbone.of(model)
    assert backbone.copy_refusal is None
    attach_heads(backbone, AuxiliaryHeads.build(backbone, HeadsConfig(1)))
    model(input_ids=IDS, labels=IDS, auxiliary="add")["auxiliary"]["nll"].sum().backward()


def test_a_vision_tower_of_as_many_blocks_is_not_taken_for_the_language_model():
    config = config_of("qwen3_5_multimodal")
    assert config.vision_config.depth == config.text_config.num_hidden_layers
    found = Backbone.of(Qwen3_5ForConditionalGeneration(config))
    assert found.layer_name == f"model.language_model.layers.{config.text_config.num_hidden_layers - 1}"
    assert found.copy_refusal is None


def test_rwkv_with_weights_that_evaluation_rescales_is_refused():
    config = RwkvConfig(vocab_size=64, hidden_size=16, num_hidden_layers=7, context_length=32)
    with pytest.raises(UnsupportedModelError, match="rescale_every must be 0, got 6 with 7 layers"):
        Backbone.of(RwkvForCausalLM(config))
    config.rescale_every = 0
    assert Backbone.of(RwkvForCausalLM(config)).copy_refusal is None
