"""A real vLLM on a CPU: labels from it as a server and offline, exports served, and an exported head that drafts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from served import Served, answers_here, answers_there, labels_with_a_kill, quiet_environment, text_prompts
from trainers import config, trained

from caftune import CAFTTrainer
from caftune.checkpoints.eagle3 import export_eagle3
from caftune.demo.chemistry import molecules, prompt
from caftune.demo.run import BASE
from caftune.generation.backends import Sampling
from caftune.generation.labels import read_labels
from caftune.pipeline.generate import Writer
from caftune.pipeline.label import label_prompts
from caftune.pipeline.schema import Recipe

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from served_draft import counters, interval

TEXTS = [prompt(molecule) for molecule in molecules(160, seed=3, substituents=(0, 2))]
TOKENS = 24
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}


@pytest.fixture(scope="module")
def vllm(peer):
    return peer("vllm") / "bin"


@pytest.fixture(scope="module")
def serve(vllm, tmp_path_factory):
    """A server of the demo's base with more options."""

    def served(*options):
        command = [vllm / "vllm", "serve", BASE, "--dtype", "float32", "--max-model-len", 256, "--max-num-seqs", 8]
        return Served([*command, "--enforce-eager", *options], tmp_path_factory.mktemp("vllm") / "log", **ENVIRONMENT)

    return served


@pytest.fixture(scope="module")
def server(serve, exports):
    """A server of the base and of the adapter alone."""
    with serve("--enable-lora", "--max-lora-rank", 8, "--lora-modules", f"tuned={exports['adapter']}") as started:
        yield started


@pytest.fixture(scope="module")
def prompts():
    return text_prompts(TEXTS, BASE)


@pytest.fixture(scope="module")
def good_heads(rows, tmp_path_factory):
    """Heads that are trained long enough to be right now and then."""
    folder = tmp_path_factory.mktemp("good heads")
    args = config(folder / "out", pretrain_heads=True, num_heads=2, max_steps=60, learning_rate=3e-3)
    trained(CAFTTrainer(str(BASE), args, train_dataset=rows)).export(folder / "heads")
    return str(folder / "heads")


@pytest.fixture(scope="module")
def exports(export, tmp_path_factory):
    return export(BASE, tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    file = tmp_path_factory.mktemp("labels") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return {"prompts": str(file), "max_new_tokens": TOKENS, "temperature": 0}


def test_labels_of_a_server_killed_in_the_middle_are_those_of_this_process(server, labels, tmp_path):
    ours, theirs = labels_with_a_kill(server, BASE, labels, tmp_path, kill_after=20)
    assert len(ours) == len(TEXTS)
    assert all(label.exact for label in theirs)
    assert ours == theirs


def test_an_adapter_alone_is_served_as_transformers_runs_it(server, exports, prompts):
    tuned, base = (answers_there(server, name, BASE, prompts, TOKENS) for name in ("tuned", BASE))
    assert tuned == answers_here(exports["adapter"], BASE, prompts, TOKENS)
    assert base == answers_here(BASE, BASE, prompts, TOKENS) != tuned


@pytest.mark.parametrize("name", ["full", "merged"])
def test_offline_labels_of_an_export_are_those_of_this_process(vllm, exports, labels, prompts, tmp_path, name):
    engine = {"enforce_eager": True, "max_model_len": 256}
    common = {"model": {"name": str(exports[name])}, "labels": {**labels, "vllm": engine}}
    label_prompts(Recipe.model_validate({"output": str(tmp_path / "transformers"), **common}))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"output": str(tmp_path / "vllm"), **common}))
    done = subprocess.run(
        [vllm / "caftune", "label", recipe, "labels.backend=vllm"],
        capture_output=True,
        text=True,
        env={**quiet_environment(), **ENVIRONMENT},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ours, theirs = (read_labels(tmp_path / who / "labels" / "labels.jsonl") for who in ("transformers", "vllm"))
    assert ours == theirs
    untuned = [answer.ids for answer in answers_here(BASE, BASE, prompts, TOKENS)]
    assert [label.completion_ids for label in ours] != untuned


def test_an_exported_head_drafts_as_often_right_as_in_caftune(serve, good_heads, prompts, tmp_path):
    export_eagle3(good_heads, str(BASE), tmp_path / "draft")
    drafts = {"method": "eagle3", "model": str(tmp_path / "draft"), "num_speculative_tokens": 1}
    with serve("--speculative-config", json.dumps(drafts)) as server:
        before = counters(server.url)
        answers = answers_there(server, BASE, BASE, prompts, TOKENS)
        drafted, accepted = (now - then for now, then in zip(counters(server.url), before, strict=True))
    assert answers == answers_here(BASE, BASE, prompts, TOKENS)
    written = list(Writer(str(BASE), good_heads, length=1).write(prompts, Sampling(TOKENS, 0.0)))
    ours = sum(one.drafting.accepted[0] for one in written) / sum(one.drafting.drafted[0] for one in written)
    low, high = interval(accepted, drafted)
    assert 0.1 < low < ours < high
