"""Every check that needs a GPU, in one short run; writes gpu.json for the table in docs/results.md.

    python benchmarks/gpu.py [--output gpu.json]            on a GPU
    python benchmarks/gpu.py --device cpu --small           a rehearsal without one: the same code on tiny shapes

Checks: loss and gradients against float64 on the CPU, in float32 and bfloat16 and per attention implementation; time and
peak memory of a training step against the forward pass of TRL's own SFTTrainer, interleaved, medians; whole runs of
CAFTTrainer (bfloat16, QLoRA, packing with flash attention, FSDP2, DeepSpeed ZeRO-2) against a run in float32 on the CPU;
labels by padded and by continuous batches.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
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
LIMIT_S = 120
# Name of a trainer run -> (options of CAFTConfig, needs a launcher, a package it needs).
RUNS: dict[str, tuple[dict[str, Any], bool, str | None]] = {
    "float32": ({}, False, None),
    "bfloat16": ({"bf16": True}, False, None),
    "LoRA": ({"lora": True}, False, None),
    "QLoRA": ({"lora": True, "four_bits": True}, False, "bitsandbytes"),
    "packed, flash attention": ({"packing": True, "bf16": True, "flash": True}, False, "flash_attn"),
    "FSDP2": ({"launch": "fsdp2"}, True, None),
    "DeepSpeed ZeRO-2": ({"launch": "zero2"}, True, "deepspeed"),
}
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


def trainer_runs(device: str) -> dict[str, Any]:
    """Each run of RUNS in a process of its own: the largest difference of a loss from the same run on the CPU."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (options, is_launched, package) in RUNS.items():
            if is_launched and device == "cpu":
                results[name] = "not run: needs a GPU"
                continue
            if package and importlib.util.find_spec(package) is None:
                results[name] = f"not run: needs {package}"
                continue
            # Compared with their own kind on the CPU: other trained weights, other batches, other weights of the base.
            plain = {key: options[key] for key in ("lora", "packing", "four_bits") if key in options}
            found, expected = _losses(folder, device, options), _losses(folder, "cpu", plain)
            if isinstance(found, str) or isinstance(expected, str):
                results[name] = found if isinstance(found, str) else expected
                continue
            pairs = [(a, b) for one, two in zip(found, expected, strict=True) for a, b in zip(one, two, strict=True)]
            results[name] = {"largest_loss_difference_nats": max(abs(a - b) for a, b in pairs)}
    return results


def labels(device: str) -> dict[str, Any]:
    """Greedy answers of the embedded base by each way of batching: seconds, and how many are those of the CPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from caftune.demo.chemistry import molecules, prompt
    from caftune.demo.run import BASE
    from caftune.generation import Sampling, transformers_backend
    from caftune.prompts import Conversation

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    drawn = molecules(64 if device == "cpu" else 1024, seed=7, substituents=(2, 4))
    prompts = [Conversation(text=prompt(m)).prompt(0, [], tokenizer) for m in drawn]
    results: dict[str, Any] = {"prompts": len(prompts)}
    expected: dict[int, Any] = {}
    for where, batching in (("cpu", "static"), (device, "static"), (device, "continuous")):
        model: Any = AutoModelForCausalLM.from_pretrained(BASE).to(where).eval()
        backend = transformers_backend(model, tokenizer, Sampling(64, temperature=0), batching=batching)
        dict(backend(prompts[:8], [0] * 8))  # warm
        start = time.perf_counter()
        found = dict(backend(prompts, [0] * len(prompts)))
        seconds = time.perf_counter() - start
        expected = expected or found
        same = sum(found[i].ids == expected[i].ids for i in expected)
        results[f"{where}, {batching}"] = {"seconds": seconds, "same_as_cpu": same}
    return results


def _losses(folder: str, device: str, options: dict[str, Any]) -> list[list[float]] | str:
    """Run `train_once` in a process, under accelerate's launcher where asked; what it printed last where it failed."""
    output = Path(folder, "losses.json")
    output.unlink(missing_ok=True)
    launcher = [sys.executable]
    if "launch" in options:
        configs = Path(__file__).parents[1] / "recipes" / "accelerate"
        file = str(configs / f"{options['launch']}.yaml")
        launcher += ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", "1"]
    command = [*launcher, __file__, "--device", device, "--once", json.dumps(options), "--output", str(output)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"failed: not done after {LIMIT_S} s"
    return json.loads(output.read_text()) if output.is_file() else f"failed: {run.stderr.strip()[-300:]}"


def train_once(device: str, options: dict[str, Any], output: Path) -> None:
    """Four steps of stage 2 on the embedded base with untrained heads; writes each step's losses, by horizon."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from caftune.demo.chemistry import completion, molecules, prompt
    from caftune.demo.run import BASE

    drawn = molecules(64, seed=7, substituents=(0, 2))
    rows = Dataset.from_list([{"prompt": prompt(m), "completion": completion(m)} for m in drawn])
    with tempfile.TemporaryDirectory() as folder:
        backbone = caftune.Backbone.of(AutoModelForCausalLM.from_pretrained(BASE))
        heads = caftune.AuxiliaryHeads.build(backbone, caftune.HeadsConfig(2))
        caftune.save_heads(f"{folder}/heads", heads, backbone, AutoTokenizer.from_pretrained(BASE))
        args = caftune.CAFTConfig(
            f"{folder}/run",
            heads=f"{folder}/heads",
            **{
                "bf16": options.get("bf16", False),
                "use_cpu": device == "cpu",
                "packing": options.get("packing", False),
            },
            **{"max_steps": 4, "logging_steps": 1, "learning_rate": 1e-3, "max_length": 128, "aux_weight": 1.0},
            **{"report_to": [], "disable_tqdm": True, "save_strategy": "no", "dataloader_pin_memory": False},
            model_init_kwargs={"attn_implementation": "flash_attention_2"} if options.get("flash") else None,
        )
        four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16")
        trainer = caftune.CAFTTrainer(
            str(BASE),
            args,
            train_dataset=rows,
            peft_config=LoraConfig(r=4, target_modules="all-linear") if options.get("lora") else None,
            quantization_config=four_bits if options.get("four_bits") else None,
        )
        trainer.train()
        trainer.export(f"{folder}/model")
        AutoModelForCausalLM.from_pretrained(f"{folder}/model")
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        if trainer.is_world_process_zero():
            output.write_text(json.dumps([[entry[f"h{h}_loss"] for h in (1, 2, 3)] for entry in logs]))


def main() -> None:
    """Parse the options, run every check, write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--once", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        train_once(options.device, json.loads(options.once), options.output)
        return
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
        "labels": labels(options.device),
        "trainer": trainer_runs(options.device),
    }
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    print(options.output.read_text())


if __name__ == "__main__":
    main()
