"""The plugin without Axolotl: its section, and the options that it refuses."""

import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from caftune.errors import CaftuneError
from caftune.generation.labels import Label, write_labels
from caftune.integrations.axolotl_section import AxolotlOptions, read_section, refuse_options

PLUGIN = "caftune.integrations.axolotl"


@pytest.mark.parametrize(
    ("section", "options"),
    [
        ({"heads": "h"}, {"heads": "h", "aux_weight": None}),
        ({"heads": "h", "weight": 0}, {"heads": "h", "aux_weight": 0.0}),
        ({"heads": "h", "weight": "1e-2"}, {"heads": "h", "aux_weight": 0.01}),  # YAML 1.1 reads 1e-2 as text
        (
            {"heads": "h", "decay": 0.5, "schedule": "constant", "train": False, "min_weight": 0.001},
            {
                **{"heads": "h", "aux_weight": None, "aux_decay": 0.5, "aux_schedule": "constant"},
                **{"train_heads": False, "aux_min_weight": 0.001},
            },
        ),
        ({"heads": "h", "train_heads": True}, {"heads": "h", "aux_weight": None, "train_heads": True}),
        (
            {"pretrain_heads": True, "num_heads": 2, "head_kind": "mlp", "target_share": 0.25},
            {
                **{"pretrain_heads": True, "num_heads": 2, "head_kind": "mlp"},
                **{"aux_target_share": 0.25, "aux_weight": None},
            },
        ),
    ],
)
def test_a_section_sets_the_options_of_the_trainer(section, options):
    assert read_section(section) == options


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (None, r"caft must be a section \(with heads, .*\), got None\. Remove it"),
        ([], r"caft must be a section .*got \[\]"),
        ({"heds": "h"}, r"caft\.heds is not a key of caft\. Did you mean caft\.heads\?"),
        ({"aux_weight": 1}, r"caft\.aux_weight is not a key of caft\. Did you mean caft\.weight\?"),
        ({"zzz": 1}, r"caft\.zzz is not a key of caft\. Known: heads, "),
        ({1: 1}, r"caft\.1 is not a key of caft"),
        ({"early_stopping_patience": 2}, r"caft\.early_stopping_patience is not a key of caft"),
        ({"heads": "h", "weight": -1}, r"caft\.weight must be greater than or equal to 0, got -1\."),
        ({"heads": "h", "schedule": "up"}, r"caft\.schedule must be 'reflected_sine', .*, got 'up'\."),
        ({"heads": "h", "train": True, "train_heads": False}, r"caft\.train and caft\.train_heads are the same option"),
        ({}, r"caft: heads must name a folder of pretrained heads, got None\. .* or set weight=0"),
        ({"pretrain_heads": True, "weight": 0}, r"caft: weight must be above 0 in stage 1"),
        ({"heads": "h", "train": False, "heads_lora_rank": 8}, r"caft: heads_lora_rank must be None unless"),
    ],
)
def test_a_wrong_section_is_one_error_with_its_place(section, message):
    with pytest.raises(CaftuneError, match=f"^{message}"):
        read_section(section)


def test_the_documents_show_what_the_configurations_of_both_stages_hold():
    root = Path(__file__).parents[2]
    shown = re.findall(
        r"^```yaml\n(.*?)^```$", (root / "docs" / "axolotl.md").read_text(), flags=re.DOTALL | re.MULTILINE
    )
    for stage, text in zip(("stage1", "stage2"), shown, strict=True):
        whole, part = yaml.safe_load((root / "recipes" / "axolotl" / f"{stage}.yaml").read_text()), yaml.safe_load(text)
        assert read_section(whole["caft"])
        assert part["caft"].items() <= whole["caft"].items()
        assert all(whole[key] == value for key, value in part.items() if key != "caft")


def test_the_documents_turn_labels_into_rows_of_tokens(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "axolotl.md").read_text()
    (code,) = re.findall(r"^```py\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    labels = [Label(n, 0, "a", "b", finish, True, [1, 2], [3, 4, 5]) for n, finish in enumerate(("stop", "length"))]
    Path("runs/heads/labels").mkdir(parents=True)
    write_labels(labels, Path("runs/heads/labels/labels.jsonl"))
    exec(code, {})
    (line,) = Path("labels.jsonl").read_text().splitlines()
    expected = {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, 3, 4, 5], "attention_mask": [1] * 5}
    assert json.loads(line) == expected


def test_without_a_section_there_are_no_heads():
    options = AxolotlOptions()
    assert not options.has_heads
    assert options.aux_weight == 0


CONFIGURATION = {
    "attn_implementation": "sdpa",
    "attn_decontaminates_packing": True,
    "adapter": "qlora",
    "load_in_4bit": True,
}


@pytest.mark.parametrize("more", [{}, {"sample_packing": True}, {"deepspeed": {"zero_optimization": {"stage": 2}}}])
def test_what_works_is_not_refused(more):
    refuse_options({**CONFIGURATION, **more}, {})


@pytest.mark.parametrize(
    ("more", "options", "message"),
    [
        ({"rl": "dpo"}, {}, "rl must not be set with a caft section, got 'dpo'"),
        ({"reward_model": True}, {}, "reward_model must not be set"),
        ({"liger_fused_linear_cross_entropy": True}, {}, "liger_fused_linear_cross_entropy must not be set"),
        ({"cut_cross_entropy": True}, {}, "cut_cross_entropy must not be set"),
        ({"chunked_cross_entropy": True}, {}, "chunked_cross_entropy must not be set"),
        ({"activation_offloading": "disk"}, {}, "activation_offloading must not be set .*got 'disk'"),
        ({"pretraining_dataset": [{"path": "x"}]}, {}, "pretraining_dataset must not be set"),
        ({"context_parallel_size": 2}, {}, "context_parallel_size must be 1 with a caft section, got 2"),
        ({}, {"pretrain_heads": True}, "adapter must not be set with caft.pretrain_heads, got 'qlora'"),
        ({"adapter": None}, {"pretrain_heads": True}, "load_in_4bit must not be set with caft.pretrain_heads"),
        (
            {"sample_packing": True, "attn_decontaminates_packing": False, "attn_implementation": None},
            {},
            "sample_packing must be false with attn_implementation=None",
        ),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, {}, "deepspeed must name ZeRO stage 2 or lower"),
        (
            {"fsdp_config": {"cpu_ram_efficient_loading": True}},
            {},
            "fsdp_config.cpu_ram_efficient_loading must be false",
        ),
    ],
)
def test_what_does_not_work_with_heads_is_refused(more, options, message):
    with pytest.raises(CaftuneError, match=f"^{message}"):
        refuse_options({**CONFIGURATION, **more}, options)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_stage_of_zero_is_read_from_the_file_that_deepspeed_names(tmp_path, stage):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    refused = pytest.raises(CaftuneError, match="^deepspeed must name ZeRO stage 2 or lower")
    with refused if stage == 3 else nullcontext():
        refuse_options({**CONFIGURATION, "deepspeed": str(file)}, {})


def test_importing_the_plugin_needs_no_axolotl():
    code = f"import sys; sys.modules['axolotl'] = None; from {PLUGIN} import CAFTPlugin; CAFTPlugin().register({{}})"
    subprocess.run([sys.executable, "-c", code], check=True)
