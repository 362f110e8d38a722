r"""Maths: GSM8K and MATH-500. The final answer of a completion (`caftune.evals.answers`) is compared with the reference.

Answers are equal if they are the same text, or if math-verify finds them equal: 1/2, 0.5, 50% and \frac12; x = 3 and 3; 3, 5
and 5, 3; but not (2, 4) and [2, 4], nor (4, 2). It is lenient: 50% is 50, {2, 4} is (2, 4), x is X, and decimals count to the
sixth digit. It drops the base of a number, so two numbers with a base (2516_8) are compared as text, as are references that are
words (\text{east}), whatever the case and the brackets.

math-verify computes with SymPy, which may never end, and its own time limits are signals, for the main thread only. So it runs
in a separate process, which ends itself after TIMEOUT_S and is restarted. Such an answer is wrong and counted in `unjudged`;
one that needs more than MEMORY_BYTES, or has more than LONGEST_ANSWER characters, is wrong.

Source: math-verify, github.com/huggingface/Math-Verify. We differ in how an answer is found: it also reads formulas that nobody
called an answer, and of several it takes one that it can read.
"""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from caftune.errors import CaftuneError
from caftune.evals.answers import LONGEST_ANSWER, SCALES, TEXT, UNCLEAR, final_answer, hash_answer, tidy, value_of
from caftune.evals.task import Example, Task, column, filled_text, identity, text

TIMEOUT_S = 5
MEMORY_BYTES = 4 * 2**30

_SIGNS = {
    "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ ", "²": "^2", "³": "^3", "×": r"\times ", "·": r"\cdot ", "÷": "/",
    "±": r"\pm ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ", "–": "-",
    "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}",
}  # fmt: skip
_NEXT = ("\nQ:", "\nHuman:", "\nUser:")  # what base models write after an answer
_BASE = re.compile(r"([0-9A-Z]+)_\{?(\d+)\}?")
_SCALE_ASKED = re.compile(rf"\b(?:how many(?: more)?|in) ({'|'.join(SCALES)})s?\b", re.IGNORECASE)


def _as_latex(answer: str) -> str:
    """Signs of mathematics that LaTeX writes as commands, as these."""
    answer = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", answer)
    answer = re.sub(r"√\s*(?:\(([^()]*)\)|(\d+|[a-z]))", lambda root: rf"\sqrt{{{root[1] or root[2]}}}", answer)
    return "".join(_SIGNS.get(sign, sign) for sign in answer)


def _letters(answer: str) -> str:
    """The answer as bare text, to see whether two are the same."""
    bare = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", TEXT.sub(r"\1", answer))  # 2 3 is not 23
    return bare.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").replace(r"\varnothing", r"\emptyset")


def is_equal(reference: str, answer: str) -> bool | None:
    r"""Whether a final answer is equal to the reference; None where math-verify did not finish.

    Raises:
        CaftuneError: math-verify is not installed.

    >>> is_equal(r"\frac{1}{2}", "0.5"), is_equal("(2,4)", "[2,4]")
    (True, False)
    """
    reference, answer = tidy(reference), _as_latex(tidy(answer))
    if len(answer) > LONGEST_ANSWER:
        return False
    ours, theirs = value_of(reference), value_of(answer)
    if ours is not None and theirs is not None:
        is_apart = abs(ours - theirs) > 1 and "%" not in reference + answer  # 50% may be 0.5, and digits may be cut off
        if ours == theirs or is_apart:
            return not is_apart
    if reference.startswith("\\text"):
        return _letters(reference).strip("()").casefold() == _letters(answer).strip("()").casefold()
    with_base, other_base = _BASE.fullmatch(_letters(reference)), _BASE.fullmatch(_letters(answer))
    if with_base and other_base:
        return with_base.groups() == other_base.groups()
    return _letters(reference) == _letters(answer) or _JUDGE.is_equal(reference, answer)


class _Judge:
    """math-verify in a separate process, for any thread; one pair at a time."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def require(self) -> None:
        """Raise CaftuneError where math-verify is not installed."""
        with self._lock:
            self._started()

    def _started(self) -> subprocess.Popen[str]:
        """The process, started if there is none (a few seconds)."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", "-m", "caftune.evals.maths", str(self._timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        greeting = process.stdout.readline() if process.stdout else ""
        if greeting != "ready\n":
            self._end()
            raise CaftuneError(
                f"Maths is judged by math-verify, which cannot be imported ({greeting.strip() or 'its process ended'}). "
                "Install it: pip install 'caftune[eval]'"
            )
        return process

    def is_equal(self, reference: str, answer: str) -> bool | None:
        with self._lock:
            process, verdict = self._started(), ""
            with contextlib.suppress(OSError):  # its pipe is closed: it ended itself
                print(json.dumps([reference, answer]), file=process.stdin, flush=True)
                verdict = process.stdout.readline() if process.stdout else ""
            if not verdict:
                self._end()
                return None
            return verdict == "True\n"

    def _end(self) -> None:
        if self._process is not None:
            with contextlib.suppress(OSError), self._process as process:
                process.kill()
        self._process = None


_JUDGE = _Judge()


def _judge_pairs(timeout_s: float) -> None:
    """The judge's process: judge the pairs on stdin, one per line."""
    import faulthandler

    answers, sys.stdout = sys.stdout, sys.stderr
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError as error:
        print(error, file=answers, flush=True)
        return
    with contextlib.suppress(ImportError, ValueError):  # not on Windows; a lower limit stays
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        faulthandler.dump_traceback_later(timeout_s, exit=True)
        try:
            reference, answer = (parse(f"\\boxed{{{text}}}", config, parsing_timeout=None) for text in json.loads(line))
            verdict = bool(verify(reference, answer, timeout_seconds=None, allow_set_relation_comp=True))
        except Exception:
            verdict = False
        faulthandler.cancel_dump_traceback_later()
        print(verdict, file=answers, flush=True)


def _score(example: Example, completion: str) -> dict[str, float]:
    is_number = value_of(tidy(example.reference)) is not None
    units = {match[1].lower() for match in _SCALE_ASKED.finditer(example.prompt)}
    answer = final_answer(completion, is_number=is_number, units=units)
    verdict = False if answer in (None, UNCLEAR) else is_equal(example.reference, str(answer))
    return {
        "accuracy": float(verdict is True),
        "answered": float(answer is not None),
        "unjudged": float(verdict is None),
    }


def _read_gsm8k(row: Mapping[str, Any], number: int) -> Example:
    _JUDGE.require()  # fails before anything is generated
    solution = text(row, number, "answer")
    reference = hash_answer(solution)
    if not reference:
        raise CaftuneError(
            f"Row {number} (from 0): answer must end with a line of #### and a number, got {solution[-80:]!r}. Fix the file."
        )
    prompt = (
        "Solve the problem step by step. Write the number that is asked for on a last line of its own, after ####.\n\n"
        f"Question: {filled_text(row, number, 'question').strip()}\nAnswer:"
    )
    return Example(str(number), prompt, reference, solution)


def _read_math(row: Mapping[str, Any], number: int) -> Example:
    _JUDGE.require()
    prompt = (
        "Solve the problem step by step. Write the final answer in \\boxed{}.\n\n"
        f"Problem:\n{filled_text(row, number, 'problem').strip()}\n\nSolution:"
    )
    answer = column(row, number, "answer")
    is_number = type(answer) in (int, float) and math.isfinite(answer)
    reference = str(answer) if is_number else filled_text(row, number, "answer")
    return Example(identity(row, number, "unique_id"), prompt, reference, str(row.get("solution") or ""))


GSM8K = Task(
    name="gsm8k",
    primary="accuracy",
    read=_read_gsm8k,
    score=_score,
    max_new_tokens=512,
    columns=("question", "answer"),
    stop=("\nQuestion:", "\nProblem:", *_NEXT),
    lower_is_better=frozenset({"unjudged"}),
)
"""Source: Cobbe et al., arXiv 2110.14168; data and checker github.com/openai/grade-school-math. "Question:" and "Answer:" as in
lm-evaluation-harness's gsm8k; the instruction, in place of examples, is ours, and asks for what the solutions end with (####).
"""

MATH500 = Task(
    name="math500",
    primary="accuracy",
    read=_read_math,
    score=_score,
    max_new_tokens=2048,
    columns=("problem", "answer", "solution", "unique_id"),
    stop=("\nProblem:", "\nQuestion:", *_NEXT),
    lower_is_better=frozenset({"unjudged"}),
)
"""Source: Hendrycks et al., arXiv 2103.03874; the 500 test problems are those of Lightman et al., arXiv 2305.20050.
"Problem:" and "Solution:" are those of Minerva's prompt (arXiv 2206.14858), without its four examples.
"""

if __name__ == "__main__":
    _judge_pairs(float(sys.argv[1]))
