"""Every check that needs a GPU, in one short run; writes gpu.json for the table in docs/results/gpu.md.

    python benchmarks/gpu.py [--output gpu.json]            on a GPU
    python benchmarks/gpu.py --checks step "trainer F"      only checks whose names begin so
    python benchmarks/gpu.py --device cpu --small           a rehearsal without one: the same code on tiny shapes

Checks: loss and gradients against float64 on the CPU, in float32 and bfloat16 and per attention implementation; time and
peak memory of a training step against the forward pass of TRL's own SFTTrainer, interleaved, medians; whole runs of
CAFTTrainer (bfloat16, QLoRA, packing with flash attention, FSDP2, DeepSpeed ZeRO-2) against a run in float32 on the CPU;
labels by padded and by continuous batches. A check that fails, or has no time left, says so in the results, which are written
after each.
"""

import argparse
import functools
import gc
import importlib.util
import json
import os
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
from caftune.core.objective import HorizonTargets, weights_of_sums

ROUNDS = 5
LIMIT_S = 120  # of one trainer run
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
WEIGHTS = caftune.AuxiliaryWeights(weight=1.0)  # at 0.01 an error of the heads would hardly show beside L_1
NO_TIME = "not run: no time left"


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
    """L_1 as SFTTrainer computes it, and the auxiliary losses, as CAFTTrainer does, where there are heads."""
    if heads is None:
        return model(**batch, fused_lm_head=True, use_cache=False).loss
    horizons = heads.config.horizons
    counts = HorizonTargets.of(batch, horizons).counts_of(horizons).to(batch["labels"].device)
    weights = weights_of_sums(WEIGHTS.at(0, 100, horizons), counts)
    outputs = model(**batch, fused_lm_head=True, use_cache=False, auxiliary="add", auxiliary_weights=weights)
    return outputs.loss + outputs["auxiliary"]["loss"]


def correctness(device: str, attention: str, dtype: torch.dtype) -> dict[str, float]:
    """Largest relative error of loss and trunk gradient against float64 on the CPU, on the tiny shape."""
    results = []
    for where, kind, implementation in (("cpu", torch.float64, "eager"), (device, dtype, attention)):
        model, heads = model_of(True, implementation, 4)
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


def trainer_run(name: str, device: str, until: float) -> dict[str, float] | str:
    """A run of RUNS in a process of its own: the largest difference of a loss from the same run on the CPU."""
    options, is_launched, package = RUNS[name]
    if is_launched and device == "cpu":
        return "not run: needs a GPU"
    if package and importlib.util.find_spec(package) is None:
        return f"not run: needs {package}"
    # Compared with their own kind on the CPU: other trained weights, other batches, other weights of the base.
    plain = {key: options[key] for key in ("lora", "packing", "four_bits") if key in options}
    found = _losses(device, json.dumps(options), until)
    expected = found if isinstance(found, str) else _losses("cpu", json.dumps(plain), until)
    if isinstance(found, str) or isinstance(expected, str):
        return found if isinstance(found, str) else f"on the CPU {expected}"
    pairs = [(a, b) for one, two in zip(found, expected, strict=True) for a, b in zip(one, two, strict=True)]
    return {"largest_loss_difference_nats": max(abs(a - b) for a, b in pairs)}


def labels(device: str) -> dict[str, Any]:
    """Greedy answers of the embedded base by each way of batching: seconds, and how many are those of the CPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from caftune.data.prompts import Conversation
    from caftune.demo.chemistry import molecules, prompt
    from caftune.demo.run import BASE
    from caftune.generation.backends import Sampling, transformers_backend

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


@functools.cache
def _losses(device: str, options: str, until: float) -> list[list[float]] | str:
    """Run `train_once` in a process, under accelerate's launcher where asked; what it printed last where it failed."""
    limit = min(LIMIT_S, int(until - time.monotonic()))
    if limit <= 0:
        return NO_TIME
    launcher = [sys.executable]
    if "launch" in json.loads(options):
        configs = Path(__file__).parents[1] / "recipes" / "accelerate"
        file = str(configs / f"{json.loads(options)['launch']}.yaml")
        launcher += ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", "1"]
    # bitsandbytes loads 4-bit weights onto a GPU that it sees, whatever use_cpu says.
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    with tempfile.TemporaryDirectory() as folder:
        output, log = Path(folder, "losses.json"), Path(folder, "log")
        command = [*launcher, __file__, "--device", device, "--once", options, "--output", str(output)]
        with log.open("w") as file_of_log:  # a pipe would be waited for as long as any child of the launcher's lives
            run = subprocess.run(
                ["timeout", "--kill-after=40", str(limit), *command],  # SIGTERM first: the launcher ends its children
                stdout=file_of_log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **hidden},
            )
        if run.returncode == 0:
            return json.loads(output.read_text())
        reason = f"not done after {limit} s" if run.returncode in (124, 137) else log.read_text().strip()[-600:]
        return f"failed: {reason}"


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


def checks_of(device: str, small: bool, until: float) -> dict[str, Callable[[], Any]]:
    """Every check by its name, in the order of their weight."""
    attentions = ["eager", "sdpa"] + (["flash_attention_2"] if transformers.utils.is_flash_attn_2_available() else [])
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    pairs = [(a, k) for a in attentions for k in kinds if (a, k) != ("flash_attention_2", "float32")]
    return {
        **{f"correctness {a}, {k}": functools.partial(correctness, device, a, kinds[k]) for a, k in pairs},
        "step": functools.partial(step_cost, device, small),
        **{f"trainer {name}": functools.partial(trainer_run, name, device, until) for name in RUNS},
        "labels": functools.partial(labels, device),
    }


def result_of(check: Callable[[], Any], until: float) -> Any:
    """What a check finds, or in words why it finds nothing."""
    if time.monotonic() >= until:
        return NO_TIME
    try:
        gc.collect()
        torch.cuda.empty_cache()  # for the processes beside this one
        return check()
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"[:600]


def main() -> None:
    """Parse the options, run the checks, write and print each result as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--checks", nargs="+", default=[""], help="how the names of the checks begin; default: all")
    parser.add_argument("--limit-s", type=float, default=540, help="no check begins later, no trainer run goes on")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--once", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        train_once(options.device, json.loads(options.once), options.output)
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; rehearse with --device cpu --small")
    until = time.monotonic() + options.limit_s
    checks = checks_of(options.device, options.small, until)
    chosen = [name for name in checks if name.startswith(tuple(options.checks))]
    if not chosen:
        parser.error(f"--checks must begin names of {', '.join(checks)}, got {' '.join(options.checks)}")
    found: dict[str, Any] = {}
    results = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
        "small": options.small,
        "checks": found,
    }
    for name in chosen:
        found[name] = result_of(checks[name], until)
        print(f"{name}: {found[name]}", flush=True)
        options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
