r"""Code: HumanEval and MBPP. A completion passes if the data set's own tests of it end without an exception.

Scoring runs what a model wrote. It is off until the environment says CAFTUNE_RUN_GENERATED_CODE=1, and then happens in a
sandbox (`caftune.evals.sandbox`). `caftune.evals.programs` finds the program in an answer. For HumanEval it is the first of:

1. The answer begins with an indented line: it continues the function, up to the first line at the left margin.
2. It defines the function: that runs after the prompt, whose imports and other functions it may need.
3. It has a body of the function as a code block, or without its first indentation.

An answer without a program fails. Solution and tests share a process, as in the official checkers, so a solution that studies
this file, or returns an object that equals everything, can pass. What cannot pass: leaving early with any status, printing,
hooks at exit, or changing builtins. A pass needs the answer to a key of this one run, which is read after the tests have ended.

Source: HumanEval, arXiv 2107.03374 and github.com/openai/human-eval; MBPP, arXiv 2108.07732; the docstring as prompt without
examples, arXiv 2204.05999 (InCoder). We differ: seconds of CPU time, not of a clock; sets have one order; a solution cannot
import NumPy; no stop texts, as the official ones ("\nclass", "\ndef", "\n#", ...) also cut within strings and lose helpers.
"""

import os
import re
import secrets
from collections.abc import Mapping
from typing import Any

from caftune.errors import CaftuneError
from caftune.evals.programs import body_of, continuation_of, names_in, solution_of, with_head
from caftune.evals.sandbox import Limits, check_sandbox, run_python
from caftune.evals.task import Example, Task, column, filled_text

PERMISSION = "CAFTUNE_RUN_GENERATED_CODE"
LIMITS = Limits(cpu_s=10, wall_s=30.0)

# Runs in the sandbox. It binds all functions it needs before the solution runs, sends the solution's prints nowhere, and reads
# tests and key from a copied descriptor, each only when needed.
_CHECKER = """
import os, sys

def check(read, write, leave, compile, exec, reverse):
    source, answer, nowhere = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    def take():
        size = int(read(source, 12))
        text = b""
        while len(text) < size:
            text += read(source, size - len(text))
        return text
    space = {}
    exec(compile(take(), "solution.py", "exec"), space)
    exec(compile(take(), "tests.py", "exec"), space)
    write(answer, reverse(take()))
    leave(0)

check(os.read, os.write, os._exit, compile, exec, lambda key: key[::-1])
"""


def passes(solution: str, tests: str, *, limits: Limits = LIMITS) -> bool:
    """Whether the tests, run after the solution in one namespace, come to their end without an exception.

    Raises:
        CaftuneError: running generated code is not permitted, or this machine cannot do it safely.
    """
    _check_permission()
    key = secrets.token_bytes(32)
    texts = (solution.encode("utf-8", "surrogatepass"), tests.encode(), key)
    stdin = b"".join(b"%12d" % len(text) + text for text in texts)
    outcome = run_python(_CHECKER, limits=limits, stdin=stdin)
    return outcome.returncode == 0 and outcome.stdout == key[::-1]


def _check_permission() -> None:
    if os.environ.get(PERMISSION) != "1":
        raise CaftuneError(
            f"{PERMISSION} must be 1 for HumanEval and MBPP, got {os.environ.get(PERMISSION, 'nothing')}. They run programs "
            "that a model wrote, in a sandbox: read in caftune/evals/sandbox.py what it guarantees, and set the variable."
        )
    check_sandbox()


# Texts that follow a solution (and occur within some): an answer that reaches one does not count as cut off.
_PAST = ("\nassert ", "\nprint(", "\nif __name__")


def _score_humaneval(example: Example, completion: str) -> dict[str, float]:
    name, head = example.reference["entry_point"], example.prompt
    program = continuation_of(completion, head, name)
    if program is None:
        found = solution_of(completion, frozenset({name}), names_in(head) - {name})
        program = body_of(completion, head, name) if found is None else with_head(head, found)
    return _verdict(program, f"{example.reference['test']}\n\ncheck({name})\n")


def _score_mbpp(example: Example, completion: str) -> dict[str, float]:
    setup, tests = example.reference["setup"], "\n".join(example.reference["tests"])
    called = frozenset(re.findall(r"\b[A-Za-z_]\w*(?=\s*\()", f"{setup}\n{tests}"))
    return _verdict(solution_of(completion, called, names_in(setup)), f"{setup}\n{tests}\n")


def _verdict(program: str | None, tests: str) -> dict[str, float]:
    _check_permission()
    return {"pass": float(program is not None and passes(program, tests))}


def _read_humaneval(row: Mapping[str, Any], number: int) -> Example:
    _check_permission()  # here too, before anything is generated
    reference = {name: filled_text(row, number, name) for name in ("entry_point", "test")}
    answer = str(row.get("canonical_solution") or "")
    return Example(str(column(row, number, "task_id")), filled_text(row, number, "prompt"), reference, answer)


def _read_mbpp(row: Mapping[str, Any], number: int) -> Example:
    """A row of the full data set, or of the sanitized one, which calls `text` `prompt` and has `test_imports`."""
    _check_permission()
    tests = _texts(column(row, number, "test_list"), number, "test_list")
    if not tests:
        raise CaftuneError(f"Row {number} (from 0): test_list must hold a test, got none. Remove the row.")
    setup = [*_texts(row.get("test_imports") or [], number, "test_imports")]
    setup += _texts([row.get("test_setup_code") or ""], number, "test_setup_code")
    task = filled_text(row, number, "text", "prompt")
    prompt = '"""\n' + "\n".join([task, *tests]) + '\n"""\n'
    reference = {"setup": "\n".join(setup), "tests": tests}
    return Example(str(column(row, number, "task_id")), prompt, reference, str(row.get("code") or ""))


def _texts(found: Any, number: int, name: str) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise CaftuneError(f"Row {number} (from 0) must have a list of texts in {name}, got {found!r}. Fix the file.")
    return found


HUMANEVAL = Task(
    name="humaneval",
    primary="pass",
    read=_read_humaneval,
    score=_score_humaneval,
    max_new_tokens=512,
    columns=("task_id", "prompt", "entry_point", "test", "canonical_solution"),
    past=_PAST,
)

MBPP = Task(
    name="mbpp",
    primary="pass",
    read=_read_mbpp,
    score=_score_mbpp,
    max_new_tokens=512,
    columns=("task_id", "text", "prompt", "test_list", "test_imports", "test_setup_code", "code"),
    past=_PAST,
)
