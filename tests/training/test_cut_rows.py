"""Rows that max_length leaves without a trained token: left out, counted and named, and refused only where they are many."""

import json
import logging
from collections import Counter

import datasets
import pytest
from datasets import Dataset
from opened import adapt_config, head_rows, stage_one_config, stage_two_config, task_rows
from test_pipeline import FAST
from trainers import OPTIONS, config
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from caftune import CAFTConfig, CAFTTrainer
from caftune.demo.chemistry import completion, molecules, prompt
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.pipeline.finetune import finetune_model
from caftune.pipeline.plan import plan
from caftune.pipeline.pretrain import measure_quality, pretrain_heads
from caftune.pipeline.preview import preview_rows
from caftune.pipeline.recipe import load_recipe
from caftune.pipeline.schema import Recipe
from caftune.training.prepare import prepare

LONG = (4, 17)  # of forty rows


def rows_with(long=LONG, count=40):
    rows = [{"prompt": prompt(m), "completion": completion(m)} for m in molecules(count, seed=7, substituents=(0, 2))]
    return [{**row, "prompt": "methyl" * 60 + row["prompt"]} if i in long else row for i, row in enumerate(rows)]


def recipe_in(folder, rows, evaluation=None, **sections):
    files = {"train": rows} | ({"eval": evaluation} if evaluation else {})
    for name, found in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    data = {name: str(folder / f"{name}.jsonl") for name in files}
    return Recipe.model_validate(
        {
            "output": str(folder / "run"),
            "model": {"name": str(BASE)},
            "loss": {"weight": 0},
            "data": {**data, "max_length": 96, **sections.pop("data", {})},
            "trainer": {**FAST, "max_steps": 2, "save_strategy": "no", **sections.pop("trainer", {})},
            **sections,
        }
    )


def result(recipe, stage="train"):
    from pathlib import Path

    lines = map(json.loads, Path(recipe.output, "results.jsonl").read_text().splitlines())
    return next(line for line in lines if line["stage"] == stage)


@pytest.mark.filterwarnings("ignore:.*flash:UserWarning")
@pytest.mark.parametrize("packing", [False, True])
def test_they_are_left_out_named_and_recorded(tmp_path, caplog, packing):
    recipe = recipe_in(tmp_path, rows_with(), rows_with([3], count=20), trainer={"packing": packing})
    with caplog.at_level(logging.WARNING):
        finetune_model(recipe)
    named = [text for text in caplog.messages if "have no token to train on within max_length=96" in text]
    assert len(named) == 2
    assert "2 of 40 rows of the train data (counted from 0: 4, 17) have no token" in named[0]
    assert "1 of 20 rows of the eval data (counted from 0: 3) have no token" in named[1]
    found = result(recipe)
    assert found["rows"] == 38
    assert found["dropped"] == {
        "train": {"count": 2, "of": 40, "rows": [4, 17]},
        "eval": {"count": 1, "of": 20, "rows": [3]},
    }


def test_a_run_that_leaves_nothing_out_says_nothing(tmp_path, caplog):
    recipe = recipe_in(tmp_path, rows_with([]))
    with caplog.at_level(logging.WARNING):
        finetune_model(recipe)
    assert "dropped" not in result(recipe)
    assert not [text for text in caplog.messages if "no token to train on" in text]


@pytest.mark.parametrize(("long", "is_refused"), [(range(4), False), (range(5), True), (range(40), True)])
def test_more_than_a_tenth_is_refused_with_the_remedy(tmp_path, long, is_refused):
    recipe = recipe_in(tmp_path, rows_with(long))
    args, tokenizer = stage_two_config(recipe, tmp_path), AutoTokenizer.from_pretrained(BASE)
    if is_refused:
        message = f"{len(long)} of 40 rows .*counted from 0: 0, 1, 2, 3, 4.*max_length=96.*Raise max_length"
        with pytest.raises(CaftuneError, match=message):
            task_rows(recipe, "train", tokenizer, args)
        with pytest.raises(CaftuneError, match=message):
            plan(recipe)
    else:
        assert len(task_rows(recipe, "train", tokenizer, args).rows) == 36
        assert plan(recipe).rows.read == 36


def test_many_of_the_evaluation_are_refused_too(tmp_path):
    recipe = recipe_in(tmp_path, rows_with([]), rows_with([1, 2, 3], count=20))
    with pytest.raises(CaftuneError, match="3 of 20 rows of the eval data"):
        finetune_model(recipe)


def test_a_preview_shows_the_rows_that_are_trained_on(tmp_path):
    assert len(list(preview_rows(recipe_in(tmp_path, rows_with([1])), 3))) == 2
    with pytest.raises(CaftuneError, match="3 of 3 rows of the train data .*: no row remains. Raise"):
        list(preview_rows(recipe_in(tmp_path, rows_with([0, 1, 2])), 3))


def test_a_text_for_the_heads_loses_them(tmp_path):
    recipe = recipe_in(tmp_path, rows_with(), heads={"text": str(tmp_path / "train.jsonl"), "count": 2})
    found = head_rows(recipe, stage_one_config(recipe, tmp_path))
    assert len(found.train) + len(found.held_out) == 38
    assert found.dropped == {"dropped": {"labels": {"count": 2, "of": 40, "rows": [4, 17]}}}


def test_stage_one_prepares_its_rows_and_names_those_left_out_once(tmp_path, caplog, monkeypatch):
    recipe = recipe_in(tmp_path, rows_with(), heads={"text": str(tmp_path / "train.jsonl"), "count": 2})
    recipe = recipe.model_copy(update={"pretrain": {**FAST, "max_steps": 1}})
    done, real = Counter(), datasets.Dataset.map

    def counted(self, *args, **kwargs):
        done[kwargs.get("desc")] += 1
        return real(self, *args, **kwargs)

    monkeypatch.setattr(datasets.Dataset, "map", counted)
    pretrain_heads(recipe)
    assert done["Tokenizing heads.text dataset"] == 1
    assert len([text for text in caplog.messages if "2 of 40 rows" in text]) == 1
    found = result(recipe, "pretrain-heads")
    assert found["dropped"] == {"labels": {"count": 2, "of": 40, "rows": [4, 17]}}
    quality = {key: value for key, value in measure_quality(recipe).items() if "seconds" not in key}
    assert quality["heads"] == found["quality"]["heads"]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("stage", [{"aux_weight": 0.0}, {"pretrain_heads": True}, {"heads": True}])
def test_from_python_they_are_dropped_as_sft_trainer_drops_them(tmp_path, heads, caplog, stage, mode):
    stage = {name: heads if name == "heads" else value for name, value in stage.items()}
    rows = Dataset.from_list(rows_with(range(20)))  # half of them: no refusal
    options = {**OPTIONS, "max_length": 96, "truncation_mode": mode}
    theirs = SFTTrainer(str(BASE), SFTConfig(str(tmp_path), **options), train_dataset=rows, eval_dataset=rows)
    with caplog.at_level(logging.WARNING):
        args = CAFTConfig(str(tmp_path), **options, **stage)
        ours = CAFTTrainer(str(BASE), args, train_dataset=rows, eval_dataset=rows)
    for name in ("input_ids", "labels"):
        for one, other in ((ours.train_dataset, theirs.train_dataset), (ours.eval_dataset, theirs.eval_dataset)):
            assert list(one[name]) == list(other[name])
    lost = list(range(20)) if mode == "keep_start" else []
    assert ours.dropped_rows == ({"train": lost, "eval": lost} if lost else {})
    assert len([text for text in caplog.messages if "20 of 40 rows" in text]) == 2 * bool(lost)


def test_no_row_left_is_an_error_from_python_too(tmp_path, caplog):
    rows = Dataset.from_list(rows_with(range(6), count=6))
    with pytest.raises(CaftuneError, match="6 of 6 rows of the train data .*: no row remains. Raise"):
        CAFTTrainer(str(BASE), config(tmp_path, max_length=96, pretrain_heads=True), train_dataset=rows)
    plain = CAFTTrainer(str(BASE), config(tmp_path, max_length=96, aux_weight=0.0), train_dataset=rows)
    assert len(plain.train_dataset) == 0  # as SFTTrainer
    assert "6 of 6 rows of the train data" in caplog.text


@pytest.mark.filterwarnings("ignore:.*flash:UserWarning")
@pytest.mark.parametrize(("packing", "what"), [(True, "They are kept, as context"), (False, "They are left out.")])
def test_from_python_the_log_says_whether_rows_are_kept(tmp_path, caplog, packing, what):
    rows = Dataset.from_list(rows_with())
    args = config(tmp_path, max_length=96, aux_weight=0.0, packing=packing)
    trainer = CAFTTrainer(str(BASE), args, train_dataset=rows)
    (text,) = (text for text in caplog.messages if "2 of 40 rows" in text)
    assert what in text
    assert trainer.dropped_rows == ({} if packing else {"train": [4, 17]})


OF_TOKENS = {"eos_token": "<unk>"}


@pytest.mark.filterwarnings("ignore:.*flash:UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shuffle_dataset": True},
        {"packing": True},
        {"packing": True, "packing_strategy": "bfd_split"},
        {"packing": True, "shuffle_dataset": True},
        OF_TOKENS,
        {"chat_template_path": "tokenizer"},
    ],
    ids=str,
)
def test_each_data_set_is_prepared_once_and_as_sft_trainer_does_it(tmp_path, monkeypatch, options):
    if "chat_template_path" in options:
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "C1"]})
        tokenizer.eos_token = "<|im_end|>"
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        options = {"chat_template_path": str(tmp_path / "tokenizer")}
    rows = rows_with([])
    recipe = recipe_in(tmp_path, rows, rows[:10], trainer=options)
    done, trainers, real = Counter(), [], datasets.Dataset.map
    init = CAFTTrainer.__init__

    def counted(self, *args, **kwargs):
        done[kwargs.get("desc")] += 1
        return real(self, *args, **kwargs)

    def kept(self, *args, **kwargs):
        init(self, *args, **kwargs)
        trainers.append(self)

    monkeypatch.setattr(datasets.Dataset, "map", counted)
    monkeypatch.setattr(CAFTTrainer, "__init__", kept)
    finetune_model(recipe)
    assert {name: count for name, count in done.items() if "Tokenizing" in str(name)} == {
        "Tokenizing train dataset": 1,
        "Tokenizing eval dataset": 1,
    }
    assert set(done.values()) == {1}
    if "eos_token" not in options:
        untied = {"max_length": 96, **options}
        theirs = SFTTrainer(
            str(BASE),
            SFTConfig(str(tmp_path), **{**OPTIONS, **untied, "seed": 42}),
            train_dataset=Dataset.from_list(rows),
        )
        assert list(trainers[0].train_dataset["input_ids"]) == list(theirs.train_dataset["input_ids"])
        assert list(trainers[0].train_dataset["labels"]) == list(theirs.train_dataset["labels"])


@pytest.mark.filterwarnings("ignore:.*flash:UserWarning")
@pytest.mark.parametrize("length", [None, "auto", 96])
def test_a_recipe_without_padding_trains_as_with_it(tmp_path, length):
    found = {}
    for padding_free in (False, True):
        folder = tmp_path / str(padding_free)
        folder.mkdir()
        options = {"padding_free": padding_free, "logging_steps": 1, "max_steps": 3}
        recipe = recipe_in(folder, rows_with([]), data={"max_length": length}, trainer=options)
        finetune_model(recipe)
        found[padding_free] = [entry["loss"] for entry in result(recipe)["log"] if "loss" in entry]
    assert len(found[True]) == 3
    assert found[True] == pytest.approx(found[False], rel=1e-5)  # float32, other sums


def test_null_is_no_cut_and_no_key_is_the_default(tmp_path):
    rows = rows_with([])
    rows[4]["prompt"] = "methyl" * 35 + rows[4]["prompt"]
    lengths = {}
    for value in (None, "auto", 96):
        recipe = recipe_in(tmp_path, rows, data={"max_length": value})
        args = stage_two_config(recipe, tmp_path)
        lengths[value] = (
            args.max_length,
            len(task_rows(recipe, "train", AutoTokenizer.from_pretrained(BASE), args).rows),
        )
    assert lengths == {None: (None, 40), "auto": (256, 40), 96: (96, 39)}
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    (tmp_path / "recipe.yaml").write_text(f"output: out\nmodel: {{name: {BASE}}}\ndata: {{max_length: null}}\n")
    assert load_recipe(tmp_path / "recipe.yaml").data.max_length is None
    (tmp_path / "recipe.yaml").write_text(f"output: out\nmodel: {{name: {BASE}}}\n")
    assert load_recipe(tmp_path / "recipe.yaml").data.max_length == "auto"


def test_rows_that_are_not_cut_must_fit_the_context(tmp_path):
    rows = rows_with([])
    rows[7]["completion"] = "C" * 300
    recipe = recipe_in(tmp_path, rows, data={"max_length": None})
    with pytest.raises(
        CaftuneError, match=r"Rows of data.train must have at most the 256 tokens .*in row 7.*max_length"
    ):
        finetune_model(recipe)


@pytest.mark.parametrize("value", [0, 1, -5, 2.5, "long", True])
def test_a_length_that_is_none_is_refused(value):
    values = {"output": "out", "model": {"name": "m"}, "data": {"max_length": value}}
    with pytest.raises(ValueError, match="a whole number above 1, auto or null"):
        Recipe.model_validate(values)


@pytest.mark.parametrize("section", ["trainer", "pretrain", "adapt"])
def test_packing_needs_a_length(tmp_path, section):
    recipe = recipe_in(tmp_path, rows_with([]), data={"max_length": None})
    recipe = recipe.model_copy(update={section: {"packing": True}})
    make = {"trainer": stage_two_config, "pretrain": stage_one_config, "adapt": lambda r, f: adapt_config(r, f, f)}
    with pytest.raises(CaftuneError, match=f"data.max_length must be a number with {section}.packing"):
        make[section](recipe, tmp_path)


def test_a_template_without_marks_names_where_to_put_one(tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rows, tokenizer = Dataset.from_list([{"messages": talk}]), AutoTokenizer.from_pretrained(BASE)
    args = config(tmp_path, aux_weight=0.0, assistant_only_loss=True)
    with pytest.raises(CaftuneError, match="assistant_only_loss must be used with .*chat template.*chat_template_path"):
        prepare(rows, tokenizer, args, name="train")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(CaftuneError, match=r"\{% generation %\}.*name the file in chat_template_path"):
        prepare(rows, tokenizer, args, name="train")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    assert sum(label != -100 for label in prepare(rows, tokenizer, args, name="train").rows[0]["labels"]) > 0


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "row", [{"prompt": "a", "completion": "b"}, {"text": "a"}, {"input_ids": [1, 2], "labels": [-100, 2]}], ids=str
)
def test_losses_of_the_assistant_alone_need_conversations(tmp_path, row, packing):
    args = config(tmp_path, aux_weight=0.0, assistant_only_loss=True, packing=packing)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = "{% generation %}{% endgeneration %}"
    with pytest.raises(
        CaftuneError, match=f"assistant_only_loss .* conversations, got the columns {', '.join(row)} in the train data"
    ):
        prepare(Dataset.from_list([row]), tokenizer, args, name="train")


@pytest.mark.parametrize("name", ["pretrain", "trainer"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation_mode": "middle"}, "truncation_mode must be one of keep_start, keep_end, got 'middle'"),
        ({"packing": True, "packing_strategy": "best"}, "packing_strategy must be one of bfd, bfd_split, wrapped"),
        ({"pad_token": "<nope>"}, "pad_token must be a token of the tokenizer, got '<nope>'"),
        ({"eos_token": "<nope>"}, "eos_token must be a token of the tokenizer, got '<nope>'"),
        ({"completion_only_loss": True}, "completion_only_loss must not be set where rows have no completion"),
        ({"dataset_text_field": "body"}, "dataset_text_field is set by data.columns"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "dataset_kwargs is set by data"),
        ({"chat_template_path": "template.txt"}, "must end in .jinja or .j2 if it is a file, got template.txt"),
        (
            {"chat_template_path": "folder"},
            "chat_template_path must be a folder with a tokenizer .*, got folder, which has no tokenizer",
        ),
        ({"chat_template_path": str(BASE)}, "must name a tokenizer with a chat template"),
    ],
    ids=str,
)
def test_options_of_rows_that_cannot_be_are_one_sentence_in_every_stage(tmp_path, monkeypatch, name, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "template.txt").write_text("{{ messages[0]['content'] }}")
    (tmp_path / "folder").mkdir()
    rows = [{"text": row["prompt"] + row["completion"]} for row in rows_with([])]
    recipe = recipe_in(tmp_path, rows, heads={"text": str(tmp_path / "train.jsonl"), "count": 2})
    recipe = recipe.model_copy(update={name: {**FAST, "max_steps": 1, **options}})
    with pytest.raises(CaftuneError, match=message):
        (finetune_model if name == "trainer" else pretrain_heads)(recipe)


def test_an_unknown_way_to_cut_is_refused_by_sft_trainer_where_no_row_is_cut(tmp_path):
    args = config(tmp_path, aux_weight=0.0, truncation_mode="middle")
    with pytest.raises(ValueError, match="Unsupported truncation mode: middle"):
        CAFTTrainer(str(BASE), args, train_dataset=Dataset.from_list(rows_with([], count=4)))
