"""Tokens that a model has no embedding of: one sentence before the first step, wherever such a token is really used."""

import json
import shutil

import pytest
from datasets import Dataset
from test_cut_rows import recipe_in, rows_with
from trainers import config
from transformers import AutoModelForCausalLM, AutoTokenizer

from caftune import CAFTTrainer
from caftune.data.prompts import Prompt
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.generation.backends import Sampling, transformers_backend
from caftune.pipeline.finetune import finetune_model
from caftune.pipeline.label import label_prompts
from caftune.pipeline.plan import plan
from caftune.pipeline.pretrain import pretrain_heads
from caftune.pipeline.preview import preview_rows
from caftune.pipeline.schema import Recipe

SAYS = r"must hold tokens with ids below 158, the rows of the model's embeddings, got '<more>' with id 158\. Use the tokenizer"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The embedded base with a tokenizer of more tokens than it has embeddings."""
    folder = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(BASE, folder)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    assert len(tokenizer) == 158
    tokenizer.add_tokens(["<more>", "<unused>"])
    tokenizer.save_pretrained(folder)
    return folder


def recipe_of(base, folder, *, uses, **sections):
    rows = rows_with([])
    if uses:
        rows[5]["completion"] = " C<more>C"
    recipe = recipe_in(folder, rows, rows[:8], **sections)
    return Recipe.model_validate({**recipe.model_dump(), "model": {"name": str(base)}})


@pytest.mark.parametrize("command", [finetune_model, plan, lambda recipe: list(preview_rows(recipe, 8))])
def test_every_command_of_the_task_says_so(base, tmp_path, command):
    with pytest.raises(CaftuneError, match=f"Row 5 of the train data {SAYS}"):
        command(recipe_of(base, tmp_path, uses=True))
    command(recipe_of(base, tmp_path, uses=False))


def test_rows_of_the_evaluation_are_looked_at(base, tmp_path):
    recipe = recipe_of(base, tmp_path, uses=True)
    (tmp_path / "fine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_with([])))
    data = recipe.data.model_copy(update={"train": str(tmp_path / "fine.jsonl")})
    with pytest.raises(CaftuneError, match=f"Row 5 of the eval data {SAYS}"):
        finetune_model(recipe.model_copy(update={"data": data}))


def test_a_text_for_the_heads_is_looked_at(base, tmp_path):
    recipe = recipe_of(base, tmp_path, uses=True, heads={"text": str(tmp_path / "train.jsonl"), "count": 2})
    with pytest.raises(CaftuneError, match=f"Row 5 of the heads.text data {SAYS}"):
        pretrain_heads(recipe)


def test_prompts_are_looked_at_before_any_is_answered(base, tmp_path):
    prompts = [{"prompt": "Name: ethanol\nSMILES:"}, {"prompt": "Name: <more>\nSMILES:"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    labels = {"prompts": str(tmp_path / "prompts.jsonl"), "max_new_tokens": 4}
    recipe = recipe_of(base, tmp_path, uses=False, labels=labels)
    with pytest.raises(CaftuneError, match=f"Prompt 1 {SAYS}"):
        label_prompts(recipe)


def test_padding_that_has_no_embedding_is_refused_where_rows_are_padded(base, tmp_path):
    padded = recipe_of(base, tmp_path, uses=False, trainer={"pad_token": "<more>"})
    with pytest.raises(CaftuneError, match=rf"The padding of rows \(pad_token\) {SAYS}"):
        plan(padded)
    plan(recipe_of(base, tmp_path, uses=False, trainer={"pad_token": "<more>", "packing": True}))


def test_answers_are_padded_with_any_token_where_the_tokenizers_own_has_no_embedding(base):
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(BASE)
    prompts = [Prompt(tokenizer(text)["input_ids"]) for text in ("Name: ethanol\nSMILES:", "Name:")]

    def answers():
        ask = transformers_backend(model, tokenizer, Sampling(6, 0.0), batching="static")
        return dict(ask(prompts, [0, 0]))

    expected = answers()
    tokenizer.pad_token = "<more>"
    assert answers() == expected


@pytest.mark.parametrize("name", ["train", "eval"])
@pytest.mark.parametrize("several", [False, True])
def test_from_python_with_heads_too(base, tmp_path, name, several):
    rows = rows_with([])
    fine = Dataset.from_list(rows)
    rows[5]["completion"] = " C<more>C"
    given = {"train": fine, "eval": fine, name: Dataset.from_list(rows)}
    evaluation = {"one": given["eval"]} if several else given["eval"]
    name = "one" if several and name == "eval" else name
    with pytest.raises(CaftuneError, match=f"Row 5 of the {name} data {SAYS}"):
        CAFTTrainer(
            str(BASE),
            config(tmp_path, pretrain_heads=True),
            train_dataset=given["train"],
            eval_dataset=evaluation,
            processing_class=AutoTokenizer.from_pretrained(base),
        )


@pytest.mark.parametrize("stage", ["train", "heads.text"])
def test_rows_keep_their_numbers_where_others_are_left_out(base, tmp_path, stage):
    rows = rows_with([2, 3])
    rows[5]["completion"] = " C<more>C"
    heads = {"heads": {"text": str(tmp_path / "train.jsonl"), "count": 2}} if stage == "heads.text" else {}
    recipe = recipe_in(tmp_path, rows, **heads)
    recipe = Recipe.model_validate({**recipe.model_dump(), "model": {"name": str(base)}})
    with pytest.raises(CaftuneError, match=f"Row 5 of the {stage} data {SAYS}"):
        (pretrain_heads if heads else finetune_model)(recipe)
