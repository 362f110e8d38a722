"""Reading an answer, for all tasks that look for something in it: bare text, then its code blocks, then the text between.

Tasks get answers without thoughts (`caftune.evals.thought`), and say themselves what they look for. Code blocks are found by
markdown-it-py: fences of any kind, in lists and quotations, closed or not.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from caftune.evals.requirements import required
from caftune.evals.task import unix_lines

TAG = re.compile(r"<[^<>\s]{1,30}>|\[(?:START|END)_\w+\]")  # of a chat template, HTML, or Galactica's marks
_INDENTED_FENCE = re.compile(r"^(?=[ \t]+(?:```|~~~))", re.MULTILINE)


@dataclass(frozen=True)
class Section:
    """A code block of an answer, or the text between two."""

    text: str
    is_code: bool
    first: int = 0  # its first line in the answer
    end: int = 0  # the line after its last
    info: str = ""  # what follows the opening fence on its line, usually a language
    fence: str = ""  # the opening fence


def plain(answer: str) -> str:
    r"""The answer with \n as line end, and without a byte order mark or zero-width characters around it."""
    return unix_lines(answer).strip("\ufeff\u200b\u2060")


@cache
def _parser() -> Any:
    with required("markdown-it-py", "code blocks in answers"):
        from markdown_it import MarkdownIt
    # Without the rule for indented code: it would split functions in the text at their blank lines.
    return MarkdownIt("commonmark").disable("code")


def sections(answer: str) -> list[Section]:
    r"""The fenced blocks of an answer and the texts between them, in order. Lines must end with \n.

    Raises:
        CaftuneError: markdown-it-py is not installed.

    >>> [(s.text, s.is_code) for s in sections("One:\n~~~py\nx = 1\n~~~\nIt is.")]
    [('One:', False), ('x = 1\n', True), ('It is.', False)]
    """
    lines, found, last = answer.split("\n"), list[Section](), 0
    for token in _parser().parse(answer) if "```" in answer or "~~~" in answer else ():
        if token.type == "fence":
            first, end = token.map
            found.append(Section("\n".join(lines[last:first]), False, last, first))
            found.append(Section(token.content, True, first, end, token.info.strip(), token.markup))
            last = end
    found.append(Section("\n".join(lines[last:]), False, last, len(lines)))
    return [section for section in found if section.text.strip()]


def code_blocks(answer: str) -> list[Section]:
    """The fenced blocks of an answer."""
    return [section for section in sections(answer) if section.is_code]


def with_separate_fences(answer: str) -> str:
    """The answer with an empty line before each indented fence; CommonMark would join it to the paragraph above."""
    return _INDENTED_FENCE.sub("\n", answer)


def inline_code(answer: str) -> list[str]:
    """The contents of backticks within a line.

    >>> inline_code("It is `CCO`, or ``OCC``.")
    ['CCO', 'OCC']
    """
    tokens = _parser().parse(answer)
    return [child.content for token in tokens for child in token.children or () if child.type == "code_inline"]
