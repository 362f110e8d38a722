"""What the values of a row become: contents are text, arguments of calls objects, and zero is a value."""

import json

import pytest
from datasets import Dataset

from caftune.data.forms import load_rows, read_rows
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.pipeline.preview import preview_rows
from caftune.pipeline.schema import Recipe


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(folder, row, **options):
    (found,) = load_rows(write(folder, row), **options).to_list()
    return found


def refused(folder, row, message, **options):
    good = {"messages": [said("user", "a")]} if {"messages", "conversations"} & row.keys() else dict.fromkeys(row, "a")
    path = write(folder, good, row)
    with pytest.raises(CaftuneError, match=rf"rows\.jsonl, row 1 \(from 0\):? {message}"):
        load_rows(path, **options)


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def part(text):
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([part("Say "), part("hi.")], "Say hi."),
        ([part("")], ""),
        (["Say ", part("hi.")], "Say hi."),
        ([{"text": "hi."}], "hi."),
        ([{**part("hi."), "cache_control": {"type": "ephemeral"}, "image_url": None}], "hi."),
    ],
)
def test_a_content_given_as_parts_is_their_text(content, text, tmp_path):
    turns = [said("user", content), said("assistant", content)]
    joined = [said("user", text), said("assistant", text)]
    assert read(tmp_path, {"messages": turns}) == {"messages": joined}
    assert read(tmp_path, {"prompt": turns[:1], "completion": turns[1:]}) == {
        "prompt": joined[:1],
        "completion": joined[1:],
    }
    shared = [{"from": "human", "value": content}, {"from": "gpt", "value": content}]
    assert read(tmp_path, {"conversations": shared}) == {"messages": joined}


def test_parts_from_arrow_are_joined_too(tmp_path):
    turns = [said("user", [part("a"), part("b")]), said("assistant", [part("c")])]
    Dataset.from_list([{"messages": turns}]).to_parquet(tmp_path / "rows.parquet")
    (row,) = load_rows(str(tmp_path / "rows.parquet")).to_list()
    assert row["messages"] == [said("user", "ab"), said("assistant", "c")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [part("a"), {"type": "image_url", "image_url": {"url": "x"}}],
            r"parts of a content in messages must be of type text, got \['text', 'image_url'\]",
        ),
        (
            [{"type": "tool_result", "content": "x"}],
            r"parts of a content in messages must be of type text, got \['tool_result'\]",
        ),
        ([part(3)], "a part of a content in messages must be text, got {'type': 'text', 'text': 3}"),
        ([{"type": "text"}], "a part of a content in messages must be text"),
        ([["nested"]], r"a part of a content in messages must be text, got \['nested'\]. Write it as"),
        (
            [{**part("a"), "image": "x.png"}],
            "a part of a content in messages must be text only, got image",
        ),
        ([], r"content in messages must be text, got \[\]"),
        (3, "content in messages must be text, got 3"),
        (False, "content in messages must be text, got False"),
        ({"text": "a"}, "content in messages must be text, got {'text': 'a'}"),
        (None, "content in messages must be text, got None"),
    ],
)
def test_a_content_that_is_no_text_is_refused(content, message, tmp_path):
    refused(tmp_path, {"messages": [said("user", content), said("assistant", "b")]}, message)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "output": ["b", "c"]}, r"output must be text, got \['b', 'c'\]. Write it as one text"),
        ({"instruction": "a", "output": {"x": 1}}, "output must be text, got {'x': 1}. Write it as one text"),
        ({"instruction": "a", "output": 3}, "output must be text, got 3. Write it in quotes"),
        ({"instruction": ["a"], "output": "b"}, r"instruction must be text, got \['a'\]"),
        ({"instruction": "a", "output": [said("assistant", "b")]}, "output must be text, got"),
        ({"instruction": "a", "input": {"x": 1}, "output": "b"}, "input must be text, got {'x': 1}"),
        ({"instruction": "a", "input": ["x"], "output": "b"}, r"input must be text, got \['x'\]"),
        ({"instruction": "a", "input": float("nan"), "output": "b"}, "input must hold values that JSON can represent"),
        ({"prompt": "a", "completion": ["b", "c"]}, r"completion must be text, got \['b', 'c'\]"),
        ({"prompt": "a", "completion": [part("b")]}, "completion must be text, got"),
        ({"prompt": "a", "completion": 1}, "completion must be text, got 1. Write it in quotes"),
        ({"prompt": "a", "completion": False}, "completion must be text, got False. Write it in quotes"),
        ({"prompt": "a", "completion": 0.5}, "completion must be text, got 0.5. Write it in quotes"),
        ({"prompt": {"x": 1}, "completion": "b"}, "prompt must be text, got {'x': 1}"),
        ({"text": ["a"]}, r"text must be text, got \['a'\]"),
        ({"text": [said("user", "a")]}, "text must be text, got"),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_what_is_no_text_in_a_column_is_refused(row, message, chat, tmp_path):
    refused(tmp_path, row, message, chat=chat)


@pytest.mark.parametrize(
    ("given", "written"),
    [(0, "0"), (False, "false"), (True, "true"), (0.0, "0.0"), (2, "2"), ("0", "0"), (" ", " ")],
)
@pytest.mark.parametrize("name", ["input", "context"])
def test_an_input_that_is_there_is_written(given, written, name, tmp_path):
    row = {"instruction": "Negate.", name: given, "output": "b"}
    assert read(tmp_path, row)["prompt"] == f"Negate.\n\n{written}\n\n"
    assert read(tmp_path, row, chat=True)["prompt"] == [said("user", f"Negate.\n\n{written}")]


@pytest.mark.parametrize("nothing", ["", None, [], {}])
@pytest.mark.parametrize("name", ["input", "context", "history", "system", "images", "tools"])
def test_what_stands_for_nothing_is_left_out(nothing, name, tmp_path):
    assert read(tmp_path, {"instruction": "Add.", name: nothing, "output": "b"})["prompt"] == "Add.\n\n"


def test_an_empty_input_gives_way_to_a_context_and_two_are_refused(tmp_path):
    row = {"instruction": "a", "input": "", "context": 0, "output": "b"}
    assert read(tmp_path, row)["prompt"] == "a\n\n0\n\n"
    with pytest.raises(CaftuneError, match=r"row 0 \(from 0\) must have an input or a context, got both"):
        read(tmp_path, row | {"input": 0})
    columns = {"instruction": "instruction", "input": "context", "output": "output"}
    assert read(tmp_path, row | {"input": "x", "context": "y"}, columns=columns)["prompt"] == "a\n\ny\n\n"


def test_an_output_that_is_none_gives_way_to_a_response(tmp_path):
    assert read(tmp_path, {"instruction": "a", "output": None, "response": "b"})["completion"] == "b"
    refused(tmp_path, {"instruction": "a", "output": 0, "response": "b"}, "output must be text, got 0")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"system": 0}, ": system must be text, got 0"),
        ({"system": ["Be brief."]}, r": system must be text, got \['Be brief.'\]"),
        ({"images": 0}, " must be text only, got images"),
        ({"history": False}, " must not have a history"),
    ],
)
def test_a_zero_that_cannot_be_used_is_refused_rather_than_left_out(value, message, tmp_path):
    with pytest.raises(CaftuneError, match=rf"row 0 \(from 0\){message}"):
        load_rows(write(tmp_path, {"instruction": "a", "output": "b", **value}), chat=True)


def call(arguments, **more):
    return {"type": "function", "function": {"name": "f", "arguments": arguments}, **more}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ('{"x": 0}', {"x": 0}),
        (' {"x": {"y": "{}"}} ', {"x": {"y": "{}"}}),
        ({"x": "{}"}, {"x": "{}"}),
        ("{}", {}),
        ("", {}),
        ("print(1)", "print(1)"),  # the text is the argument
        ("[1]", "[1]"),
        ([1], [1]),
        (None, None),
    ],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_arguments_that_are_an_object_in_a_text_become_it(given, kept, as_text, tmp_path):
    def turns(arguments):
        return [
            said("user", "a"),
            {"role": "assistant", "tool_calls": [call(arguments, id="1"), call(arguments)]},
            said("tool", "0"),
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": arguments}},
        ]

    written = json.dumps(turns(given)) if as_text else turns(given)
    for name in ("messages", "conversations"):
        assert read(tmp_path, {name: written}) == {"messages": turns(kept)}
    prompt = {"prompt": turns(given)[:1], "completion": turns(given)[1:]}
    assert read(tmp_path, prompt)["completion"] == turns(kept)[1:]


def test_calls_that_are_json_in_a_text_or_hold_no_function_are_read_too(tmp_path):
    turn = {"role": "assistant", "tool_calls": json.dumps([{"name": "f", "arguments": '{"x": 0}'}])}
    assert read(tmp_path, {"messages": [turn]})["messages"][0]["tool_calls"] == [{"name": "f", "arguments": {"x": 0}}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ('{"x": ', r"arguments of a call in messages must be JSON, got '{\"x\": ' \(Expecting value\)"),
        ("{'x': 0}", "arguments of a call in messages must be JSON"),
        ('{"x": 0, "x": 1}', "arguments of a call in messages must be JSON, .*the key 'x' occurs twice"),
        ({"x": float("inf")}, "must hold values that JSON can represent"),
    ],
)
def test_arguments_that_would_lose_something_are_refused(arguments, message, tmp_path):
    refused(tmp_path, {"messages": [{"role": "assistant", "tool_calls": [call(arguments)]}]}, message)


@pytest.mark.parametrize("calls", ["{", {"name": "f"}, ["f"], 0])
def test_calls_that_are_no_list_of_calls_are_refused(calls, tmp_path):
    refused(tmp_path, {"messages": [{"role": "assistant", "tool_calls": calls}]}, "tool_calls")


@pytest.mark.parametrize("more", [{"tool_calls": []}, {"name": "bot"}, {"tool_calls": None}])
def test_an_assistant_that_says_nothing_and_calls_nothing_is_refused(more, tmp_path):
    refused(tmp_path, {"messages": [said("assistant", None, **more)]}, "content in messages must be text, got None")


def test_calls_that_are_null_or_an_empty_list_are_no_calls(tmp_path):
    turns = [said("user", "a", name=None), said("assistant", "b", tool_calls=[], function_call=None)]
    assert read(tmp_path, {"messages": turns})["messages"] == [said("user", "a"), said("assistant", "b")]


def test_sharegpt_calls_and_what_came_back_become_messages(tmp_path):
    turns = [
        {"from": "human", "value": "2+3?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"from": "observation", "value": '{"sum": 5}'},
        {"from": "function_call", "value": json.dumps([{"name": "g", "arguments": '{"b": 0}'}, {"name": "h"}])},
        {"from": "tool", "value": "5"},
        {"from": "gpt", "value": "5"},
    ]
    row = read(tmp_path, {"conversations": turns, "tools": '[{"name": "add"}]'})
    first = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
    second = [call({"b": 0}) | {"function": {"name": "g", "arguments": {"b": 0}}}]
    second += [{"type": "function", "function": {"name": "h"}}]
    assert row["messages"] == [
        said("user", "2+3?"),
        said("assistant", None, tool_calls=first),
        said("tool", '{"sum": 5}'),
        said("assistant", None, tool_calls=second),
        said("tool", "5"),
        said("assistant", "5"),
    ]
    assert row["tools"] == [{"name": "add"}]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (
            {"from": "function_call", "value": "add(2)"},
            "a function_call in conversations must be JSON, got 'add\\(2\\)'",
        ),
        ({"from": "function_call", "value": "[]"}, "a function_call in conversations must be an object with name"),
        ({"from": "function_call", "value": '{"arguments": {}}'}, "a function_call in conversations must be an object"),
        ({"from": "function_call", "value": None}, "a function_call in conversations must be an object"),
        (
            {"from": "bot", "value": "x"},
            "a speaker in conversations must be one of human, .*function_call, got 'bot'. Rename",
        ),
        ({"from": ["gpt"], "value": "x"}, "a speaker in conversations must be one of"),
        ({"from": "gpt", "value": 3}, "content in conversations must be text, got 3"),
    ],
)
def test_a_sharegpt_turn_that_cannot_be_read_is_named_with_a_remedy(turn, message, tmp_path):
    refused(tmp_path, {"conversations": [turn]}, message)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("[{'role': 'user', 'content': 'a'}]", r"messages must be JSON, got .* Write it with json\.dumps"),
        ('[{"role": "user"', "messages must be JSON"),
        ('"text"', "messages must be a list of messages, got 'text'"),
        ("", "messages must be JSON, got ''"),
    ],
)
def test_messages_as_text_that_are_no_messages_are_refused(messages, message, tmp_path):
    refused(tmp_path, {"messages": messages}, message)


def test_messages_may_stand_as_json_in_a_csv(tmp_path):
    turns = [said("user", 'a, "b"'), said("assistant", "c\nd")]
    text = json.dumps(turns).replace('"', '""')
    (tmp_path / "rows.csv").write_text(f'messages\n"{text}"\n')
    assert load_rows(str(tmp_path / "rows.csv")).to_list() == [{"messages": turns}]


@pytest.mark.parametrize(
    ("name", "value"), [("tools", {"name": "f"}), ("tools", ["f"]), ("tools", 0), ("chat_template_kwargs", [1])]
)
def test_tools_and_options_of_another_kind_are_refused(name, value, tmp_path):
    refused(tmp_path, {"messages": [said("user", "a")], name: value}, f"{name} must be a")


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_of_no_rows_is_refused_rather_than_taken_for_none(limit, tmp_path):
    path = write(tmp_path, {"text": "a"})
    for read_some in (load_rows, read_rows):
        with pytest.raises(CaftuneError, match=f"limit must be at least 1, got {limit}"):
            read_some(path, limit=limit)
    recipe = Recipe.model_validate(
        {"output": str(tmp_path / "run"), "model": {"name": str(BASE)}, "data": {"train": path}}
    )
    with pytest.raises(CaftuneError, match=f"limit must be at least 1, got {limit}"):
        next(preview_rows(recipe, limit))


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "max_length"])
def test_arguments_of_the_rendering_are_no_variables_of_a_template(name, tmp_path):
    row = {"messages": [said("user", "a")], "chat_template_kwargs": {"thinking": False, name: 1}}
    refused(tmp_path, row, f"chat_template_kwargs must hold variables of the chat template, got {name}")
