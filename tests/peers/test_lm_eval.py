"""lm-evaluation-harness itself: examples and scores are those of the command `lm_eval`, on rows of GSM8K.

The harness is in its own environment, where pytest runs this file a second time.
"""

import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from caftune.compare.runner import compare
from caftune.errors import CaftuneError
from caftune.pipeline import evaluate as evaluation
from caftune.pipeline import lm_eval_tasks as harness
from caftune.pipeline.base_model import BaseModel
from caftune.pipeline.finetune import finetune_model
from caftune.pipeline.schema import EvalSection, Recipe
from caftune.report.render import write_report

ROOT = Path(__file__).parents[2]
IS_INSIDE = importlib.util.find_spec("lm_eval") is not None
inside = pytest.mark.skipif(not IS_INSIDE, reason="lm_eval is not installed: the test of its environment runs this")

ROWS = 6
TASKS = ["local_gsm8k", "choice", "letters", "answers"]
LETTERS = """
import random

def share(doc, results):
    return {"letters": len(set(doc["answer"]) & set(results[0])) / len(set(doc["answer"]))}

def with_choices(dataset):
    def choose(doc):
        choices = [doc["answer"].split("#### ")[-1], str(len(doc["question"])), "12", "250"]
        random.shuffle(choices)
        return {"choices": choices, "right": choices.index(doc["answer"].split("#### ")[-1])}

    return dataset.map(choose)
"""


@pytest.mark.skipif(IS_INSIDE, reason="this is the environment of the harness")
def test_the_harness_in_its_environment(peer, shared):
    python = peer("lm-eval") / "bin" / "python"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CAFTUNE_SHARED": str(shared), "HF_HUB_OFFLINE": "1"}
    command = [python, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", Path(__file__)]
    ran = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    assert "passed" in ran.stdout


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory):
    """A tiny model with room for a question with its example, rows, and tasks on them."""
    import datasets

    folder = tmp_path_factory.mktemp("harness")
    shutil.copytree(shared / "models" / "stories260k", folder / "model", copy_function=shutil.copyfile)
    (folder / "model").chmod(0o755)
    change(folder / "model" / "config.json", max_position_embeddings=2048)
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    change(folder / "model" / "tokenizer_config.json", chat_template=template)
    for name, count in (("train", 20), ("test", ROWS)):
        lines = (shared / "data" / "gsm8k" / f"{name}.jsonl").read_text().splitlines()
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines[:count]))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "letters.py").write_text(LETTERS)
    for name, task in tasks(folder).items():
        text = re.sub("'(!function [a-z._]+)'", r"\1", yaml.safe_dump({"task": name, **task}))
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def tasks(folder):
    """GSM8K as the harness publishes it but on local rows, and a task of each other kind of request."""
    import lm_eval.tasks

    published = yaml.safe_load((Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml").read_text())
    files = {name: str(folder / f"{name}.jsonl") for name in ("train", "test")}
    rows = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    gsm8k = {key: value for key, value in published.items() if key not in ("task", "tag", "dataset_name")} | rows
    short = {**gsm8k["generation_kwargs"], "max_gen_toks": 24}
    asked = {"doc_to_text": "Question: {{question}}\nAnswer:", **rows}
    mean = {"aggregation": "mean", "higher_is_better": True}
    letters = {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": short,
        "process_results": "!function letters.share",
        "metric_list": [{"metric": "letters", **mean}],
    }
    return {
        "local_gsm8k": {**gsm8k, "num_fewshot": 1, "generation_kwargs": short},
        "choice": {
            **asked,
            "output_type": "multiple_choice",
            "process_docs": "!function letters.with_choices",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "right",
            "metric_list": [{"metric": name, **mean} for name in ("acc", "acc_norm")],
        },
        "letters": {**asked, **letters},
        "answers": {
            **rows,
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "running": {**asked, **letters, "unsafe_code": True},
        "absent": {**asked, **letters, "dataset_kwargs": {"data_files": {"test": str(folder / "absent.jsonl")}}},
        "hub": {**asked, **letters, "dataset_path": "owner/absent", "dataset_kwargs": {}},
    }


def recipe(folder, output, **section):
    names = [f"lm_eval:{name}" for name in section.pop("tasks", TASKS)]
    section = {"data": dict.fromkeys(names, str(folder / "tasks")), "batch_size": 4, "chat": False, **section}
    values = {"output": str(output), "model": {"name": str(folder / "model")}}
    return Recipe.model_validate({**values, "eval": {"model": "base", "tasks": names, **section}})


def lines_of(output, task):
    file = Path(output, "eval", "base", f"lm_eval-{task}.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def output(folder):
    evaluation.evaluate_model(recipe(folder, folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def command(folder):
    """The results and samples of the harness's own command, by task."""
    options = {"model": "hf", "model_args": f"pretrained={folder / 'model'}", "tasks": ",".join(TASKS), "device": "cpu"}
    options |= {"include_path": str(folder / "tasks"), "batch_size": "4", "output_path": str(folder / "own")}
    given = [text for name, value in options.items() for text in (f"--{name}", value)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "own_cache")}
    subprocess.run([sys.executable, "-m", "lm_eval", *given, "--log_samples"], check=True, cwd=folder, env=environment)
    (results,) = folder.glob("own/*/results_*.json")
    samples = {name: read_samples(folder / "own", name) for name in TASKS}
    return json.loads(results.read_text())["results"], samples


def read_samples(folder, task):
    (file,) = folder.glob(f"*/samples_{task}_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@inside
@pytest.mark.parametrize("task", TASKS)
def test_examples_scores_and_measures_are_those_of_the_harnesss_own_command(output, command, task):
    results, samples = command[0][task], command[1][task]
    rows = (json.loads(line) for line in (output / "results.jsonl").read_text().splitlines())
    (found,) = [row for row in rows if row["task"] == f"lm_eval:{task}"]
    assert found["measures"] == {name: [value] for name, value in harness.measures_of(results).items()}
    lines = lines_of(output, task)
    assert len(lines) == found["examples"] == ROWS
    for sample in samples:
        line = lines[sample["doc_id"]]
        assert [str(part) for part in flat(line["responses"])] == flat(sample["resps"])  # its file has texts of numbers
        for metric in sample["metrics"]:
            name = f"{metric},{sample['filter']}".removesuffix(",none")
            if task != "answers":
                assert line["scores"][name] == sample[metric]


def flat(value):
    """The parts of a nested list."""
    return [part for each in value for part in flat(each)] if isinstance(value, list) else [value]


@inside
def test_the_tasks_can_tell_examples_apart(output):
    assert len({line["completion"] for line in lines_of(output, "local_gsm8k")}) == ROWS
    assert len({line["scores"]["letters"] for line in lines_of(output, "letters")}) > 1
    assert 0 < sum(line["scores"]["acc"] for line in lines_of(output, "choice")) < ROWS
    assert all(line["scores"] == {} for line in lines_of(output, "answers"))


@inside
def test_random_numbers_of_a_training_are_not_those_of_a_task(folder, tmp_path):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    evaluation.read_tasks(recipe(folder, tmp_path, tasks=["choice"]).eval)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@inside
def test_a_second_evaluation_asks_nothing_and_finds_the_same(output, folder, tmp_path, monkeypatch):
    shutil.copytree(output, tmp_path / "run")
    before = (output / "results.jsonl").read_text()
    monkeypatch.setattr(BaseModel, "load", lambda _: pytest.fail("loaded"))
    evaluation.evaluate_model(recipe(folder, tmp_path / "run"))
    assert (tmp_path / "run" / "results.jsonl").read_text() == before
    assert all(lines_of(tmp_path / "run", task) == lines_of(output, task) for task in TASKS)
    (result,) = evaluation.evaluate_model(recipe(folder, tmp_path / "run", tasks=["choice"], limit=2))
    assert (result.examples, lines_of(tmp_path / "run", "choice")) == (2, lines_of(output, "choice")[:2])


@inside
def test_an_interrupt_between_tasks_loses_nothing(output, folder, tmp_path, monkeypatch):
    opened = []
    real = evaluation.harness_model

    def model(*given):
        opened.append(given)
        if len(opened) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(evaluation, "harness_model", model)
    both = recipe(folder, tmp_path, tasks=["choice", "letters"])
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate_model(both)
    evaluation.evaluate_model(both)
    assert len(opened) == 3  # of `letters` again, not of `choice`
    assert all(lines_of(tmp_path, task) == lines_of(output, task) for task in ("choice", "letters"))


@inside
def test_runs_are_sampled_with_their_seeds_and_kept(folder, tmp_path, monkeypatch):
    sampled = {"tasks": ["letters", "choice"], "runs": 2, "temperature": 0.9, "max_new_tokens": 12, "limit": 3}
    evaluation.evaluate_model(recipe(folder, tmp_path / "run", **sampled))
    texts = [line["completion"] for line in lines_of(tmp_path / "run", "letters")]
    assert [line["seed"] for line in lines_of(tmp_path / "run", "letters")] == [42] * 3 + [43] * 3
    assert texts[:3] != texts[3:]
    choices = [line["completion"] for line in lines_of(tmp_path / "run", "choice")]
    assert len(choices) == 3  # likelihoods are the same in all runs
    evaluation.evaluate_model(recipe(folder, tmp_path / "again", **sampled))
    assert [line["completion"] for line in lines_of(tmp_path / "again", "letters")] == texts
    monkeypatch.setattr(BaseModel, "load", lambda _: pytest.fail("loaded"))
    evaluation.evaluate_model(recipe(folder, tmp_path / "run", **sampled))
    assert [line["completion"] for line in lines_of(tmp_path / "run", "letters")] == texts


@inside
def test_a_conversation_is_that_of_the_harness(folder, tmp_path, monkeypatch):
    import lm_eval.evaluator
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda _: None)  # half a minute
    results = lm_eval.evaluator.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder / "model")},
        device="cpu",
        batch_size=4,
        tasks=["local_gsm8k", "choice"],
        apply_chat_template=True,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
    )
    evaluation.evaluate_model(recipe(folder, tmp_path, tasks=["local_gsm8k", "choice"], chat=True))
    for task in ("local_gsm8k", "choice"):
        own = {sample["doc_id"]: sample for sample in results["samples"][task]}
        for number, line in enumerate(lines_of(tmp_path, task)):
            assert line["prompt"] == own[number]["arguments"][0][0]
            assert line["prompt"].startswith("[user]")
            assert flat(line["responses"]) == [part for each in own[number]["resps"] for part in flat(json_of(each))]


def json_of(value):
    return json.loads(json.dumps(value))


@inside
@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("lettres", "tasks", "got lm_eval:lettres, which is no task of .*tasks. Near: letters"),
        ("letters", "task", "eval.data.lm_eval:letters must be a file or folder with tasks .* which does not exist"),
        ("choice", "tasks/letters.yaml", "must be a file with the task choice, got .*letters.yaml with letters"),
        ("letters", "train.jsonl", "lm_eval:letters must be a task that lm_eval can load, got "),
        ("running", "tasks", "runs the model's code outside of a sandbox"),
        ("running", "tasks/running.yaml", "runs the model's code outside of a sandbox"),
        (
            "absent",
            "tasks",
            "lm_eval:absent must be a task that lm_eval can load, got FileNotFoundError: .*absent.jsonl",
        ),
        ("hub", "tasks", "lm_eval:hub must be a task that lm_eval can load, got .*owner/absent.* Check the connection"),
    ],
)
def test_a_task_that_cannot_be_had_is_one_error_before_training(folder, tmp_path, name, source, message):
    section = {"tasks": [name], "data": {f"lm_eval:{name}": str(folder / source)}}
    with pytest.raises(CaftuneError, match=message):
        evaluation.read_tasks(recipe(folder, tmp_path, **section).eval)
    values = recipe(folder, tmp_path, **section).model_dump()
    values |= {"data": {"train": str(folder / "train.jsonl")}, "heads": {"text": str(folder / "train.jsonl")}}
    for begin in (finetune_model, compare):
        with pytest.raises(CaftuneError, match=message):
            begin(Recipe.model_validate({**values, "loss": {"weight": 0.01}}))
    assert not (tmp_path / "train").exists()


@inside
def test_a_task_in_a_file_is_evaluated_alone(output, folder, tmp_path):
    section = {"tasks": ["letters"], "data": {"lm_eval:letters": str(folder / "tasks" / "letters.yaml")}}
    evaluation.evaluate_model(recipe(folder, tmp_path, **section))
    assert lines_of(tmp_path, "letters") == lines_of(output, "letters")


@inside
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsm8", "no task of lm_eval 0.4.*Near: .*gsm8k"),
        ("ai2_arc", "a group of arc_challenge, arc_easy"),
        ("mmlu", "a group of mmlu_stem, "),
        ("gsm8k", "lm_eval:gsm8k must be a task that lm_eval can load, got .*openai/gsm8k"),
    ],
)
def test_published_tasks_are_found_by_their_names(name, message):
    with pytest.raises(CaftuneError, match=message):
        evaluation.read_tasks(EvalSection(tasks=[f"lm_eval:{name}"]))


@inside
def test_arms_are_compared_and_reported_on_tasks_of_the_harness(folder, tmp_path):
    rows = {"train": str(folder / "train.jsonl"), "columns": {"prompt": "question", "completion": "answer"}}
    trainer = {"max_steps": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "use_cpu": True}
    labels = {"columns": rows["columns"]}
    values = recipe(folder, tmp_path, tasks=["letters", "choice", "answers"], model=None).model_dump(exclude_unset=True)
    values |= {"data": {**rows, "max_length": 256}, "labels": labels, "loss": {"weight": 0.5}}
    values |= {
        "heads": {"count": 1, "text": rows["train"]},
        "pretrain": {**trainer, "max_steps": 2},
        "trainer": trainer,
    }
    found = compare(Recipe.model_validate({**values, "compare": {"arms": ["ntp", "caft"], "seeds": 2}}))
    assert [(task.name, task.primary, task.examples) for task in found.tasks] == [
        ("lm_eval:letters", "letters", ROWS),
        ("lm_eval:choice", "acc", ROWS),
        ("lm_eval:answers", "word_perplexity", ROWS),
    ]
    for arm in ("ntp", "caft"):
        runs = [tmp_path / "compare" / arm / seed / "eval" / "model" / "lm_eval-letters.jsonl" for seed in ("42", "43")]
        scores = [[json.loads(line)["scores"]["letters"] for line in run.read_text().splitlines()] for run in runs]
        (measure,) = [row for row in found.measures if (row.measure, row.arm) == ("letters", arm)]
        assert measure.values == pytest.approx([sum(each) / ROWS for each in scores])
    rows = {(row.task, row.measure): row for row in found.differences}
    assert rows["lm_eval:letters", "letters"].over == "runs and examples"
    assert rows["lm_eval:answers", "word_perplexity"].over == "runs"
    write_report([tmp_path])
    text = (tmp_path / "report.md").read_text()
    assert "lm\\_eval:letters, 6 examples" in text
    assert "word_perplexity ↓" in text.replace("\\", "")
