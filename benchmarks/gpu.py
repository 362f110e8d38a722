"""Every check that needs a GPU, in one short run; writes gpu.json for the table in docs/results.md.

    python benchmarks/gpu.py [--output gpu.json]            on a GPU
    python benchmarks/gpu.py --device cpu --small           a rehearsal without one: the same code on tiny shapes

Checks: loss and gradients against float64 on the CPU, in float32 and bfloat16 and per attention implementation; time and
peak memory of a training step against the forward pass of TRL's own SFTTrainer, interleaved, medians.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl.trainer.utils import add_fused_lm_head

import caftune

ROUNDS = 5
PAPER = caftune.AuxiliaryWeights()


def shape(small: bool) -> dict[str, int]:
    """A trunk of the width of a 1.7B model with few layers; tiny for a rehearsal."""
    if small:
        return {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 512,
        }
    return {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "vocab_size": 151936,
    }


def model_of(small: bool, attention: str, num_heads: int) -> tuple[Any, caftune.AuxiliaryHeads | None]:
    """A model with random weights, the same for every call, and its heads."""
    torch.manual_seed(0)
    config = Qwen3Config(**shape(small), num_key_value_heads=4, head_dim=shape(small)["hidden_size"] // 16 or 16)
    config._attn_implementation = attention
    model = Qwen3ForCausalLM(config)
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    if num_heads == 0:
        return model, None
    backbone = caftune.Backbone.of(model)
    heads = caftune.AuxiliaryHeads.build(backbone, caftune.HeadsConfig(num_heads))
    caftune.attach_heads(backbone, heads)
    heads.requires_grad_(False)
    return model, heads


def batch_of(small: bool, device: str) -> dict[str, torch.Tensor]:
    """Random tokens, the first half of each row unlabelled."""
    rows, tokens = (2, 32) if small else (4, 1024)
    ids = torch.randint(0, shape(small)["vocab_size"], (rows, tokens), generator=torch.Generator().manual_seed(1)).to(
        device
    )
    labels = ids.clone()
    labels[:, : tokens // 2] = -100
    return {"input_ids": ids, "labels": labels}


def loss_of(model: Any, heads: caftune.AuxiliaryHeads | None, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """L_1 as SFTTrainer computes it, and the auxiliary losses where there are heads."""
    if heads is None:
        return model(**batch, fused_lm_head=True, use_cache=False).loss
    outputs = model(**batch, fused_lm_head=True, use_cache=False, auxiliary="add")
    scores = outputs["auxiliary"]
    weights = PAPER.at(0, 100, heads.config.horizons)
    return outputs.loss + caftune.auxiliary_loss(scores["nll"], scores["count"], weights)


def correctness(device: str, attention: str, dtype: torch.dtype) -> dict[str, float]:
    """Largest relative error of loss and trunk gradient against float64 on the CPU, on the tiny shape."""
    results = []
    for where, kind in (("cpu", torch.float64), (device, dtype)):
        model, heads = model_of(True, "eager" if where == "cpu" else attention, 4)
        model.to(where, kind)
        loss = loss_of(model, heads, batch_of(True, where))
        loss.backward()
        gradient = torch.cat([p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None])
        results.append((loss.item(), gradient))
    (exact, gradient), (found, other) = results
    return {
        "loss_error": abs(found - exact) / abs(exact),
        "gradient_error": float((other - gradient).norm() / gradient.norm()),
    }


def step_cost(device: str, small: bool) -> dict[str, dict[str, float]]:
    """Median time and peak memory of forward, backward and AdamW in bfloat16 autocast: next-token, and CAFT with K = 4."""
    steps: dict[str, Callable[[], float]] = {}
    for name, num_heads in (("next-token", 0), ("caft", 4)):
        model, heads = model_of(small, "sdpa", num_heads)
        model.to(device).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        steps[name] = _step(model, heads, optimizer, batch_of(small, device), device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, float] = {}
    for round_number in range(ROUNDS + 1):
        for name, step in steps.items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            seconds = step()
            if round_number > 0:
                times[name].append(seconds)
            if device == "cuda":
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return {
        name: {"median_s": statistics.median(times[name]), "peak_gib_beyond_state": peaks.get(name, -1)}
        for name in steps
    }


def _step(model: Any, heads: Any, optimizer: torch.optim.Optimizer, batch: Any, device: str) -> Callable[[], float]:
    def step() -> float:
        _synchronize(device)
        start = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = loss_of(model, heads, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _synchronize(device)
        return time.perf_counter() - start

    return step


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Parse the options, run every check, write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; rehearse with --device cpu --small")
    attentions = ["eager", "sdpa"] + (["flash_attention_2"] if transformers.utils.is_flash_attn_2_available() else [])
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    pairs = [(a, k) for a in attentions for k in kinds if (a, k) != ("flash_attention_2", "float32")]
    results = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
        "small": options.small,
        "correctness": {f"{a}, {k}": correctness(options.device, a, kinds[k]) for a, k in pairs},
        "step": step_cost(options.device, options.small),
    }
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    print(options.output.read_text())


if __name__ == "__main__":
    main()
