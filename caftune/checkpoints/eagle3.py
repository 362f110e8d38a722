"""The head of horizon 2 as a draft model for servers: EAGLE-3's one layer, which vLLM and SGLang run.

A decoder head reads the input of the model's last layer at position t and predicts token t + 2. EAGLE-3's layer reads hidden
states of the model at t and the embedding of token t + 1, which the model has just chosen, and predicts token t + 2 as well:

    EAGLE-3    x + attention([norm_e(embedding of token t + 1), norm_h(x)]) and the MLP, x = fc(hidden states at t)
    head       x + attention(norm_h(x)) and the MLP, x = the input of the last layer at t

With fc = 1 and zeros for the columns that read the embedding both are the same function. Written for the loaders of vLLM 0.32.0
(model_executor/models/llama_eagle3.py, run; qwen3_eagle3.py, read) and SGLang 0.5.23 (srt/models/llama_eagle3.py, read). SGLang
does not call fc where one hidden state of the model's width comes in, so that fc must be the identity there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from caftune.checkpoints.cards import eagle3_card
from caftune.checkpoints.heads_folder import config_of, describe_heads, file_name, find_heads, load_heads
from caftune.checkpoints.opening import opening
from caftune.core.backbone import Backbone
from caftune.core.finite import refuse_not_finite
from caftune.errors import CaftuneError
from caftune.files import refuse_filled_folder, replacing, write_json, write_text

# Model types, with the draft layer that computes what their layers compute.
_LAYERS = {"llama": "llama", "mistral": "llama", "qwen2": "llama", "qwen3": "qwen3"}
_ARCHITECTURES = {"llama": "LlamaForCausalLMEagle3", "qwen3": "Eagle3Qwen3ForCausalLM"}
_MIXED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LINEAR = (*_MIXED, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_WEIGHTS = {f"{name}.weight" for name in (*_LINEAR, "input_layernorm", "post_attention_layernorm")}
# What a kind has beyond that: always, and in some models.
_NORMS = {"llama": set[str](), "qwen3": {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}}
_OUTPUT_BIAS = "self_attn.o_proj.bias"
_BIASES = {"llama": {*(f"{name}.bias" for name in _MIXED), _OUTPUT_BIAS}, "qwen3": set[str]()}
# Fields that the draft shares with the model.
_SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_act"),
    *("rms_norm_eps", "rope_parameters", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)


def export_eagle3(heads: str, model: str, folder: str | Path, *, revision: str | None = None) -> list[str]:
    """Write the head of horizon 2 as an EAGLE-3 draft model of one layer. Returns the servers that can load it.

    Args:
        heads: a heads folder or a hub id. Heads of horizons above 2 are left out: EAGLE-3 has no place for them.
        model: the model that they draft for, a folder or a hub id. Its final norm and unembedding are written too.
        folder: new or empty.
        revision: of the model on the hub.

    Raises:
        CaftuneError: MLP heads, heads without the final norm, layers other than Llama's and Qwen3's, heads of another
            architecture or tokenizer, or weights that are not finite. Nothing is written then.
    """
    target = Path(folder)
    refuse_filled_folder(target)
    description = describe_heads(find_heads(heads))
    _refuse_other_heads(heads, description)
    where = {"revision": revision or "main"}
    with opening(model, "MODEL", revision=revision):
        kind = _kind_of(AutoConfig.from_pretrained(model, **where), model)
        tokenizer: Any = AutoTokenizer.from_pretrained(model, **where)
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto", **where)
    backbone = Backbone.of(loaded)
    head = load_heads(heads, backbone, tokenizer, force=True).heads[0].state_dict()
    _refuse_other_names(set(head), kind, model)
    weights = _weights_of(head, backbone)
    refuse_not_finite(weights, "The weights to export", "Nothing was written. Export other heads.")
    described = _draft_config(loaded.config, weights, kind)
    # SGLang's draft layer has no biases in the attention, and no norms of queries and keys.
    servers = ["vLLM"] if kind == "qwen3" or described["attention_bias"] else ["vLLM", "SGLang"]
    with replacing(target / "model.safetensors") as partial:
        save_file(weights, partial, metadata={"format": "pt"})
    write_text(target / "README.md", eagle3_card(description, file_name(model), servers))
    write_json(target / "config.json", described)
    return servers


def _refuse_other_heads(name: str, description: Mapping[str, Any]) -> None:
    config = config_of(description)
    if config.kind != "decoder":
        raise CaftuneError(
            f"The heads in {name} must be decoder heads, got {config.kind} heads: EAGLE-3's draft is one decoder layer. Train "
            "heads with heads.kind=decoder."
        )
    if not config.final_norm:
        raise CaftuneError(
            f"The heads in {name} must be followed by the model's final norm, got heads without it (as imported from the "
            "reference implementation): EAGLE-3's draft always applies it. Train heads with `caftune pretrain-heads`."
        )


def _kind_of(config: Any, model: str) -> str:
    """The draft layer for a model: llama or qwen3."""
    if config.model_type not in _LAYERS:
        raise CaftuneError(
            f"{model} must be a model of type {', '.join(_LAYERS)}, got {config.model_type}: the servers' EAGLE-3 layers are "
            "Llama's and Qwen3's. Serve the model without a draft."
        )
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    is_sliding = types[-1] == "sliding_attention" if types else window is not None
    if is_sliding and window < config.max_position_embeddings:
        raise CaftuneError(
            f"The last layer of {model} must see all earlier tokens, got a window of {window} tokens: the servers' EAGLE-3 "
            "layers have none. Serve the model without a draft."
        )
    if config.hidden_act != "silu":
        raise CaftuneError(
            f"The activation of {model} must be silu, got {config.hidden_act}: the servers' EAGLE-3 layers have no other. "
            "Serve the model without a draft."
        )
    return _LAYERS[config.model_type]


def _refuse_other_names(names: set[str], kind: str, model: str) -> None:
    """Raise CaftuneError for a layer that has other weights than the draft's."""
    expected = _WEIGHTS | _NORMS[kind]
    odd = sorted((expected - names) | (names - expected - _BIASES[kind]))
    if odd:
        what = "no" if odd[0] in expected else "also"
        raise CaftuneError(
            f"The last layer of {model} must have the weights of the servers' EAGLE-3 layer ({kind}), got {what} {odd[0]}. "
            "Serve the model without a draft."
        )


def _weights_of(head: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """The tensors of the draft model by the names that both servers load."""
    layer = {name: tensor.detach().cpu() for name, tensor in head.items()}
    norm = layer.pop("input_layernorm.weight")
    width = len(norm)
    for name in _MIXED:
        weight = layer[f"{name}.weight"]
        # The embedding of the next token comes first: the head does not read it.
        layer[f"{name}.weight"] = torch.cat([torch.zeros_like(weight), weight], dim=1)
    if f"{_MIXED[0]}.bias" in layer:  # vLLM's layer then has a bias of the output too (Qwen2's has none)
        layer.setdefault(_OUTPUT_BIAS, torch.zeros_like(norm))
    (final,) = backbone.closing_names
    weights = {
        "fc.weight": torch.eye(width, dtype=norm.dtype),
        "layers.0.hidden_norm.weight": norm,
        "layers.0.input_layernorm.weight": torch.ones_like(norm),
        **{f"layers.0.{name}": tensor for name, tensor in layer.items()},
        "norm.weight": backbone.model.get_submodule(final).weight.detach().cpu(),
        "lm_head.weight": backbone.unembedding().weight.detach().cpu(),
    }
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def _draft_config(config: Any, weights: Mapping[str, Tensor], kind: str) -> dict[str, Any]:
    """The config.json: one layer as the model's, and which hidden state it reads."""
    layers = config.num_hidden_layers
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        **{name: getattr(config, name, None) for name in _SHARED},
        "head_dim": weights["layers.0.self_attn.q_proj.weight"].shape[0] // config.num_attention_heads,
        "attention_bias": f"layers.0.{_OUTPUT_BIAS}" in weights,
        "mlp_bias": False,
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,  # lm_head is in the file; the embeddings are the served model's
        "dtype": str(weights["fc.weight"].dtype).removeprefix("torch."),
        "draft_vocab_size": config.vocab_size,
        "norm_before_residual": False,
        "num_aux_hidden_states": 1,
        # The input of the last layer. vLLM counts the layers before it and reads this field first; SGLang counts from 0 the
        # layer whose output it is, and reads it from eagle_config alone.
        "eagle_aux_hidden_state_layer_ids": [layers - 1],
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [layers - 2]},
    }
