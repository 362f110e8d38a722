"""Tasks of lm-evaluation-harness, without the harness: names, errors, and what is kept of results that are shaped as its own.

tests/peers/test_lm_eval.py runs the harness itself.
"""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from caftune.compare import measures
from caftune.compare.examples import ConceptMarker, compared_examples
from caftune.compare.runs import ComparedRun
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.pipeline import lm_eval_tasks as harness
from caftune.pipeline.evaluate import Result, _EvaluatedModel, read_tasks
from caftune.pipeline.finetune import finetune_model
from caftune.pipeline.lm_eval_tasks import KeptResponses, lines_of, measures_of
from caftune.pipeline.run import Run
from caftune.pipeline.schema import EvalSection, Recipe


def generated(doc, text, strict, flexible):
    """The two entries that the harness logs of an example with two filters."""
    shared = {"doc_id": doc, "target": f"so #### {doc}", "arguments": [(f"Q{doc}", {"until": ["\n"]})]}
    shared |= {"resps": [[text]], "metrics": ["exact_match"]}
    return [
        {**shared, "filter": "strict", "filtered_resps": ["x"], "exact_match": strict},
        {**shared, "filter": "flexible", "filtered_resps": ["y"], "exact_match": flexible},
    ]


def chosen(doc, likelihoods, target, *, arguments=None, **found):
    arguments = arguments or [("Which?", f" {letter}") for letter in "abc"]
    resps = [[(likelihood, False)] for likelihood in likelihoods]
    shared = {"doc_id": doc, "target": target, "arguments": arguments, "resps": resps, "filter": "none"}
    return {**shared, "metrics": list(found), **found}


def test_an_example_has_the_scores_of_all_filters_and_the_models_own_text():
    first, second = generated(0, " 7", 0.0, 1.0), generated(1, " 8", 1.0, 1.0)
    lines = lines_of([first[0], second[0], first[1], second[1]], {"exact_match,strict": 0.5, "exact_match,flexible": 1})
    assert [line["scores"] for line in lines] == [
        {"exact_match,strict": 0.0, "exact_match,flexible": 1.0},
        {"exact_match,strict": 1.0, "exact_match,flexible": 1.0},
    ]
    assert [(line["id"], line["prompt"], line["completion"]) for line in lines] == [
        ("0", "Q0", " 7"),
        ("1", "Q1", " 8"),
    ]
    assert lines[1]["reference"] == lines[1]["answer"] == "so #### 1"


def test_ten_examples_stay_in_the_order_of_their_numbers():
    samples = [chosen(doc, [-1.0, -2.0, -3.0], 0, acc=1.0) for doc in range(12)]
    assert [line["id"] for line in lines_of(samples, {"acc": 1.0})] == [str(doc) for doc in range(12)]


@pytest.mark.parametrize(
    ("target", "reference"),
    [(1, "b"), ("b", "b"), (-100, -100), ([0, 2], ["a", "c"]), (9, 9)],
    ids=["number", "text", "none", "several", "out of range"],
)
def test_of_several_choices_the_likeliest_is_the_answer(target, reference):
    (line,) = lines_of([chosen(0, [-3.0, -1.0, -2.0], target, acc=1.0)], {"acc": 1.0})
    assert (line["completion"], line["reference"]) == ("b", reference)
    assert json.loads(json.dumps(line)) == {**line, "responses": [[-3.0, False], [-1.0, False], [-2.0, False]]}


def test_choices_are_prompts_where_these_differ_and_requests_without_a_prompt_choose_nothing():
    prompts = [("Ann was", " tall"), ("Bob was", " tall")]
    (line,) = lines_of([chosen(0, [-3.0, -1.0], " tall", arguments=prompts, acc=1.0)], {"acc": 1.0})
    assert line["completion"] == "Bob was tall"
    pairs = [("Which?", " a"), ("Which?", " b"), ("", " a"), ("", " b")]
    (line,) = lines_of([chosen(0, [-3.0, -2.0, -0.5, -0.1], 0, arguments=pairs, acc=0.0)], {"acc": 0.0})
    assert (line["completion"], line["reference"]) == ("b", "a")


@pytest.mark.parametrize(
    ("response", "completion"), [((-2.5, True), "(log-likelihood -2.5000)"), (-31.25, "(log-likelihood -31.2500)")]
)
def test_the_likelihood_of_a_text_stands_where_nothing_was_written(response, completion):
    sample = {"doc_id": 0, "target": "text", "arguments": [("Once", " text")], "resps": [[response]], "filter": "none"}
    (line,) = lines_of([{**sample, "metrics": []}], {})
    assert line["completion"] == completion


def test_only_means_over_examples_are_scores_of_an_example():
    samples = [
        chosen(0, [-1.0, -2.0, -3.0], 0, acc=1.0, f1=(0, 0), perplexity=-1.0),
        chosen(1, [-1.0, -2.0, -3.0], 2, acc=0.0, f1=(2, 0), perplexity=-3.0),
    ]
    values = {"acc": 0.5, "f1": 0.33, "perplexity": math.exp(2)}
    assert [line["scores"] for line in lines_of(samples, values)] == [{"acc": 1.0}, {"acc": 0.0}]


def test_measures_are_numbers_by_metric_and_filter_without_standard_errors():
    results = {"name": "arc", "alias": " - arc", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": 0.1}
    results |= {"em,strict": 1, "em_stderr,strict": "N/A", "parts,none": {"a": 1}, "ppl,none": math.inf}
    assert measures_of(results) == {"acc": 0.5, "em,strict": 1.0, "ppl": math.inf}


class Model:
    """What KeptResponses uses of the harness's model; it stops before the request `stops_at`."""

    def __init__(self, stops_at=None):
        self.asked, self.stops_at = [], stops_at

    def set_cache_hook(self, hook):
        self.hook = hook

    def _each(self, kind, requests, respond):
        found = []
        for number, request in enumerate(requests):
            if number == self.stops_at:
                raise KeyboardInterrupt
            self.asked.append(request.args)
            found.append(respond(number, request.args))
            self.hook.add_partial(kind, request.args, found[-1])
        return found

    def loglikelihood(self, requests):
        return self._each("loglikelihood", requests, lambda _, args: (-float(len(args[1])), True))

    def generate_until(self, requests):
        return self._each("generate_until", requests, lambda number, args: f"{args[0]}{len(self.asked)}.{number}")


def kept(folder, model, seed=0, fingerprint="f"):
    found = KeptResponses(folder / "lm_eval.jsonl", fingerprint, None, lambda: model)
    found.seed = seed
    return found


def requests(*args):
    return [SimpleNamespace(args=each) for each in args]


CHOICES = requests(("Q", " a"), ("Q", " bb"), ("R", " a"))


def test_kept_responses_are_not_asked_for_again_and_read_as_they_were_given(tmp_path):
    first = kept(tmp_path, Model()).loglikelihood(CHOICES)
    second = kept(tmp_path, None).loglikelihood(CHOICES)
    assert first == second == [(-2.0, True), (-3.0, True), (-2.0, True)]
    more = Model()
    kept(tmp_path, more).loglikelihood([*CHOICES, *requests(("S", " c"))])
    assert more.asked == [("S", " c")]


@pytest.mark.parametrize("cut", [0, 5])
def test_an_interrupt_loses_no_response_even_if_it_cuts_off_a_line(tmp_path, cut):
    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path, Model(stops_at=2)).loglikelihood(CHOICES)
    file = tmp_path / "lm_eval.jsonl"
    whole = file.read_text()
    if cut:
        file.write_text(whole + whole[:cut])
    rest = Model()
    assert kept(tmp_path, rest).loglikelihood(CHOICES)[0] == (-2.0, True)
    assert rest.asked == [("R", " a")]
    assert kept(tmp_path, None).loglikelihood(CHOICES)[2] == (-2.0, True)


def test_another_model_and_other_settings_are_queried_again(tmp_path):
    greedy = {"do_sample": False, "temperature": 0.0}
    for fingerprint, settings in (("f", greedy), ("g", greedy), ("f", {**greedy, "until": ["."]})):
        model = Model()
        kept(tmp_path, model, fingerprint=fingerprint).generate_until(requests(("Q", settings)))
        assert model.asked == [("Q", settings)]


@pytest.mark.parametrize(
    "settings", [{"do_sample": True, "temperature": 0.5}, {"temperature": 0.5}, {"do_sample": True}]
)
def test_samples_belong_to_their_seed_and_repetition_and_are_kept_together(tmp_path, settings):
    twice = requests(("Q", settings), ("Q", settings))
    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path, Model(stops_at=1), seed=1).generate_until(twice)
    drawn = kept(tmp_path, Model(), seed=1).generate_until(twice)
    assert len(set(drawn)) == 2
    assert kept(tmp_path, None, seed=1).generate_until(twice) == drawn
    other = Model()
    kept(tmp_path, other, seed=2).generate_until(twice)
    assert len(other.asked) == 2


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"do_sample": False, "temperature": 0.7}])
def test_a_greedy_answer_serves_every_seed_and_repetition(tmp_path, settings):
    model = Model()
    answers = kept(tmp_path, model, seed=1).generate_until(requests(("Q", settings), ("Q", settings)))
    assert (len(set(answers)), len(model.asked)) == (1, 1)
    assert kept(tmp_path, None, seed=2).generate_until(requests(("Q", settings))) == answers[:1]


def published(**groups):
    names = ["arc_easy", "arc_challenge", "gsm8k", "gsm8k_cot", "hellaswag"]
    index = {"ai2_arc": SimpleNamespace(tags={"arc_easy", "arc_challenge"})}
    index |= {name: SimpleNamespace(cfg={"task": members}) for name, members in groups.items()}
    every = [*names, *index]
    return SimpleNamespace(all_subtasks=names, all_tags=["ai2_arc"], all_tasks=every, task_index=index)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsm8", "got lm_eval:gsm8, which is no task of .*Near: gsm8k, gsm8k_cot"),
        ("xyz", "got lm_eval:xyz, which is no task of .*It has arc_easy, "),
        ("ai2_arc", "got lm_eval:ai2_arc, a group of arc_challenge, arc_easy. Name those you want, each with lm_eval:"),
        ("mix", "got lm_eval:mix, a group of gsm8k, hellaswag, inner."),
        ("big", "a group of t0, t1, t2, t3, t4 and 7 more."),
    ],
)
def test_a_name_that_is_no_single_task_is_refused(name, message):
    known = published(mix=["gsm8k", {"task": "hellaswag"}, {"group": "inner"}], big=[f"t{n}" for n in range(12)])
    with pytest.raises(CaftuneError, match=message):
        harness._refuse_unknown(f"lm_eval:{name}", known, None)
    harness._refuse_unknown("lm_eval:gsm8k", known, None)


class Task:
    """What is read of the harness's own task."""

    VERSION = 1

    def __init__(self, better, **attributes):
        self.better = better
        vars(self).update(attributes)

    def aggregation(self):
        return dict.fromkeys(self.better)

    def higher_is_better(self):
        return self.better

    def get_config(self, name):
        return None


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Task({"pass": True}, UNSAFE_CODE=True), "runs the model's code .* Use the tasks humaneval and mbpp"),
        (Task({"acc": True}, MULTIMODAL=True), "must be a task on text"),
        (Task({"acc": None}), r"whether higher is better for one of its metrics \(acc\)"),
        (Task({}), "whether higher is better"),
    ],
)
def test_tasks_that_cannot_be_evaluated_or_compared_are_refused(task, message):
    with pytest.raises(CaftuneError, match=message):
        harness._refuse_unfit("lm_eval:x", task)


@pytest.mark.parametrize(
    ("better", "found", "primary", "lower"),
    [
        ({"exact_match": True}, ["exact_match,strict", "exact_match,flexible"], "exact_match,strict", []),
        ({"perplexity": False, "acc": True}, ["acc", "perplexity"], "perplexity", ["perplexity"]),
        ({"odd": None, "acc": True}, ["odd", "acc"], "acc", []),
        ({"pass": True, "acc": True}, ["acc"], "acc", []),
    ],
)
def test_the_primary_measure_is_the_first_of_the_tasks_list_with_its_first_filter(better, found, primary, lower):
    about = harness._about(harness.HarnessTask("lm_eval:x", Task(better)), {name: [0.5] for name in found}, [])
    assert (about["primary"], about["lower_is_better"]) == (primary, lower)


@pytest.fixture
def without_harness(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)


def recipe(tmp_path, **section):
    data = {"train": str(tmp_path / "absent.jsonl")}
    values = {"output": str(tmp_path / "run"), "model": {"name": str(BASE)}, "data": data, "eval": section}
    return Recipe.model_validate(values)


def test_a_missing_harness_is_one_error_before_evaluation_and_training(tmp_path, without_harness):
    message = r"lm_eval must be installed for lm_eval:gsm8k, .* Run pip install 'caftune\[lm-eval\]'\."
    with pytest.raises(CaftuneError, match=message):
        read_tasks(EvalSection(tasks=["lm_eval:gsm8k"]))
    with pytest.raises(CaftuneError, match=message):
        finetune_model(recipe(tmp_path, tasks=["lm_eval:gsm8k"]))


def test_other_backends_are_refused():
    with pytest.raises(CaftuneError, match="eval.backend must be transformers for lm_eval:gsm8k, got server"):
        read_tasks(EvalSection(tasks=["lm_eval:gsm8k"], backend="server"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gsm9k", r"Did you mean gsm8k\? "),
        ("lm_evals:gsm8k", r"Did you mean lm_eval:gsm8k\? "),
        ("arc_easy", r"Did you mean lm_eval:arc_easy\? "),
        ("x", ""),
    ],
)
def test_the_error_for_an_unknown_task_says_how_to_name_the_harnesss(name, hint):
    with pytest.raises(CaftuneError, match=rf"got '{name}'\. {hint}Known: humaneval, .*and lm_eval:NAME for those of"):
        read_tasks(EvalSection(tasks=[name]))


def test_a_folder_of_tasks_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("caftune.pipeline.run.data_commit", lambda _: pytest.fail("asked"))
    data = {"lm_eval:x": "owner/tasks"}
    assert Run.open(recipe(tmp_path, tasks=["lm_eval:x"], data=data)).recipe.eval.data == data


ABOUT = {
    "primary": "ppl",
    "lower_is_better": ["ppl"],
    "version": 1,
    "num_fewshot": 0,
    "lm_eval": "0.4.13",
    "files_sha256": None,
}


def compared(value, scores):
    """A run with a perplexity, which belongs to no example, and an accuracy."""
    lines = [
        {
            "run": 0,
            "id": str(n),
            "prompt": f"Q{n}",
            "reference": "r",
            "answer": "",
            "completion": "c",
            "scores": {"acc": s},
        }
        for n, s in enumerate(scores)
    ]
    mean = sum(scores) / len(scores)
    harness = {**ABOUT, "examples_sha256": "a"}
    row = {"measures": {"ppl": [value], "acc": [mean]}, "harness": harness}
    return ComparedRun({}, {"lm_eval:x": lines}, [], {"lm_eval:x": row})


DIVERGED = ComparedRun({}, {}, [])


def test_a_comparison_takes_measures_of_whole_runs_as_recorded_and_knows_which_are_better_low():
    runs = {
        "ntp": [compared(9.0, [1, 0]), compared(8.0, [1, 1])],
        "caft": [compared(7.0, [0, 0]), compared(6.5, [1, 0])],
    }
    task = measures._task("lm_eval:x", runs)
    assert (task.primary, task.lower_is_better, task.examples) == ("ppl", ["ppl"], 2)
    marker = ConceptMarker(None, "words", [])
    table = measures._measure([task], runs, marker, has_held_out=False)
    assert [key[:2] for key in table][:2] == [("lm_eval:x", "ppl"), ("lm_eval:x", "acc")]
    assert table["lm_eval:x", "ppl", "ntp"].values == [9.0, 8.0]
    assert table["lm_eval:x", "ppl", "ntp"].scores is None
    assert table["lm_eval:x", "acc", "caft"].scores.tolist() == [[0, 0], [1, 0]]
    assert compared_examples(task, runs, marker) == []  # no example has a perplexity


def test_a_diverged_run_leaves_the_task_known_from_the_others():
    runs = {"ntp": [DIVERGED], "caft": [compared(7.0, [0, 1])]}
    assert measures._task("lm_eval:x", runs).primary == "ppl"
    table = measures._measure(
        [measures._task("lm_eval:x", runs)], runs, ConceptMarker(None, "words", []), has_held_out=False
    )
    assert math.isnan(table["lm_eval:x", "ppl", "ntp"].values[0])
    assert measures._task("lm_eval:x", {"ntp": [DIVERGED]}).examples == 0


@pytest.mark.parametrize(
    ("key", "value"), [("examples_sha256", "b"), ("files_sha256", "c"), ("version", 2), ("lm_eval", "0.4.14")]
)
def test_runs_on_other_examples_or_with_other_rules_are_not_compared(key, value):
    one, other = compared(9.0, [1, 0]), compared(7.0, [0, 0])
    measures._task("lm_eval:x", {"ntp": [one], "caft": [other]})
    other.evaluated["lm_eval:x"]["harness"][key] = value
    with pytest.raises(CaftuneError, match=rf"All runs must be evaluated by the same lm_eval:x.* \({key}\)"):
        measures._task("lm_eval:x", {"ntp": [one], "caft": [other]})


def test_examples_are_the_same_whatever_form_a_model_is_asked_in():
    task = harness.HarnessTask("lm_eval:x", Task({"acc": True}))
    sample = {"doc_id": 0, "doc_hash": "d", "target_hash": "t"}
    asked = [harness._about(task, {"acc": [1.0]}, [{**sample, "prompt_hash": form}]) for form in ("plain", "chat")]
    assert asked[0] == asked[1]
    assert harness._about(task, {"acc": [1.0]}, [{**sample, "doc_hash": "e"}]) != asked[0]


@pytest.mark.parametrize("given", ["", "task.yaml"])
def test_a_tasks_own_rules_are_known_by_all_its_files(tmp_path, given):
    for name in ("task.yaml", "utils.py", "rows.jsonl"):
        (tmp_path / name).write_text("a")
    found = []
    for name in ("rows.jsonl", "utils.py", "task.yaml"):
        (tmp_path / name).write_text("b")
        found.append(harness._sha256_of_files(tmp_path / given))
    assert len(set(found)) == 3
    (tmp_path / "rows.jsonl").write_text("c")  # rows are compared by themselves
    assert harness._sha256_of_files(tmp_path / given) == found[-1]


@pytest.mark.parametrize(
    "form", [lambda text: text, lambda text: {"default": text, "tool_use": text}], ids=["one", "several"]
)
def test_the_harness_asks_with_the_fixed_date_of_training(tmp_path, form):
    template = "{{ strftime_now('%d %b %Y') }}"
    model = SimpleNamespace(fingerprint="f", tokenizer=lambda: SimpleNamespace(chat_template=form(template)))
    evaluated = object.__new__(_EvaluatedModel)
    evaluated._model, evaluated._file = model, tmp_path / "cache.jsonl"
    assert evaluated._responses.tokenizer.chat_template == form('{{ "26 Jul 2024" }}')


@pytest.mark.parametrize(("kind", "is_generated"), [("generate_until", True), ("multiple_choice", False)])
def test_likelihoods_are_asked_for_once_whatever_the_number_of_runs(kind, is_generated):
    task = Task({"acc": True}, get_config={"output_type": kind}.get)
    assert harness.HarnessTask("lm_eval:x", task).is_generated == is_generated


@pytest.mark.parametrize("primary", ["acc", "ppl"])
def test_a_report_shows_the_task_without_the_harness(tmp_path, without_harness, primary):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    from caftune.report.render import write_report

    run = compared(9.0, [1.0, 0.0])
    about = {**ABOUT, "primary": primary, "examples_sha256": "a"}
    result = Result("lm_eval:x", "base", 2, 1, {"ppl": [9.0], "acc": [0.5]}, 0, chat=False, harness=about)
    (tmp_path / "results.jsonl").write_text(json.dumps({"stage": "eval base lm_eval:x", **vars(result)}) + "\n")
    file = tmp_path / "eval" / "base" / "lm_eval-x.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in run.answers["lm_eval:x"]))
    _, page = sorted(write_report([tmp_path]), key=lambda path: path.suffix)
    text = Path(page).read_text()
    assert "lm\\_eval:x, 2 examples" in text or "lm_eval:x, 2 examples" in text
    assert "ppl ↓" in text
    assert ("Q0" in text) == (primary == "acc")  # without a score there is nothing to say of an answer
