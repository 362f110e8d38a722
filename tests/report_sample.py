"""A comparison as `caftune compare` writes it: numbers as they might be, only the shape is that of real runs."""

import json
import math
import random
from statistics import fmean, stdev
from typing import Any

ARMS = ["ntp", "caft", "beta0", "random_heads"]
_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided 95%, by number of runs
_TASK = {
    "exact_match": 0.221,
    "exact_match_inchi": 0.235,
    "valid": 0.934,
    "levenshtein": 9.4,
    "morgan": 0.61,
    "maccs": 0.78,
    "rdk": 0.69,
    "bleu": 0.81,
    "benzene_precision": 0.94,
    "benzene_recall": 0.91,
    "benzene_f1": 0.925,
    "amide_precision": 0.88,
    "amide_recall": 0.8,
    "amide_f1": 0.838,
    "carboxylic_acid_precision": 0.9,
    "carboxylic_acid_recall": 0.85,
    "carboxylic_acid_f1": 0.874,
    "fragments_micro_f1": 0.86,
    "fragments_macro_f1": 0.55,
    "exact_match, concept-dense": 0.164,
    "exact_match, concept-light": 0.268,
}
_GROUPS = ["fr_benzene", "fr_halogen", "fr_ether", "fr_amide", "fr_COO", "fr_Al_OH", "fr_NH2", "fr_nitro", "fr_ester"]
_NAMES = [*_GROUPS, "fr_ketone", "fr_nitrile", "fr_methoxy"]
_GAIN = {"base": -0.3, "ntp": 0.0, "caft": 0.06, "beta0": 0.0, "random_heads": 0.012}
_PROMPT = "Name: 4-acetamido-2-(methoxycarbonyl)benzoic acid\nSMILES: "
_REFERENCE = "CC(=O)Nc1ccc(C(=O)O)c(C(=O)OC)c1"


def sample(*, seeds: int = 5, arms: list[str] | None = None) -> dict[str, Any]:
    """A comparison with this many seeds."""
    names, draw = arms or ARMS, random.Random(7)
    measures = []
    for measure, value in _TASK.items():
        for arm in ["base", *names]:
            gain = -_GAIN.get(arm, 0.0) * 4 if measure == "levenshtein" else _GAIN.get(arm, 0.0) * min(value, 1 - value)
            count, noise = (1 if arm == "base" else seeds), 0.3 if measure == "levenshtein" else 0.006
            measures.append(row("molecules", measure, arm, [value + gain + draw.gauss(0, noise) for _ in range(count)]))
    for arm in names:
        gain = _GAIN.get(arm, 0.0)
        measures.append(
            row("held-out text", "loss", arm, [0.4123 - gain / 8 + draw.gauss(0, 0.002) for _ in range(seeds)])
        )
        for measure, value in (("probability", 0.72), ("exact", 0.78)):
            measures.append(
                row("concepts", measure, arm, [value + gain / 2 + draw.gauss(0, 0.004) for _ in range(seeds)])
            )
    return {
        "format": 1,
        "title": "names",
        "recipe": {
            "output": "runs/names",
            "seed": 42,
            "model": {"name": "demo", "tuning": "full"},
            "labels": {"backend": "server", "server": {"url": "https://key@host/v1", "concurrency": 16}},
            "loss": {"weight": 0.01, "decay": 0.8, "schedule": "reflected_sine"},
            "trainer": {"learning_rate": 0.0005, "num_train_epochs": 2},
        },
        "arms": names,
        "seeds": list(range(42, 42 + seeds)),
        "missing": [],
        "tasks": [{"name": "molecules", "primary": "exact_match", "examples": 400, "lower_is_better": ["levenshtein"]}],
        "measures": measures,
        "comparisons": comparisons(measures, names) if seeds > 1 else [],
        "verdict": "CAFT helped: exact_match on molecules +1.9 percentage points (95% interval +1.6 to +2.1) compared with "
        "next-token fine-tuning.",
        "remarks": [
            "CAFT compared with random_heads: exact_match on molecules +2.0 percentage points (95% interval +1.2 to +2.8); the "
            "difference is significant.",
            "All arms started from the same state: their losses at the first step agree to a relative difference of 1e-09.",
            "A training step of CAFT took 1.31 times the time, 1.24 times the FLOPs of next-token fine-tuning.",
        ],
        "costs": {arm: _costs(arm, seeds) for arm in names},
        "plans": {arm: _plan(arm, seeds) for arm in names},
        "device": "cpu",
        "logs": {arm: [_log(arm, draw) for _ in range(seeds)] for arm in names},
        "concepts": {"kind": "smiles", "arms": {arm: _concepts(arm, seeds, draw) for arm in names}},
        "examples": [_example(number, names) for number in range(8)],
        "checks": {"start": 1e-9, "beta0": 0, "answers": 2000},
        "quality": _quality(),
        "provenance": {
            "command": "caftune compare names.yaml labels.server.url=https://key@host/v1",
            "time": "2026-05-04T10:11:12+00:00",
            "versions": {"python": "3.12.3", "caftune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            "git": "551f26000000000000000000000000000000abcd",
            "device": "cpu",
            "data": {"train": "ab" * 32, "eval": "cd" * 32},
            "heads": {"weights_sha256": "ef" * 32, "training": {"steps": 120, "data": {"rows": 600}}},
        },
    }


def small(*, seeds: int = 5) -> dict[str, Any]:
    """The sample with no pictures but the first, which take long."""
    found = sample(seeds=seeds)
    kept = [row for row in found["measures"] if not row["measure"].endswith(("_precision", "_recall", "f1"))]
    return {**found, "measures": kept, "logs": {}, "concepts": None, "quality": None}


def row(task: str, measure: str, arm: str, values: list[float]) -> dict[str, Any]:
    half = _T[len(values)] * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"task": task, "measure": measure, "arm": arm, "values": values, "mean": fmean(values), "half": half}


def comparisons(measures: list[dict[str, Any]], arms: list[str]) -> list[dict[str, Any]]:
    """Differences with plain paired intervals, and p-values of a normal approximation: enough for a picture."""
    table = {(item["task"], item["measure"], item["arm"]): item["values"] for item in measures}
    found = []
    pairs = [(arm, "ntp") for arm in arms if arm != "ntp"] + [
        ("caft", arm) for arm in arms if arm not in ("ntp", "caft")
    ]
    for task, measure in dict.fromkeys(key[:2] for key in table):
        for arm, baseline in pairs:
            if baseline != "ntp" and measure != "exact_match":
                continue
            apart = [a - b for a, b in zip(table[task, measure, arm], table[task, measure, baseline], strict=True)]
            error = stdev(apart) / math.sqrt(len(apart))
            p = math.erfc(abs(fmean(apart)) / error / math.sqrt(2)) if error else 1.0
            found.append(
                {
                    **{"task": task, "measure": measure, "arm": arm, "baseline": baseline, "difference": fmean(apart)},
                    **{"low": fmean(apart) - 2.776 * error, "high": fmean(apart) + 2.776 * error, "p_value": p},
                    **{
                        "p_holm": min(1.0, 24 * p),
                        "effect_size": None,
                        "minimum_detectable": 3.9 * error,
                        "over": "runs",
                    },
                }
            )
    return found


def _costs(arm: str, seeds: int) -> dict[str, list[float | None]]:
    ratio = 1.0 if arm == "ntp" else 1.24
    return {
        "tokens": [183_204] * seeds,
        "flops": [1.02e12 * ratio] * seeds,
        "seconds": [20.4 * ratio + 0.1 * seed for seed in range(seeds)],
        "peak_memory_bytes": [None] * seeds if arm == "beta0" else [1.1 * 2**30 * ratio] * seeds,
        "memory_before_bytes": [2**29] * seeds,
    }


def _plan(arm: str, seeds: int) -> dict[str, list[float]]:
    ratio = 1.0 if arm == "ntp" else 1.2
    return {
        "flops_per_token": [5.2e6 * ratio] * seeds,
        "overhead": [ratio] * seeds,
        "peak_memory_bytes": [600 * 2**20 * ratio] * seeds,
    }


def _log(arm: str, draw: random.Random) -> list[dict[str, float]]:
    log: list[dict[str, float]] = []
    for step in [1, *range(10, 190, 10)]:
        own = 0.35 + 1.4 * math.exp(-step / 40) - _GAIN.get(arm, 0.0) / 4 * step / 190 + draw.gauss(0, 0.012)
        entry = {"step": step, "epoch": step / 95, "loss": own, "learning_rate": 5e-4}
        if arm != "ntp":
            entry["main_loss"] = entry["h1_loss"] = own
            for h in range(2, 6):
                late = 0.9 if arm == "random_heads" else 0.3
                entry[f"h{h}_loss"] = own + late * (h - 1) ** 0.7 + draw.gauss(0, 0.015)
                entry[f"h{h}_accuracy"] = 0.8 - 0.1 * h
                weight = 0.0 if arm == "beta0" else 0.01 * 0.8 ** (h - 1)
                entry[f"h{h}_weight"] = weight * math.sin((190 - step) / 190 * math.pi / 2)
        log.append(entry)
    log.append({"step": 190, "epoch": 2.0, "eval_loss": 0.41})
    return [*log, {"step": 190, "epoch": 2.0, "train_runtime": 20.0, "train_loss": 0.6}]


def _concepts(arm: str, seeds: int, draw: random.Random) -> dict[str, Any]:
    gain = _GAIN.get(arm, 0.0) / 2

    def part(value: float) -> dict[str, list[float]]:
        return {
            "probability": [value + gain + draw.gauss(0, 0.006) for _ in range(seeds)],
            "exact": [value + 0.06 + gain + draw.gauss(0, 0.006) for _ in range(seeds)],
        }

    sizes = {str(n): {"count": 900 // n, **part(0.9 - 0.05 * n)} for n in (2, 3, 4, 5, 7, 10)}
    names = {name: {"count": 320 - 25 * i, **part(0.86 - 0.03 * i)} for i, name in enumerate(_NAMES)}
    return {**part(0.72), "by_tokens": sizes, "by_name": names}


def _example(number: int, arms: list[str]) -> dict[str, Any]:
    answers = {}
    for place, arm in enumerate(arms):
        is_right = (number + place) % 3 == 1
        text = _REFERENCE if is_right else _REFERENCE.replace("OC)c1", "O)c1")
        answers[arm] = {"text": text, "concepts": [[0, 6], [6, 12], [12, 19], [9, 14]], "score": float(is_right)}
    reference = {"text": _REFERENCE, "concepts": [[0, 7], [12, 19], [20, 29]]}
    return {"task": "molecules", "id": str(number), "prompt": _PROMPT, "reference": reference, "answers": answers}


def _quality() -> dict[str, Any]:
    horizons = range(2, 6)
    found: dict[str, Any] = {"targets": {str(h): 12_000 - 300 * h for h in horizons}, "positions": 512}
    for kind, shift in (("heads", 0.55), ("untrained", 2.4), ("trunk", 0.0)):
        found[kind] = {
            "loss": {str(h): 0.4 + shift * (h - 1) ** 0.5 for h in horizons},
            "top1": {str(h): 0.88 - 0.2 * shift - 0.03 * h for h in horizons},
            "top5": {str(h): 0.97 - 0.15 * shift - 0.02 * h for h in horizons},
        }
        if kind != "trunk":
            found[kind] |= {"agreement": {str(h): 0.8 - 0.22 * shift - 0.03 * h for h in horizons}}
            found[kind]["accepted_length"] = 2.61 if kind == "heads" else 0.42
    return {**found, "weights_sha256": "ef" * 32}


def write_sample(folder: Any, found: dict[str, Any]) -> Any:
    """Put a comparison where `caftune compare` puts it. Returns the run folder."""
    (folder / "compare").mkdir(parents=True)
    (folder / "compare" / "comparison.json").write_text(json.dumps(found), encoding="utf-8")
    return folder


def single_run(folder: Any, weight: float = 0.01) -> Any:
    """What `caftune train` and `caftune eval` leave in a run folder, which is returned."""
    log = sample()["logs"]["caft"][0]
    eval_row = {"examples": 2, "runs": 1, "unfinished": 0, "task": "gsm8k"}
    rows = [
        {"stage": "pretrain-heads", "rows": 9, "metrics": {}, "quality": sample()["quality"]},
        {"stage": "train", "rows": 9, "metrics": {"loss": 1.25, "h1_loss": 1.25}, "log": log}
        | {
            "costs": {
                "tokens": 1000,
                "flops": None,
                "seconds": 2.5,
                "peak_memory_bytes": 2**31,
                "memory_before_bytes": 2**29,
            }
        }
        | {"plan": {name: values[0] for name, values in _plan("caft", 1).items()}},
        {"stage": "eval model gsm8k", "model": "model", "measures": {"accuracy": [0.5]}, **eval_row},
        {"stage": "eval base gsm8k", "model": "base", "measures": {"accuracy": [0.25]}, **eval_row},
    ]
    (folder / "train").mkdir(parents=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "train" / "recipe.yaml").write_text(f"seed: 42\nloss: {{weight: {weight}}}\n")
    (folder / "train" / "provenance.json").write_text(json.dumps(sample()["provenance"]))
    for model, answer in (("base", "3"), ("model", "4\u2028<b>")):
        lines = [
            {
                "run": run,
                "id": str(i),
                "prompt": "2 + 2?",
                "reference": {"answer": 4},
                "completion": answer if run == 0 else "no",
            }
            | {"scores": {"accuracy": float(model == "model")}}
            for run in (0, 1)
            for i in range(3)
        ]
        file = folder / "eval" / model / "gsm8k.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return folder
