"""Training says where a chat template writes another text before an answer than a model gets in its prompt."""

import json
import logging
from datetime import date

import pytest
from datasets import Dataset
from trainers import config
from transformers import AutoModelForCausalLM, AutoTokenizer

from caftune.data.prompts import conversations
from caftune.demo.run import BASE
from caftune.pipeline.finetune import finetune_model
from caftune.pipeline.schema import Recipe
from caftune.training.prepare import prepare

# How templates begin an answer in a conversation ({}) and where one is to be written.
_TURNS = (
    "{%% for m in messages %%}{%% if m.role == 'assistant' %%}%s{{ eos_token }}{%% else %%}{{ '<' + m.role + '>' + m.content }}"
    "{%% endif %%}{%% endfor %%}{%% if add_generation_prompt %%}%s{%% endif %%}"
)
_LAST = "{% if loop.last %}{{ '<t></t>' }}{% endif %}"
AGREE = {
    "the same": _TURNS % ("<a>{{ m.content }}", "<a>"),
    "white space stripped": _TURNS % ("<a>{{ m.content.strip() }}", "<a>"),
    "an empty thought before a last answer, as Qwen3's": _TURNS % (f"<a>{_LAST}{{{{ m.content }}}}", "<a>"),
    "a thought that both have": _TURNS % ("<a><t>{{ m.content }}", "<a><t>"),
    "an empty thought that the prompt has where it is switched off": _TURNS
    % (f"<a>{_LAST}{{{{ m.content }}}}", "<a>{% if thinking is defined and not thinking %}{{ '<t></t>' }}{% endif %}"),
    "no mark of a turn": _TURNS % ("{{ m.content }}", ""),
}
APART = {
    "a thought in the prompt alone, as DeepSeek-R1's distillates'": (_TURNS % ("<a>{{ m.content }}", "<a><t>"), "<t>"),
    "an empty thought in the prompt alone": (_TURNS % ("<a>{{ m.content }}", "<a><t></t>"), "<t></t>"),
    "a space in the prompt alone": (_TURNS % ("<a>{{ m.content.strip() }}", "<a> "), " "),
    "no turn in training": (_TURNS % ("{{ m.content }}", "<a>"), "<a>"),
}
ROWS = [[{"role": "user", "content": "C"}, {"role": "assistant", "content": answer}] for answer in ("CC", " CC", "N")]


def warned(caplog, template, rows=ROWS, form="messages", **more):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = template
    made = [{"messages": row} if form == "messages" else {"prompt": row[:-1], "completion": row[-1:]} for row in rows]
    with caplog.at_level(logging.WARNING, "caftune.data.template_errors"):
        args = config("unused", aux_weight=0.0, max_steps=1, max_length=64)
        prepare(Dataset.from_list([row | more for row in made]), tokenizer, args, name="train", source="rows.jsonl")
    return [record.message for record in caplog.records if record.name == "caftune.data.template_errors"]


@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
@pytest.mark.parametrize("name", AGREE)
def test_nothing_is_said_where_the_prompt_begins_the_conversation(name, form, caplog):
    assert warned(caplog, AGREE[name], form=form) == []


def test_nothing_is_said_where_a_row_switches_thoughts_off_in_both(caplog):
    name = "an empty thought that the prompt has where it is switched off"
    assert warned(caplog, AGREE[name], chat_template_kwargs={"thinking": False}) == []


@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
@pytest.mark.parametrize("name", APART)
def test_a_prompt_that_no_training_text_begins_with_is_named(name, form, caplog):
    template, prompted = APART[name]
    (message,) = warned(caplog, template, form=form)
    assert message.startswith("3 of 3 rows of rows.jsonl that were compared (the first is row 0, from 0)")
    assert f"the prompt ends with {prompted!r}, and training continues with 'CC" in message
    assert "trainer.chat_template_path" in message


def test_the_first_row_that_differs_is_named(caplog):
    template = _TURNS % ("<a>{% if m.content == 'N' %}{{ '<t>' }}{% endif %}{{ m.content }}", "<a><t>")
    (message,) = warned(caplog, template)
    assert message.startswith("2 of 3 rows of rows.jsonl")
    (message,) = warned(caplog, template, rows=ROWS[2:] + ROWS[:1])[-1:]
    assert message.startswith("1 of 2 rows of rows.jsonl that were compared (the first is row 1, from 0)")


def test_conversations_without_an_answer_at_their_end_say_nothing(caplog):
    template, _ = next(iter(APART.values()))
    assert warned(caplog, template, rows=[ROWS[0] + [{"role": "user", "content": "C"}]]) == []


def test_a_recipe_says_it_once_and_a_template_of_its_own_ends_it(tmp_path, caplog):
    AutoModelForCausalLM.from_pretrained(BASE).save_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template, _ = next(iter(APART.values()))
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in ROWS))
    (tmp_path / "both.jinja").write_text(AGREE["a thought that both have"])
    trainer = {"max_steps": 1, "use_cpu": True, "gradient_checkpointing": False, "save_strategy": "no"}
    values = {"model": {"name": str(tmp_path / "base")}, "loss": {"weight": 0.0}}
    values["data"] = {"train": str(tmp_path / "rows.jsonl"), "eval": str(tmp_path / "rows.jsonl")}
    for count, more in ((1, {}), (0, {"chat_template_path": str(tmp_path / "both.jinja")})):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "caftune.data.template_errors"):
            recipe = {**values, "output": str(tmp_path / f"run{count}"), "trainer": trainer | more}
            finetune_model(Recipe.model_validate(recipe))
        said = [record.message for record in caplog.records if record.name == "caftune.data.template_errors"]
        assert len(said) == count


@pytest.mark.parametrize("is_named", [False, True])
@pytest.mark.parametrize("format_", ["%d %b %Y", "%H:%M:%S.%f"])
def test_templates_that_write_the_date_are_trained_on_with_the_date_of_prompts(format_, is_named):
    template = f'{{{{ strftime_now("{format_}") }}}}' + AGREE["the same"]
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = {"default": template, "tool_use": template} if is_named else template
    rows = Dataset.from_list([{"messages": row} for row in ROWS])
    trained = prepare(rows, tokenizer, config("unused", aux_weight=0.0, max_steps=1), name="train").rows["input_ids"]
    prompts = [talk.prompt(0, [], tokenizer).ids for talk in conversations(rows, tokenizer)]
    assert [ids[: len(prompt)] for ids, prompt in zip(trained, prompts, strict=True)] == prompts
    assert tokenizer.decode(prompts[0]).startswith(date(2024, 7, 26).strftime(format_).replace(" ", "")[:2])
