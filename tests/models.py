"""Tiny models of many families, built from configurations with a fixed seed: no download."""

import types

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCABULARY, WIDTH, DEPTH = 61, 16, 2

_ROPE = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_OPT = {
    "hidden_size": WIDTH,
    "ffn_dim": 24,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "dropout": 0.0,
}
_GPT = {"n_embd": WIDTH, "n_layer": DEPTH, "n_head": 2, "n_positions": 64}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_WINDOW = {"sliding_window": 4}

# Family name -> (model type, what differs from the configuration's defaults).
FAMILIES = {
    "llama": ("llama", _ROPE),
    "qwen2": ("qwen2", _ROPE),
    "qwen3": ("qwen3", _ROPE),
    "mistral": ("mistral", {**_ROPE, **_WINDOW}),
    "gemma": ("gemma", _ROPE),
    "gemma2": ("gemma2", {**_ROPE, **_WINDOW, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {**_ROPE, **_WINDOW, "query_pre_attn_scalar": 8}),
    "phi": ("phi", {**_ROPE, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0}),
    "phi3": ("phi3", {**_ROPE, "pad_token_id": 0}),
    "olmo2": ("olmo2", _ROPE),
    "granite": ("granite", {**_ROPE, "logits_scaling": 3.0, "residual_multiplier": 0.7}),
    "cohere": ("cohere", {**_ROPE, "logit_scale": 0.25}),
    "gpt2": ("gpt2", {**_GPT, **_NO_DROPOUT}),
    "gpt_neox": ("gpt_neox", {**_ROPE, "hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "gptj": ("gptj", {**_GPT, **_NO_DROPOUT, "rotary_dim": 4}),
    "opt": ("opt", {**_OPT, "word_embed_proj_dim": WIDTH}),
    "opt_projected": ("opt", {**_OPT, "word_embed_proj_dim": 12, "do_layer_norm_before": False}),
    "bloom": ("bloom", {"hidden_size": WIDTH, "n_layer": DEPTH, "n_head": 2, "hidden_dropout": 0.0}),
    "mpt": ("mpt", {"d_model": WIDTH, "n_layers": DEPTH, "n_heads": 2, "expansion_ratio": 2, "max_seq_len": 64}),
    "stablelm": ("stablelm", {**_ROPE, "hidden_dropout": 0.0}),
    "mixtral": ("mixtral", {**_ROPE, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "falcon": (
        "falcon",
        {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "hidden_dropout": 0.0},
    ),
    "glm4": ("glm4", {**_ROPE, "pad_token_id": 0}),
    "mamba": ("mamba", {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "state_size": 4, "time_step_rank": 4}),
}


def config_of(family, **changes):
    model_type, settings = FAMILIES[family]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return CONFIG_MAPPING[model_type](**{"vocab_size": VOCABULARY, **special, **settings, **changes})


def build(family="llama", *, dtype=torch.float64, attention="eager", seed=0, spread=12.0, **changes):
    """A model in eval mode whose weights are `spread` times as wide as at birth, so that errors are not lost in noise."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = config_of(family, **changes)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(spread)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__.endswith(("RMSNorm", "CohereLayerNorm")):
                module.forward = types.MethodType(_norm, module)
    return model.to(dtype).eval()


def _norm(self, hidden):
    """The family's norm in the dtype of its input: transformers' own goes through float32, which hides errors below 1e-7."""
    eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
    if type(self).__name__ == "CohereLayerNorm":
        hidden = hidden - hidden.mean(-1, keepdim=True)
    weight = 1 + self.weight if type(self).__name__.startswith("Gemma") else self.weight
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps) * weight
