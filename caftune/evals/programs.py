"""The program in an answer to a coding task: what a reader of the answer would run.

An answer is Python, or Markdown with Python in it. Of its code blocks, and of its text outside of them, the program is:

1. The first that defines one of the wanted names, parses, and is no stub (a signature with `pass`, `...` or a docstring alone).
   A later one replaces it if the text between says that it corrects the earlier ("fixed", "oops", "wait", ...). Of two
   alternatives the first counts.
2. Without what follows the definitions and is neither definition, import nor a value that they read (examples, tests, prints),
   without asserts, and in text without a fence also without prose.
3. With the imports, functions, classes and values from elsewhere in the answer that it uses and does not define.

A block whose end is missing or broken is read up to its last complete definition; a function is never cut. No part is chosen by
running it. Only what Markdown and copying do to a program is repaired: a fence in a docstring, code on the line of a fence, a
fence after the last line, zero-width characters, no-break spaces, a body that was moved to the left margin.
"""

import ast
import builtins
import functools
import itertools
import re
import textwrap
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from caftune.evals.reading import Section, inline_code, plain, sections, with_separate_fences

_MOST_CHUNKS = 200  # of a text that does not parse as a whole, tried one by one
_MOST_ENDS = 40  # of a body, tried one by one
_FAILURES = 12  # lines at the margin in a row that do not parse, as within a string: the next are not tried
_DEEPEST = 3  # blocks within blocks
_LOCK = threading.Lock()  # warnings.catch_warnings is not safe in threads
_IN_INFO = re.compile(
    r"(?:^|[ \t])((?:async def|def|class|import|from|return|for|while|if|with|try)\b.*|@\w.*|\w+ = .*)$"
)
_FENCE_LINE = re.compile(r"[ \t>]*(?:`{3,}|~{3,})[ \t]*$")
_CODE_START = re.compile(
    r"(?:def|async|class|if|for|while|try|with|from|import)\b|@|\"\"\"|'''|[\w.\[\]]+ *(?:=|:.*=|\()"
)
_HEAD = re.compile(r"(?:async def|def|class) +(\w+)")
_LEAVES = re.compile(r"assert\b|print\b|if __name__|\"\"\"|'''")
_CORRECTS = re.compile(
    r"\b(?:corrected|correction|fixed|to fix|oops|wait|revised|(?:my|a) mistake (?:in|above|there)|made a mistake|"
    r"has a (?:bug|mistake)|(?:is|was) (?:wrong|incorrect)|does(?: not|n't) work|too slow|final (?:version|code|solution))\b",
    re.IGNORECASE,
)
_PROSE = re.compile(r"[A-Z][a-z']*[,!.]?(?: [\w',-]+[,!.:]?)+$")
_INVISIBLE = str.maketrans(
    {"\u200b": None, "\u200c": None, "\u200d": None, "\u2060": None, "\ufeff": None, "\u00a0": " "}
)
_FUTURE = "from __future__ "
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
_VALUES = (ast.Assign, ast.AnnAssign, ast.AugAssign)
_OTHERS = (ast.If, ast.For, ast.While, ast.With, ast.Try)


@dataclass(frozen=True)
class _Unit:
    """Statements that share lines, nearly always one: their text, and the names that they bind and read."""

    source: str
    nodes: tuple[ast.stmt, ...]
    binds: frozenset[str]
    reads: frozenset[str]

    def is_one_of(self, *kinds: type[ast.stmt]) -> bool:
        return any(isinstance(node, kinds) for node in self.nodes)


@dataclass(frozen=True)
class _Part:
    """A part of an answer: statements, or text that does not parse (no units). `is_code`: a whole code block."""

    text: str
    units: tuple[_Unit, ...]
    is_code: bool


def solution_of(answer: str, wanted: frozenset[str], known: frozenset[str] = frozenset()) -> str | None:
    """The program in an answer that defines one of the `wanted` names, or None. `known` are names that it need not define."""
    for parts in _readings(plain(answer)):
        place = _chosen(parts, wanted)
        if place is not None:
            units = _without_tests(parts[place].units, wanted)
            before = [unit for part in parts[:place] for unit in part.units]
            others = [*reversed(before), *(unit for part in parts[place + 1 :] for unit in part.units)]
            return _joined([*_helpers(units, others, known, wanted), *units])
    return None


def continuation_of(answer: str, head: str, name: str) -> str | None:
    """The program that an answer makes of `head`, the beginning of the function `name`, by writing its body; or None.

    The body ends before the first line at the left margin, comments aside, where the text before it is complete. None where the
    answer does not begin with an indented line, or this is prose, a fence or a function of that name.
    """
    answer = plain(answer)
    lines = answer.split("\n")
    first = next((line for line in lines if line.strip()), "")
    if (
        not re.match(r"  |\t", first)
        or re.match(r"\s*(?:```|~~~|[-*+>] |\d+[.)] )", first)
        or _PROSE.match(first.strip())
    ):
        return None
    run = "\n".join(itertools.takewhile(lambda line: not re.match(r"\S", line), lines))
    if name in _bound(units_of(textwrap.dedent(run)) or ()):
        return None
    return _continued(head, answer) or head + run


def body_of(answer: str, head: str, name: str) -> str | None:
    """The program that `head` and a body of its function make, where the body is a code block, or the answer was stripped."""
    answer = plain(answer)
    for text in (answer, with_separate_fences(answer)):
        blocks = [section.text for section in _python_sections(text) if section.is_code]
        for block in blocks or [answer, *_indented(answer, frozenset({name}))]:
            for body in (block, textwrap.indent(textwrap.dedent(block), "    "), f"    {block.strip()}"):
                program = _continued(head, body)
                if program is not None and _returns(program, name):
                    return program
    return None


def names_in(source: str) -> frozenset[str]:
    """The names that a program binds at its top level; none where it does not parse."""
    return _bound(units_of(source) or ())


# Parsing


@functools.lru_cache(maxsize=1024)
def _parsed(source: str) -> ast.Module | None:
    """The syntax tree of a program that Python compiles, or None."""
    try:
        with _LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
            compile(source, "answer.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return None
    return tree


def units_of(source: str) -> tuple[_Unit, ...] | None:
    """The statements of a program; None where it does not parse, even without invisible characters."""
    tree = _parsed(source)
    if tree is None:
        seen = source.translate(_INVISIBLE)
        return units_of(seen) if seen != source else None
    lines, groups = source.split("\n"), list[list[ast.stmt]]()
    for node in tree.body:
        if groups and _start(node) <= (groups[-1][-1].end_lineno or 0):
            groups[-1].append(node)
        else:
            groups.append([node])
    return tuple(_unit("\n".join(lines[_start(g[0]) - 1 : g[-1].end_lineno]), g) for g in groups)


def _start(node: ast.stmt) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])


def _unit(source: str, nodes: Sequence[ast.stmt]) -> _Unit:
    binds = {name for node in nodes for name in _bound_by(node)}
    reads = {n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    inner = {name for node in nodes for name in _all_bound(node)}
    return _Unit(source, tuple(nodes), frozenset(binds), frozenset(reads - inner | reads & binds))


def _bound_by(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    else:
        yield from _all_bound(node)


def _all_bound(node: ast.AST) -> Iterator[str]:
    for n in ast.walk(node):
        if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load):
            yield n.id
        elif isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield n.name
        elif isinstance(n, ast.alias):
            yield n.asname or n.name.partition(".")[0]
        elif isinstance(n, ast.arg):
            yield n.arg


def _bound(units: Sequence[_Unit]) -> frozenset[str]:
    return frozenset(name for unit in units for name in unit.binds)


# The parts of an answer


def _readings(answer: str) -> Iterator[list[_Part]]:
    """The parts of an answer in several readings: the first with a program is the one to take."""
    if units_of(answer):
        yield _parts([Section(answer, False)])
    yield _parts(_python_sections(answer))
    yield _parts(_python_sections(with_separate_fences(answer)))
    codes = [re.sub(r"^(?:python|py) ", "", code) for code in inline_code(answer)]
    yield _parts([Section(code, True) for code in [*codes, *_indented(answer)]])


def _indented(answer: str, names: frozenset[str] = frozenset()) -> list[str]:
    """The runs of lines that are indented, moved to the left margin, except bodies of functions and classes of other names."""
    lines = answer.split("\n")
    runs = [list(run) for _, run in itertools.groupby(lines, lambda line: not line.strip() or line[0] in " \t")]
    texts = [
        "\n".join(run)
        for before, run in zip([[""], *runs], runs, strict=False)
        if run[0][:1] in ("", " ", "\t") and not ((head := _HEAD.match(before[-1])) and head[1] not in names)
    ]
    return [textwrap.dedent(text) for text in texts if text.strip()]


def _python_sections(answer: str, depth: int = 0) -> list[Section]:
    """The sections of an answer, with code blocks repaired that Python needs otherwise than Markdown cuts them."""
    found: list[Section] = []
    for section in sections(answer):
        source = _with_info(section)
        if not section.is_code or units_of(source) is not None:
            found.append(replace(section, text=source))
            continue
        longer = _to_a_later_fence(section, source, answer.split("\n"))
        if longer is not None:
            return [*found, replace(section, text=longer[0]), *_python_sections(longer[1], depth)]
        whole, rest = _to_an_inline_fence(source)
        if whole:
            found += [replace(section, text=whole), *_python_sections(rest, depth + 1)]
        elif depth < _DEEPEST and re.search(r"^[ \t]*(?:```|~~~)", source, re.MULTILINE):  # Markdown in a block
            found += _python_sections(source, depth + 1)
        else:
            found.append(replace(section, text=source))
    return found


def _with_info(section: Section) -> str:
    """The text of a block, with code on the line of its opening fence."""
    code = _IN_INFO.search(section.info) if section.is_code else None
    return f"{code[1]}\n{section.text}" if code else section.text


def _to_a_later_fence(section: Section, source: str, lines: Sequence[str]) -> tuple[str, str] | None:
    """A block that was closed by a fence in one of its docstrings: its whole text, and the lines after it."""
    margin = max(lines[section.first].find(section.fence), 0)
    rest = [re.sub(rf"^[ \t]{{0,{margin}}}", "", line) for line in lines[section.end - 1 :]]
    ends = [number for number, line in enumerate(rest) if number and _FENCE_LINE.match(line)][:20]
    for end in ends:
        text = source + "\n".join(rest[:end]) + "\n"
        if units_of(text) is not None:
            return text, "\n".join(lines[section.end + end :])
    return None


def _to_an_inline_fence(source: str) -> tuple[str, str]:
    """The block up to a fence at the end of its last line instead of below it, and the rest; else an empty text and all."""
    fence = re.search(r"(?<=\S)[ \t]*```[ \t]*$", source, re.MULTILINE)
    if fence is None or units_of(source[: fence.start()]) is None:
        return "", source
    return source[: fence.start()], source[fence.end() :]


def _parts(found: Sequence[Section]) -> list[_Part]:
    """The sections in order: a block that parses as it is, other text in the longest runs of lines that parse."""
    parts = list[_Part]()
    for section in found:
        units = units_of(section.text) if section.is_code else None
        if units is not None:
            parts.append(_Part(section.text, units, True))
            continue
        chunks, at = _chunks(section.text), 0
        while at < len(chunks):
            end = _longest(chunks, at, leaves=not section.is_code)
            text = "".join(chunks[at : end or at + 1])
            parts.append(_Part(text, (units_of(text) or ()) if end else (), False))
            at = end or at + 1
    return parts


def _chunks(text: str) -> list[str]:
    """The text cut before every line at the left margin."""
    return [chunk for chunk in re.split(r"^(?=\S)", text, flags=re.MULTILINE) if chunk.strip()][:_MOST_CHUNKS]


def _longest(chunks: Sequence[str], start: int, *, leaves: bool) -> int | None:
    """The end of the longest run of chunks from `start` that parses; where it `leaves`, before examples and tests."""
    found, failures = None, 0
    for end in range(start + 1, len(chunks) + 1):
        if units_of("".join(chunks[start:end])) is not None:
            found, failures = end, 0
            if leaves and end < len(chunks) and _LEAVES.match(chunks[end]):
                break
        else:
            failures += 1
        if failures > _FAILURES or (found is None and not _CODE_START.match(chunks[start])):
            break
    return found


# The choice


def _chosen(parts: Sequence[_Part], wanted: frozenset[str]) -> int | None:
    """The place of the part that is the program: the first, or a later one that corrects it."""
    chosen = None
    for place, part in enumerate(parts):
        if wanted & _bound(part.units) and not _is_stub(part, wanted):
            between = "" if chosen is None else "\n".join(p.text for p in parts[chosen + 1 : place] if not p.is_code)
            if chosen is None or _CORRECTS.search(between):
                chosen = place
    return chosen


def _is_stub(part: _Part, wanted: frozenset[str]) -> bool:
    """Whether the part defines the wanted functions only as stubs."""
    defined = [node for unit in part.units for node in unit.nodes if wanted & set(_bound_by(node))]
    return all(
        isinstance(node, ast.Import | ast.ImportFrom)
        or (isinstance(node, ast.FunctionDef) and all(map(_is_placeholder, node.body)))
        for node in defined
    )


def _is_placeholder(node: ast.stmt) -> bool:
    if isinstance(node, ast.Raise):
        return any(isinstance(n, ast.Name) and n.id.startswith("NotImplemented") for n in ast.walk(node))
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _without_tests(units: Sequence[_Unit], wanted: frozenset[str]) -> list[_Unit]:
    last = max(number for number, unit in enumerate(units) if unit.binds & wanted)
    read = {name for unit in units if unit.is_one_of(*_DEFINITIONS) for name in unit.reads}
    return [unit for number, unit in enumerate(units) if _is_program(unit, is_after=number > last, read=read)]


def _is_program(unit: _Unit, *, is_after: bool, read: set[str]) -> bool:
    if unit.is_one_of(*_DEFINITIONS):
        return True
    if any(isinstance(node, ast.AnnAssign) and node.value is None for node in unit.nodes):
        return False  # prose, such as "Note: this", is an annotation in Python
    if is_after:
        return unit.is_one_of(*_VALUES) and bool((unit.binds or unit.reads) & read)
    calls = any(isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) for node in unit.nodes)
    return calls or unit.is_one_of(*_VALUES, *_OTHERS)


def _helpers(
    units: Sequence[_Unit],
    others: Sequence[_Unit],
    known: frozenset[str] = frozenset(),
    wanted: frozenset[str] = frozenset(),
) -> list[_Unit]:
    """The definitions, imports and values of `others`, the first first, that a program of these units lacks."""
    pool = [unit for unit in others if unit.is_one_of(*_DEFINITIONS, *_VALUES)]
    taken: list[_Unit] = []
    known |= frozenset(vars(builtins))
    while True:
        together = [*units, *taken]
        missing = wanted.union(*(unit.reads for unit in together)) - known - _bound(together)
        helper = next((unit for unit in pool if unit.binds & missing), None)
        if helper is None:
            return sorted(taken, key=lambda unit: not unit.is_one_of(ast.Import, ast.ImportFrom))
        taken.insert(0, helper)


def _joined(units: Sequence[_Unit]) -> str:
    """The units as a program; imports from __future__ must come first in it."""
    ordered = sorted(units, key=lambda unit: not unit.source.startswith(_FUTURE))
    return "".join(f"{unit.source}\n" for unit in ordered)


def with_head(head: str, program: str) -> str:
    """`head` and then the program, which may use it; the program's imports from __future__ come first."""
    lines = program.splitlines(keepends=True)
    futures = list(itertools.takewhile(lambda line: line.startswith(_FUTURE), lines))
    return "".join([*futures, head, "\n", *lines[len(futures) :]])


# Bodies


def _continued(head: str, body: str) -> str | None:
    """`head` with the shortest part of the body, up to a line at the margin, with which it compiles, and its helpers."""
    lines = body.split("\n")
    ends = [number for number, line in enumerate(lines) if re.match(r"[^\s#]", line) and number]
    for end in [*ends[:_MOST_ENDS], len(lines)]:
        program = head + "\n".join(lines[:end]) + "\n"
        if any(line.strip() for line in lines[:end]) and _parsed(program) is not None:
            units, rest = units_of(program) or (), Section("\n".join(lines[end:]), False)
            helpers = _helpers(units, [unit for part in _parts([rest]) for unit in part.units])
            return program + _joined([unit for unit in helpers if not unit.binds & _bound(units)])
    return None


def _returns(program: str, name: str) -> bool:
    """Whether the function, defined last under this name, itself gives a value back or raises."""
    tree = _parsed(program)
    nodes = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name] if tree else []
    left: list[ast.AST] = [*nodes[-1].body] if nodes else []
    while left:
        node = left.pop()
        if isinstance(node, ast.Return | ast.Yield | ast.Raise):
            return True
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            left += ast.iter_child_nodes(node)
    return False
