"""Bases with the demo's tokenizer, with rotary positions, without, and with biases; and heads that differ from each other."""

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from caftune import AuxiliaryHeads, Backbone, HeadsConfig, save_heads
from caftune.demo.run import BASE

HEADS = 3


def load_base(name, attention="sdpa"):
    """The embedded Llama, or a GPT-2 of the same vocabulary without dropout and with weights wide enough to matter."""
    if name == "llama":
        return AutoModelForCausalLM.from_pretrained(BASE, attn_implementation=attention)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"vocab_size": 158, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        model = GPT2LMHeadModel(GPT2Config(**shape, **dropout, **ends, initializer_range=0.2))
    model.set_attn_implementation(attention)
    return model


def write_heads(name, folder):
    """Heads for a base, each moved from the copy it starts as, so that a mix-up of horizons shows."""
    backbone = Backbone.of(load_base(name))
    heads = AuxiliaryHeads.build(backbone, HeadsConfig(HEADS))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_heads(folder, heads, backbone, AutoTokenizer.from_pretrained(BASE))
    return str(folder)


def write_llama(folder, *, is_tied):
    """Write the embedded Llama, with tied embeddings or with two matrices of the same values, and `folder`-heads for it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.config.tie_word_embeddings = is_tied
    base = LlamaForCausalLM(model.config)
    base.load_state_dict(state)
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    backbone = Backbone.of(AutoModelForCausalLM.from_pretrained(folder))
    save_heads(f"{folder}-heads", AuxiliaryHeads.build(backbone, HeadsConfig(2)), backbone, tokenizer)


def write_biased(folder):
    """Write a Qwen2, whose attention has biases, of two layers with the demo's tokenizer; return its name."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=158, num_key_value_heads=1, **shape))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return str(folder)
