"""The server of llama.cpp: labels from it, and exports that are converted to GGUF and served."""

import subprocess
from pathlib import Path

import pytest
from served import Served, answers_here, answers_there, labels_with_a_kill, quiet_environment, text_prompts

from caftune.data.forms import load_rows

TOKENS = 24


@pytest.fixture(scope="module")
def llama(peer):
    return peer("llama.cpp")


@pytest.fixture
def serve(llama, tmp_path):
    """A server of a model, which is converted to GGUF in float32."""

    def served(model):
        convert = [llama / "bin" / "python", llama / "source" / "llama.cpp" / "convert_hf_to_gguf.py", model]
        file = tmp_path / "model.gguf"
        done = subprocess.run(
            [*map(str, convert), "--outtype", "f32", "--outfile", str(file)],
            capture_output=True,
            text=True,
            env=quiet_environment(),
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return Served([llama / "bin" / "python", Path(__file__).with_name("llama_server.py"), file], tmp_path / "log")

    return served


@pytest.fixture(scope="module")
def base(shared):
    return shared / "models" / "stories260k"


@pytest.fixture(scope="module")
def questions(shared):
    return str(shared / "data" / "instructions" / "alpaca_en_demo.json")


def test_labels_of_a_server_killed_in_the_middle_are_those_of_this_process(serve, base, questions, tmp_path):
    labels = {"prompts": questions, "limit": 160, "skip_long_prompts": True}
    labels |= {"max_new_tokens": TOKENS, "temperature": 0}
    with serve(base) as server:
        ours, theirs = labels_with_a_kill(server, base, labels, tmp_path, kill_after=20)
    assert len(ours) >= 150
    assert all(label.exact for label in theirs)
    assert ours == theirs


@pytest.fixture(scope="module")
def exports(export, base, tmp_path_factory):
    return export(base, tmp_path_factory.mktemp("exports"))


@pytest.mark.parametrize("name", ["full", "merged"])
def test_an_export_is_served_as_transformers_runs_it(serve, exports, base, questions, name):
    tuned = exports[name]
    prompts = text_prompts(load_rows(questions, limit=40)["prompt"], base)
    with serve(tuned) as server:
        found = answers_there(server, tuned, base, prompts, TOKENS)
    assert found == answers_here(tuned, base, prompts, TOKENS) != answers_here(base, base, prompts, TOKENS)
