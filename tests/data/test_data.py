"""Reading data: one form out of many, and errors that name the file, the row and the remedy."""

import gzip
import json

import pytest
from datasets import Dataset, Features, Json, List, Value

from caftune.data.forms import load_rows, refuse_unnamed_split
from caftune.data.prompts import is_chat
from caftune.errors import CaftuneError
from caftune.pipeline.schema import Recipe
from caftune.pipeline.stage_rows import read_task_rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_every_file_format_gives_the_same_rows(tmp_path):
    import pandas

    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    write(tmp_path / "x.jsonl", rows)
    (tmp_path / "x.json").write_text(json.dumps(rows))
    pandas.DataFrame(rows).to_csv(tmp_path / "x.csv", index=False)
    pandas.DataFrame(rows).to_parquet(tmp_path / "x.parquet")
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.write((tmp_path / "x.jsonl").read_text())
    for name in ("x.jsonl", "x.json", "x.csv", "x.parquet", "x.jsonl.gz"):
        assert load_rows(str(tmp_path / name)).to_list() == rows


def test_alpaca_rows_become_prompt_and_completion(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"instruction": "Add.", "input": "1 2", "output": "3"}])
    assert load_rows(path).to_list() == [{"prompt": "Add.\n\n1 2\n\n", "completion": "3"}]


def test_alpaca_rows_become_a_conversation_for_a_chat_model(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"instruction": "Add.", "input": "", "response": "3"}])
    asked, answered = [{"role": "user", "content": "Add."}], [{"role": "assistant", "content": "3"}]
    assert load_rows(path, chat=True).to_list() == [{"prompt": asked, "completion": answered}]


def test_texts_become_a_conversation_where_that_is_asked_for(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"prompt": "Add.", "completion": "3", "tools": [{"name": "f"}]}])
    asked, answered = [{"role": "user", "content": "Add."}], [{"role": "assistant", "content": "3"}]
    (row,) = load_rows(path, texts_too=True).to_list()
    assert row == {"prompt": asked, "completion": answered, "tools": [{"name": "f"}]}
    path = write(tmp_path / "y.jsonl", [{"text": "Add. 3"}])
    assert load_rows(path, texts_too=True).to_list() == [{"text": "Add. 3"}]


@pytest.mark.parametrize(
    ("row", "chat", "is_conversation"),
    [
        ({"prompt": "Add.", "completion": "3"}, None, False),
        ({"prompt": "Add.", "completion": "3"}, True, True),
        ({"instruction": "Add.", "output": "3"}, None, True),
        ({"instruction": "Add.", "output": "3"}, False, False),
    ],
)
def test_a_recipe_says_whether_a_chat_model_is_trained_in_conversations(row, chat, is_conversation, tmp_path):
    path = write(tmp_path / "x.jsonl", [row])
    recipe = Recipe.model_validate({"output": "o", "model": {"name": "m"}, "data": {"train": path, "chat": chat}})
    assert is_chat(read_task_rows(recipe.data, path, limit=None, chat=True)) is is_conversation


def test_a_system_message_in_a_column_of_its_own_comes_first(tmp_path):
    asked, answered = {"role": "user", "content": "Add."}, {"role": "assistant", "content": "3"}
    brief, own = {"role": "system", "content": "Be brief."}, {"role": "system", "content": "Be long."}
    turns = [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "3"}]

    def read(row, **options):
        (found,) = load_rows(write(tmp_path / "x.jsonl", [{**row, "system": "Be brief."}]), **options).to_list()
        return found.get("messages") or found["prompt"]

    assert read({"messages": [asked, answered]}) == read({"conversations": turns}) == [brief, asked, answered]
    assert read({"messages": [own, asked, answered]}) == [own, asked, answered]
    assert read({"instruction": "Add.", "output": "3"}, chat=True) == [brief, asked]
    with pytest.raises(
        CaftuneError, match=r"row 0 \(from 0\) must not have a system message, as the row is plain text"
    ):
        read({"prompt": "Add.", "completion": "3"})


def test_what_an_instruction_is_about_is_not_left_out(tmp_path):
    row = {"instruction": "Add.", "context": "1 2", "response": "3"}
    assert load_rows(write(tmp_path / "x.jsonl", [row])).to_list() == [{"prompt": "Add.\n\n1 2\n\n", "completion": "3"}]
    with pytest.raises(CaftuneError, match=r"row 0 \(from 0\) must not have a history"):
        load_rows(write(tmp_path / "x.jsonl", [{**row, "history": [["a", "b"]]}]))


def test_named_columns_bring_along_what_belongs_to_them(tmp_path):
    columns = {"instruction": "ask", "output": "say"}
    row = {"ask": "Add.", "say": "3", "other": "left out"}

    def read(**more):
        return load_rows(write(tmp_path / "x.jsonl", [{**row, **more}]), columns, chat=True).to_list()[0]

    asked = {"role": "user", "content": "Add.\n\n1 2"}
    assert read(context="1 2")["prompt"] == read(input="1 2")["prompt"] == [asked]
    brief = {"role": "system", "content": "Be brief."}
    assert read(context="1 2", system="Be brief.")["prompt"] == [brief, asked]
    with pytest.raises(CaftuneError, match=r"row 0 \(from 0\) must not have a history"):
        read(history=[["a", "b"]])


def test_nested_values_and_tools_stay_as_they_were(tmp_path):
    def call(**arguments):
        return [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]

    tools = [{"type": "function", "function": {"name": "f"}}]
    path = write(tmp_path / "x.jsonl", [{"messages": call(x=1)}, {"messages": call(y=2), "tools": tools}])
    rows = load_rows(path)
    assert [row["messages"] for row in rows] == [call(x=1), call(y=2)]
    assert [row["tools"] for row in rows] == [None, tools]


def test_a_csv_is_text(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,completion\nagent,007\n")
    assert load_rows(str(tmp_path / "x.csv")).to_list() == [{"prompt": "agent", "completion": "007"}]


def test_an_answer_that_is_a_number_is_refused(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"prompt": "1+2", "completion": 3}])
    with pytest.raises(CaftuneError, match=r"row 0 \(from 0\): completion must be text, got 3"):
        load_rows(path)


def test_rows_of_another_form_are_refused(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"text": "a"}, {"prompt": "a", "completion": "b"}])
    with pytest.raises(CaftuneError, match=r"row 1 \(from 0\) must have the columns and types of the rows before it"):
        load_rows(path)


def test_sharegpt_rows_become_messages(tmp_path):
    path = write(
        tmp_path / "x.jsonl", [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}]
    )
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert load_rows(path).to_list() == [{"messages": turns}]


def test_columns_rename_and_limit_cuts(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"q": "1", "a": "2", "more": 0}, {"q": "3", "a": "4", "more": 0}])
    rows = load_rows(path, {"prompt": "q", "completion": "a"}, limit=1)
    assert rows.to_list() == [{"prompt": "1", "completion": "2"}]


def test_what_goes_along_with_renamed_columns_stays(tmp_path):
    tools, options = [{"type": "function", "function": {"name": "f"}}], {"short": True}
    row = {"dialogue": [{"role": "user", "content": "a"}], "tools": tools, "chat_template_kwargs": options}
    found = load_rows(write(tmp_path / "x.jsonl", [row]), {"messages": "dialogue"})
    assert found.to_list() == [{"messages": row["dialogue"], "tools": tools, "chat_template_kwargs": options}]


def test_the_input_of_an_instruction_stays_unless_it_is_named_for_something_else(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"instruction": "Add.", "input": "1 2", "reply": "3"}])
    named = load_rows(path, {"instruction": "instruction", "output": "reply"})
    assert named.to_list() == [{"prompt": "Add.\n\n1 2\n\n", "completion": "3"}]
    other = load_rows(path, {"instruction": "instruction", "output": "input"})
    assert other.to_list() == [{"prompt": "Add.\n\n", "completion": "1 2"}]


@pytest.mark.parametrize("source", ["x.parquet", "owner/name"])
def test_arrow_adds_no_keys_to_what_is_nested(tmp_path, monkeypatch, source):
    def call(**arguments):
        return [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]

    asked = [{"role": "user", "content": "a"}]
    written = Dataset.from_list([{"messages": talk} for talk in (call(x=1), call(y=[2]), asked)])
    written.to_parquet(tmp_path / "x.parquet")
    monkeypatch.setattr("caftune.data.readers.load_dataset", lambda name, split: written)
    monkeypatch.chdir(tmp_path)
    assert load_rows(source)["messages"] == [call(x=1), call(y=[2]), asked]


def test_a_null_that_was_written_as_json_stays(tmp_path):
    talk = [{"role": "user", "content": "a", "choice": {"x": None}}]
    message = {"role": Value("string"), "content": Value("string"), "choice": Json()}
    Dataset.from_list([{"messages": talk}], Features({"messages": List(message)})).to_parquet(tmp_path / "x.parquet")
    assert load_rows(str(tmp_path / "x.parquet"))["messages"] == [talk]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\nWhen?,Yes, of course.\n", r"row 1 \(from 0\) must have 2 cells, .* got \[' of course.'\] beyond them"),
        ('a,b\nWhen?,"Yes\n', "is malformed CSV .* Close every quote"),
        ('a,"He said "hi", to me"\n', "is malformed CSV .* double those within quotes"),
    ],
)
def test_a_csv_that_would_lose_text_is_refused(tmp_path, content, message):
    (tmp_path / "x.csv").write_text("prompt,completion\n" + content)
    with pytest.raises(CaftuneError, match=message):
        load_rows(str(tmp_path / "x.csv"))


def test_a_cell_of_a_csv_may_be_long_and_empty_ones_may_follow(tmp_path):
    (tmp_path / "x.csv").write_text(f"prompt,completion\na,{'b' * 200_000},,\n")
    assert load_rows(str(tmp_path / "x.csv")).to_list() == [{"prompt": "a", "completion": "b" * 200_000}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2: malformed JSON"),
        ('{"text": "a"}\n\n[1]\n', "line 3: must be a JSON object, got list"),
        ("", "is empty. Give at least one row"),
        ('{"a": 1}\n', r"row 0 .* must have the columns of a known form, got a \(known: messages"),
        (
            '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": null}\n',
            "row 1 .*: completion must be given, got none",
        ),
        (
            '{"conversations": [{"from": "bot", "value": "x"}]}\n',
            "a speaker in conversations must be one of human, .*, got 'bot'",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(CaftuneError, match=message):
        load_rows(str(tmp_path / "x.jsonl"))


@pytest.mark.parametrize("source", ["nothing.jsonl", "./nothing", "/nothing/at/all"])
def test_a_missing_file_is_refused_without_asking_the_hub(source):
    with pytest.raises(CaftuneError, match=r"must be an existing file or a hub id \(owner/name\), got neither"):
        load_rows(source)


def test_a_missing_column_is_named(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"q": "1"}])
    with pytest.raises(CaftuneError, match=r"has no column 'answer'; its columns are q. Fix data.columns"):
        load_rows(path, {"prompt": "q", "completion": "answer"})


def test_columns_of_no_known_form_are_named_where_the_recipe_names_them(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"q": "1"}])
    with pytest.raises(CaftuneError, match=r"prompt alone, to be answered; .*\. Name them in labels\.columns"):
        load_rows(path, place="labels.columns")
    assert load_rows(path, {"prompt": "q"}, place="labels.columns").to_list() == [{"prompt": "1"}]


@pytest.mark.parametrize("ending", [".txt", ".parquet.gz"])
def test_an_unknown_ending_is_refused(tmp_path, ending):
    (tmp_path / f"x{ending}").write_text("a")
    with pytest.raises(CaftuneError, match=rf"must end in .jsonl, .json, .csv .* or .parquet, got '{ending}'"):
        load_rows(str(tmp_path / f"x{ending}"))


def test_a_json_file_that_is_no_list_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"text": "a"}')
    with pytest.raises(CaftuneError, match="must hold a JSON list of objects"):
        load_rows(str(tmp_path / "x.json"))


def test_a_byte_order_mark_is_left_out(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\n')
    assert load_rows(str(tmp_path / "rows.jsonl"))["text"] == ["a"]


def broken_files(folder):
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    (folder / "cut.jsonl.gz").write_bytes(whole[:-20])
    (folder / "latin.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    (folder / "folder").mkdir()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut.jsonl.gz", r"cut\.jsonl\.gz is damaged or cut off"),
        ("latin.jsonl", r"latin\.jsonl must be text in UTF-8, got"),
        ("folder", "folder must be a file or a hub id, got a folder. Name a file in it"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_a_remedy(name, message, tmp_path):
    broken_files(tmp_path)
    with pytest.raises(CaftuneError, match=message):
        load_rows(str(tmp_path / name))


def test_a_slip_in_the_names_of_columns_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}')
    with pytest.raises(
        CaftuneError, match=r"data\.columns\.promt is not one of caftune's names\. Did you mean prompt\?"
    ):
        load_rows(str(tmp_path / "rows.jsonl"), {"promt": "question", "completion": "answer"})


def test_tools_may_stand_as_json_in_a_text(tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = write(tmp_path / "x.jsonl", [{**row, "tools": json.dumps(tools), "chat_template_kwargs": '{"x": 1}'}])
    (found,) = load_rows(path).to_list()
    assert (found["tools"], found["chat_template_kwargs"]) == (tools, {"x": 1})
    with pytest.raises(CaftuneError, match=r"row 0 \(from 0\): tools must be JSON, got 'search'"):
        load_rows(write(tmp_path / "x.jsonl", [{**row, "tools": "search"}]))
    alpaca = {"instruction": "Add.", "output": "3", "tools": "RDKit, Open Babel"}  # a column of its own
    assert load_rows(write(tmp_path / "x.jsonl", [alpaca])).to_list() == [{"prompt": "Add.\n\n", "completion": "3"}]


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/name", (("owner/name",), "train")),
        ("owner/name:test[:5]", (("owner/name",), "test[:5]")),
        ("owner/name/main:test", (("owner/name", "main"), "test")),
    ],
)
def test_a_hub_id_names_a_configuration_and_a_split(source, asked, monkeypatch):
    def load(*place, split):
        assert (place, split) == asked
        return Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr("caftune.data.readers.load_dataset", load)
    assert load_rows(source).to_list() == [{"text": "a"}]


def test_a_data_set_that_needs_a_configuration_is_told_how(monkeypatch):
    def load(*place, split):
        raise ValueError("Config name is missing.")

    monkeypatch.setattr("caftune.data.readers.load_dataset", load)
    with pytest.raises(CaftuneError, match=r"Config name is missing.\). A hub id is owner/name\[/config\]\[:split\]"):
        load_rows("openai/gsm8k:test")


def test_what_is_evaluated_on_must_name_its_split(tmp_path, monkeypatch):
    refuse_unnamed_split("owner/name:test", "data.eval")
    refuse_unnamed_split("rows.jsonl", "data.eval")
    with pytest.raises(
        CaftuneError, match=r"data.eval must be a file that exists or name a split .* Write owner/name:test"
    ):
        refuse_unnamed_split("owner/name", "data.eval")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner/name").touch()  # a file of that name
    refuse_unnamed_split("owner/name", "data.eval")
