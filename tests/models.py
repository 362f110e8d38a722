"""Tiny models of many families, built from configurations with a fixed seed: no download.

Some tests also use real models, where they are at hand: a folder for each (`smollm2-135m-instruct`, `gemma3-270m`) in
CAFTUNE_MODELS, by default `models` beside the repository. `fetched` skips a test where its model is absent.
"""

import os
import types
from pathlib import Path

import pytest
import torch
from families import DEPTH, FAMILIES, SPREADS, VOCABULARY, WIDTH, config_of
from transformers import AutoModelForCausalLM

__all__ = ["DEPTH", "FAMILIES", "VOCABULARY", "WIDTH", "build", "config_of", "fetched"]


def fetched(name):
    """The folder of a real model, or a skipped test."""
    folder = Path(os.environ.get("CAFTUNE_MODELS") or Path(__file__).parents[2] / "models") / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"a real model is not here: {folder} does not exist (set CAFTUNE_MODELS)")
    return folder


def build(family="llama", *, dtype=torch.float64, attention="eager", seed=0, spread=None, **changes):
    """A model in eval mode whose weights are `spread` times as wide as at birth, so that errors are not lost in noise."""
    spread = spread or SPREADS.get(family, 12.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = config_of(family, **changes)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("A_log"):  # a state space's decay, which is exponential in it
                    continue
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
