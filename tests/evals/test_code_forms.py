# ruff: noqa: E501 (tables of answers, one a line)
"""The forms in which answers to HumanEval and MBPP come: the program in each is found, and no wrong answer becomes right.

The verdicts are those of the sandbox; many programs share one run of it, so that the tables stay quick.
"""

import gzip
import json
import sys
import textwrap
import time

import pytest

from caftune.errors import CaftuneError
from caftune.evals import code, reading
from caftune.evals.code import HUMANEVAL, MBPP, PERMISSION
from caftune.evals.programs import body_of, continuation_of, solution_of
from caftune.evals.sandbox import Limits, run_python
from caftune.evals.task import until_stop

# Each program runs in a namespace of its own, its prints go nowhere.
MANY = """
import io, json, sys
verdicts, out = [], sys.stdout
for program, tests in json.load(sys.stdin):
    sys.stdout, space = io.StringIO(), {}
    try:
        exec(compile(program, "solution.py", "exec"), space)
        exec(compile(tests, "tests.py", "exec"), space)
        verdicts.append(1.0)
    except BaseException:
        verdicts.append(0.0)
    sys.stdout = out
print(json.dumps(verdicts))
"""


def scores(task, rows_and_answers):
    """The verdicts on many answers, from one run of the sandbox."""
    programs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PERMISSION, "1")
        patch.setattr(code, "passes", lambda program, tests: programs.append([program, tests]) or True)
        found = [
            task.score(task.read(row, 0), until_stop(answer, task.stop))["pass"] for row, answer in rows_and_answers
        ]
    limits = Limits(cpu_s=100, wall_s=200.0, output_bytes=1 << 20)
    verdicts = iter(json.loads(run_python(MANY, limits=limits, stdin=json.dumps(programs).encode()).stdout))
    return [next(verdicts) if one else 0.0 for one in found]


HEAD = HUMANEVAL.rows[0]["prompt"]
BODY = "    return sum(value > limit for value in values)\n"
WHOLE = "def count_above(values, limit):\n" + BODY
WRONG = "def count_above(values, limit):\n    return -1\n"
LONG = "def count_above(values, limit):\n    found = 0\n\n    for value in values:\n        if value > limit:\n            found += 1\n\n    return found\n"
LONG_BODY = LONG.partition("\n")[2]
HELPED = "def count_above(values, limit):\n    return sum(map(is_above(limit), values))\n"
HELPER = "def is_above(limit):\n    return lambda value: value > limit\n"
DOCUMENTED = (
    'def count_above(values, limit):\n    """Count.\n\n    ```python\n    count_above([1, 2], 1)\n    ```\n    """\n'
    + BODY
)
TWO_SPACES = 'def count_above(values, limit):\n  """Count.\n\n  ```\n  count_above([1], 0)\n  ```\n  """\n  return sum(v > limit for v in values)\n'


def fenced(source, info="python", fence="```"):
    return f"{fence}{info}\n{source}{fence}\n"


def inset(text, by):
    return textwrap.indent(text, by, lambda line: True)


RIGHT = {
    "the body": BODY,
    "the body with an empty line within": LONG_BODY,
    "the body with CRLF": LONG_BODY.replace("\n", "\r\n"),
    "the body without an end of line": BODY.rstrip(),
    "the body, then prose": BODY + "\nThis counts the values. It's quick.\n",
    "the body, then an explanation with a colon": BODY + "\nExplanation: sum() adds truths up.\n",
    "the body, then a rule and a heading": BODY + "\n---\n\n### Notes\n\n- quick\n",
    "the body, then the next question with another function": BODY + "\n\ndef other(a):\n    return [\n",
    "the body with a helper defined below": "    return sum(map(is_above(limit), values))\n\n\n" + HELPER,
    "the body with a text at the margin": '    text = """\ndef other\nprint(\nassert \n"""\n' + BODY,
    "the body with brackets that close at the margin": "    return sum([\n        value > limit for value in values\n])\n",
    "the body with a comment at the margin": "    found = 0\n# one by one\n    for v in values:\n        found += v > limit\n    return found\n",
    "the body, then a fence that closes another's": BODY + "```\n\nThis counts.",
    "the body, stripped": LONG_BODY.strip(),
    "the body, stripped, of one line": BODY.strip(),
    "the body at the margin, in a fence": fenced(textwrap.dedent(LONG_BODY)),
    "the body at the margin with an early return, in a fence": fenced("if not values: return 0\nfound = 0\nfor v in values:\n    found += v > limit\nreturn found\n"),
    "the body indented below prose": f"The body is this:\n\n{LONG_BODY}\nThat is all.",
    "the whole between tags": f"[PYTHON]\n{LONG}[/PYTHON]",
    "steps in pieces, then the whole": "Step 1:\n" + fenced("found = 0\n") + "Step 2:\n" + fenced("for value in values:\n    found += value > limit\n") + "Together:\n" + fenced(LONG),
    "the body in a fence, with prose": f"The body is:\n\n{fenced(BODY)}\nThat is all.",
    "the body in a fence in a list": f"1. Fill in:\n\n{inset(fenced(LONG_BODY), '   ')}\n2. Done.",
    "the whole": WHOLE,
    "the whole with the prompt": HEAD + BODY,
    "the whole with a byte order mark": "\ufeff" + WHOLE,
    "the whole with CRLF in a fence": fenced(LONG).replace("\n", "\r\n"),
    "the whole with old Mac line ends": fenced(WHOLE).replace("\n", "\r"),
    "the whole with tabs": "def count_above(values, limit):\n\tfound = 0\n\tfor v in values:\n\t\tfound += v > limit\n\treturn found\n",
    "the whole with tabs in a fence": fenced("def count_above(values, limit):\n\tfound = 0\n\tfor v in values:\n\t\tfound += v > limit\n\treturn found\n"),
    "the whole between prose, no fence": f"Here is the function:\n\n{LONG}\nIt goes through the values.\nDone.",
    "the whole between prose of single words": f"Sure\n\n{LONG}\nDone\n",
    "the whole behind a note that reads as Python": f"Note: this\n- it\n{LONG}",
    "the whole and an import, with prose between": "First:\n\nfrom operator import gt\n\nThen:\n\ndef count_above(values, limit):\n    return sum(gt(v, limit) for v in values)\n\nSo.",
    "the whole indented under prose": f"Here:\n\n{inset(LONG, '    ')}\nDone.",
    "the whole indented right below prose": f"Here:\n{inset(WHOLE, '    ')}\nDone.",
    "the whole indented from the start": inset(LONG, "    ") + "\nDone.",
    "the whole behind one space": " " + WHOLE,
    "tildes": fenced(WHOLE, fence="~~~"),
    "four backticks": fenced(WHOLE, fence="````"),
    "no language": fenced(LONG, info=""),
    "a language with attributes": fenced(LONG, info='python title="count.py" linenos'),
    "a language in braces": fenced(LONG, info="{.python .numberLines}"),
    "upper-case language": fenced(LONG, info="Python3"),
    "a fence in a list": f"1. Write it:\n   {inset(fenced(LONG), '   ').lstrip()}2. Use it.",
    "a fence in a list item's own line": f"- ```python\n{inset(LONG, '  ')}  ```\n",
    "a fence in a list, far in": f"- Code:\n\n{inset(fenced(LONG), '      ')}\n",
    "a fence in a list, not far enough in": f"1. Code:\n{inset(fenced(LONG), ' ')}2. Done\n",
    "a fence behind four spaces, below prose": f"Here:\n{inset(fenced(LONG), '    ')}ok",
    "a fence behind a tab": f"Here:\n{inset(fenced(LONG), chr(9))}ok",
    "a fence in a nested list": f"1. One\n   - Two\n\n{inset(fenced(LONG), '     ')}\n",
    "a fence in a quotation": inset(fenced(LONG), "> "),
    "code on the line of the fence": f"```python {WHOLE}```",
    "code on the line of the fence, no language": f"```{WHOLE}```",
    "an import on the line of the fence": f"```python import math\n{WHOLE}```",
    "a fence behind the last line": f"```python\n{WHOLE.rstrip()}```\nIt counts.",
    "a fence behind the last line, then a use": f"```python\n{WHOLE.rstrip()}```\nUse:\n```python\ncount_above([1], 0)\n```\n",
    "all on one line": "```python count_above = lambda values, limit: sum(v > limit for v in values)```",
    "within a line": "Use `count_above = lambda values, limit: sum(v > limit for v in values)`.",
    "a docstring that holds a fence": fenced(DOCUMENTED),
    "a docstring that holds a fence, in a list": f"1. Code:\n{inset(fenced(DOCUMENTED), '   ')}\n2. Done",
    "a docstring of two spaces that holds a fence": fenced(TWO_SPACES),
    "a docstring that holds a fence, then a use": fenced(TWO_SPACES) + "\nUse:\n" + fenced("print(count_above([1], 0))\n"),
    "a docstring that holds a fence, no fence around": TWO_SPACES,
    "a module's docstring that holds a fence": fenced(f'"""\nUse:\n```\ncount_above([1], 0)\n```\n"""\n{LONG}'),
    "a fence that is not closed": "Sure:\n```python\n" + LONG,
    "a fence that is not closed, cut in a test": f"```python\n{LONG}\nprint(count_above([1, 2",
    "a fence that is not closed, cut in another function": f"```python\n{LONG}\ndef main():\n    print('a",
    "a fence in a fence": fenced(fenced(LONG), info="markdown", fence="````"),
    "a fence in a fence of as many marks": f"```\n{fenced(LONG)}```\n",
    "prose in the block": fenced(f"Here is the solution:\n\n{LONG}"),
    "a sentence between functions of a block": fenced(f"{HELPER}\nThen the function itself:\n\n{HELPED}"),
    "examples of a session in prose": f">>> count_above([1, 5], 4)\n1\n\n{fenced(LONG)}",
    "examples of a session in a block before": fenced(">>> count_above([1, 5], 4)\n1\n") + fenced(LONG),
    "a session behind the function": fenced(f"{LONG}\n>>> count_above([1, 5], 4)\n1\n"),
    "a signature first": fenced("def count_above(values: list[int], limit: int) -> int:\n") + "Its body:\n" + fenced(LONG),
    "a stub first": fenced('def count_above(values, limit):\n    """Count."""\n    ...\n') + "Filled in:\n" + fenced(LONG),
    "a stub that raises first": fenced("def count_above(values, limit):\n    raise NotImplementedError('soon')\n") + fenced(LONG),
    "a use first": "Use:\n" + fenced("from solution import count_above\n\nprint(count_above([1], 0))\n") + "Code:\n" + fenced(LONG),
    "a use with an assert first": "Wanted:\n" + fenced("\nassert count_above([1], 0) == 1\n") + fenced(LONG),
    "a program of the shell first": fenced("pip install numpy\n", info="bash") + fenced(LONG),
    "a helper in a block before": f"First:\n{fenced(HELPER)}Then:\n{fenced(HELPED)}",
    "a helper in a block behind": f"{fenced(HELPED)}where\n{fenced(HELPER)}",
    "an import in a block before": fenced("import operator\n") + fenced("def count_above(values, limit):\n    return sum(operator.gt(v, limit) for v in values)\n"),
    "a constant and a chain of helpers in blocks": fenced("ONE = 1\n") + fenced("def one(value):\n    return ONE\n") + fenced("def count_above(values, limit):\n    return sum(one(v) for v in values if v > limit)\n"),
    "a helper in the text and the function in a block": f"{HELPER}\nand\n\n{fenced(HELPED)}",
    "a corrected version": f"{fenced(WRONG)}Wait, that is wrong. The corrected version:\n{fenced(LONG)}",
    "a corrected version without fences": f"{WRONG}\nOops, here it is, fixed:\n\n{LONG}",
    "a mistake that is seen": f"{fenced(WRONG)}This does not work for any list. So:\n{fenced(LONG)}",
    "a worse alternative": f"{fenced(LONG)}Alternatively:\n{fenced(WRONG)}",
    "an alternative that is cut": f"{fenced(LONG)}Alternatively:\n```python\ndef count_above(values, limit):\n    return len([v for",
    "a future import": fenced(f"from __future__ import annotations\n\nimport math\n\n{LONG}"),
    "annotations with an import": fenced("from typing import List\n\n\ndef count_above(values: List[int], limit: int) -> int:\n" + BODY),
    "a decorator": fenced(f"import functools\n\n@functools.wraps(len)\n{LONG}"),
    "a decorator without a fence": f"Here:\n\nimport functools\n\n@functools.wraps(len)\n{LONG}\nDone.",
    "a lambda": fenced("count_above = lambda values, limit: sum(v > limit for v in values)\n"),
    "a lambda with an annotation": fenced("from typing import Callable\n\ncount_above: Callable = lambda values, limit: sum(v > limit for v in values)\n"),
    "another name for a function": fenced(f"{HELPER}\n\ndef _count(values, limit):\n    return sum(map(is_above(limit), values))\n\n\ncount_above = _count\n"),
    "a class with a method that does it": fenced("class Counter:\n    def count_above(self, values, limit):\n        return sum(v > limit for v in values)\n\n\ndef count_above(values, limit):\n    return Counter().count_above(values, limit)\n"),
    "an async helper": fenced("import asyncio\n\n\nasync def above(v, limit):\n    return v > limit\n\n\ndef count_above(values, limit):\n    return sum(asyncio.new_event_loop().run_until_complete(above(v, limit)) for v in values)\n"),
    "a helper below": fenced(f"{HELPED}\n\n{HELPER}"),
    "a value below": fenced("def count_above(values, limit):\n    return sum(ONE for v in values if v > limit)\n\n\nONE = 1\n"),
    "a table that is filled before": fenced("ONES = []\nfor _ in range(9):\n    ONES.append(1)\n\n\ndef count_above(values, limit):\n    return sum(ONES[0] for v in values if v > limit)\n"),
    "a main": fenced(f"{LONG}\n\nif __name__ == '__main__':\n    boom()\n"),
    "a main without a fence": f"{LONG}\n\nif __name__ == '__main__':\n    print(count_above([1], 0))\n",
    "tests below, one of them wrong": fenced(f"{LONG}\n\nassert count_above([1, 5, 9], 4) == 3\nprint('passed')\n"),
    "a test function below that is called and wrong": fenced(f"{LONG}\n\ndef test():\n    assert count_above([1], 0) == 7\n\ntest()\n"),
    "unittest below": fenced(f"import unittest\n\n{LONG}\n\nclass T(unittest.TestCase):\n    pass\n\nunittest.main()\n"),
    "questions to the user below": fenced(f"{LONG}\n\nn = int(input())\nprint(count_above([n], 0))\n"),
    "a use below that fails": fenced(f"{LONG}\n\nresult = count_above(None, 4)\nprint(result)\n"),
    "zero-width characters": fenced(LONG.replace("return", "\u200breturn")),
    "no-break spaces": fenced(LONG.replace("    ", "\u00a0" * 4)),
    "a heading and bold": f"## Solution\n\n**Code:**\n\n{fenced(LONG)}\n**Complexity:** O(n)",
    "html around": f"<details>\n<summary>Code</summary>\n\n{fenced(LONG)}\n</details>",
    "an escape that Python warns of": fenced('def count_above(values, limit):\n    """A \\d."""\n' + BODY),
}  # fmt: skip

WRONG_ANSWERS = {
    "nothing": "",
    "white space": " \n\t\n",
    "a refusal": "I'm sorry, but I can't help with that.",
    "prose about it": "You could add up the truths of value > limit for each value in values, and return the sum.",
    "a fence without code": "```python\n```",
    "a stub alone": fenced('def count_above(values, limit):\n    """Count."""\n    pass\n'),
    "a signature alone": fenced("def count_above(values, limit):\n"),
    "another function": fenced(LONG.replace("count_above", "count_over")),
    "a method of a class alone": fenced("class Solution:\n    def count_above(self, values, limit):\n        return sum(v > limit for v in values)\n"),
    "an async function": fenced("async " + LONG),
    "a wrong body": "    return 0\n",
    "a wrong body, then a right one": "    return 0\n\n    return sum(v > limit for v in values)\n",
    "a wrong body, then a right function": "    return 0\n\n\n" + WHOLE,
    "a wrong body, then a right fence": "    return 0\n\n" + fenced(WHOLE),
    "a broken body, then a right function": "    return (\n\n" + WHOLE,
    "a broken body, then a right fence": "    return sum(v >\n\n" + fenced(WHOLE),
    "a body that is cut": "    found = 0\n    for value in values:\n        if value > limit",
    "a body that is cut where it parses": "    found = 0\n    for value in values:\n        found += value > limit\n",
    "steps in pieces alone": "Step 1:\n" + fenced("found = 0\n") + "Step 2:\n" + fenced("for value in values:\n    found += value > limit\n"),
    "a body that prints": "    print(sum(v > limit for v in values))\n",
    "a body in a comment": "    # return sum(v > limit for v in values)\n",
    "a body in a docstring": '    """\n    return sum(v > limit for v in values)\n    """\n',
    "a body indented by a tab": "\treturn sum(value > limit for value in values)",
    "a body indented by five": "     return sum(value > limit for value in values)",
    "a body that needs what is nowhere": "    return sum(map(is_above(limit), values))\n",
    "a body with a helper that is wrong": "    return sum(map(is_above(limit), values))\n\n\n" + HELPER.replace(">", "<"),
    "a body with a second thought in prose": "    return len(values)\n\nOops, it should be sum(v > limit for v in values).",
    "a body that is cut in two": "    return sum(value > \ndef other(): limit for value in values)",
    "a dedented body that is wrong": fenced("if not values: return 0\nreturn len(values)\n"),
    "a wrong function": fenced(WRONG),
    "a wrong function, then an alternative": f"{fenced(WRONG)}Or:\n{fenced(WHOLE)}",
    "a wrong function, then an alternative without fences": f"{WRONG}\nAnother way would be this one:\n\n{WHOLE}",
    "three guesses, the last of them right": f"{fenced(WRONG)}\n{fenced(WRONG.replace('-1', '0'))}\n{fenced(WHOLE)}",
    "a right function, then a corrected one that is wrong": f"{fenced(WHOLE)}Oops, the corrected version:\n{fenced(WRONG)}",
    "a right function, then in the block a wrong one": fenced(f"{WHOLE}\n\n{WRONG}"),
    "a wrong function in the text, then a right fence": f"{WRONG}\nin other words\n\n{fenced(WHOLE)}",
    "a wrong function in a list, then a right one": f"1. A:\n{inset(fenced(WRONG), '   ')}2. B:\n{inset(fenced(WHOLE), '   ')}",
    "a wrong function whose docstring holds a right one": fenced('def count_above(values, limit):\n  """\n```\n' + WHOLE + '```\n  """\n  return -1\n'),
    "a right function in a comment": fenced("# " + WHOLE.replace("\n", "\n# ") + "\n" + WRONG),
    "a right function in a string": fenced(f"code = '''\n{WHOLE}'''\n"),
    "a right function under a condition that fails": fenced(f"if False:\n{inset(WHOLE, '    ')}"),
    "a function that is cut": "```python\ndef count_above(values, limit):\n    found = 0\n    for v in values:\n        found += (",
    "a function cut behind an early return": "```python\ndef count_above(values, limit):\n    if not values:\n        return 0\n    return sum(",
    "a function with a syntax error": fenced("def count_above(values, limit)\n" + BODY),
    "a function with a helper that is nowhere": fenced(HELPED),
    "a function with a wrong helper, and a right one in another block": fenced(HELPER.replace(">", "<") + "\n" + HELPED) + "Or:\n" + fenced(HELPER),
    "a function without its import": fenced("def count_above(values, limit):\n    return sum(operator.gt(v, limit) for v in values)\n"),
    "a function of another name": WHOLE.replace("count_above", "count_over"),
    "a function of another name in prose": "Here it is:\n" + WHOLE.replace("count_above", "count_over") + "It counts.",
    "a class with such a body": "class Counter:\n" + BODY,
    "a wrong lambda": "`count_above = lambda values, limit: len(values)`",
    "a function that is deleted": fenced(f"{WHOLE}\ncount_above = None\n"),
    "a wrong decorator": fenced(f"def broken(f):\n    return None\n\n\n@broken\n{WHOLE}"),
    "javascript": fenced("function count_above(values, limit) { return values.filter(v => v > limit).length; }\n", info="js"),
    "an exit": fenced("import sys\nsys.exit(0)\n" + WRONG),
    "a test that is changed": fenced(f"{WRONG}\n\ndef check(candidate):\n    pass\n"),
    "an endless bracket": "    return " + "(" * 2000,
    "a lone surrogate": fenced("def count_above(values, limit):\n    return '\ud800'\n"),
    "a zero byte": fenced("def count_above(values, limit):\n    return '\0'\n"),
    "thousands of signs": "    return " + "-" * 20000 + "1\n",
    "thousands of attributes": "    return values" + ".a" * 20000 + "\n",
}  # fmt: skip


def test_at_least_98_in_100_forms_of_a_right_answer_count_and_here_all():
    found = scores(HUMANEVAL, [(HUMANEVAL.rows[0], answer) for answer in RIGHT.values()])
    missed = [name for name, score in zip(RIGHT, found, strict=True) if score != 1.0]
    assert not missed
    assert len(RIGHT) >= 40


def test_no_form_of_a_wrong_answer_counts():
    found = scores(HUMANEVAL, [(HUMANEVAL.rows[0], answer) for answer in WRONG_ANSWERS.values()])
    counted = [name for name, score in zip(WRONG_ANSWERS, found, strict=True) if score != 0.0]
    assert not counted
    assert 2 * len(WRONG_ANSWERS) >= len(RIGHT) * 0.8


HYPOTENUSE_RIGHT = {
    "what the prompt imports and defines is used": fenced("def hypotenuse(a, b):\n    return math.sqrt(4 * (halve(a) ** 2 + halve(b) ** 2))\n"),
    "the prompt's function is defined once more": fenced("def halve(number):\n    return number / 2\n\n\ndef hypotenuse(a, b):\n    return (a * a + b * b) ** 0.5\n"),
    "an import of the prompt's in another block": fenced("import math\n") + fenced("def hypotenuse(a, b):\n    return math.hypot(a, b)\n"),
    "a future import": fenced("from __future__ import annotations\n\n\ndef hypotenuse(a: float, b: float) -> float:\n    return math.hypot(a, b)\n"),
}  # fmt: skip


def test_a_program_behind_its_prompt_finds_what_the_prompt_has():
    found = scores(HUMANEVAL, [(HUMANEVAL.rows[1], answer) for answer in HYPOTENUSE_RIGHT.values()])
    assert dict(zip(HYPOTENUSE_RIGHT, found, strict=True)) == dict.fromkeys(HYPOTENUSE_RIGHT, 1.0)


BOX, DEPTH = MBPP.rows[1]["code"].split("\n\n")
MBPP_RIGHT = {
    "plain": f"{BOX}\n\n{DEPTH}\n",
    "the next question and a wrong answer behind": f'{BOX}\n\n{DEPTH}\n\n"""\nWrite a function.\n"""\ndef depth(box):\n    return 0\n',
    "a test, then a class of that name": f"{BOX}\n\n{DEPTH}\n\nassert depth(None) == 0\n\nclass Box:\n    pass\n",
    "a wrong test behind": f"{BOX}\n\n{DEPTH}\n\nassert depth(None) == 9\n",
    "a print between": f"{BOX}\n\nprint(Box(1).inner)\n\n{DEPTH}\n",
    "two blocks": f"First:\n{fenced(BOX + chr(10))}Then:\n{fenced(DEPTH + chr(10))}",
    "two blocks, the other way round": f"{fenced(DEPTH + chr(10))}with\n{fenced(BOX + chr(10))}",
    "two blocks in a list": f"1. A:\n{inset(fenced(BOX + chr(10)), '   ')}2. B:\n{inset(fenced(DEPTH + chr(10)), '   ')}",
    "a use first": "\n".join(["```python", "print('tests:')", "assert depth(None) == 0", "```", "", fenced(f"{BOX}\n\n{DEPTH}\n")]),
    "prose around": f"Here it is:\n\n{BOX}\n\n{DEPTH}\n\nIt counts the boxes.",
}  # fmt: skip
MBPP_WRONG = {
    "one of two": fenced(BOX + "\n"),
    "the other of two": fenced(DEPTH + "\n"),
    "a wrong one, then the next question and a right answer": f'{BOX}\n\ndef depth(box):\n    return 0\n\n"""\nQ.\n"""\n{DEPTH}\n',
    "a wrong one, then a test and a right one": f"{BOX}\n\ndef depth(box):\n    return 0\n\nassert depth(None) == 0\n\n{DEPTH}\n",
    "a body alone": "    return 0 if box is None else 1 + depth(box.inner)\n",
    "the tests alone": "\n".join(MBPP.rows[1]["test_list"]),
}  # fmt: skip


def test_forms_of_answers_to_mbpp_are_judged_as_a_reader_would():
    forms = MBPP_RIGHT | MBPP_WRONG
    found = dict(zip(forms, scores(MBPP, [(MBPP.rows[1], answer) for answer in forms.values()]), strict=True))
    assert found == dict.fromkeys(MBPP_RIGHT, 1.0) | dict.fromkeys(MBPP_WRONG, 0.0)


def test_a_function_that_is_called_as_a_builtin_is_found():
    row = {"task_id": 4, "text": "Add.", "test_list": ["assert sum(1, 2) == 3"], "code": ""}
    answer = fenced("print('see below')\n") + fenced("def sum(a, b):\n    return a + b\n")
    assert scores(MBPP, [(row, answer), (row, fenced("def add(a, b):\n    return a + b\n"))]) == [1.0, 0.0]


def test_an_answer_without_a_program_is_not_run(monkeypatch):
    monkeypatch.setenv(PERMISSION, "1")
    monkeypatch.setattr(code, "passes", lambda *_: pytest.fail("it was run"))
    for answer in ("", "I cannot help with that.", fenced("def other():\n    return 1\n")):
        assert HUMANEVAL.score(HUMANEVAL.read(HUMANEVAL.rows[0], 0), answer) == {"pass": 0.0}
        assert MBPP.score(MBPP.read(MBPP.rows[1], 0), answer) == {"pass": 0.0}


def test_the_program_that_is_run_is_the_answers_own():
    name = frozenset({"count_above"})
    assert solution_of(f"Sure:\n{fenced(f'{LONG}{chr(10)}print(count_above([], 1))')}", name) == LONG
    assert solution_of(fenced(HELPER) + fenced(HELPED), name) == HELPER + HELPED
    assert continuation_of(BODY + "\nSo it is.", HEAD, "count_above") == HEAD + BODY + "\n"
    assert continuation_of(WHOLE, HEAD, "count_above") is None
    assert body_of(fenced(textwrap.dedent(BODY)), HEAD, "count_above") == HEAD + BODY + "\n"
    assert body_of("No.", HEAD, "count_above") is None


# The data sets


def in_prose(source):
    return f"Sure, here is it:\n\n{source}\n\nThe function goes through its input. Let me know!"


def humaneval_rows(shared):
    with gzip.open(shared / "data/humaneval/HumanEval.jsonl.gz") as file:
        return list(map(json.loads, file))


DRESSINGS = {
    "the body": lambda row: row["canonical_solution"],
    "the body, then other functions": lambda row: (
        row["canonical_solution"] + "\n\ndef zz(a):\n    return a\n\n\nprint(zz("
    ),
    "a fence with prose": lambda row: in_prose(fenced(row["prompt"] + row["canonical_solution"])),
    "a list": lambda row: f"1. Code:\n\n{inset(fenced(row['prompt'] + row['canonical_solution']), '   ')}\n2. Use it.",
    "tildes, cut": lambda row: f"~~~py\n{row['prompt']}{row['canonical_solution']}\n\nprint({row['entry_point']}(",
    "no fence": lambda row: in_prose(row["prompt"] + row["canonical_solution"]),
    "the body in a fence": lambda row: in_prose(fenced(row["canonical_solution"])),
}


@pytest.mark.parametrize("name", DRESSINGS)
def test_every_solution_of_humaneval_passes_as(name, shared):
    rows = humaneval_rows(shared)
    found = scores(HUMANEVAL, [(row, DRESSINGS[name](row)) for row in rows])
    assert [row["task_id"] for row, score in zip(rows, found, strict=True) if score != 1.0] == []
    assert len(rows) == 164


def test_the_solution_of_another_question_of_humaneval_never_passes(shared):
    rows = humaneval_rows(shared)
    others = [in_prose(fenced(row["prompt"] + row["canonical_solution"])) for row in [*rows[1:], rows[0]]]
    assert sum(scores(HUMANEVAL, list(zip(rows, others, strict=True)))) == 0


def test_solutions_of_mbpp_pass_in_plain_text_and_in_prose(shared):
    with (shared / "data/mbpp/mbpp.jsonl").open() as file:
        rows = list(map(json.loads, file))[::8]
    answers = [row["code"] for row in rows] + [in_prose(fenced(row["code"] + "\n")) for row in rows]
    found = scores(MBPP, list(zip([*rows, *rows], answers, strict=True)))
    assert [row["task_id"] for row, score in zip([*rows, *rows], found, strict=True) if score != 1.0] == []


def test_long_answers_are_read_in_seconds_at_most():
    start = time.perf_counter()
    for answer in (
        "This is a line of prose.\n" * 3000,
        "```\nx (\n" * 300,
        "def f(x):\n    return (\n\n" * 300,
        "`" * 9999,
    ):
        assert solution_of(answer, frozenset({"f"})) is body_of(answer, HEAD, "count_above") is None
    assert time.perf_counter() - start < 20


# Markdown


def test_without_markdown_it_the_remedy_is_named(monkeypatch):
    reading._parser.cache_clear()
    monkeypatch.setitem(sys.modules, "markdown_it", None)
    with pytest.raises(CaftuneError, match=r"markdown-it-py must be installed .* pip install 'caftune\[eval\]'"):
        reading.sections(fenced("text\n"))


def test_an_answer_that_goes_past_its_end_is_not_cut_there():
    assert HUMANEVAL.stop == MBPP.stop == ()
    assert any(text in BODY + "\nprint(count_above([1], 0))\n" for text in HUMANEVAL.past)
