"""`caftune eval`: from rows to numbers, on the embedded base, resumable, and computed again without the model."""

import itertools
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from openai_server import Replies, serve
from rich.console import Console
from transformers import AutoTokenizer
from typer.testing import CliRunner

from caftune.cli import app
from caftune.compare import runner as compare
from caftune.demo.chemistry import completion, molecules, prompt
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.evals import code
from caftune.evals.proteins import sequence_of
from caftune.evals.task import means, until_stop
from caftune.evals.tasks import TASKS
from caftune.generation.answers import AnswerCache
from caftune.generation.backends import Answer
from caftune.pipeline import base_model
from caftune.pipeline import evaluate as evaluation
from caftune.pipeline.base_model import BaseModel
from caftune.pipeline.folder import RunFolder
from caftune.pipeline.schema import Recipe


@pytest.fixture
def values(tmp_path):
    pytest.importorskip("rdkit")
    rows = [
        {"id": m.name, "description": prompt(m), "smiles": completion(m)}
        for m in molecules(12, seed=5, substituents=(0, 2))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {"tasks": ["molecules"], "data": {"molecules": str(tmp_path / "rows.jsonl")}, "model": "base"}
    section |= {"max_new_tokens": 40, "batch_size": 4}
    return {"output": str(tmp_path / "run"), "model": {"name": str(BASE)}, "eval": section}


@pytest.fixture
def own_rows(values):
    """The recipe for rows of one's own, as a model is trained on them, with the task exact_match."""
    path = Path(values["output"]).with_name("own.jsonl")
    drawn = molecules(6, seed=5, substituents=(0, 2))
    path.write_text("".join(json.dumps({"prompt": prompt(m), "completion": completion(m)}) + "\n" for m in drawn))
    section = {**values["eval"], "tasks": ["exact_match"], "data": {"exact_match": str(path), "molecules": str(path)}}
    return {**values, "eval": section}


def evaluated(values, **changes):
    recipe = Recipe.model_validate({**values, "eval": {**values["eval"], **changes}})
    (result,) = evaluation.evaluate_model(recipe)
    return result


def lines_of(values, model="base", task="molecules"):
    path = Path(values["output"], "eval", model, f"{task}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_example_and_run_has_a_line_from_which_the_numbers_follow(values):
    result = evaluated(values, runs=2, temperature=0.8)
    lines = lines_of(values)
    assert [(line["run"], line["seed"]) for line in lines] == [(0, 42)] * 12 + [(1, 43)] * 12
    assert (result.examples, result.runs) == (12, 2)
    assert evaluation.summarise(TASKS["molecules"], "base", lines) == result
    assert result.measures["valid"] == [
        sum(line["scores"]["valid"] for line in lines[i : i + 12]) / 12 for i in (0, 12)
    ]


def test_answers_are_scored_against_their_own_examples(values):
    evaluated(values)
    task = TASKS["molecules"]
    rows = [json.loads(line) for line in Path(values["eval"]["data"]["molecules"]).read_text().splitlines()]
    for number, (row, line) in enumerate(zip(rows, lines_of(values), strict=True)):
        example = task.read(row, number)
        assert {name: line[name] for name in asdict(example)} == asdict(example)
        assert line["answer"] == row["smiles"].strip()
        assert line["scores"] == task.score(example, line["completion"])


def test_a_second_evaluation_asks_nothing_and_a_third_run_only_itself(values, monkeypatch):
    first = evaluated(values, runs=2, temperature=0.8)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "answer_backend", lambda *_, **__: pytest.fail("asked"))
        assert evaluated(values, runs=2, temperature=0.8) == first
    cache = Path(values["output"], "eval", "cache.jsonl")
    before = cache.read_text().count("\n")
    third = evaluated(values, runs=3, temperature=0.8)
    assert cache.read_text().count("\n") == before + 12
    assert third.measures["valid"][:2] == first.measures["valid"]


def counted(monkeypatch, place, name, calls):
    real = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *given, **more: calls.append(name) or real(*given, **more))


@pytest.mark.parametrize("tasks", [["exact_match"], ["molecules", "exact_match"]])
def test_a_model_is_hashed_and_loaded_and_its_answers_are_read_once_for_all_tasks_and_runs(
    own_rows, monkeypatch, tasks
):
    calls = []
    for place, name in (
        (base_model, "model_fingerprint"),
        (BaseModel, "tokenizer"),
        (BaseModel, "load"),
        (AnswerCache, "_read"),
    ):
        counted(monkeypatch, place, name, calls)
    changes = {"tasks": tasks, "runs": 3, "temperature": 0.8, "columns": {"smiles": "completion"}}
    recipe = Recipe.model_validate({**own_rows, "eval": {**own_rows["eval"], **changes}})
    first = evaluation.evaluate_model(recipe)
    assert sorted(calls) == ["load", "model_fingerprint", "tokenizer"]
    calls.clear()
    assert evaluation.evaluate_model(recipe) == first
    assert sorted(calls) == ["_read", "model_fingerprint", "tokenizer"]


def test_results_hold_the_measures_of_each_run(values):
    result = evaluated(values)
    (row,) = [json.loads(line) for line in Path(values["output"], "results.jsonl").read_text().splitlines()]
    assert row["stage"] == "eval base molecules"
    assert row["measures"] == result.measures


def test_the_command_prints_a_table(values, tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    ran = CliRunner().invoke(app, ["eval", str(tmp_path / "recipe.yaml")])
    assert ran.exit_code == 0, ran.output
    assert "molecules: base (12 examples, 1 run)" in " ".join(ran.output.split())
    assert "Prompts were given as plain text (eval.chat)." in ran.output
    assert "valid" in ran.output


def test_rows_as_a_model_is_trained_on_them_are_asked_unchanged_to_the_letter_or_as_molecules(own_rows):
    own = [json.loads(line) for line in Path(own_rows["eval"]["data"]["molecules"]).read_text().splitlines()]
    evaluated(own_rows)
    evaluated(own_rows, tasks=["molecules"], columns={"smiles": "completion"})
    exact, as_molecules = lines_of(own_rows, task="exact_match"), lines_of(own_rows)
    for row, letter, molecule in zip(own, exact, as_molecules, strict=True):
        assert letter["prompt"] == molecule["prompt"] == row["prompt"]
        assert letter["reference"] == molecule["reference"] == row["completion"].strip()
        assert letter["completion"] == molecule["completion"]
        assert letter["scores"]["exact_match"] == (letter["completion"].strip() == row["completion"].strip())


# In which form, and what is scored


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<said>{% endif %}"
)
ASKED, ANSWERED = ({"role": role, "content": "C"} for role in ("user", "assistant"))
TEXTS = {"prompt": "C", "completion": "C"}


@pytest.fixture
def chatty(own_rows, tmp_path):
    """The recipe with a base that has a chat template."""
    shutil.copytree(BASE, tmp_path / "chatty")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chatty")
    return {**own_rows, "model": {"name": str(tmp_path / "chatty")}}


def trained_on(values, row):
    """The recipe with this row as data.train."""
    path = Path(values["output"]).with_name("train.jsonl")
    path.write_text(json.dumps(row) + "\n")
    return {**values, "data": {"train": str(path)}}


@pytest.fixture
def reply(monkeypatch):
    """Lets every model answer with one text; the prompts that it was asked are gathered."""

    def replies(text, finish="stop"):
        asked, ids = [], AutoTokenizer.from_pretrained(BASE)(text)["input_ids"]

        def backend(prompts, _seeds):
            asked.extend(prompts)
            yield from ((place, Answer(ids, finish)) for place in range(len(prompts)))

        monkeypatch.setattr(evaluation, "answer_backend", lambda *_, **__: backend)
        return asked

    return replies


@pytest.mark.parametrize(
    ("row", "chat", "in_conversation"),
    [
        (TEXTS, None, False),
        ({"text": "CC"}, None, False),
        ({"messages": [ASKED, ANSWERED]}, None, True),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, None, True),
        ({"instruction": "C", "output": "C"}, None, True),
        (None, None, True),
        (TEXTS, True, True),
        ({"messages": [ASKED, ANSWERED]}, False, False),
    ],
)
def test_a_model_is_asked_in_the_form_it_is_trained_in_unless_told(chatty, reply, row, chat, in_conversation):
    asked = reply("C")
    result = evaluated(trained_on(chatty, row) if row else chatty, chat=chat)
    lines = lines_of(chatty, task="exact_match")
    assert [prompt.messages is not None for prompt in asked] == [in_conversation] * 6
    assert {line["chat"] for line in lines} == {result.chat} == {in_conversation}
    assert evaluation.summarise(TASKS["exact_match"], "base", lines) == result


def test_a_column_named_prompt_is_asked_as_a_model_was_trained_on_it(own_rows, reply, tmp_path):
    (tmp_path / "sums.jsonl").write_text(json.dumps({"question": "C?", "answer": "#### 3"}) + "\n")
    asked = reply("#### 3")
    values = own_rows | {
        "eval": own_rows["eval"] | {"tasks": ["gsm8k"], "data": {"gsm8k": str(tmp_path / "sums.jsonl")}}
    }
    assert evaluated(values, columns={"prompt": "question"}).measures["accuracy"] == [1.0]
    evaluated(values)
    assert asked[0].text == "C?" != asked[1].text


def test_a_model_without_a_chat_template_is_asked_in_plain_text_whatever_it_is_trained_on(own_rows, reply):
    asked = reply("C")
    assert evaluated(trained_on(own_rows, {"instruction": "C", "output": "C"})).chat is False
    assert {prompt.messages for prompt in asked} == {None}


def test_where_the_form_cannot_be_known_it_must_be_given(chatty, reply):
    reply("C")
    unknown = {**chatty, "data": {"train": "nowhere.jsonl"}}
    with pytest.raises(CaftuneError, match=r"eval\.chat must be set .*nowhere\.jsonl must be an existing file"):
        evaluated(unknown)
    assert evaluated(unknown, chat=True).chat is True


def test_a_comparison_says_the_form_where_it_is_another_than_before_there_was_a_choice(chatty, own_rows):
    def said(values, **changes):
        return compare._with_form(Recipe.model_validate({**values, "eval": {**values["eval"], **changes}})).eval.chat

    assert said(trained_on(chatty, TEXTS)) is False
    assert said(trained_on(chatty, {"messages": [ASKED, ANSWERED]})) is said(trained_on(own_rows, TEXTS)) is None
    assert said(trained_on(chatty, TEXTS), chat=True) is True
    with pytest.raises(CaftuneError, match=r"eval\.chat must not be true"):
        said(own_rows, chat=True)


def test_a_closed_thought_before_an_answer_is_not_scored(own_rows, reply):
    row = json.loads(Path(own_rows["eval"]["data"]["exact_match"]).read_text().splitlines()[0])
    reply(f"<think>\n\n</think>\n\n{row['completion'].strip()}")
    assert evaluated(own_rows, limit=1).measures["exact_match"] == [1.0]
    assert lines_of(own_rows, task="exact_match")[0]["completion"] == row["completion"].strip()


def thinking(values, opened):
    """The recipe with a base whose chat template writes this where the model begins to speak, its marks special tokens."""
    folder = Path(values["model"]["name"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    tokenizer.chat_template = TEMPLATE.replace("<said>", f"<said>{opened}")
    tokenizer.save_pretrained(folder)
    return values


@pytest.mark.parametrize("opened", ["<think>\n", "[THINK]"])
def test_a_thought_that_the_chat_template_opened_is_not_scored_closed_or_not(chatty, reply, opened):
    row = json.loads(Path(chatty["eval"]["data"]["exact_match"]).read_text().splitlines()[0])
    right, values = row["completion"].strip(), thinking(chatty, opened)
    for said, accuracy, unclosed in ((f"N.\n</think>\n\n{right}", 1.0, 0), (right, 0.0, 1)):
        Path(values["output"], "eval", "cache.jsonl").unlink(missing_ok=True)
        reply(said)
        result = evaluated(values, limit=1, chat=True)
        (line,) = lines_of(values, task="exact_match")
        assert (result.measures["exact_match"], result.in_thought) == ([accuracy], unclosed)
        assert (line["completion"], line["in_thought"]) == (right if accuracy else "", bool(unclosed))


def test_answers_that_end_within_a_thought_are_counted_where_results_are_printed(own_rows, reply):
    reply("<think>C", "length")
    result = evaluated(own_rows)
    console = Console(record=True, width=200)
    evaluation.print_results(console, [result])
    assert (result.unfinished, result.in_thought, result.measures["exact_match"]) == (6, 6, [0.0])
    assert "6 answers end within a thought" in console.export_text()
    lines = [
        {name: value for name, value in line.items() if name != "in_thought"}
        for line in lines_of(own_rows, task="exact_match")
    ]
    assert evaluation.summarise(TASKS["exact_match"], "base", lines).in_thought == 0, (
        "lines of an older version have no such count"
    )


def test_a_stop_text_within_a_thought_does_not_cut_the_answer(own_rows, reply):
    row = json.loads(Path(own_rows["eval"]["data"]["molecules"]).read_text().splitlines()[0])
    reply(f"<think>\nDescription: it has a ring.\n</think>\n{row['completion'].strip()}\nDescription: another")
    changes = {"columns": {"smiles": "completion"}, "limit": 1, "max_new_tokens": 150}
    assert evaluated(own_rows, tasks=["molecules"], **changes).measures["exact_match"] == [1.0]


def test_an_answer_that_a_stop_text_ends_was_not_cut_off(own_rows, reply):
    for text, unfinished in (("CC\nDescription: an", 0), ("CC\nDescr", 6)):
        Path(own_rows["output"], "eval", "cache.jsonl").unlink(missing_ok=True)
        reply(text, "length")
        result = evaluated(own_rows, tasks=["molecules"], columns={"smiles": "completion"})
        assert result.unfinished == unfinished
        assert {line["finish"] for line in lines_of(own_rows)} == {"length" if unfinished else "stop"}


# Which model it was


@pytest.fixture
def others(tmp_path):
    """Two models whose folders have the same last name, and the run's own."""
    for folder in ("a/model", "b/model", "run/model"):
        shutil.copytree(BASE, tmp_path / folder)
    return tmp_path


def test_models_whose_folders_have_one_name_are_kept_apart(own_rows, others):
    models = [str(others / "a/model"), str(others / "b/model"), None, "base"]
    labels = [evaluated(own_rows, model=model).model for model in models]
    assert labels[2:] == ["model", "base"]
    assert [re.fullmatch("model-[0-9a-f]{6}", label) is not None for label in labels] == [True, True, False, False]
    folders = [path.name for path in Path(own_rows["output"], "eval").iterdir() if path.is_dir()]
    assert sorted(folders) == sorted(set(labels))
    assert all(len(lines_of(own_rows, label, "exact_match")) == 6 for label in labels)


def test_a_model_has_one_label_however_it_is_named(own_rows, others, monkeypatch):
    monkeypatch.chdir(others / "a")

    def label(name):
        return evaluation.label_of(name, str(BASE), RunFolder(own_rows["output"]))

    assert label("model") == label("../a/model") == label(str(others / "a/model"))
    assert label("../run/model") == label(str(others / "run/model")) == "model"
    assert label("some/model") != label("other/model")
    assert label("Qwen/Qwen3-0.6B").startswith("Qwen3-0.6B-")


def test_two_models_behind_one_server_are_told_apart(own_rows):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    said = itertools.count(1)  # no two answers are the same
    replies = Replies(
        lambda _: [*tokenizer("C" * next(said))["input_ids"], tokenizer.eos_token_id],
        decode=tokenizer.decode,
        eos=tokenizer.eos_token_id,
    )
    server = {"concurrency": 1, "retries": 0}
    with serve(replies):
        first, second, again = (
            evaluated(own_rows, backend="server", server={**server, "url": replies.url, "model": name})
            for name in ("served/one", "served/two", "served/one")
        )
    asked = [request["model"] for request in replies.requests]
    assert asked == sorted(asked), "the first is asked no more once its answers are there"
    assert (asked.count("served/one"), first) == (asked.count("served/two"), again)
    assert (first.model[:4], second.model[:4]) == ("one-", "two-")
    answers = [lines_of(own_rows, result.model, "exact_match") for result in (first, second)]
    longest, shortest = (
        max(len(line["completion"]) for line in answers[0]),
        min(len(line["completion"]) for line in answers[1]),
    )
    assert [len(lines) for lines in answers] == [6, 6]
    assert longest < shortest, "the second has answers of its own"


# Structures


@pytest.fixture
def proteins(values, tmp_path):
    pytest.importorskip("Bio")
    rows = [{"functions": ["toxin activity"], "sequence": "MKTAYIAKQR"} for _ in range(3)]
    (tmp_path / "proteins.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {"tasks": ["proteins"], "data": {"proteins": str(tmp_path / "proteins.jsonl")}, "structures": "a-model"}
    return {**values, "eval": {**values["eval"], **section}}


def test_with_a_folding_model_answers_of_proteins_have_measures_of_structure_too(proteins, monkeypatch):
    asked, measures = [], [{"plddt": 90.0, "tm_score": 0.5}, {"plddt": 50.0, "tm_score": 0.1}, {}]
    monkeypatch.setattr(evaluation, "check_structures", asked.append)
    monkeypatch.setattr(evaluation, "compare_structures", lambda *given: asked.append(given) or measures)
    result = evaluated(proteins)
    lines = lines_of(proteins, task="proteins")
    pairs = [(sequence_of(line["completion"]), "MKTAYIAKQR") for line in lines]
    assert asked == ["a-model", (pairs, "a-model")]
    assert (result.measures["plddt"], result.measures["tm_score"]) == ([70.0], [0.3])
    assert [{**line["scores"], **extra} == line["scores"] for line, extra in zip(lines, measures, strict=True)] == [
        True
    ] * 3
    assert all("identity" in line["scores"] for line in lines)
    assert evaluation.summarise(TASKS["proteins"], "base", lines) == result


def test_without_one_nothing_is_folded(proteins, monkeypatch):
    monkeypatch.setattr(evaluation, "compare_structures", lambda *_: pytest.fail("folded"))
    assert "plddt" not in evaluated(proteins, structures=None).measures


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"structures": "x"}, CaftuneError, r"eval\.structures needs the task proteins in eval\.tasks"),
        ({"tasks": []}, CaftuneError, r"eval\.tasks must name tasks, got none\. Known: humaneval"),
        ({"tasks": ["molecule"]}, CaftuneError, r"eval\.tasks must hold names of tasks, got 'molecule'\. .* molecules"),
        ({"data": {}}, CaftuneError, r"eval\.data\.molecules must name a file or hub id"),
        ({"runs": 2}, CaftuneError, "eval.runs must be 1 with eval.temperature 0"),
        (
            {"model": None},
            CaftuneError,
            "run/model is missing. Run `caftune train` first, or name a model in eval.model",
        ),
        ({"columns": {"smiles": "nothing"}}, CaftuneError, r"rows\.jsonl: .*'nothing'.*eval\.columns"),
        ({"columns": {"prompt": "nothing"}}, CaftuneError, r"rows\.jsonl: .*'nothing'.*eval\.columns"),
        ({"columns": {"promt": "description"}}, CaftuneError, r"eval\.columns\.promt is .* Did you mean prompt\?"),
        ({"chat": True}, CaftuneError, r"eval\.chat must not be true for .*, which has no chat template\. Remove it"),
        ({"max_new_tokens": 250}, CaftuneError, "prompts of molecules .* leave no room for 250 tokens"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_the_model_is_asked(values, monkeypatch, changes, error, message):
    monkeypatch.setattr(evaluation, "answer_backend", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(error, match=message):
        evaluated(values, **changes)


def test_an_adapter_alone_is_refused_with_how_to_make_it_a_model(values):
    model = Path(values["output"], "model")
    model.mkdir(parents=True)
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(CaftuneError, match=r"an adapter alone\. Run `caftune export` with model\.lora\.merge=true"):
        evaluated(values, model=None)


class Watched(dict):
    """A row that records the columns that are looked for."""

    def __init__(self, row):
        super().__init__(row)
        self.wanted = set()

    def get(self, name, default=None):
        self.wanted.add(name)
        return super().get(name, default)

    def __getitem__(self, name):
        self.wanted.add(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_names_the_columns_that_it_looks_for(name, monkeypatch):
    monkeypatch.setattr(code, "_check_permission", lambda: None)
    rows = [Watched(row) for row in TASKS[name].rows]
    for number, row in enumerate(rows):
        TASKS[name].read(row, number)
    wanted = set.union(*(row.wanted for row in rows))
    assert wanted <= set(TASKS[name].columns)
    assert {column for row in rows for column in row} & set(TASKS[name].columns) <= wanted


def test_every_task_has_rows_of_its_own_and_takes_any_completion():
    for name, task in TASKS.items():
        if name in ("humaneval", "mbpp"):
            continue  # they run what was written: see test_code_tasks.py
        examples = [task.read(row, number) for number, row in enumerate(task.rows)]
        assert len({example.id for example in examples}) == len(examples) >= 3
        scores = [task.score(example, text) for example in examples for text in ("", "\x00 ]]{", "a" * 500)]
        assert task.primary in task.combine(scores), name


def test_means_are_over_those_that_have_the_measure():
    assert means([{"a": 1.0, "b": 0.5}, {"a": 0.0}]) == {"a": 0.5, "b": 0.5}


def test_an_answer_ends_where_the_first_stop_text_begins():
    assert until_stop("one\n\nQ: two###", ["###", "\n\nQ:"]) == "one"
    assert until_stop("one", ["###"]) == "one"
