"""`caftune report`: what runs found, as one page of HTML that needs nothing else, and in short as Markdown.

`read_run` gives what `caftune compare` wrote, or a single `caftune train` in the same shape. report_sections.py turns that into
sections of plain values; report.html lays them out, and here they become Markdown, without the pictures.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from caftune.compare.verdict import BASE, BASELINE, HELD_OUT, TREATMENT
from caftune.errors import CaftuneError
from caftune.evals.statistics import interval
from caftune.evals.tasks import TASKS

if TYPE_CHECKING:
    from markupsafe import Markup

    from caftune.report.parts import Example, Picture, Section, Table

_FORMAT = 1
_EXAMPLES = 4  # of each task in the report of a single run, and of a run in the Markdown
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
            f"{error.name} must be installed for a report, got none. Run pip install caftune[report]."
        ) from error
    runs = [read_run(folder) for folder in folders]
    parts = [(run["title"], run["verdict"], list(sections(run))) for run in runs]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    title = ", ".join(run["title"] for run in runs)
    target = Path(folders[0] if output is None else output)
    target.mkdir(parents=True, exist_ok=True)
    files = {
        target / "report.html": template.render(parts=parts, title=title, draw=_draw),
        target / "report.md": "\n".join(_markdown(title, parts)) + "\n",
    }
    for file, text in files.items():
        file.write_text(text, encoding="utf-8", errors="replace")  # half of a surrogate pair, which a model may write
    return list(files)


def _draw(picture: "Picture", prefix: str) -> "Markup":
    """The SVG as a part of the page: named by its contents, with ids that no other picture on the page has."""
    from markupsafe import Markup, escape

    own = re.sub(r'( id="|url\(#|href="#)', lambda found: found[1] + prefix, picture.svg)
    return Markup(own.replace("<svg", f'<svg role="img" aria-label="{escape(picture.words)}"', 1))


def read_run(folder: str | Path) -> dict[str, Any]:
    """A run folder in the shape of comparison.json, whether several arms were compared in it or one was trained.

    Raises:
        CaftuneError: it holds no results, or a comparison of another format.
    """
    compared, results = Path(folder, "compare", "comparison.json"), Path(folder, "results.jsonl")
    if compared.is_file():
        found = _json(compared)
        if found.get("format") != _FORMAT:
            raise CaftuneError(
                f"{compared} must be of format {_FORMAT}, got {found.get('format')}. Run `caftune compare` again."
            )
        return found
    if compared.parent.is_dir():
        raise CaftuneError(f"{folder} holds a comparison that is not finished. Run `caftune compare` to its end first.")
    if not results.is_file():
        raise CaftuneError(
            f"{folder} must hold compare/comparison.json or results.jsonl, got neither. Run `caftune compare` or "
            "`caftune train` first."
        )
    return _single_run(Path(folder), {row["stage"]: row for row in _lines(results)})


def _single_run(folder: Path, stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The results of `caftune train` and `caftune eval` as a comparison of one arm."""
    stage = next((folder / name for name in ("train", "pretrain", "labels") if (folder / name).is_dir()), folder)
    recipe_file, provenance_file = stage / "recipe.yaml", stage / "provenance.json"
    recipe = yaml.safe_load(recipe_file.read_text(encoding="utf-8")) if recipe_file.is_file() else {}
    provenance = _json(provenance_file) if provenance_file.is_file() else {}
    trained = stages.get("train")
    arm = stages.get("compare", {}).get("arm") or (TREATMENT if recipe.get("loss", {}).get("weight") else BASELINE)
    asked = [row for name, row in stages.items() if name.startswith("eval ") and row["task"] in TASKS]
    tasks = {row["task"]: row["examples"] for row in asked}
    measures = [
        _measure(row["task"], name, _name(row["model"], arm), values)
        for row in asked
        for name, values in row["measures"].items()
    ]
    if trained and "loss" in trained["metrics"]:
        measures.append(_measure(HELD_OUT, "loss", arm, [trained["metrics"]["loss"]]))
    return {
        "format": _FORMAT,
        "title": folder.resolve().name,
        "recipe": recipe,
        "arms": [arm] if trained else [],
        "seeds": [recipe.get("seed")],
        "missing": [],
        "tasks": [
            {
                "name": name,
                "primary": TASKS[name].primary,
                "examples": examples,
                "lower_is_better": sorted(TASKS[name].lower_is_better),
            }
            for name, examples in tasks.items()
        ],
        "measures": measures,
        "comparisons": [],
        "verdict": "One arm: nothing to compare. `caftune compare` does.",
        "remarks": [],
        "costs": {arm: {name: [value] for name, value in trained["costs"].items()}}
        if trained and "costs" in trained
        else {},
        "plans": {arm: {name: [value] for name, value in trained["plan"].items()}}
        if trained and trained.get("plan")
        else {},
        "device": provenance.get("device", "an unknown device"),
        "logs": {arm: [trained["log"]]} if trained else {},
        "concepts": None,
        "examples": [example for task in tasks for example in _answers(folder, task, arm)],
        "quality": _quality(folder, stages),
        "provenance": provenance,
    }


def _measure(task: str, measure: str, arm: str, values: list[float]) -> dict[str, Any]:
    mean, half = interval(values) if len(values) > 1 else (values[0], None)
    return {"task": task, "measure": measure, "arm": arm, "values": values, "mean": mean, "half": half}


def _name(model: str, arm: str) -> str:
    """What an evaluated model is in the report: that of the run folder is the arm."""
    return arm if model == "model" else model


def _answers(folder: Path, task: str, arm: str) -> list[dict[str, Any]]:
    """The first examples of a task, with the answers of all models that were asked them."""
    files = sorted(folder.glob(f"eval/*/{task}.jsonl"), key=lambda file: (file.parent.name != BASE, file.parent.name))
    shown: dict[str, dict[str, Any]] = {}
    for file in files:
        for line in islice((line for line in _lines(file) if line["run"] == 0), _EXAMPLES):
            reference = line["reference"] if isinstance(line["reference"], str) else json.dumps(line["reference"])
            new = {
                "task": task,
                "id": line["id"],
                "prompt": line["prompt"],
                "reference": _plain(reference),
                "answers": {},
            }
            example = shown.setdefault(line["id"], new)
            score = line["scores"].get(TASKS[task].primary, 0.0)
            example["answers"][_name(file.parent.name, arm)] = {**_plain(line["completion"]), "score": score}
    return list(shown.values())


def _plain(text: str) -> dict[str, Any]:
    return {"text": text, "concepts": []}


def _quality(folder: Path, stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """How good the heads are: as measured last, else as stage 1 recorded it."""
    files = [file for file in (folder / "heads" / "quality.json", folder / "quality.json") if file.is_file()]
    return _json(files[0]) if files else stages.get("pretrain-heads", {}).get("quality")


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CaftuneError(f"{file} must be JSON, got something else ({error}). Make it again.") from error


def _lines(file: Path) -> list[dict[str, Any]]:
    # not splitlines: JSON leaves some characters as they are that it takes for the end of a line
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


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
            for example in section.examples[:_EXAMPLES]:
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
