"""Files are written whole or not at all."""

import json
import os
import subprocess
import sys

import pytest

from caftune.files import read_json, replacing, write_json, write_lines


def test_an_error_leaves_the_old_file_and_nothing_next_to_it(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def broken_off():
        with replacing(path) as partial:
            partial.write_text("{")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_a_new_folder_is_made_with_the_folder(tmp_path):
    write_lines(tmp_path / "new" / "x.jsonl", [{"a": "é"}, {"b": 1}])
    assert (tmp_path / "new" / "x.jsonl").read_text(encoding="utf-8") == '{"a": "é"}\n{"b": 1}\n'


def test_a_file_that_is_absent_reads_as_nothing(tmp_path):
    assert read_json(tmp_path / "x.json") == {}


def test_processes_that_write_the_same_file_do_not_disturb_one_another(tmp_path):
    path = tmp_path / "x.json"
    code = (
        "import sys; from pathlib import Path; from caftune.files import write_json\n"
        "for _ in range(200): write_json(Path(sys.argv[1]), [sys.argv[2]] * 1000)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), name], env=dict(os.environ)) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert json.loads(path.read_text()) in (["a"] * 1000, ["b"] * 1000)
    assert list(tmp_path.iterdir()) == [path]
