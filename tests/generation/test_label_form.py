"""In which form the base gets prompts that are text: `labels.chat`, and `--chat` of the commands."""

import json
from pathlib import Path

import pytest
from opened import head_rows, stage_one_config
from tokenizer_kinds import built, save_base
from typer.testing import CliRunner

from caftune.cli import app
from caftune.errors import CaftuneError
from caftune.generation.backends import Answer
from caftune.pipeline.generate import Writer
from caftune.pipeline.label import label_prompts
from caftune.pipeline.schema import Recipe

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}<said>{% endif %}"
)


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Labels a recipe with these rows and options of labels, and returns the prompts that the base got, as text."""

    def label(rows=({"prompt": "Explain X."}, {"prompt": "Why? "}), *, template=TEMPLATE, fails=False, **options):
        if not (tmp_path / "base").is_dir():
            tokenizer = built("llama-2")
            tokenizer.chat_template = template
            save_base(tokenizer, tmp_path / "base")
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        prompts = []

        def backend(asked, seeds):
            prompts.extend(asked)
            yield from ((index, Answer([300, 1], "stop")) for index in range(len(asked)))

        monkeypatch.setattr("caftune.pipeline.label.answer_backend", lambda *_, **__: backend)
        monkeypatch.setattr("caftune.pipeline.base_model.model_fingerprint", lambda *_: "any")
        section = {"prompts": str(tmp_path / "prompts.jsonl"), "max_new_tokens": 8, **options}
        values = {"output": str(tmp_path / "run"), "model": {"name": str(tmp_path / "base")}, "labels": section}
        label.recipe = Recipe.model_validate(values)
        label_prompts(label.recipe)
        return [
            prompt.text or "".join(f"<{m['role']}>{m['content']}" for m in prompt.messages or ()) for prompt in prompts
        ]

    return label


def labels_of(folder):
    return [json.loads(line) for line in Path(folder, "run", "labels", "labels.jsonl").read_text().splitlines()]


def test_a_chat_model_gets_prompts_that_are_text_as_what_a_user_says(given, tmp_path, capsys):
    assert given() == ["<user>Explain X.", "<user>Why? "]
    assert "Prompts are given in a conversation (labels.chat)." in capsys.readouterr().err
    assert [label["prompt"] for label in labels_of(tmp_path)] == ["<user>Explain X.<said>", "<user>Why? <said>"]
    (result,) = map(json.loads, Path(tmp_path, "run", "results.jsonl").read_text().splitlines())
    assert result["chat"] is True


def test_the_recipe_may_say_that_it_gets_text(given, tmp_path, capsys):
    assert given(chat=False) == ["Explain X.", "Why?"]
    assert "Prompts are given as plain text (labels.chat)." in capsys.readouterr().err
    assert json.loads(Path(tmp_path, "run", "results.jsonl").read_text())["chat"] is False


def test_a_base_without_a_template_gets_text(given):
    assert given(template=None) == ["Explain X.", "Why?"]
    with pytest.raises(CaftuneError, match=r"labels.chat must not be true for .*, which has no chat template"):
        given(template=None, chat=True)


def test_a_system_message_goes_with_them(given):
    assert given(system="Be brief.") == ["<system>Be brief.<user>Explain X.", "<system>Be brief.<user>Why? "]
    with pytest.raises(
        CaftuneError, match=r"labels.system must be used with prompts that are messages, .* Set labels.chat=true"
    ):
        given(system="Be brief.", chat=False)


def test_rows_to_train_on_are_prompts_too(given):
    assert given([{"prompt": "Explain X.", "completion": "Y."}]) == ["<user>Explain X."]


@pytest.mark.parametrize("chat", [None, True])
def test_an_empty_prompt_starts_from_bos_alone(given, chat):
    assert given([{"prompt": ""}, {"prompt": "Why?"}], chat=chat) == ["", "<user>Why?"]


def test_a_text_starts_from_bos_alone(given):
    assert given([{"text": "What a day."}]) == [""]


def test_prompts_that_were_rendered_before_are_not_rendered_again(given):
    rendered = "<s><user>Explain X.<said>"
    assert given([{"prompt": rendered}]) == [rendered.removeprefix("<s>")]
    with pytest.raises(CaftuneError, match=r"labels.chat must be set .* 1 of 2 \(the first is row 1, from 0\)"):
        given([{"prompt": "Why?"}, {"prompt": rendered}])
    assert given([{"prompt": "Why?"}, {"prompt": rendered}], chat=True)[1] == f"<user>{rendered}"


def test_messages_are_conversations_and_alpaca_rows_what_the_recipe_says(given):
    rows = [{"instruction": "Add.", "input": "1 1", "output": "2"}]
    assert given(rows) == ["<user>Add.\n\n1 1"]
    assert given(rows, chat=False) == ["Add.\n\n1 1\n\n"]
    talk = [{"messages": [{"role": "user", "content": "Why?"}]}]
    assert given(talk) == ["<user>Why?"]
    with pytest.raises(CaftuneError, match=r"labels.chat must not be false for prompts that are messages"):
        given(talk, chat=False)


def test_answers_in_one_form_do_not_serve_the_other(given):
    assert len(given()) == 2
    assert given() == []
    assert given(chat=True) == []
    assert len(given(chat=False)) == 2
    assert given(chat=False) == []
    assert given() == []


@pytest.mark.parametrize(
    ("made", "wanted", "is_same"),
    [(None, None, True), (None, True, True), (None, False, False), (True, False, False), (False, None, False)],
)
def test_heads_are_pretrained_on_labels_in_the_recipes_form(given, made, wanted, is_same, tmp_path):
    given([{"prompt": f"{number}?"} for number in range(12)], chat=made)
    recipe = given.recipe.model_copy(update={"labels": given.recipe.labels.model_copy(update={"chat": wanted})})
    args = stage_one_config(recipe, tmp_path / "pretrain")
    if is_same:
        assert head_rows(recipe, args).about["in_conversation"] is (made is not False)
    else:
        with pytest.raises(CaftuneError, match=r"was made with another recipe \(labels.chat"):
            head_rows(recipe, args)


def test_labels_are_written_after_the_record_of_their_form(given, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("caftune.pipeline.folder.RunFolder.record", stopped)
    with pytest.raises(KeyboardInterrupt):
        given([{"prompt": "Why?"}])
    with pytest.raises(CaftuneError, match=r"labels\.jsonl is missing\. Run `caftune label`"):
        head_rows(given.recipe, stage_one_config(given.recipe, tmp_path / "pretrain"))


@pytest.mark.parametrize(("template", "is_same"), [(None, True), (TEMPLATE, False)])
def test_labels_of_before_there_was_the_option_were_given_as_text(given, template, is_same, tmp_path):
    given([{"prompt": f"{number}?"} for number in range(12)], template=template, chat=None)
    file = tmp_path / "run" / "labels" / "recipe.yaml"
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if "chat:" not in line))
    results = tmp_path / "run" / "results.jsonl"
    results.write_text("".join(json.dumps({**json.loads(line), "chat": None}) + "\n" for line in results.open()))
    args = stage_one_config(given.recipe, tmp_path / "pretrain")
    if is_same:
        head_rows(given.recipe, args)
    else:
        with pytest.raises(CaftuneError, match=r"labels.chat: False -> None"):
            head_rows(given.recipe, args)


# caftune generate, and heads info --measure


class Asks(Writer):
    """A writer of which only the prompts are wanted."""

    def __init__(self, template):
        self.tokenizer = built("llama-2")
        self.tokenizer.chat_template = template


@pytest.mark.parametrize(
    ("template", "chat", "expected"),
    [(TEMPLATE, None, True), (TEMPLATE, False, False), (TEMPLATE, True, True), (None, None, False)],
)
def test_generate_gives_prompts_of_a_file_as_it_gives_those_of_the_command_line(template, chat, expected, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n')
    found = Asks(template).prompts(["Why?"], str(tmp_path / "prompts.jsonl"), chat=chat)
    assert [prompt.messages is not None for prompt in found] == [expected, expected]
    assert found[0] == found[1]


def test_generate_refuses_a_conversation_without_a_template(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n')
    with pytest.raises(CaftuneError, match="--chat must not be true for"):
        Asks(None).prompts([], str(tmp_path / "prompts.jsonl"), chat=True)


def test_the_schema_has_the_option():
    schema = json.loads(CliRunner().invoke(app, ["schema"]).stdout)
    assert "chat template" in schema["$defs"]["LabelsSection"]["properties"]["chat"]["description"]
