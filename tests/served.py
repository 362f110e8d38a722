"""Real servers on loopback, in separate processes, and labels from one that is killed in the middle."""

import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from caftune.data.prompts import Conversation
from caftune.generation.backends import Sampling, end_tokens, transformers_backend
from caftune.generation.labels import read_labels
from caftune.generation.server import Server, server_backend
from caftune.pipeline.label import label_prompts
from caftune.pipeline.schema import Recipe

STARTED = 400  # seconds that a server may take


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def quiet_environment():
    """One thread, and no hub."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Served:
    """A server on a free port, for a `with` block. `log` gets what it prints."""

    def __init__(self, command, log, **environment):
        port = free_port()
        self.url, self.log = f"http://127.0.0.1:{port}", Path(log)
        self.command = [*map(str, command), "--host", "127.0.0.1", "--port", str(port)]
        self.environment = {**quiet_environment(), **environment}

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self):
        """Start the server, and return when it answers; the test fails with the end of its log where it never does."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

        deadline = time.monotonic() + STARTED
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=1).close()
                return
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                time.sleep(0.2)
        self.stop()
        pytest.fail(f"{self.command[:2]} did not come up:\n{self.log.read_text(errors='replace')[-4000:]}")

    def stop(self):
        """End the server and its children as a kill does, without a goodbye to its clients."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def text_prompts(texts, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    return [Conversation(text).prompt(0, [], tokenizer) for text in texts]


def answers_here(name, base, prompts, tokens):
    """The greedy answers of a model, or of an adapter with its base, in this process and in float32."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    backend = transformers_backend(model, AutoTokenizer.from_pretrained(base), Sampling(tokens, 0.0))
    return in_order(backend(prompts, [0] * len(prompts)))


def answers_there(server, name, base, prompts, tokens):
    """The greedy answers of what a server serves under a name."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    limits = Server(f"{server.url}/v1", str(name), concurrency=4)
    ends = end_tokens(model.generation_config, tokenizer)
    return in_order(server_backend(limits, tokenizer, Sampling(tokens, 0.0), ends)(prompts, [0] * len(prompts)))


def in_order(answers):
    found = dict(answers)
    return [found[number] for number in range(len(found))]


def labels_with_a_kill(server, base, labels, folder, *, kill_after):
    """Label with `server` killed and restarted after some answers, and in this process. Returns both lists of labels.

    `labels`: the section of the recipe. No answer may be requested twice, and the kill must have fallen in the middle.
    """
    limits = {"url": f"{server.url}/v1", "concurrency": 4, "retries": 80}
    ours, theirs = (
        Recipe.model_validate(
            {
                "output": str(folder / name),
                "model": {"name": str(base)},
                "labels": {**labels, "backend": name, "server": limits},
            }
        )
        for name in ("transformers", "server")
    )
    cache = folder / "server" / "labels" / "cache.jsonl"
    labelling = threading.Thread(target=label_prompts, args=[theirs])
    labelling.start()
    while not cache.is_file() or cache.read_bytes().count(b"\n") < kill_after:
        assert labelling.is_alive()
        time.sleep(0.02)
    server.stop()
    assert labelling.is_alive()
    kept = cache.read_bytes().count(b"\n")
    server.start()
    labelling.join(timeout=300)
    assert not labelling.is_alive()
    label_prompts(ours)
    found = [read_labels(Path(recipe.output) / "labels" / "labels.jsonl") for recipe in (ours, theirs)]
    assert kill_after <= kept < 0.95 * len(found[0])
    assert max(Counter(cache.read_text().split('"key": "')[1:]).values()) == 1
    return found
