"""Every data set of a command is tokenized once, whatever its stages and trainers do with it."""

import json
from collections import Counter

import datasets
import pytest
from test_pipeline import FAST

from caftune.demo.chemistry import completion, molecules, prompt
from caftune.demo.run import BASE
from caftune.pipeline.finetune import finetune_model
from caftune.pipeline.label import label_prompts
from caftune.pipeline.plan import plan
from caftune.pipeline.pretrain import measure_quality, pretrain_heads
from caftune.pipeline.preview import preview_rows
from caftune.pipeline.schema import Recipe

COUNTS = {"train": 24, "eval": 12}
TALK = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


def rows_of(form, count):
    drawn = molecules(count, seed=5, substituents=(0, 2))
    if form == "text":
        return [{"text": prompt(one) + completion(one)} for one in drawn]
    if form == "messages":
        said = (("user", prompt), ("assistant", completion))
        return [{"messages": [{"role": role, "content": write(one)} for role, write in said]} for one in drawn]
    return [{"prompt": prompt(one), "completion": completion(one)} for one in drawn]


@pytest.fixture
def recipe_of(tmp_path, heads):
    def write(form="pair", **sections):
        for name, count in COUNTS.items():
            text = "".join(json.dumps(row) + "\n" for row in rows_of(form, count))
            (tmp_path / f"{name}.jsonl").write_text(text)
        (tmp_path / "talk.jinja").write_text(TALK)
        options = {"chat_template_path": str(tmp_path / "talk.jinja")} if form == "messages" else {}
        values = {
            "output": str(tmp_path / "run"),
            "model": {"name": str(BASE)},
            "heads": {"path": str(heads)},
            "data": {name: str(tmp_path / f"{name}.jsonl") for name in COUNTS},
            "trainer": {**FAST, "max_steps": 1, "save_strategy": "no", **options},
        }
        return Recipe.model_validate({**values, **sections})

    return write


@pytest.fixture
def tokenized(monkeypatch):
    """How many rows of each data set were tokenized, by us or by TRL."""
    found, real = Counter(), datasets.Dataset.map

    def counted(self, *args, **kwargs):
        desc = str(kwargs.get("desc"))
        if desc.startswith("Tokenizing "):
            found[desc.removeprefix("Tokenizing ").removesuffix(" dataset")] += len(self)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(datasets.Dataset, "map", counted)
    return found


ADAPT = {**FAST, "max_steps": 1}


@pytest.mark.parametrize("form", ["pair", "text", "messages"])
@pytest.mark.parametrize("adapt", [None, ADAPT], ids=["train", "train and adapt"])
def test_train(recipe_of, tokenized, form, adapt):
    finetune_model(recipe_of(form, adapt=adapt))
    assert tokenized == COUNTS


@pytest.mark.filterwarnings("ignore:.*flash:UserWarning")
def test_stages_that_cut_their_rows_otherwise_prepare_each_their_own(recipe_of, tokenized):
    recipe = recipe_of(adapt={**ADAPT, "truncation_mode": "keep_end"})
    finetune_model(recipe)
    assert tokenized == {name: 2 * count for name, count in COUNTS.items()}


@pytest.mark.filterwarnings("ignore:.*flash:UserWarning")
def test_packing_uses_the_rows_again(recipe_of, tokenized):
    finetune_model(recipe_of(adapt={**ADAPT, "packing": True}))
    assert tokenized == COUNTS


def test_plan_and_preview_read_the_train_data_alone(recipe_of, tokenized):
    plan(recipe_of())
    assert tokenized == {"train": COUNTS["train"]}
    tokenized.clear()
    assert len(list(preview_rows(recipe_of(), 3))) == 3
    assert tokenized == {"train": 3}


def test_labels_are_tokens_already(recipe_of, tokenized, tmp_path):
    labels = {"prompts": str(tmp_path / "train.jsonl"), "max_new_tokens": 8, "keep_truncated": True}
    recipe = recipe_of(labels=labels, heads={"count": 2}, pretrain={**FAST, "max_steps": 1})
    label_prompts(recipe)
    pretrain_heads(recipe)
    plan(recipe, "heads")
    assert tokenized == {}


def test_a_text_for_the_heads(recipe_of, tokenized, tmp_path):
    heads = {"count": 2, "text": str(tmp_path / "train.jsonl")}
    recipe = recipe_of("text", heads=heads, pretrain={**FAST, "max_steps": 1})
    pretrain_heads(recipe)
    assert tokenized == {"heads.text": COUNTS["train"]}
    tokenized.clear()
    measure_quality(recipe)
    assert tokenized == {"heads.text": COUNTS["train"]}
