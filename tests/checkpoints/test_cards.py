"""Model cards: of heads what they are and how good, of a fine-tuned model what it was made with."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from trainers import config

from caftune import CAFTTrainer
from caftune.checkpoints.cards import heads_card, read_quality
from caftune.checkpoints.quality_card import quality_table
from caftune.demo.run import BASE
from caftune.files import file_sha256, write_json

QUALITY = {
    "targets": {"2": 1200, "3": 1100},
    "positions": 64,
    "heads": {
        "loss": {"2": 1.234, "3": 2.345},
        "top1": {"2": 0.5, "3": 0.25},
        "top5": {"2": 0.75, "3": 0.625},
        "agreement": {"2": 0.4, "3": 0.3},
        "accepted_length": 0.875,
    },
    "untrained": {
        "loss": {"2": 7.0, "3": 8.0},
        "top1": {"2": 0.1, "3": 0.05},
        "top5": {"2": 0.2, "3": 0.15},
        "agreement": {"2": 0.02, "3": 0.01},
        "accepted_length": 0.125,
    },
    "trunk": {"loss": {"2": 0.5, "3": 0.55}, "top1": {"2": 0.9, "3": 0.89}, "top5": {"2": 0.99, "3": 0.98}},
}


@pytest.fixture
def folder(heads, tmp_path):
    shutil.copytree(heads, tmp_path / "heads")
    return tmp_path / "heads"


def card(folder):
    return ModelCard(heads_card(folder, "owner/heads", licence="mit"))


def describe(folder, **changes):
    path = folder / "heads.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_report_of_quality_is_a_table_of_horizons_and_kinds():
    lines = quality_table(QUALITY)
    assert lines[:2] == ["| | h = 2 | h = 3 |", "|---|---|---|"]
    assert "| loss, nats: heads | 1.234 | 2.345 |" in lines
    assert "| loss, nats: the model, one token before | 0.500 | 0.550 |" in lines
    assert "| top-1, %: untrained copies | 10.0 | 5.0 |" in lines
    assert "| top-5, %: heads | 75.0 | 62.5 |" in lines
    assert "| agreement, %: heads | 40.0 | 30.0 |" in lines
    assert not [line for line in lines if line.startswith("| agreement, %: the model,")]


def test_a_report_of_quality_says_how_it_was_measured():
    said = quality_table(QUALITY)[-1]
    assert "1,200 targets at h = 2" in said
    assert "over 64 positions" in said
    assert "0.88 of the 2 guesses would be accepted on average (untrained copies: 0.12)" in said


def test_the_card_of_measured_heads_holds_the_table(folder):
    quality = {**QUALITY, "weights_sha256": json.loads((folder / "heads.json").read_text())["weights_sha256"]}
    write_json(folder / "quality.json", quality)
    assert read_quality(folder) == quality
    assert "\n".join(quality_table(QUALITY)) in card(folder).text


def test_a_report_of_other_heads_is_left_out(folder):
    write_json(folder / "quality.json", {**QUALITY, "weights_sha256": "0" * 64})
    assert read_quality(folder) is None
    assert "Quality" not in card(folder).text


def test_heads_that_were_never_measured_have_a_card_without_quality(folder):
    assert "Quality" not in card(folder).text


def test_the_card_of_heads_says_what_was_not_recorded(folder):
    text = card(folder).text
    assert "- **trained on**: not recorded" in text
    assert "- **revision of the base**: not recorded" in text


def test_a_base_that_is_a_folder_of_this_machine_is_not_linked(folder):
    assert card(folder).data.base_model is None


def test_a_base_that_is_on_the_hub_is_linked_with_its_revision(folder):
    base = json.loads((folder / "heads.json").read_text())["base"]
    describe(folder, base=base | {"name": "owner/base", "revision": "f" * 40})
    found = card(folder)
    assert found.data.base_model == "owner/base"
    assert f"- **revision of the base**: {'f' * 40}" in found.text


def test_a_value_of_several_lines_stays_in_its_place(folder):
    training = json.loads((folder / "heads.json").read_text())["training"]
    describe(folder, training=training | {"command": "caftune pretrain-heads\n# Heading\na.yaml"})
    assert "- **command**: `caftune pretrain-heads # Heading a.yaml`\n" in card(folder).text


@pytest.fixture(scope="module")
def models(heads, rows, tmp_path_factory):
    """Fine-tuned with heads, and plainly."""
    folder = tmp_path_factory.mktemp("models")
    for name, options in {"caft": {"heads": heads, "aux_weight": 0.02}, "plain": {"aux_weight": 0}}.items():
        args = config(folder / "out", max_steps=2, **options)
        trainer = CAFTTrainer(str(BASE), args, train_dataset=rows)
        trainer.train()
        trainer.export(folder / name)
    return {name: ModelCard.load(folder / name / "README.md") for name in ("caft", "plain")}


def test_the_card_of_a_model_names_its_base_its_settings_and_its_heads(models, heads):
    text = models["caft"].text
    assert f"- **base**: {BASE.name}" in text
    assert "steps 2, learning_rate 0.001" in text
    assert "- **weights**: float32, as the base was published" in text
    assert "aux_weight 0.02, aux_decay 0.8, aux_schedule reflected_sine, train_heads True" in text
    assert "- **auxiliary heads**: 3 (decoder), not part of this checkpoint" in text
    assert file_sha256(Path(heads, "heads.safetensors")) in text
    assert models["caft"].data.tags == ["caftune", "caft"]


def test_the_card_of_a_plainly_tuned_model_speaks_of_no_heads(models):
    text = models["plain"].text
    assert "- **auxiliary heads**: none (plain next-token fine-tuning)" in text
    assert "aux_" not in text
    assert "concept-aware" not in text
    assert models["plain"].data.tags == ["caftune", "sft"]
