"""Labels from a real `transformers serve` on loopback, killed in the middle."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from caftune.generation.labels import read_labels
from caftune.pipeline.label import label_prompts
from caftune.pipeline.schema import Recipe


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_server(base, port):
    command = [
        Path(sys.executable).with_name("transformers"),
        "serve",
        base,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*map(str, command), "--device", "cpu"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def wait_for(process, port):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "transformers serve ended"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    pytest.fail("transformers serve did not come up")


def test_a_real_server_killed_in_the_middle_gives_the_labels_of_this_process(shared, tmp_path):
    base, port = str(shared / "models" / "stories260k"), free_port()
    common = {"limit": 203, "skip_long_prompts": True, "max_new_tokens": 24, "temperature": 0}
    common["prompts"] = str(shared / "data" / "instructions" / "alpaca_en_demo.json")
    server = {"url": f"http://127.0.0.1:{port}/v1", "concurrency": 4, "retries": 12}
    recipes = {
        name: Recipe.model_validate(
            {
                "output": str(tmp_path / name),
                "model": {"name": base},
                "labels": {**common, "backend": name, "server": server},
            }
        )
        for name in ("transformers", "server")
    }
    cache = tmp_path / "server" / "labels" / "cache.jsonl"
    process = start_server(base, port)
    try:
        wait_for(process, port)
        labelling = threading.Thread(target=label_prompts, args=[recipes["server"]])
        labelling.start()
        while not cache.is_file() or cache.read_bytes().count(b"\n") < 60:
            assert labelling.is_alive()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = cache.read_bytes().count(b"\n")
        assert kept < 190
        process = start_server(base, port)
        labelling.join(timeout=300)
        assert not labelling.is_alive()
    finally:
        process.kill()
        process.wait()
    label_prompts(recipes["transformers"])
    ours, theirs = (read_labels(tmp_path / name / "labels" / "labels.jsonl") for name in recipes)
    assert len(ours) >= 200
    assert max(Counter(cache.read_text().split('"key": "')[1:]).values()) == 1
    for name in ("row", "turn", "prompt_ids", "completion", "finish"):
        assert [getattr(label, name) for label in ours] == [getattr(label, name) for label in theirs]
    # The server gives text. A model that spells a word otherwise than its tokenizer does is told by its text alone.
    spelled = [one.completion_ids == other.completion_ids for one, other in zip(ours, theirs, strict=True)]
    assert sum(spelled) >= 0.98 * len(ours)
