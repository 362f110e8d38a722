"""Kill `caftune train` with SIGKILL at random moments, start it again each time, and compare with a run left alone.

    python tests/kills.py --kills 20 [--seed 0] [--folder DIR]

Every run trains with dropout, trained heads and a checkpoint at every step, so that many kills fall into the writing of one;
every other run is LoRA, the rest full fine-tuning. Prints one line per kill; exits with 1 if a final weight or a logged loss
differs in a bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from caftune import AuxiliaryHeads, Backbone, HeadsConfig, save_heads
from caftune.demo.chemistry import completion, molecules, prompt
from caftune.demo.run import BASE
from caftune.files import file_sha256

STEPS = 24
LIMIT_S = 240
AFTER = "after its end"  # which counts as no kill


def prepare(folder: Path) -> None:
    """Data, heads and one recipe per tuning."""
    rows = [{"prompt": prompt(m), "completion": completion(m)} for m in molecules(24, seed=7, substituents=(0, 2))]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    backbone = Backbone.of(AutoModelForCausalLM.from_pretrained(BASE))
    heads = AuxiliaryHeads.build(backbone, HeadsConfig(2))
    save_heads(folder / "heads", heads, backbone, AutoTokenizer.from_pretrained(BASE))
    for tuning in ("full", "lora"):
        recipe = {
            "output": str(folder / tuning),
            "model": {"name": str(BASE), "tuning": tuning, "lora": {"r": 4, "dropout": 0.1}},
            "heads": {"path": str(folder / "heads"), "train": True},
            "data": {"train": str(folder / "rows.jsonl"), "max_length": 128},
            "trainer": {
                **{"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "use_cpu": True},
                **{"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "logging_steps": 1},
                "gradient_checkpointing": False,
            },
        }
        (folder / f"{tuning}.yaml").write_text(yaml.safe_dump(recipe))


def start(folder: Path, tuning: str, output: Path) -> subprocess.Popen:
    """`caftune train` in a process group of its own."""
    command = [sys.executable, "-m", "caftune.cli", "train", str(folder / f"{tuning}.yaml"), f"output={output}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = output.with_suffix(".log").open("a")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def finish(process: subprocess.Popen, output: Path) -> None:
    """Wait for the end; raise with what it printed where it failed."""
    if process.wait(LIMIT_S) != 0:
        raise RuntimeError(f"caftune train failed:\n{output.with_suffix('.log').read_text()[-3000:]}")


def result(output: Path) -> tuple[str, str, list[dict[str, float]]]:
    """Hash of the exported model, hash of the trained heads, and what was logged at every step."""
    log = json.loads((output / "results.jsonl").read_text())["log"]
    steps = [
        {key: entry[key] for key in entry if key.endswith(("loss", "grad_norm"))} for entry in log if "loss" in entry
    ]
    heads = output / "train" / f"checkpoint-{STEPS}" / "heads" / "heads.safetensors"
    return file_sha256(output / "model" / "model.safetensors"), file_sha256(heads), steps


def kill_once(folder: Path, tuning: str, output: Path, draw: random.Random) -> str:
    """Kill a run, one time in seven in its start, else at a random moment of a random step still to come. Returns where."""
    process = start(folder, tuning, output)
    if draw.random() < 1 / 7:
        time.sleep(draw.uniform(0, 8))
    else:
        step = draw.randint(min(_newest(output) + 1, STEPS), STEPS)
        _wait_for(step, process, output)
        time.sleep(draw.uniform(0, 0.1))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    found = sorted((int(path.name.rpartition("-")[2]), path) for path in output.glob("train/checkpoint-*"))
    whole = [number for number, path in found if (path / "trainer_state.json").is_file()]
    half = [number for number, path in found if number not in whole]
    state = f"checkpoints {whole}" + (f", half of {half}" if half else "")
    return AFTER if (output / "results.jsonl").is_file() else state


def _wait_for(step: int, process: subprocess.Popen, output: Path) -> None:
    """Wait until the checkpoint of `step` is begun."""
    begun = time.monotonic()
    while process.poll() is None and _newest(output) < step:
        if time.monotonic() - begun > LIMIT_S:
            raise RuntimeError(f"step {step} was not reached")
        time.sleep(0.002)


def _newest(output: Path) -> int:
    return max((int(path.name.rpartition("-")[2]) for path in output.glob("train/checkpoint-*")), default=0)


def main() -> None:
    """Parse the options, run the kills, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder)
        expected = {}
        for tuning in ("full", "lora"):
            finish(start(folder, tuning, folder / f"{tuning}-alone"), folder / f"{tuning}-alone")
            expected[tuning] = result(folder / f"{tuning}-alone")
        draw, kills, trial, differing = random.Random(options.seed), 0, 0, 0
        while kills < options.kills:
            tuning = ("full", "lora")[trial % 2]
            output = folder / f"{tuning}-{trial}"
            for _ in range(draw.choice([1, 1, 2])):  # sometimes the resumed run is killed too
                where = kill_once(folder, tuning, output, draw)
                kills += where != AFTER
                print(
                    f"{tuning}, killed {where}" if where == AFTER else f"{kills}: {tuning}, killed at {where}",
                    flush=True,
                )
            finish(start(folder, tuning, output), output)
            is_same = result(output) == expected[tuning]
            differing += not is_same
            print(f"    resumed: {'identical' if is_same else 'DIFFERENT'}", flush=True)
            trial += 1
    print(f"{kills} kills in {trial} runs, {trial - differing} identical to the run left alone.")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
