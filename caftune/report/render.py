"""`caftune report`: the results of runs as one page of HTML that needs no other file, and in short as Markdown.

sections.py turns what `caftune compare` (or a single `caftune train`) wrote into sections of plain values; page.html lays them
out, and here they become Markdown, without the pictures.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from caftune.compare.summary import Comparison
from caftune.errors import CaftuneError
from caftune.files import write_text
from caftune.report.single_run import EXAMPLES, read_single_run

if TYPE_CHECKING:
    from markupsafe import Markup

    from caftune.report.parts import Example, Picture, Section, Table

_TEMPLATE = Path(__file__).with_name("page.html")


def write_report(folders: Sequence[str | Path], output: str | Path | None = None) -> list[Path]:
    """Write report.html and report.md on these run folders into `output`, by default the first of them.

    Raises:
        CaftuneError: no folder, one without results, or a missing package.
    """
    if not folders:
        raise CaftuneError("folders must name run folders, got none. Name at least one.")
    try:
        import jinja2

        from caftune.report.sections import sections
    except ImportError as error:
        raise CaftuneError(
            f"{error.name} must be installed for a report, got none. Run pip install 'caftune[report]'."
        ) from error
    runs = [read_run(folder) for folder in folders]
    parts = [(run.title, run.verdict, list(sections(run))) for run in runs]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    title = ", ".join(run.title for run in runs)
    target = Path(folders[0] if output is None else output)
    target.mkdir(parents=True, exist_ok=True)
    files = {
        target / "report.html": template.render(parts=parts, title=title, draw=_draw),
        target / "report.md": "\n".join(_markdown(title, parts)) + "\n",
    }
    for file, text in files.items():
        # A model may write half of a surrogate pair, which UTF-8 cannot hold: it becomes "?".
        write_text(file, text.encode("utf-8", errors="replace").decode("utf-8"))
    return list(files)


def read_run(folder: str | Path) -> Comparison:
    """The comparison in a run folder; a single training as a comparison of one arm.

    Raises:
        CaftuneError: it holds no results, or a comparison of another format.
    """
    compared = Path(folder, "compare", "comparison.json")
    if compared.is_file():
        return Comparison.read(compared)
    if compared.parent.is_dir():
        raise CaftuneError(
            f"{folder} holds a comparison that is not finished. Run `caftune compare` again to finish it."
        )
    if not Path(folder, "results.jsonl").is_file():
        raise CaftuneError(
            f"{folder} must hold compare/comparison.json or results.jsonl, got neither. Run `caftune compare` or "
            "`caftune train` first."
        )
    return read_single_run(Path(folder))


def _draw(picture: "Picture", prefix: str) -> "Markup":
    """The SVG as a part of the page: labelled with its contents, with ids that no other picture on the page has."""
    from markupsafe import Markup, escape

    own = re.sub(r'( id="|url\(#|href="#)', lambda found: found[1] + prefix, picture.svg)
    return Markup(own.replace("<svg", f'<svg role="img" aria-label="{escape(picture.words)}"', 1))


def _markdown(title: str, parts: Sequence[tuple[str, str, Sequence["Section"]]]) -> Iterator[str]:
    yield f"# caftune: {_inline(title)}"
    for name, verdict, sections in parts:
        yield from ("", f"## {_inline(name)}", "", f"**{_inline(verdict)}**", "")
        for section in sections:
            if section.title != "Verdict":
                yield from (f"### {section.title}", "")
            yield from (f"- {_inline(text)}" for text in section.text)
            yield from (f"- `{term}`: {text}" for term, text in section.terms.items())
            yield ""
            if not section.tables:
                yield from (f"- {_inline(picture.title)}. {_inline(picture.words)}" for picture in section.pictures)
                yield ""
            for table in section.tables:
                yield from _markdown_table(table)
            for example in section.examples[:EXAMPLES]:
                yield from _markdown_example(example)
            if section.code:
                yield from ("The recipe:", "", *_block(section.code))


def _markdown_table(table: "Table") -> Iterator[str]:
    title, how = _inline(table.title), _inline(table.how)
    yield from ([f"<details><summary>{title}</summary>", "", how] if table.is_folded else [f"**{title}.** {how}"])
    yield from ("", f"| {' | '.join(map(_inline, table.head))} |", f"|---{'|---:' * (len(table.head) - 1)}|")
    marks = {"better": " **▲**", "worse": " **▼**", "": ""}
    for row in table.rows:
        yield f"| {' | '.join(_inline(cell.text) + marks[cell.tag] for cell in row)} |"
    yield from ("", *["</details>", ""] * table.is_folded)


def _markdown_example(example: "Example") -> Iterator[str]:
    yield from (f"**{_inline(example.title)}**", "", *_block(example.prompt))
    for answer in example.answers:
        yield from (f"{answer.name} {answer.mark or answer.score}".strip() + ":", "")
        yield from _block("".join(part.text for part in answer.parts))


def _block(text: str) -> list[str]:
    """An indented block: no text can end it, or is read as Markdown or HTML in it."""
    return [*(f"    {line}" for line in text.splitlines()), ""]


def _inline(text: str) -> str:
    signs = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "\\|", "*": "\\*", "_": "\\_", "[": "\\["}
    return "".join(signs.get(sign, sign) for sign in " ".join(text.split()))
