"""Files read row by row: nothing behind the limit, nothing changed in silence, what is damaged named by its line."""

import gzip
import json
import os
import subprocess
import sys
from itertools import islice

import pytest
from datasets import Dataset

from caftune.data.forms import load_rows, read_rows
from caftune.data.readers import MalformedJson, parse_json, raw_rows
from caftune.errors import CaftuneError
from caftune.pipeline.recipe import load_recipe

DEEP = '{"text": "a", "more": ' + "[" * 5000 + "]" * 5000 + "}"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (DEEP, "nested too deeply"),
        ('{"text": "a", "more": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ('{"text": "a", "text": "b"}', "the key 'text' occurs twice in one object"),
        ('{"text": "a", "more": [{"x": 1, "y": 2, "x": 1}]}', "the key 'x' occurs twice in one object"),
        (r'{"text": "\ud83d"}', r"\\ud83d is half of a surrogate pair"),
        (r'{"text": "a", "\uDC00": 1}', r"\\udc00 is half of a surrogate pair"),
        (r'{"text": "\ud83d\ud83d\ude00"}', r"\\ud83d is half of a surrogate pair"),
        ('{"text": "a"} {"text": "b"}', "Extra data"),
        ('{"text": "a\x01"}', "Invalid control character"),
    ],
)
def test_a_line_that_would_lose_something_or_cannot_be_read_is_named(line, reason, tmp_path):
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "a"}}\n\n{line}\n')
    with pytest.raises(
        CaftuneError, match=rf"rows\.jsonl, line 3: malformed JSON \({reason}.*\)\. Fix or remove the line"
    ):
        read_rows(str(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.json").write_text(f'[{{"text": "a"}},\n{line}\n]')
    with pytest.raises(CaftuneError, match=r"rows\.json, line \d+: malformed JSON \(.*\)\. Fix the file"):
        read_rows(str(tmp_path / "rows.json"))


def test_one_object_per_line_in_a_json_file_is_named_as_such(tmp_path):
    (tmp_path / "rows.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(
        CaftuneError, match=r"rows\.json, line 2: malformed JSON .* One object per line\? Name it \.jsonl"
    ):
        load_rows(str(tmp_path / "rows.json"))


@pytest.mark.parametrize(
    "text",
    [
        r'"\ud83d\ude00"',  # a whole pair
        r'"\\ud83d"',  # the six characters of an escape, in a text about it
        r'"a\u0000b"',  # NUL is a character as any other
        '"é\u2028\x85"',
        "1e-12",
        "-0.0",
        "18446744073709551616",
        "123456789.123456789",
    ],
)
def test_what_json_can_say_stays_as_it_is(text, tmp_path):
    assert repr(parse_json(text)) == repr(json.loads(text))
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "a", "value": {text}}}\n', encoding="utf-8")
    assert read_rows(str(tmp_path / "rows.jsonl")) == [{"text": "a", "value": json.loads(text)}]


def test_malformed_json_says_its_line():
    with pytest.raises(MalformedJson, match="Expecting value") as caught:
        parse_json("[1,\n2,\nx]")
    assert caught.value.line == 3


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", '{"text": "a"}\n'),
        ("rows.json", '[{"text": "a"}]'),
        ("rows.csv", "text\na\n"),
        ("rows.csv", "text\nй\n"),
        ("rows.jsonl.gz", '{"text": "a"}\n'),
    ],
)
def test_a_file_in_utf_16_or_32_is_refused_with_what_to_do(name, text, encoding, tmp_path):
    content = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(CaftuneError, match=rf"{name} must be text in UTF-8, got.*Convert it, with"):
        load_rows(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "text"),
    [("x.jsonl", '{"text": "a"}\n'), ("x.json", '[{"text": "a"}]'), ("x.csv", "text\na\n"), ("x.csv.gz", "text\na\n")],
)
def test_a_byte_order_mark_at_the_start_of_a_file_is_no_text(name, text, tmp_path):
    content = text.encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert load_rows(str(tmp_path / name)).to_list() == [{"text": "a"}]


def test_a_recipe_with_a_byte_order_mark_is_read_and_one_in_utf_16_is_named(tmp_path):
    text = "output: run\nmodel: {name: base}\n"
    (tmp_path / "marked.yaml").write_bytes(text.encode("utf-8-sig"))
    assert load_recipe(tmp_path / "marked.yaml").output == "run"
    (tmp_path / "wide.yaml").write_bytes(text.encode("utf-16"))
    with pytest.raises(CaftuneError, match=r"wide\.yaml must be text in UTF-8, got .* Convert it"):
        load_recipe(tmp_path / "wide.yaml")


def test_what_is_behind_the_limit_is_not_read(tmp_path):
    good, bad = '{"prompt": "a", "completion": "b"}\n', "not JSON\n"
    (tmp_path / "x.jsonl").write_text(good * 3 + bad)
    assert len(load_rows(str(tmp_path / "x.jsonl"), limit=3)) == 3
    assert len(read_rows(str(tmp_path / "x.jsonl"), limit=2)) == 2
    with pytest.raises(CaftuneError, match="line 4: malformed JSON"):
        load_rows(str(tmp_path / "x.jsonl"), limit=4)
    (tmp_path / "x.csv").write_text("prompt,completion\na,b\na,b\na,b,c\n")
    assert len(load_rows(str(tmp_path / "x.csv"), limit=2)) == 2
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % n for n in range(100_000)))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-1000])
    assert load_rows(str(tmp_path / "cut.jsonl.gz"), limit=5)["text"] == list("01234")


def test_a_parquet_file_is_read_a_batch_at_a_time(tmp_path):
    Dataset.from_dict({"text": [str(n) for n in range(2500)]}).to_parquet(tmp_path / "x.parquet")
    assert [row["text"] for row in raw_rows(str(tmp_path / "x.parquet"))] == [str(n) for n in range(2500)]
    rows = raw_rows(str(tmp_path / "x.parquet"))
    assert [row["text"] for row in islice(rows, 2)] == ["0", "1"]
    rows.close()
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-10])
    with pytest.raises(CaftuneError, match=r"cut\.parquet is damaged or cut off"):
        load_rows(str(tmp_path / "cut.parquet"))


def test_the_cells_of_a_csv_keep_their_line_ends(tmp_path):
    (tmp_path / "x.csv").write_bytes(b'prompt,completion\r\n"a\r\nb","c\nd"\r\n"e\rf",g\r\n')
    rows = load_rows(str(tmp_path / "x.csv")).to_list()
    assert rows == [{"prompt": "a\r\nb", "completion": "c\nd"}, {"prompt": "e\rf", "completion": "g"}]


@pytest.mark.parametrize("header", ["text,text", "prompt,completion,prompt"])
def test_a_column_of_a_csv_that_stands_twice_is_refused(header, tmp_path):
    (tmp_path / "x.csv").write_text(f"{header}\n" + ",".join("abc"[: header.count(",") + 1]) + "\n")
    with pytest.raises(CaftuneError, match=r"x\.csv must have columns of different names, got '(text|prompt)' twice"):
        load_rows(str(tmp_path / "x.csv"))


def test_values_that_look_like_dates_or_numbers_keep_their_type(tmp_path):
    rows = [
        {"prompt": "2024-01-01", "completion": "007", "n": 1},
        {"prompt": "2024-01-02", "completion": "1.0", "n": 1.5},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [repr(row) for row in read_rows(str(tmp_path / "x.jsonl"))] == [repr(row) for row in rows]
    assert load_rows(str(tmp_path / "x.jsonl"))["completion"] == ["007", "1.0"]


def test_reading_files_writes_nothing_into_a_home(tmp_path):
    (home := tmp_path / "home").mkdir()
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "x.parquet")
    code = f"from caftune.data.forms import load_rows\nfor n in ('jsonl', 'parquet'): load_rows(f'{tmp_path}/x.{{n}}')"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    subprocess.run([sys.executable, "-c", code], check=True, env={**environment, "HOME": str(home)})
    assert not list(home.rglob("*"))
