"""An exported EAGLE-3 draft, computed from its files alone, predicts what the head of horizon 2 predicts."""

import json
import math

import pytest
import torch
from huggingface_hub import ModelCard
from models import build
from safetensors.torch import load_file
from torch.nn.functional import linear, silu, softmax
from transformers import AutoConfig, AutoTokenizer
from typer.testing import CliRunner

from caftune import AuxiliaryHeads, Backbone, HeadsConfig, save_heads
from caftune.checkpoints.eagle3 import export_eagle3
from caftune.cli import app
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.files import file_sha256

VOCABULARY, DEPTH = 158, 3  # the demo's tokenizer
IDS = torch.tensor([[5, 9, 11, 30, 7, 8, 40, 12, 4, 55, 6, 80]])
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "llama": ("llama", GROUPED),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "wide heads": ("llama", {"head_dim": 12}),
    "llama3 phases": ("llama", {"rope_parameters": LLAMA3, **GROUPED}),
    "biased llama": ("llama", {"attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", {"rms_norm_eps": 1e-3, **GROUPED}),
}


def written(folder, family="llama", *, heads=3, kind="decoder", final_norm=True, dtype=torch.float64, **changes):
    """A tiny model and its heads on disk (their names), and in memory."""
    shape = {"vocab_size": VOCABULARY, "num_hidden_layers": DEPTH, **changes}
    model = build(family, attention="sdpa", dtype=dtype, **shape)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    backbone = Backbone.of(model)
    built = AuxiliaryHeads.build(backbone, HeadsConfig(heads, kind, final_norm=final_norm))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    save_heads(folder / "model-heads", built, backbone, tokenizer)
    return str(folder / "model"), str(folder / "model-heads"), backbone, built


def rms(hidden, weight, config):
    return hidden / (hidden.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weight


def rotated(states, config):
    """Rotary phases, in float32 as everywhere."""
    rope, size = config["rope_parameters"], config["head_dim"]
    frequencies = 1 / rope["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] / (2 * math.pi / frequencies)
        share = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - share) * frequencies / rope["factor"] + share * frequencies
    angles = (torch.arange(states.shape[-2])[:, None].float() * frequencies).repeat(1, 2)
    one, two = states.chunk(2, -1)
    return states * angles.cos() + torch.cat([-two, one], -1) * angles.sin()


def attention(inputs, weights, config):
    def part(name, heads):
        bias = weights.get(f"layers.0.self_attn.{name}_proj.bias") if config["attention_bias"] else None
        states = linear(inputs, weights[f"layers.0.self_attn.{name}_proj.weight"], bias)
        states = states.view(1, -1, heads, config["head_dim"]).transpose(1, 2)
        norm = weights.get(f"layers.0.self_attn.{name}_norm.weight")
        return states if norm is None else rms(states, norm, config)

    queries, groups = config["num_attention_heads"], config["num_key_value_heads"]
    q, k = (rotated(part(name, heads), config) for name, heads in (("q", queries), ("k", groups)))
    k, v = (states.repeat_interleave(queries // groups, 1) for states in (k, part("v", groups)))
    later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    shares = softmax((q @ k.mT / config["head_dim"] ** 0.5).masked_fill(later, -math.inf), -1)
    joined = (shares @ v).transpose(1, 2).flatten(2)
    bias = weights["layers.0.self_attn.o_proj.bias"] if config["attention_bias"] else None
    return linear(joined, weights["layers.0.self_attn.o_proj.weight"], bias)


def drafted(folder, hidden, embedded):
    """The logits of an EAGLE-3 draft model, from its files, the model's hidden states and the next tokens' embeddings."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    residual = linear(hidden, weights["fc.weight"])
    normed = rms(residual, weights["layers.0.hidden_norm.weight"], config)
    assert not config["norm_before_residual"]
    embedded = rms(embedded, weights["layers.0.input_layernorm.weight"], config)
    residual = residual + attention(torch.cat([embedded, normed], -1), weights, config)
    normed = rms(residual, weights["layers.0.post_attention_layernorm.weight"], config)
    gate, up, down = (weights[f"layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    residual = residual + linear(silu(linear(normed, gate)) * linear(normed, up), down)
    return linear(rms(residual, weights["norm.weight"], config), weights["lm_head.weight"])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_draft_of_the_files_alone_has_the_heads_logits(name, tmp_path):
    family, changes = MODELS[name]
    model, heads, backbone, built = written(tmp_path, family, **changes)
    export_eagle3(heads, model, tmp_path / "draft")
    with backbone.capture() as call:
        states = backbone.model(IDS, output_hidden_states=True, use_cache=False).hidden_states
    config = json.loads((tmp_path / "draft/config.json").read_text())
    (layer,) = config["eagle_aux_hidden_state_layer_ids"]  # vLLM's: states[n] is the output of n layers
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [
        layer - 1
    ]  # SGLang's: of the layer numbered n
    own, other = (backbone.unembedding().logits(built.hidden(index, backbone, call)) for index in (0, 1))
    embedded = backbone.model.get_input_embeddings()(IDS.roll(-1, 1))
    found = drafted(tmp_path / "draft", states[layer], embedded)
    torch.testing.assert_close(found, own, rtol=0, atol=1e-9)
    assert (found - other).abs().max() > 0.1


def test_heads_of_the_base_draft_for_its_fine_tuned_model_with_that_models_norm_and_unembedding(tmp_path):
    _, heads, _, built = written(tmp_path / "base", heads=1)
    model, _, tuned, _ = written(tmp_path / "tuned", seed=1)
    export_eagle3(heads, model, tmp_path / "draft")
    weights = load_file(tmp_path / "draft/model.safetensors")
    assert torch.equal(weights["norm.weight"], tuned.model.model.norm.weight)
    assert torch.equal(weights["lm_head.weight"], tuned.model.lm_head.weight)
    assert torch.equal(weights["layers.0.mlp.up_proj.weight"], built.heads[0].mlp.up_proj.weight)


def test_the_files_are_in_the_dtype_of_the_model(tmp_path):
    model, heads, _, _ = written(tmp_path, dtype=torch.bfloat16)
    export_eagle3(heads, model, tmp_path / "draft")
    assert {tensor.dtype for tensor in load_file(tmp_path / "draft/model.safetensors").values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(tmp_path / "draft").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "kind", "architecture", "servers", "biased"),
    [
        ("llama", "llama", "LlamaForCausalLMEagle3", ["vLLM", "SGLang"], False),
        ("wide heads", "llama", "LlamaForCausalLMEagle3", ["vLLM", "SGLang"], False),
        ("llama3 phases", "llama", "LlamaForCausalLMEagle3", ["vLLM", "SGLang"], False),
        ("mistral", "llama", "LlamaForCausalLMEagle3", ["vLLM", "SGLang"], False),
        ("biased llama", "llama", "LlamaForCausalLMEagle3", ["vLLM"], True),
        ("qwen2", "llama", "LlamaForCausalLMEagle3", ["vLLM"], True),
        ("qwen3", "qwen3", "Eagle3Qwen3ForCausalLM", ["vLLM"], False),
    ],
)
def test_transformers_reads_the_configuration_that_the_servers_need(
    name, kind, architecture, servers, biased, tmp_path
):
    family, changes = MODELS[name]
    model, heads, backbone, _ = written(tmp_path, family, **changes)
    assert export_eagle3(heads, model, tmp_path / "draft") == servers
    found, base = AutoConfig.from_pretrained(tmp_path / "draft"), backbone.model.config
    expected = {
        **{"model_type": kind, "architectures": [architecture], "num_hidden_layers": 1, "tie_word_embeddings": False},
        **{"vocab_size": VOCABULARY, "draft_vocab_size": VOCABULARY, "norm_before_residual": False},
        **{"num_aux_hidden_states": 1, "eagle_aux_hidden_state_layer_ids": [DEPTH - 1], "attention_bias": biased},
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [DEPTH - 2]},
        "head_dim": getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads,
        **{
            field: getattr(base, field)
            for field in (
                *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_act"),
                *("rms_norm_eps", "rope_parameters", "max_position_embeddings", "eos_token_id"),
            )
        },
    }
    assert {field: getattr(found, field) for field in expected} == expected
    weights = load_file(tmp_path / "draft/model.safetensors")
    assert not [name for name in weights if "embed_tokens" in name or "d2t" in name or "t2d" in name]
    assert ("layers.0.self_attn.o_proj.bias" in weights) is biased


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "mlp"}, "must be decoder heads, got mlp heads"),
        ({"final_norm": False}, "must be followed by the model's final norm, got heads without it"),
        ({"family": "gemma"}, "must be a model of type llama, mistral, qwen2, qwen3, got gemma:"),
        ({"family": "smollm3", "no_rope_layers": [1, 1, 0]}, "got smollm3:"),
        ({"family": "gpt2"}, "got gpt2:"),
        ({"family": "mistral"}, "must see all earlier tokens, got a window of 4 tokens"),
        ({"family": "qwen2", "use_sliding_window": True, "max_window_layers": 2}, "got a window of 4 tokens"),
        ({"hidden_act": "gelu"}, "must be silu, got gelu"),
        ({"mlp_bias": True}, "got also mlp.down_proj.bias"),
        ({"family": "qwen3", "attention_bias": True}, "got also self_attn.k_proj.bias"),
    ],
)
def test_what_the_servers_cannot_run_is_refused_and_nothing_is_written(options, message, tmp_path):
    model, heads, _, _ = written(tmp_path, **options)
    with pytest.raises(CaftuneError, match=message):
        export_eagle3(heads, model, tmp_path / "draft")
    assert not (tmp_path / "draft").exists()


def test_windows_before_the_last_layer_or_as_long_as_the_context_change_nothing(tmp_path):
    model, heads, _, _ = written(tmp_path / "one", "mistral", sliding_window=64, max_position_embeddings=64)
    assert export_eagle3(heads, model, tmp_path / "one/draft")
    types = ["sliding_attention", "sliding_attention", "full_attention"]
    model, heads, _, _ = written(tmp_path / "two", "qwen2", use_sliding_window=True, layer_types=types)
    assert export_eagle3(heads, model, tmp_path / "two/draft")


def test_heads_of_another_architecture_weights_that_are_nan_and_filled_folders_are_refused(tmp_path):
    _, heads, _, built = written(tmp_path / "one")
    model, *_ = written(tmp_path / "two", intermediate_size=40)
    with pytest.raises(CaftuneError, match="differs in its"):
        export_eagle3(heads, model, tmp_path / "draft")
    with torch.no_grad():
        built.heads[0].mlp.up_proj.weight[0, 0] = math.nan
    _, _, backbone, _ = written(tmp_path / "three")
    save_heads(tmp_path / "nan", built, backbone, AutoTokenizer.from_pretrained(BASE))
    with pytest.raises(CaftuneError, match="got NaN or inf in layers.0.mlp.up_proj.weight"):
        export_eagle3(str(tmp_path / "nan"), str(tmp_path / "three/model"), tmp_path / "draft")
    assert not (tmp_path / "draft").exists()
    with pytest.raises(CaftuneError, match="must be an empty or a new folder"):
        export_eagle3(heads, str(tmp_path / "one/model"), tmp_path / "one")


@pytest.mark.parametrize(("family", "servers"), [("llama", "vLLM and SGLang"), ("qwen3", "vLLM")])
def test_the_command_finds_the_model_next_to_kept_heads_and_says_what_is_left_out(family, servers, tmp_path):
    _, heads, _, _ = written(tmp_path, family)
    done = CliRunner().invoke(app, ["heads", "export-eagle3", heads, str(tmp_path / "draft")])
    assert done.exit_code == 0, done.output
    assert f"(for {servers}; " in done.output
    assert "The heads of horizons 3, 4 are not in it" in done.output
    card = ModelCard.load(tmp_path / "draft/README.md")
    assert card.data.tags == ["caftune", "eagle3"]
    assert "vllm serve model " in card.text
    assert ("sglang" in card.text) is (family == "llama")
    options = card.text.split("--speculative-config '")[1].split("'")[0]
    assert json.loads(options) == {"method": "eagle3", "model": "FOLDER", "num_speculative_tokens": 1}
    assert "**horizons left out**: 3, 4" in card.text
    assert file_sha256(f"{heads}/heads.safetensors") in card.text
