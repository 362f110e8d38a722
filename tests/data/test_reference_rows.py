"""Rows of the reference implementation: `conversation` with `human` and `assistant`, `status` of the generation."""

import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hub import serve_hub

from caftune.data.forms import load_rows, read_rows
from caftune.errors import CaftuneError
from caftune.evals.tasks import TASKS
from caftune.pipeline.evaluate import _is_trained_on_text, read_tasks
from caftune.pipeline.schema import DataSection, EvalSection


def said(role, content):
    return {"role": role, "content": content}


def row(*turns, status="OK", **more):
    return {"id": "7", "status": status, "conversation": list(turns), **more}


ASKED, ANSWERED = said("human", "1+1?"), said("assistant", "Two.")
GOOD = row(ASKED, ANSWERED)
MESSAGES = [said("user", "1+1?"), said("assistant", "Two.")]


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(path)


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        (GOOD, MESSAGES),
        ({"conversation": [ASKED, ANSWERED]}, MESSAGES),
        (row(ASKED, ANSWERED, status=None), MESSAGES),
        (row(ASKED, said("gpt", "Two.")), MESSAGES),
        (row(said("system", "Be brief."), ASKED, ANSWERED), [said("system", "Be brief."), *MESSAGES]),
        (row(ASKED, ANSWERED, system="Be brief."), [said("system", "Be brief."), *MESSAGES]),
        (row(ASKED, ANSWERED, ASKED, ANSWERED), MESSAGES * 2),
        (row({"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "Two."}), MESSAGES),
        ({**GOOD, "conversation": json.dumps(GOOD["conversation"])}, MESSAGES),
        ({"conversations": [ASKED, ANSWERED], "conversation": "a talk"}, MESSAGES),
        ({"conversations": [ASKED, ANSWERED], "conversation": [], "status": "ERROR"}, MESSAGES),
        ({"messages": MESSAGES, "status": "ERROR"}, MESSAGES),
        ({"conversations": [ASKED, ANSWERED], "status": "ERROR"}, MESSAGES),
    ],
)
def test_a_conversation_becomes_messages(given, messages, tmp_path):
    assert load_rows(write(tmp_path, given)).to_list() == [{"messages": messages}]


def test_a_form_of_other_columns_keeps_its_meaning(tmp_path):
    for form in ({"text": "C"}, {"prompt": "C", "completion": "N"}):
        assert load_rows(write(tmp_path, {**form, "conversation": [], "status": "ERROR"})).to_list() == [form]


FAILED = [row(status="ERROR"), row(ASKED, status="timeout"), row(), {"id": 3, "status": "OK", "conversation": None}]


def test_failed_generations_are_left_out_and_counted(tmp_path, caplog):
    path = write(tmp_path, GOOD, *FAILED, GOOD)
    with caplog.at_level(logging.WARNING):
        rows = load_rows(path)
    assert rows["messages"] == [MESSAGES] * 2
    assert [record.message for record in caplog.records] == [
        f"4 of 6 rows of {path} are failed generations and are left out (the first is row 1, from 0, with no conversation)."
    ]


def test_nothing_is_reported_where_all_are_finished(tmp_path, caplog):
    load_rows(write(tmp_path, GOOD, GOOD))
    assert not caplog.records


@pytest.mark.parametrize("failed", FAILED)
def test_a_file_of_failed_generations_alone_is_refused(failed, tmp_path):
    for read in (load_rows, read_rows):
        with pytest.raises(
            CaftuneError, match=r"rows.jsonl must have a row with status OK .*, got 2 failed generations"
        ):
            read(write(tmp_path, failed, failed))


def test_the_limit_counts_rows_read_and_the_rest_is_not_read(tmp_path):
    path = write(tmp_path, FAILED[0], GOOD)
    Path(path).write_text(Path(path).read_text() + "{not JSON\n")
    assert len(load_rows(path, limit=2)) == len(read_rows(path, limit=2)) == 1
    with pytest.raises(CaftuneError, match="line 3: malformed JSON"):
        load_rows(path, limit=3)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(said("robot", "x")), r"row 2 \(from 0\): a role in conversation must be one of system, .* got 'robot'"),
        (row({"from": "robot", "value": "x"}), "a speaker in conversation must be one of human, .* got 'robot'"),
        (row(said("human", 3)), "content in conversation must be text, got 3"),
        (row(said("human", None)), "content in conversation must be text, got None"),
        ({**GOOD, "conversation": "Human: hi"}, r"conversation must be JSON, got 'Human: hi' \(.*\)\. Write it with"),
        ({**GOOD, "conversation": {"role": "human"}}, "conversation must be a list of messages, got "),
        ({"text": "C"}, "must have the columns and types of the rows before it"),
    ],
)
def test_a_bad_row_is_named_by_its_number_in_the_file(bad, message, tmp_path):
    with pytest.raises(CaftuneError, match=message):
        load_rows(write(tmp_path, GOOD, FAILED[0], bad))


def test_a_conversation_under_another_name_keeps_its_status(tmp_path):
    rows = [{"talk": each["conversation"], "status": each["status"], "text": "x"} for each in (FAILED[1], GOOD)]
    assert load_rows(write(tmp_path, *rows), {"conversation": "talk"})["messages"] == [MESSAGES]
    states = [{"talk": each["conversation"], "state": each["status"]} for each in (FAILED[1], GOOD)]
    columns = {"conversation": "talk", "status": "state"}
    assert load_rows(write(tmp_path, *states), columns)["messages"] == [MESSAGES]


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_other_files_hold_the_same_rows(kind, tmp_path):
    rows = [FAILED[0], GOOD, row(said("system", "Be brief."), ASKED, ANSWERED)]
    path = tmp_path / f"rows.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows))
    else:
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    assert load_rows(str(path))["messages"] == [MESSAGES, [said("system", "Be brief."), *MESSAGES]]


def test_rows_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "rows")
    lines = "".join(json.dumps(each) + "\n" for each in [GOOD, FAILED[0], GOOD]).encode()
    with serve_hub(tmp_path / "hub") as hub:
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
        hub.private["owner/rows"] = False
        hub.record("owner/rows", "first", {"train.jsonl": lines})
        assert load_rows("owner/rows")["messages"] == [MESSAGES] * 2
        assert load_rows("owner/rows", limit=2)["messages"] == [MESSAGES]


def evaluated(folder, *rows, task="exact_match", **columns):
    section = EvalSection(tasks=[task], data={task: write(folder, *rows)}, columns=columns)
    ((_, examples),) = read_tasks(section)
    return [(example.id, example.prompt, example.reference) for example in examples]


def test_a_question_and_its_answer_are_evaluated_on(tmp_path):
    other = row(said("user", "2+2?"), said("gpt", "Four.")) | {"id": "8"}
    assert evaluated(tmp_path, GOOD, FAILED[0], other) == [("7", "1+1?", "Two."), ("8", "2+2?", "Four.")]
    found = evaluated(tmp_path, row(ASKED, said("assistant", "So 2.\n#### 2")), task="gsm8k",
                      prompt="prompt", question="prompt", answer="completion")  # fmt: skip
    assert found == [("0", "1+1?", "2")]


def test_several_turns_are_no_question(tmp_path):
    with pytest.raises(CaftuneError, match="must have a column prompt"):
        evaluated(tmp_path, row(ASKED, ANSWERED, ASKED, ANSWERED))


@pytest.mark.parametrize("extra", [{"status": "draft"}, {"status": "ERROR", "conversation": "see above"}])
def test_a_status_of_other_rows_is_ignored_in_evaluations(extra, tmp_path):
    assert evaluated(tmp_path, {"prompt": "C", "completion": "N", **extra}) == [("0", "C", "N")]
    own = TASKS["humaneval"].rows[0] | {"status": "draft"}
    assert read_rows(write(tmp_path, own)) == [own]


def test_a_first_row_that_failed_does_not_hide_that_a_model_talks(tmp_path):
    assert not _is_trained_on_text(DataSection(train=write(tmp_path, FAILED[0], GOOD)))
