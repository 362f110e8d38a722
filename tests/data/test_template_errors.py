"""What a chat template refuses is one sentence with file and row; a byte order mark is no part of a template."""

import json
from importlib import resources

import pytest
from datasets import Dataset
from opened import load_tokenizer, stage_two_config
from trainers import config
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

from caftune import CAFTTrainer
from caftune.data.forms import load_rows
from caftune.data.prompts import apply_template, conversations
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.pipeline.finetune import finetune_model
from caftune.pipeline.generate import Writer
from caftune.pipeline.label import label_prompts
from caftune.pipeline.preview import preview_rows
from caftune.pipeline.schema import Recipe
from caftune.training.prepare import prepare

MARK = "\ufeff"
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system role here') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<' + m.role + '>' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments + '.' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def said(role, content, **more):
    return {"role": role, "content": content, **more}


ASKED, ANSWERED = said("user", "C"), said("assistant", "CC")
CALLED = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
REFUSED = {
    "roles that do not alternate": ([ASKED, ASKED, ANSWERED], "Roles must alternate"),
    "no system role": ([said("system", "S"), ASKED, ANSWERED], "No system role here"),
    "a content of null": ([ASKED, said("assistant", None, **CALLED)], "has no attribute 'content'"),
    "arguments added to a text": ([ASKED, said("assistant", "", **CALLED)], "unsupported operand type"),
    "no content": ([ASKED, {"role": "assistant", **CALLED}], "has no attribute 'content'"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strict")
    AutoModelForCausalLM.from_pretrained(BASE).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = STRICT
    tokenizer.save_pretrained(folder)
    return str(folder)


def write(folder, *rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def recipe_in(folder, base, file, **trainer):
    options = {"max_steps": 1, "use_cpu": True, "gradient_checkpointing": False, "save_strategy": "no", **trainer}
    values = {"output": str(folder / "run"), "model": {"name": base}, "loss": {"weight": 0.0}, "data": {"train": file}}
    values["labels"] = {"prompts": file, "max_new_tokens": 4, "temperature": 0}
    return Recipe.model_validate({**values, "trainer": options})


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
def test_training_names_the_row_that_a_template_refuses(name, form, base, tmp_path):
    turns, reason = REFUSED[name]

    def row(turns):
        return {"messages": turns} if form == "messages" else {"prompt": turns[:-1], "completion": turns[-1:]}

    file = write(tmp_path, row([ASKED, ANSWERED]), row(turns))
    message = rf"rows\.jsonl, row 1 \(from 0\): the chat template refuses this conversation \(.*{reason}.*\)\. Fix or"
    recipe = recipe_in(tmp_path, base, file)
    for command in (finetune_model, lambda recipe: list(preview_rows(recipe))):
        with pytest.raises(CaftuneError, match=message):
            command(recipe)


def test_labelling_names_the_row_that_a_template_refuses(base, tmp_path):
    file = write(tmp_path, {"messages": [ASKED]}, {"prompt": [ASKED, ASKED]} | {"messages": [ASKED, ASKED]})
    with pytest.raises(
        CaftuneError, match=r"rows\.jsonl, row 1 \(from 0\): the chat template refuses .*Roles must alternate"
    ):
        label_prompts(recipe_in(tmp_path, base, file))


def test_a_later_turn_is_named_with_its_row_too(base):
    talks = [ASKED, ANSWERED, ASKED, ASKED]
    (talk,) = conversations(
        Dataset.from_list([{"messages": talks}]), AutoTokenizer.from_pretrained(base), source="x.jsonl"
    )
    assert talk.prompt(0, [], AutoTokenizer.from_pretrained(base)).ids
    with pytest.raises(CaftuneError, match=r"x\.jsonl, row 0 \(from 0\): the chat template refuses"):
        talk.prompt(1, ["C"], AutoTokenizer.from_pretrained(base))


def test_an_error_of_something_else_keeps_its_own_name(base, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise TypeError("not of a template")

    recipe = recipe_in(tmp_path, base, write(tmp_path, {"messages": [ASKED, ANSWERED]}))
    args = stage_two_config(recipe, tmp_path / "run")
    monkeypatch.setattr(SFTTrainer, "_prepare_dataset", broken)
    with pytest.raises(TypeError, match="not of a template"):
        prepare(Dataset.from_list([{"messages": [ASKED, ANSWERED]}]), load_tokenizer(recipe), args, name="train")


@pytest.mark.parametrize("suffix", [".jinja", ".j2"])
def test_a_byte_order_mark_of_a_template_file_is_not_trained_on(suffix, base, tmp_path):
    path = tmp_path / f"template{suffix}"
    path.write_text(MARK + STRICT, encoding="utf-8")
    rows = Dataset.from_list([{"messages": [ASKED, ANSWERED]}])
    args = config(tmp_path / "run", aux_weight=0.0, max_steps=1, max_length=64, chat_template_path=str(path))
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    trainer = CAFTTrainer(str(BASE), args, train_dataset=rows, processing_class=tokenizer)
    assert trainer.processing_class.chat_template == STRICT
    assert args.chat_template_path == str(path)
    found = tokenizer.decode(trainer.train_dataset[0]["input_ids"])
    assert found.replace("</s>", "") == "<user>C<assistant>CC"
    again = prepare(rows, AutoTokenizer.from_pretrained(BASE), args, name="train").rows
    assert again[0]["input_ids"] == trainer.train_dataset[0]["input_ids"]


def test_a_byte_order_mark_of_the_tokenizers_own_template_is_not_written(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = MARK + STRICT
    assert apply_template([ASKED], {}, tokenizer, tokenize=False) == "<user>C"
    args = config(tmp_path / "run", aux_weight=0.0, max_steps=1, max_length=64)
    rows = Dataset.from_list([{"messages": [ASKED, ANSWERED]}])
    again = prepare(rows, tokenizer, args, name="train").rows
    trainer = CAFTTrainer(str(BASE), args, train_dataset=rows, processing_class=tokenizer)
    for found in (again, trainer.train_dataset):
        assert tokenizer.decode(found[0]["input_ids"]).replace("</s>", "") == "<user>C<assistant>CC"
    assert trainer.processing_class.chat_template == STRICT  # what is exported


def test_a_template_file_in_utf_16_is_named(base, tmp_path):
    (tmp_path / "wide.jinja").write_text(STRICT, encoding="utf-16")
    file = write(tmp_path, {"messages": [ASKED, ANSWERED]})
    with pytest.raises(CaftuneError, match=r"wide\.jinja must be text in UTF-8, got"):
        finetune_model(recipe_in(tmp_path, base, file, chat_template_path=str(tmp_path / "wide.jinja")))


def test_generate_names_the_row_of_its_file(base, tmp_path):
    writer = Writer.__new__(Writer)
    writer.tokenizer = AutoTokenizer.from_pretrained(base)
    file = write(tmp_path, {"messages": [ASKED]}, {"messages": [ASKED, ASKED]})
    with pytest.raises(CaftuneError, match=r"rows\.jsonl, row 1 \(from 0\): the chat template refuses"):
        writer.prompts(["C"], file)


# Messages that a template leaves out

LLAMA_3, LLAMA_3_1, QWEN_3, GPT_OSS = (
    (resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text()
    for name in ("llama3", "llama3_1", "qwen3", "gptoss")
)
PARTS = "{% for m in messages %}{{ '<' + m.role + '>' }}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
LOST = {
    "a role that it does not know": (
        QWEN_3,
        [said("developer", "S"), ASKED, ANSWERED],
        "content of message 0 .*developer",
    ),
    "calls of tools": (LLAMA_3, [ASKED, said("assistant", "", **CALLED)], "calls of tools of message 1 .*assistant"),
    "calls without a content": (LLAMA_3, [ASKED, said("assistant", None, **CALLED)], "calls of tools of message 1"),
    "a text next to calls": (
        LLAMA_3_1,
        [ASKED, said("assistant", "C", **CALLED)],
        r"content \(next to calls of tools\) of message 1",
    ),
    "a call of a function": (QWEN_3, [ASKED, said("assistant", "", function_call={"name": "f"})], "call of a function"),
    "contents that are no parts": (PARTS, [ASKED, ANSWERED], "content of message 0 .*user"),
}


def tokenizer_with(template):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", LOST)
def test_a_message_that_the_template_leaves_out_is_refused_by_its_row(name, tmp_path):
    template, turns, what = LOST[name]
    tokenizer, args = tokenizer_with(template), config(tmp_path, aux_weight=0.0)
    message = rf"rows\.jsonl, row 1 \(from 0\): the chat template must write .* leaves out the {what}"
    good = [ASKED, ANSWERED] if template is not PARTS else [said("user", ""), said("assistant", "")]
    rows = load_rows(write(tmp_path, {"messages": good}, {"messages": turns}))
    with pytest.raises(CaftuneError, match=message):
        prepare(rows, tokenizer, args, name="train", source="rows.jsonl")
    with pytest.raises(CaftuneError, match=message):
        conversations(rows, tokenizer, source="rows.jsonl")


def test_a_system_message_for_the_labels_that_the_template_leaves_out_is_refused():
    template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    with pytest.raises(CaftuneError, match="leaves out the content of message 0 .* role system"):
        conversations(Dataset.from_list([{"prompt": [ASKED]}]), tokenizer_with(template), system="Be brief.")


def test_thoughts_and_switches_that_a_template_removes_are_not_missed(tmp_path):
    thought = said("assistant", "<think>\nC\n</think>\n\nCC")
    turns = [said("system", " /no_think\n"), ASKED, thought, ASKED, thought]
    template = QWEN_3.replace("messages[0].content", "messages[0].content.replace('/no_think', '')")
    rows = Dataset.from_list([{"messages": turns}])
    assert len(prepare(rows, tokenizer_with(template), config(tmp_path, aux_weight=0.0), name="train").rows) == 1
    # A text before a call, which GPT-OSS takes for a thought and removes once the final answer follows.
    turns = [ASKED, said("assistant", "C", **CALLED), said("tool", "N"), ANSWERED]
    rows = Dataset.from_list([{"messages": turns}])
    assert len(prepare(rows, tokenizer_with(GPT_OSS), config(tmp_path, aux_weight=0.0), name="train").rows) == 1
