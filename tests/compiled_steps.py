"""Ten steps of unequal lengths under torch_compile, for test_compiled.py: in a process without checked annotations, which torch
cannot trace. Prints, for SFTTrainer and for CAFTTrainer with frozen and with trained heads, the functions that were compiled
again, the graphs and their breaks, and the largest relative difference of a logged number from the run without compilation."""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics
from trainers import OPTIONS
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from caftune import AuxiliaryHeads, Backbone, CAFTConfig, CAFTTrainer, HeadsConfig, save_heads
from caftune.demo.run import BASE

LENGTHS = (9, 14, 11, 17, 8, 21, 12, 19, 10, 16)
RUNS = {"sft": None, "frozen": {"train_heads": False}, "trained": {"train_heads": True}}
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}  # traced by dynamo, run by torch


def load():
    """Two layers of the embedded base."""
    return AutoModelForCausalLM.from_pretrained(BASE, num_hidden_layers=2)


def rows():
    """Two rows a step, of one length, with prompts of unequal lengths."""
    ids = [list(range(3, 3 + length)) for length in LENGTHS for _ in range(2)]
    prompts = [2 + number % 4 for number in range(len(ids))]
    labels = [[-100] * prompt + row[prompt:] for row, prompt in zip(ids, prompts, strict=True)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def logged(heads, own, folder, **options):
    """The loss, gradient norm and horizons' losses of every step."""
    options = {**OPTIONS, "max_steps": len(LENGTHS), "per_device_train_batch_size": 2, **options}
    options |= {"train_sampling_strategy": "sequential"}
    kind, args = SFTTrainer, SFTConfig(folder, **options)
    if own is not None:
        kind, args = CAFTTrainer, CAFTConfig(folder, heads=heads, aux_weight=1.0, **own, **options)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    trainer = kind(load(), args, train_dataset=rows(), processing_class=tokenizer)
    trainer.train()
    names = ("loss", "grad_norm", "h2_loss")
    return [[line[name] for name in names if name in line] for line in trainer.state.log_history if "loss" in line]


def compiled(heads, own, folder):
    """A run with and a run without compilation."""
    torch._dynamo.reset()
    counters.clear()
    clear_compilation_metrics()
    found = logged(heads, own, folder, **COMPILED)
    numbers = [(x.co_name, x.compile_id) for x in get_compilation_metrics() if x.compile_id]
    again = [name for name, number in numbers if int(number.split("/")[1].split("_")[0]) > 0]
    breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
    pairs = zip(found, logged(heads, own, folder), strict=True)
    apart = max(abs(a - b) / abs(b) for one, other in pairs for a, b in zip(one, other, strict=True))
    return {"again": again, "graphs": graphs, "breaks": breaks, "apart": apart}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        backbone, heads = Backbone.of(load()), Path(folder, "heads")
        built = AuxiliaryHeads.build(backbone, HeadsConfig(2))
        save_heads(heads, built, backbone, AutoTokenizer.from_pretrained(BASE))
        found = {name: compiled(str(heads), own, folder) for name, own in RUNS.items()}
    sys.stdout.write(json.dumps(found) + "\n")
