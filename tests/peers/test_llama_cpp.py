"""A real llama-server: labels from it, and exports that are converted to GGUF and served."""

import subprocess

import pytest
from served import Served, answers_here, answers_there, free_port, labels_with_a_kill, quiet_environment, text_prompts

from caftune.data.forms import load_rows

TOKENS = 24


@pytest.fixture(scope="module")
def llama(peer):
    return peer("llama.cpp")


@pytest.fixture
def serve(llama, tmp_path):
    """Convert a model to GGUF in float32 and serve it; all servers are stopped at the end."""
    started = []

    def start(model):
        port, file = free_port(), tmp_path / "model.gguf"
        convert = [llama / "bin" / "python", llama / "source" / "llama.cpp" / "convert_hf_to_gguf.py", model]
        done = subprocess.run(
            [*map(str, convert), "--outtype", "f32", "--outfile", str(file)],
            capture_output=True,
            text=True,
            env=quiet_environment(),
        )
        assert done.returncode == 0, done.stderr[-4000:]
        command = [llama / "build" / "bin" / "llama-server", "--model", file, "--host", "127.0.0.1", "--port", port]
        exact = ["--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off"]
        sizes = ["--ctx-size", 2048, "--parallel", 4, "--threads", 1]
        started.append(Served([*command, *exact, *sizes], port, tmp_path / "log"))
        return started[-1].wait()

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def base(shared):
    return shared / "models" / "stories260k"


@pytest.fixture(scope="module")
def questions(shared):
    return str(shared / "data" / "instructions" / "alpaca_en_demo.json")


def test_labels_of_a_server_killed_in_the_middle_are_those_of_this_process(serve, base, questions, tmp_path):
    labels = {"prompts": questions, "limit": 160, "skip_long_prompts": True}
    labels |= {"max_new_tokens": TOKENS, "temperature": 0}
    ours, theirs = labels_with_a_kill(serve(base), base, labels, tmp_path, kill_after=20)
    assert len(ours) >= 150
    assert all(label.exact for label in theirs)
    assert ours == theirs


@pytest.mark.parametrize("name", ["full", "merged"])
def test_an_export_is_served_as_transformers_runs_it(serve, export, base, questions, tmp_path, name):
    tuned = export(base, tmp_path)[name]
    prompts = text_prompts(load_rows(questions, limit=40)["prompt"], base)
    found = answers_there(serve(tuned), tuned, base, prompts, TOKENS)
    assert found == answers_here(tuned, base, prompts, TOKENS) != answers_here(base, base, prompts, TOKENS)
