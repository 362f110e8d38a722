"""The configurations of many causal-LM families, tiny: what `examination.py` examines and docs/models.md lists."""

import dataclasses

from transformers import CONFIG_MAPPING

VOCABULARY, WIDTH, DEPTH = 61, 16, 2

# A tiny value for every size that configurations name; a family takes those that its configuration has.
TINY = {
    **{"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "embedding_size", "lru_width", "ffn_hidden_size"], WIDTH),
    **dict.fromkeys(["input_embedding_size", "output_embedding_size", "embedding_dim", "word_embed_proj_dim"], WIDTH),
    **dict.fromkeys(["num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers"], DEPTH),
    **dict.fromkeys(["num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads"], 2),
    **{"decoder_attention_heads": 2, "encoder_attention_heads": 2, "encoder_layers": DEPTH, "num_key_value_heads": 1},
    **dict.fromkeys(["intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"], 24),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len"], 64),
    **{"head_dim": 8, "query_pre_attn_scalar": 8, "rotary_dim": 4},
    # mixtures of experts
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"], 8),
    **dict.fromkeys(["expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"], 8),
    **{"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_dense_layers": 1},
    **{"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    # compressed and indexed attention
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    **{"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2},
    # windows shorter than a row of the tests, so that masks matter
    **dict.fromkeys(["sliding_window", "attention_chunk_size", "attention_window_size", "sliding_window_size"], 4),
    **{"local_attention": 4, "window_size": 4, "swa_head_dim": 8, "swa_num_attention_heads": 2},
    "swa_num_key_value_heads": 1,
    # state spaces and linear attention
    **{"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 4, "mamba_dt_rank": 4},
    **{"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1, "mamba_d_ssm": 32},
    **{"chunk_size": 4, "state_size": 4, "time_step_rank": 4, "block_size": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2},
    **{"linear_head_dim": 8, "linear_num_heads": 2},
    # no dropout: a replay would draw other numbers than the model did
    **dict.fromkeys(["attention_dropout", "hidden_dropout", "residual_dropout", "embedding_dropout", "dropout"], 0.0),
    **dict.fromkeys(["hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout", "layerdrop"], 0.0),
    **dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop", "emb_pdrop", "resid_dropout", "embed_dropout"], 0.0),
}

_EQUAL_HEADS = {"num_key_value_heads": 2}
_DECODER = {"is_decoder": True}
_FULL, _LINEAR = "full_attention", "linear_attention"


def _layers(*types):
    return {"num_hidden_layers": len(types), "layer_types": list(types)}


_VISION = {
    **{"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 8, "patch_size": 4},
}
_TOWER = {
    **{"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "num_position_embeddings": 16},
    "out_hidden_size": WIDTH,
}
# Tokens that stand for images: none of those that the tests use.
_IMAGE = dict.fromkeys(["image_token_index", "image_token_id", "boi_token_index", "eoi_token_index"], 0)
_CROSS = {"num_hidden_layers": 3, "cross_attention_layers": [1]}
_GEMMA4 = {
    **_layers("sliding_attention", _FULL, "sliding_attention", _FULL),
    **{"num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 4},
    "final_logit_softcapping": 2.0,
}

# Family name -> (model type, what differs from TINY and from the configuration's defaults). Settings that change what
# stands between the last layer and the logits (scale, softcap, projections) are set to values that matter.
FAMILIES = {
    "llama": ("llama", {}),
    "llama4": ("llama4_text", {"intermediate_size_mlp": 24}),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_next_attention": ("qwen3_next", _layers(_LINEAR, _FULL)),
    "qwen3_next_linear": ("qwen3_next", _layers(_FULL, _LINEAR)),
    "qwen3_5_attention": ("qwen3_5_text", _layers(_LINEAR, _FULL)),
    "qwen3_5_linear": ("qwen3_5_text", _layers(_FULL, _LINEAR)),
    "qwen3_5_moe": ("qwen3_5_moe_text", _layers(_LINEAR, _FULL)),
    "mistral": ("mistral", {}),
    "ministral": ("ministral", {}),
    "ministral3": ("ministral3", {}),
    "mixtral": ("mixtral", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"final_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {}),
    "vaultgemma": ("vaultgemma", {"final_logit_softcapping": 2.0}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "phimoe": ("phimoe", {}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {}),
    "olmo_hybrid_attention": ("olmo_hybrid", _layers(_LINEAR, _FULL)),
    "olmo_hybrid_linear": ("olmo_hybrid", _layers(_FULL, _LINEAR)),
    "olmoe": ("olmoe", {}),
    "flex_olmo": ("flex_olmo", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "granite": ("granite", {"logits_scaling": 3.0, "residual_multiplier": 0.7}),
    "granitemoe": ("granitemoe", {"logits_scaling": 3.0}),
    "granitemoeshared": ("granitemoeshared", {"logits_scaling": 3.0}),
    "granitemoehybrid_attention": ("granitemoehybrid", {**_layers(_LINEAR, _FULL), "mamba_expand": 2}),
    "granitemoehybrid_mamba": ("granitemoehybrid", {**_layers(_FULL, _LINEAR), "mamba_expand": 2}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", {"logit_scale": 0.25}),
    "cohere2_moe": ("cohere2_moe", {"logit_scale": 0.25}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "glm4_moe": ("glm4_moe", {}),
    "glm4_moe_lite": ("glm4_moe_lite", _EQUAL_HEADS),
    "deepseek_v2": ("deepseek_v2", _EQUAL_HEADS),
    "deepseek_v3": ("deepseek_v3", _EQUAL_HEADS),
    "gpt_oss": ("gpt_oss", {}),
    "falcon": ("falcon", {}),
    "falcon_mamba": ("falcon_mamba", {}),
    "falcon_h1": ("falcon_h1", {"lm_head_multiplier": 0.5}),
    "gpt2": ("gpt2", {}),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]]}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox_japanese": ("gpt_neox_japanese", {}),
    "gptj": ("gptj", {}),
    "codegen": ("codegen", {"n_head": 4}),
    "openai_gpt": ("openai-gpt", {}),
    "ctrl": ("ctrl", {"dff": 24}),
    "opt": ("opt", {}),
    "opt_projected": ("opt", {"word_embed_proj_dim": 12, "do_layer_norm_before": False}),
    "xglm": ("xglm", {}),
    "biogpt": ("biogpt", {}),
    "bloom": ("bloom", {}),
    "mpt": ("mpt", {"expansion_ratio": 2}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {}),
    "persimmon": ("persimmon", {}),
    "mamba": ("mamba", {}),
    "mamba2": ("mamba2", {"num_heads": 4}),
    "jamba_attention": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1}),
    "jamba_mamba": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 0}),
    "bamba_attention": ("bamba", {"attn_layer_indices": [1]}),
    "bamba_mamba": ("bamba", {"attn_layer_indices": [0]}),
    "zamba": ("zamba", {"num_hidden_layers": 5, "layers_block_type": [_LINEAR, _LINEAR, "hybrid", _LINEAR, "hybrid"]}),
    "zamba2": ("zamba2", {**_EQUAL_HEADS, "num_hidden_layers": 3, "layers_block_type": [_LINEAR, "hybrid", "hybrid"]}),
    "nemotron": ("nemotron", {}),
    "nemotron_h": ("nemotron_h", {}),
    "lfm2_attention": ("lfm2", _layers("conv", _FULL)),
    "lfm2_conv": ("lfm2", _layers(_FULL, "conv")),
    "lfm2_moe": ("lfm2_moe", _layers("conv", _FULL)),
    "lfm3_attention": ("lfm3", _layers("conv", _FULL)),
    "lfm3_conv": ("lfm3", _layers(_FULL, "conv")),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5_moe": ("ernie4_5_moe", {"moe_num_shared_experts": 1}),
    "minimax_attention": ("minimax", _layers(_LINEAR, _FULL)),
    "minimax_linear": ("minimax", _layers(_FULL, _LINEAR)),
    "minimax_m2": ("minimax_m2", {}),
    "hunyuan_dense": ("hunyuan_v1_dense", {}),
    "hunyuan_moe": ("hunyuan_v1_moe", {}),
    "exaone4": ("exaone4", {}),
    "exaone_moe": ("exaone_moe", {}),
    "hyperclovax": ("hyperclovax", {"logits_scaling": 3.0}),
    "seed_oss": ("seed_oss", {}),
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "afmoe": ("afmoe", {}),
    "helium": ("helium", {}),
    "nanochat": ("nanochat", {"final_logit_softcapping": 2.0}),
    "bitnet": ("bitnet", {}),
    "cwm": ("cwm", {}),
    "dbrx": (
        "dbrx",
        {
            "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "diffllama": ("diffllama", _EQUAL_HEADS),
    "doge": ("doge", {"keep_window_size": 64}),
    "dots1": ("dots1", {}),
    "aria_text": ("aria_text", {}),
    "jais2": ("jais2", {}),
    "jetmoe": ("jetmoe", {"kv_channels": 8}),
    "longcat_flash": ("longcat_flash", {**_EQUAL_HEADS, "head_dim": 4, "expert_ffn_hidden_size": 8}),
    "minicpm3": ("minicpm3", {**_EQUAL_HEADS, "dim_model_base": 8}),
    "solar_open": ("solar_open", {}),
    "youtu": ("youtu", _EQUAL_HEADS),
    "hy_v3": ("hy_v3", {}),
    "kimi_linear_attention": ("kimi_linear", {**_EQUAL_HEADS, **_layers(_LINEAR, _FULL)}),
    "kimi_linear_linear": ("kimi_linear", {**_EQUAL_HEADS, **_layers(_FULL, _LINEAR)}),
    "mimo_v2_flash": ("mimo_v2_flash", {}),
    "bailing_hybrid": ("bailing_hybrid", {**_EQUAL_HEADS, **_layers(_LINEAR, _FULL)}),
    "moshi": ("moshi", {}),
    "mellum": ("mellum", {}),
    "laguna": ("laguna", {}),
    "granite_swa": ("granite_swa", {"logits_scaling": 3.0}),
    "deepseek_v32": ("deepseek_v32", _EQUAL_HEADS),
    "glm_moe_dsa": ("glm_moe_dsa", _EQUAL_HEADS),
    "deepseek_v4": ("deepseek_v4", {}),
    "hy_v4": ("hy_v4", {}),
    "qwen4_exp": (
        "qwen4_exp_text",
        {
            **_layers(_LINEAR, _FULL),
            **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4},
            **{"indexer_compress_ratio": 2},
        },
    ),
    "axk1": ("axk1", _EQUAL_HEADS),
    "axk2": ("axk2", _EQUAL_HEADS),
    "rwkv": ("rwkv", {"attention_hidden_size": WIDTH}),
    "zaya": ("zaya", {"num_experts_per_tok": 1}),
    "inkling": ("inkling_text", {}),
    "inkling2": ("inkling2_text", {}),
    "hrm_text": ("hrm_text", {}),
    "modernbert_decoder": ("modernbert-decoder", {}),
    "bert_decoder": ("bert", _DECODER),
    "roberta_decoder": ("roberta", _DECODER),
    "bert": ("bert", {}),
    "bert_generation": ("bert-generation", {}),
    "bart_decoder": ("bart", {"is_decoder": True, "is_encoder_decoder": False}),
    "whisper_decoder": ("whisper", {}),
    "xlnet": ("xlnet", {"d_inner": 24}),
    "recurrent_gemma_attention": ("recurrent_gemma", {"num_hidden_layers": 3, "logits_soft_cap": 2.0}),
    "recurrent_gemma_recurrent": ("recurrent_gemma", {"num_hidden_layers": 4, "logits_soft_cap": 2.0}),
    "xlstm": ("xlstm", {"output_logit_soft_cap": 2.0}),
    "beam": ("beam", {"final_logit_softcapping": 2.0}),
    "flint": ("flint", {}),
    "kolibri1": ("kolibri1", {}),
    "granitemoe_swa": ("granitemoe_swa", {"logits_scaling": 3.0}),
    "minimax_m3": ("minimax_m3_vl_text", {}),
    "internlm3": ("internlm3", {}),
    "iquestcoder": ("iquestcoder", {}),
    "llama4_multimodal": ("llama4", {"text_config": ("llama4_text", {"intermediate_size_mlp": 24}), **_IMAGE}),
    "qwen3_5_multimodal": (
        "qwen3_5",
        {"text_config": ("qwen3_5_text", _layers(_LINEAR, _FULL)), "vision_config": _TOWER, **_IMAGE},
    ),
    "gemma3_multimodal": ("gemma3", {"text_config": ("gemma3_text", {}), "vision_config": _VISION, **_IMAGE}),
    "gemma4_multimodal": ("gemma4", {"text_config": ("gemma4_text", _GEMMA4), **_IMAGE}),
    "emu3": ("emu3", {"text_config": ("emu3_text_model", {}), **_IMAGE}),
    "mllama": ("mllama", {"text_config": ("mllama_text_model", _CROSS), **_IMAGE}),
    "mllama_crossing": ("mllama", {"text_config": ("mllama_text_model", {"cross_attention_layers": [1]}), **_IMAGE}),
    "cpmant": ("cpmant", {"dim_head": 8, "dim_ff": 24}),
    "pegasus_decoder": ("pegasus", {}),
    "qwen3_5_moe_multimodal": ("qwen3_5_moe", {"text_config": ("qwen3_5_moe_text", _layers(_LINEAR, _FULL)), **_IMAGE}),
    "gemma4_unified": ("gemma4_unified_text", _GEMMA4),
    "big_bird_decoder": ("big_bird", {**_DECODER, "attention_type": "original_full"}),
    "mbart_decoder": ("mbart", {}),
    "prophetnet_decoder": ("prophetnet", {"num_decoder_layers": 2, "num_encoder_layers": 2}),
    "xlm": ("xlm", {"emb_dim": WIDTH, "causal": True}),
    "reformer": ("reformer", {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"]}),
    "gemma3n": (
        "gemma3n_text",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", _FULL, "sliding_attention", _FULL],
            "num_kv_shared_layers": 2,
            "intermediate_size": [24] * 4,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 4,
            "laurel_rank": 4,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma4": ("gemma4_text", _GEMMA4),
    "gemma4_shared_kv": ("gemma4_text", {**_GEMMA4, "num_kv_shared_layers": 2}),
}
# Families whose hidden states grow without bound when weights are spread as widely as in the others.
SPREADS = dict.fromkeys(["mamba", "falcon_mamba", "rwkv"], 4.0)


def config_of(family, **changes):
    model_type, settings = FAMILIES[family]
    return _tiny(model_type, {**settings, **changes})


def _tiny(model_type, settings):
    kind = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(kind)}
    sizes = {name: value for name, value in TINY.items() if name in known}
    nested = {name: _tiny(*value) for name, value in settings.items() if isinstance(value, tuple)}
    return kind(**{**sizes, **settings, **nested})
