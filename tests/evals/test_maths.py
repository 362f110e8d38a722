"""Maths: the answer that is found, what is equal to what, and a judge that nothing a model writes can hold up."""

import json
import os
import random
import signal
import sys
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caftune.errors import CaftuneError
from caftune.evals import maths
from caftune.evals.answers import final_answer
from caftune.evals.maths import GSM8K, MATH500, TIMEOUT_S, is_equal
from caftune.evals.task import Example, until_stop

TASKS = [GSM8K, MATH500]
RIGHT = {"accuracy": 1.0, "answered": 1.0, "unjudged": 0.0}


def solution(row):
    return row.get("solution") or row["answer"]


def some(rows, count):
    """So many of the rows, always the same; all of them with CAFTUNE_ALL_SOLUTIONS=1."""
    return rows if os.environ.get("CAFTUNE_ALL_SOLUTIONS") == "1" else random.Random(0).sample(rows, count)


def scored(task, row, completion, number=0):
    return task.score(task.read(row, number), until_stop(completion, task.stop))


@pytest.fixture(scope="module")
def rows(shared):
    def of(path):
        return [json.loads(line) for line in (shared / "data" / path).read_text(encoding="utf-8").splitlines()]

    return {name: of(f"{name}.jsonl") for name in ("gsm8k/train", "gsm8k/test", "math500/test")}


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("48 - 31 = 17\n#### 17", "17"),
        ("#### 1,234.50", "1234.50"),
        ("#### -$3\n", "-3"),
        ("#### 18 dollars a day.", "18"),
        ("#### 17\nThen came another question.\n#### 99", "17"),
        ("#### Step 1\nWe add 2 and 3.\n#### 2. Multiply by 4\nThat is 20.", "20"),
        (r"so \boxed{42}.", "42"),
        (r"$$\boxed{\frac{1}{\sqrt{2}}}$$", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\left\{1, \{2\}, 3\right\}} is it, not 7", r"\{1, \{2\}, 3\}"),
        (r"first \boxed{3}, no: \fbox {4}", "4"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"{ \boxed{6}", "6"),
        (r"\boxed{7} } }", "7"),
        (r"#### 8 and \boxed{9}", "9"),
        (r"\boxed{\text{east}}", r"\text{east}"),
        (r"\boxed{}  The answer is 5", "5"),
        ("The answer is 42.", "42"),
        ("The answer is 42. It took 7 steps.", "42"),
        ("The answer is 4. Wait. The answer is 3.5, I see.", "3.5, I see"),
        ("The final answer is $x = 3$. I hope it is correct.", "x = 3"),
        ("So the answer is:\n$$\n\\frac{1}{2}\n$$\nDone in 3 steps.", "\\frac{1}{2}\n"),
        (r"The answer is \(2\pi\).", r"2\pi"),
        ("The answer is $3$ or $5$.", "3 or 5"),
        ("**Final answer:** 12 apples", "12"),
        ("The answer is $18 per day.", "18"),
        ("The answer is 18 in total.", "18"),
        ("Final answer: it is 18 dollars a day, or so", "18"),
        ("The answer is 5 a.", "5 a"),
        ("She has 3 + 4 = 7 of them", "7"),
        ("It is 5 - 8, that is −3.", "-3"),
        ("The range is 3-5", "5"),
        ("about 3/4 of 100%", "100%"),
        ("I do not know.", None),
        ("", None),
        (r"Is it 5? \boxed{4", "5"),
        (r"\boxed{\frac{1}{2}", None),
    ],
)
def test_the_final_answer_is_found(completion, answer):
    found = final_answer(completion)
    assert (found and found.strip()) == (answer and answer.strip())


EQUAL = [
    (r"\frac{1}{2}", "1/2"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", r"\frac12"),
    (r"\frac{1}{2}", r"\dfrac{2}{4}"),
    (r"\frac{1}{2}", ".5"),
    (r"\frac{1}{2}", r"50\%"),
    (r"\frac{1}{2}", "50%"),
    ("0.5", r"\frac{1}{2}"),
    ("50", r"50\%"),
    ("3", "x = 3"),
    ("x=3", "3"),
    ("-3", "-3.0"),
    ("10,\\!080", "10080"),
    ("58,500", "58500"),
    ("58500", "58,500"),
    ("1000000", "1,000,000"),
    ("3", "$3"),
    (r"\$32,\!348", "32348"),
    ("18", r"18 \text{ dollars}"),
    ("18", "18 eggs"),
    ("5", r"5\text{ cm}^2"),
    ("5", r"5 \mathrm{~cm}"),
    (r"5.4 \text{ cents}", "5.4"),
    (r"864 \mbox{ inches}^2", "864"),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}^\circ"),
    ("90^\\circ", "90"),
    ("[2,11)", r"\left[2, 11\right)"),
    ("(3,4]", "(3, 4]"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty)\cup(-\infty,2)"),
    (r"x \in [-2,7]", "[-2,7]"),
    ("3, 5, 7", "7,3,5"),
    (r"1,-2", r"-2 \text{ and } 1"),
    (r"\{1\pm\sqrt{5},-2\}", r"\{-2, 1+\sqrt{5}, 1-\sqrt{5}\}"),
    (r"1 \pm \sqrt{19}", r"1 - \sqrt{19}, 1 + \sqrt{19}"),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{pmatrix} -\frac13 \\ \frac23 \end{pmatrix}"),
    (r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}", r"\begin{bmatrix} -1 & 0 \\ 0 & -1 \end{bmatrix}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
    (r"11 \sqrt{5} + 11", r"11(1+\sqrt5)"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    ("x^5 - x^4 + x^3 - x^2 + x - 1", "(x-1)(x^4+x^2+1)"),
    (r"\frac{11+9a}{20}", r"\frac{9a+11}{20}"),
    ("5x - 7y + 11z + 4 = 0", "-5x + 7y - 11z - 4 = 0"),
    (r"137 \frac{1}{2}", "137.5"),
    ("2516_8", "2516_{8}"),
    (r"\text{Evelyn}", "evelyn"),
    (r"\text{(C)}", "C"),
    (r"\text{even}", r"\textbf{even}"),
]
UNEQUAL = [
    (r"\frac{1}{2}", r"\frac{1}{3}"),
    (r"\frac{1}{2}", "0.51"),
    (r"\frac{1}{3}", "0.33"),
    (r"\frac{1}{2}", "2"),
    ("3", "-3"),
    ("3", "x = 4"),
    ("3", "3x"),
    ("3", "3 or 5"),
    ("3", "3 million"),
    ("58,500", "58"),
    ("58,500", "58,501"),
    ("1000", "1.000"),
    ("[2,11)", "[2,11]"),
    ("(2,4)", "[2,4]"),
    ("(2,4)", "(4,2)"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty, 2] \cup (3, \infty)"),
    ("3, 5, 7", "3, 5"),
    ("3, 5, 7", "3, 5, 8"),
    ("3", "3, 5"),
    (r"\{1, 2\}", r"\{1, 2, 3\}"),
    (r"1 \pm \sqrt{19}", r"1 + \sqrt{19}"),
    (r"\begin{pmatrix} 2 \\ -2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 2 \end{pmatrix}"),
    (r"\begin{pmatrix} 2 \\ -2 \end{pmatrix}", r"\begin{pmatrix} -2 \\ 2 \end{pmatrix}"),
    (r"11 \sqrt{5} + 11", r"11 \sqrt{5} - 11"),
    (r"\frac{11+9a}{20}", r"\frac{11+9b}{20}"),
    ("x^2 + 1", "x^2 - 1"),
    ("2516_8", "2516_9"),
    ("2516_8", "2517_8"),
    (r"\text{east}", "west"),
    (r"\text{(C)}", "D"),
    ("2\\pi", "2"),
    ("3", ""),
    ("3", "three blind mice"),
]


@pytest.mark.parametrize(("reference", "answer"), EQUAL)
def test_an_answer_in_another_form_is_equal(reference, answer):
    assert is_equal(reference, answer) is True


@pytest.mark.parametrize(("reference", "answer"), UNEQUAL)
def test_a_near_miss_is_not_equal(reference, answer):
    assert is_equal(reference, answer) is False


@st.composite
def written(draw, value):
    """A fraction in one of the ways to write it."""
    times = draw(st.integers(1, 4))
    top, bottom = value.numerator * times, value.denominator * times
    forms = [f"{top}/{bottom}", rf"\frac{{{top}}}{{{bottom}}}", rf"\dfrac{{{top}}}{{{bottom}}}", f"x = {top}/{bottom}"]
    if value.denominator in (1, 2, 4, 5):
        forms.append(str(float(value)))
    return draw(st.sampled_from(forms))


@settings(deadline=None, max_examples=80, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fractions_are_equal_exactly_where_python_says_so(data):
    fractions = st.fractions(-3, 3, max_denominator=6)
    first = data.draw(fractions)
    second = data.draw(st.one_of(st.just(first), fractions))
    answer = data.draw(written(second))
    assert is_equal(rf"\frac{{{first.numerator}}}{{{first.denominator}}}", answer) is (first == second)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_our_own_rows_are_right_with_their_solution_and_wrong_with_another(task):
    assert len(task.rows) >= 3
    for row, other in zip(task.rows, (*task.rows[1:], task.rows[0]), strict=True):
        assert scored(task, row, solution(row)) == RIGHT
        assert scored(task, row, solution(other)) == RIGHT | {"accuracy": 0.0}


@pytest.mark.parametrize(("name", "count"), [("gsm8k/train", 7473), ("gsm8k/test", 1319)])
def test_every_solution_of_gsm8k_is_right(rows, name, count):
    assert len(rows[name]) == count
    wrong = [row["answer"] for row in rows[name] if scored(GSM8K, row, row["answer"]) != RIGHT]
    assert wrong == []


def test_every_number_of_gsm8k_is_read_as_python_reads_it(rows):
    for row in some(rows["gsm8k/test"], 120):
        plain = row["answer"].rpartition("####")[2].replace(",", "").strip()
        number = GSM8K.read(row, 0).reference
        assert is_equal(number, plain) is is_equal(plain, final_answer(f"It is {number}.")) is True
        assert is_equal(number, str(int(plain) + 1)) is False


def test_math_verify_itself_finds_every_answer_of_math500_equal_to_itself(rows):
    answers = [row["answer"] for row in some(rows["math500/test"], 100)]
    answers += [maths.tidy(answer) for answer in answers]
    assert [answer for answer in answers if maths._JUDGE.is_equal(answer, answer) is not True] == []


def test_every_solution_of_math500_is_right(rows):
    wrong = [row["unique_id"] for row in rows["math500/test"] if scored(MATH500, row, row["solution"]) != RIGHT]
    assert len(rows["math500/test"]) == 500
    assert wrong == []


@pytest.mark.parametrize(("task", "name"), [(GSM8K, "gsm8k/test"), (MATH500, "math500/test")])
def test_shuffled_solutions_are_wrong(rows, task, name):
    asked = rows[name][:100]
    answers = [solution(row) for row in asked[7:] + asked[:7]]
    whole = task.combine([scored(task, row, answer) for row, answer in zip(asked, answers, strict=True)])
    assert whole["accuracy"] < 0.03
    assert (whole["answered"], whole["unjudged"]) == (1.0, 0.0)


@pytest.mark.parametrize(("task", "heading"), [(GSM8K, "Question"), (MATH500, "Problem")])
def test_a_model_that_goes_on_with_the_next_question_is_cut(task, heading):
    row = task.rows[0]
    completion = f"{solution(row)}\n\n{heading}: What is 1 + 1?\nIt is \\boxed{{2}}.\n#### 2"
    assert until_stop(completion, task.stop) == solution(row) + "\n"
    assert scored(task, row, completion) == RIGHT
    assert f"\n{heading}:" in task.read(row, 0).prompt


JUNK = {
    "empty": "",
    "blank": " \n\t",
    "words": "I am a teapot, and the answer is blowing in the wind.",
    "digits": "7" * 100_000,
    "boxed digits": "\\boxed{" + "7" * 100_000 + "}",
    "announced digits": "The answer is " + "7" * 100_000,
    "marked digits": "#### " + "7" * 100_000 + "!",
    "thousands": "#### " + "1" + ",111" * 25_000,
    "blanks": "#### 5" + " " * 100_000 + "!",
    "deep braces": "\\boxed{" + "{" * 50_000 + "}" * 50_000 + "}",
    "deep boxes": "\\boxed{" * 10_000 + "x" + "}" * 10_000,
    "deep fractions": "\\boxed{" + "\\frac{1}{" * 90 + "}" * 90 + "}",
    "open braces": "{" * 100_000,
    "open boxes": "\\boxed{" * 14_000,
    "closed braces": "}" * 100_000,
    "open formulas": "The answer is " + "\\(" * 50_000,
    "dollars": "the answer is $$" * 6_000,
    "unbalanced": r"\boxed{\frac{1}{}} \left( \sqrt{ \begin{pmatrix} $ \] }",
    "half a matrix": r"\boxed{\begin{pmatrix} 1 \\ }",
    "backslashes": "\\" * 100_001,
    "code": "\\boxed{__import__('os').getpid()}",
    "not text": "\x00\ud800\udfff ￿ \\boxed{\ud800}",
}


@pytest.mark.parametrize("kind", JUNK)
def test_junk_is_wrong_within_seconds(kind):
    assert GSM8K.score is MATH500.score, "or else both are to be tested"
    example = GSM8K.read(GSM8K.rows[0], 0)
    began = time.monotonic()
    assert GSM8K.score(example, JUNK[kind])["accuracy"] == 0.0
    assert time.monotonic() - began < TIMEOUT_S + 3


@pytest.mark.parametrize("kind", ["empty", "blank", "open boxes", "backslashes"])
def test_where_nothing_is_answered_that_is_counted(kind):
    scores = MATH500.score(Example("0", "", "5"), JUNK[kind])
    assert scores == {"accuracy": 0.0, "answered": 0.0, "unjudged": 0.0}


def test_an_answer_of_more_than_a_thousand_characters_is_wrong_without_being_looked_at(monkeypatch):
    assert is_equal("5", "5" + " + 0" * 100) is True
    monkeypatch.setattr(maths, "_JUDGE", None)
    assert is_equal("5", "5" + " + 0" * 250) is False


def test_an_answer_that_never_ends_is_unjudged_and_the_next_one_is_judged(monkeypatch):
    monkeypatch.setattr(maths, "_JUDGE", judge := maths._Judge(timeout_s=1))
    example = Example("0", "", "5")
    judge.require()
    judge._timeout_s = TIMEOUT_S  # of the process after this one: on a busy machine the first answer takes a second
    began = time.monotonic()
    assert MATH500.score(example, r"\boxed{9^{9^{9^{9}}}}") == {"accuracy": 0.0, "answered": 1.0, "unjudged": 1.0}
    assert 1 <= time.monotonic() - began < 1 + 3
    assert MATH500.score(example, r"\boxed{x = 5}") == RIGHT


def test_a_judge_that_died_is_started_anew():
    assert maths._JUDGE.is_equal("3", "x=3") is True
    first = maths._JUDGE._process
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert maths._JUDGE.is_equal("3", "x=3") is True
    assert maths._JUDGE._process is not first


def test_a_judge_that_dies_over_an_answer_leaves_it_unjudged():
    maths._JUDGE.require()
    os.kill(maths._JUDGE._process.pid, signal.SIGSTOP)
    threading.Timer(0.2, os.kill, (maths._JUDGE._process.pid, signal.SIGKILL)).start()
    assert maths._JUDGE.is_equal("3", "x=3") is None
    assert maths._JUDGE.is_equal("3", "x=3") is True


def test_time_and_memory_of_a_judge_are_limited():
    resource = pytest.importorskip("resource")
    maths._JUDGE.require()
    assert maths._JUDGE._process.args[-1] == str(TIMEOUT_S) == "5"
    assert resource.prlimit(maths._JUDGE._process.pid, resource.RLIMIT_AS) == (maths.MEMORY_BYTES,) * 2


def test_many_threads_may_score():
    pairs = EQUAL[:10] + UNEQUAL[:10]
    found = {}

    def ask(number):
        for place, (reference, answer) in enumerate(pairs):
            example = Example("0", "", reference)
            found[number, place] = MATH500.score(example, rf"\boxed{{{answer}}}")["accuracy"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number, place] for number in range(4) for place in range(20)] == ([1.0] * 10 + [0.0] * 10) * 4


def test_a_prompt_says_how_the_answer_is_to_be_marked():
    assert GSM8K.read({"question": " How many? ", "answer": "#### 3"}, 5) == Example(
        "5",
        "Solve the problem step by step. Write the number that is asked for on a last line of its own, after ####.\n\n"
        "Question: How many?\nAnswer:",
        "3",
        "#### 3",
    )
    assert MATH500.read({"problem": "What is $x$?", "answer": "3", "unique_id": "test/algebra/1.json"}, 5) == Example(
        "test/algebra/1.json",
        "Solve the problem step by step. Write the final answer in \\boxed{}.\n\nProblem:\nWhat is $x$?\n\nSolution:",
        "3",
    )


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_missing_column_is_named(task):
    for name in ("question", "answer") if task is GSM8K else ("problem", "answer"):
        row = {key: value for key, value in task.rows[0].items() if key != name}
        with pytest.raises(CaftuneError, match=f"Row 3 .*column {name},"):
            task.read(row, 3)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_worked_solution_is_the_perfect_answer(task):
    example = task.read(task.rows[0], 0)
    assert example.answer == solution(task.rows[0])
    assert task.score(example, example.answer) == RIGHT


def test_a_gsm8k_answer_without_its_number_is_refused():
    with pytest.raises(CaftuneError, match="Row 3 .*must end with a line of #### and a number, got 'So it is 5.'"):
        GSM8K.read({"question": "How many?", "answer": "So it is 5."}, 3)


def test_without_math_verify_the_remedy_is_told_when_a_row_is_read(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('antlr4 is not here')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(maths, "_JUDGE", maths._Judge())
    for task in TASKS:
        with pytest.raises(CaftuneError, match=r"antlr4 is not here\). Install it: pip install 'caftune\[eval\]'"):
            task.read(task.rows[0], 0)


def test_the_sign_of_a_reference_counts_in_any_writing():
    answers = [
        GSM8K.read({"question": "a", "answer": f"#### {minus}5"}, 0).reference for minus in "-\u2212\u2011\uff0d"
    ]
    assert answers == ["-5"] * 4
