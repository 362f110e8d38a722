"""`caftune report`: every number on the page is one of the run's, nothing on it reaches out, and no text of a model gets in."""

import json
import math
import re
import shutil
import subprocess
import sys
from statistics import fmean

import pytest

from caftune.errors import CaftuneError

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from report_page import Page, page_of
from report_sample import ARMS, sample, single_run, small, write_sample
from typer.testing import CliRunner

from caftune.cli import app
from caftune.compare.summary import MarkedText, number, places_for
from caftune.report import plots
from caftune.report.parts import marked
from caftune.report.render import read_run, write_report

REACHING = {"src", "href", "srcset", "action", "poster", "data", "formaction", "background", "ping", "xlink:href"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = write_sample(tmp_path_factory.mktemp("report") / "names", sample())
    write_report([folder])
    return folder


@pytest.fixture(scope="module")
def html(whole):
    return (whole / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def values(found, task, measure, arm):
    (row,) = [r for r in found["measures"] if (r["task"], r["measure"], r["arm"]) == (task, measure, arm)]
    return row["values"]


def test_nothing_on_the_page_is_fetched(html, page):
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if name in REACHING and not (name == "href" and tag == "a" and value.startswith("#run-")):
                assert value.startswith(("#", "data:")), (tag, name, value)
            assert not name.startswith("on"), (tag, name)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "iframe", "object", "embed", "img", "form", "base"}
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert "@import" not in html
    policies = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_ids_are_unique_and_pictures_refer_to_their_own(html, page):
    assert len(page.ids) == len(set(page.ids))
    for reference in re.findall(r'(?:url\(|href=")#([^)"]+)', html):
        assert reference in page.ids


def test_every_picture_is_described_in_words(page):
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(pictures) > 12
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"]) > 20
    assert [tag for tag, _ in page.tags].count("figcaption") == len(pictures)
    assert ("html", {"lang": "en"}) in page.tags


def test_the_verdict_comes_first_with_its_remarks(page):
    found = sample()
    places = [page.text.index(text) for text in (found["verdict"], *found["remarks"], "Results", "Provenance")]
    assert places == sorted(places)


def test_means_and_intervals_are_those_of_the_run(page):
    found = sample()
    for measure, arm in (("valid", "caft"), ("morgan", "ntp"), ("exact_match, concept-dense", "beta0")):
        runs = [100 * value for value in values(found, "molecules", measure, arm)]
        half = 2.776 * math.sqrt(sum((x - fmean(runs)) ** 2 for x in runs) / 4 / 5)
        shown = page.cell("molecules, 400 examples", arm, f"{measure}, %").partition("▲")[0].partition("▼")[0]
        assert [float(part) for part in shown.split(" ± ")] == pytest.approx([fmean(runs), half], abs=0.06)
    assert page.cell("molecules, 400 examples", "base", "levenshtein ↓") == number(
        values(found, "molecules", "levenshtein", "base")[0], 2
    )
    assert page.cell("held-out text", "ntp", "loss, nats ↓").startswith(
        f"{fmean(values(found, 'held-out text', 'loss', 'ntp')):.4f} ± "
    )


def test_the_base_is_the_first_row_and_the_main_measure_the_first_column(page):
    head, *rows = page.tables["molecules, 400 examples"]
    assert head[:2] == ["arm", "★ exact_match, %"]
    assert [cells[0] for cells in rows] == ["base", *ARMS]


def changed(task, measure, arm, **keys):
    found = small()
    for row in found["comparisons"]:
        if (row["task"], row["measure"]) == (task, measure):
            row["p_holm"] = 1.0
            if row["arm"] == arm and row["baseline"] == "ntp":
                row.update(keys)
    return found


def test_what_differs_is_marked_after_the_correction_only(tmp_path):
    found = changed("molecules", "valid", "caft", p_value=0.001, p_holm=0.06, difference=0.02)
    assert "better" not in page_of(tmp_path, found).cell("molecules", "caft", "valid, %")
    found = changed("molecules", "valid", "caft", p_value=0.001, p_holm=0.05, difference=0.02)
    shown = page_of(tmp_path / "other", found)
    assert shown.cell("molecules", "caft", "valid, %").endswith("▲ better")
    assert "better" not in shown.cell("molecules", "beta0", "valid, %")


def test_a_pair_of_other_arms_marks_nothing(tmp_path):
    found = small()
    for row in found["comparisons"]:
        row["p_holm"] = 1.0 if row["baseline"] == "ntp" else 0.0
    assert "better" not in page_of(tmp_path, found).cell("molecules", "caft", "★ exact_match, %")


def test_less_is_better_where_the_task_says_so(tmp_path):
    found = changed("molecules", "levenshtein", "caft", p_holm=0.01, difference=-0.5)
    assert page_of(tmp_path, found).cell("molecules", "caft", "levenshtein ↓").endswith("▲ better")
    found = changed("held-out text", "loss", "caft", p_holm=0.01, difference=0.5)
    assert page_of(tmp_path / "other", found).cell("held-out", "caft", "loss, nats ↓").endswith("▼ worse")


def test_the_direction_of_the_picture_is_that_of_the_measure(tmp_path):
    row = plots.Difference("caft", -1.0, -2.0, 0.5)
    more, less = (plots.forest([row], unit="x", is_lower_better=lower) for lower in (False, True))
    assert re.findall("← worse|better →|← better|worse →", more) == ["← worse", "better →"]
    assert re.findall("← worse|better →|← better|worse →", less) == ["← better", "worse →"]


def test_differences_are_in_percentage_points_with_both_p_values(page):
    found = sample()
    (row,) = [r for r in found["comparisons"] if (r["measure"], r["arm"], r["baseline"]) == ("valid", "beta0", "ntp")]
    (cells,) = [c for c in page.tables["All differences, with p-values"] if c[:2] == ["molecules: valid, %", "beta0"]]
    assert cells[2] == "ntp"
    shown = [float(x.replace("−", "-")) for x in re.findall(r"[+−][\d.]+", cells[3])]
    assert shown == pytest.approx([100 * row[name] for name in ("difference", "low", "high")], abs=0.06)
    assert [float(x) for x in cells[4:6]] == pytest.approx([row["p_value"], row["p_holm"]], rel=0.06)
    assert float(cells[6]) == pytest.approx(100 * row["minimum_detectable"], abs=0.06)


def test_concepts_are_means_over_the_seeds(page):
    part = sample()["concepts"]["arms"]["caft"]["by_name"]["fr_amide"]
    column = "probability, caft, %"
    assert page.cell("Concepts by functional group", "fr_amide", column) == f"{100 * fmean(part['probability']):.1f}"
    assert page.cell("Concepts by functional group", "fr_amide", "count") == str(part["count"])
    sizes = [cells[0] for cells in page.tables["Concepts by number of tokens"][1:]]
    assert sizes == ["2", "3", "4", "5", "7", "10"]


def test_one_seed_has_no_intervals(tmp_path):
    shown = page_of(tmp_path, small(seeds=1))
    assert "±" not in "".join(cell for row in shown.tables["molecules, 400 examples"] for cell in row)
    assert "All differences, with p-values" not in shown.tables
    assert "One run per arm" in shown.text


def test_missing_runs_are_named_and_nothing_finished_is_no_crash(tmp_path):
    found = {**small(), "missing": ["caft/45"]}
    assert "Missing runs: caft/45." in page_of(tmp_path, found).text
    nothing = {"seeds": [], "measures": [], "comparisons": [], "concepts": None, "examples": [], "tasks": []}
    nothing |= {"logs": {arm: [] for arm in ARMS}, "costs": {arm: {"tokens": []} for arm in ARMS}, "quality": None}
    shown = page_of(tmp_path / "other", {**found, **nothing, "verdict": "Nothing can be said yet."})
    assert "Nothing can be said yet." in shown.text
    assert shown.cell("Training on cpu", "caft", "tokens") == "not measured"


def test_a_loss_that_is_no_number_leaves_a_gap(tmp_path):
    found = {**small(), "logs": sample()["logs"]}
    for entry in found["logs"]["caft"][0][5:]:
        entry.update({name: float("nan") for name in entry if name.endswith("loss")})
    assert "Next-token loss L₁ in training" in page_of(tmp_path, found).text


def test_arms_are_held_to_each_other_by_one_and_the_same_loss(tmp_path):
    theirs, ours = {"loss": 1.0}, {"loss": 1.5, "main_loss": 1.25, "h1_loss": 1.0}
    logs = {"ntp": [theirs, theirs], "caft": [{"loss": 1.0}, ours]}  # the first step had no heads
    logs = {arm: [[{"step": step, **entry} for step, entry in enumerate(log, 1)]] for arm, log in logs.items()}
    page = page_of(tmp_path, {**small(), "logs": logs})
    said = {found.get("aria-label") for tag, found in page.tags if tag == "svg"}
    assert {f"At the last step (nats per token): {ends}." for ends in ("ntp 1, caft 1.25", "caft 0.25")} <= said


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;{{ 7 * 7 }}</pre>\ud800 $x$ ```\n\n# h\u2028|"


def test_texts_are_shown_and_never_read(tmp_path):
    found = {**small(), "concepts": sample()["concepts"]}
    example = found["examples"][0]
    example |= {"prompt": HOSTILE, "id": HOSTILE}
    example["answers"]["caft"] = {"text": HOSTILE, "concepts": [[0, 30]], "score": 0.0}
    names = found["concepts"]
    for arm in names["arms"].values():
        arm["by_tokens"] = {}
        arm["by_name"] = {HOSTILE: arm["by_name"]["fr_amide"], "$\\b{$": arm["by_name"]["fr_COO"]}
    found |= {"title": HOSTILE, "verdict": HOSTILE, "remarks": [HOSTILE, HOSTILE]}
    found["provenance"]["command"] = HOSTILE
    shown = page_of(tmp_path, found)
    assert not {"script", "img", "h"} & {tag for tag, _ in shown.tags}
    assert not any(name.startswith("on") for _, attributes in shown.tags for name in attributes)
    shown_as = "\n" + HOSTILE.replace("\ud800", "?")  # a browser drops the first end of line
    assert shown.blocks.count(shown_as) == 2  # as prompt and as answer
    markdown = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    outside = "\n".join(line for line in markdown.splitlines() if not line.startswith("    "))
    assert "<script" not in outside
    assert "<img" not in outside
    (command,) = [line for line in outside.splitlines() if line.startswith("| command")]
    assert len(re.findall(r"(?<!\\)\|", command)) == 3
    assert not re.search(r"^# h", markdown, flags=re.MULTILINE)


def pieces(text, ranges):
    return [tuple(part) for part in marked(MarkedText(text, ranges))]


def test_marks_stand_at_the_characters_of_the_concepts():
    assert pieces("abcdef", [[1, 3]]) == [("a", 0, False, False), ("bc", 1, True, True), ("def", 0, False, False)]
    assert pieces("abcd", [[0, 2], [2, 4]]) == [("ab", 1, True, True), ("cd", 1, True, True)]
    assert pieces("", []) == []


def test_overlapping_concepts_share_their_characters():
    assert pieces("abcdef", [[0, 4], [2, 6]]) == [
        ("ab", 1, True, False),
        ("cd", 2, True, True),
        ("ef", 1, False, True),
    ]
    assert pieces("abcd", [[0, 4], [1, 2]])[1] == ("b", 2, True, True)


def test_marks_count_characters_beyond_the_first_plane_as_one(tmp_path):
    found = small()
    found["examples"][0]["reference"] = {"text": "🧪é𝔸bcd", "concepts": [[1, 3], [4, 6]]}
    assert page_of(tmp_path, found).marks[:2] == ["é𝔸", "cd"]


def test_right_and_wrong_are_said_in_words_and_other_scores_as_numbers(tmp_path):
    found = small()
    shown = page_of(tmp_path, found).text
    assert "✓ right" in shown
    assert "✗ wrong" in shown
    for example in found["examples"]:
        example["answers"]["caft"]["score"] = 0.25
    other = page_of(tmp_path / "other", found).text
    assert "score 0.25" in other
    assert "✓ right" not in other


def test_addresses_of_servers_are_left_out(html, whole):
    assert "key@host" not in html
    assert "key@host" not in (whole / "report.md").read_text()
    assert "url: left out" in html


def test_a_single_training_is_reported_without_a_verdict(tmp_path):
    html, _ = write_report([single_run(tmp_path / "one")])
    shown = Page(html.read_text(encoding="utf-8"))
    assert "One arm, so nothing is compared. `caftune compare` makes several." in shown.text
    assert [cells for cells in shown.tables["gsm8k, 2 examples"][1:]] == [["base", "25.0"], ["caft", "50.0"]]
    assert shown.cell("held-out text", "caft", "loss, nats ↓") == "1.250"
    assert shown.tables["Training on cpu"][1] == ["caft", "1,000", "not measured", "2.5", "2.00"]
    # No measured ratio: there is no next-token run to hold it against.
    head, planned = shown.tables["Plan and measurement"]
    assert head[3:5] == ["FLOPs over ntp: plan", "peak memory, MiB: plan"]
    assert planned == ["caft", "6.24 × 10⁶", "not measured", "×1.20", "720", "1,536"]
    assert "Quality by horizon" in shown.tables
    assert [block.strip("\n") for block in shown.blocks].count("4\u2028<b>") == 3  # of run 0


def test_a_training_without_weight_is_next_token_fine_tuning(tmp_path):
    assert read_run(single_run(tmp_path / "one", weight=0.0)).arms == ["ntp"]


@pytest.mark.parametrize(("train", "words"), [(True, "trained along"), (False, "frozen")])
def test_the_page_says_how_the_heads_of_caft_are_trained(tmp_path, train, words):
    found = {**small(), "recipe": {"heads": {"train": train}}}
    assert f"concept-aware fine-tuning with pretrained heads, {words}" in page_of(tmp_path, found).text


def test_a_run_that_only_pretrained_heads_is_reported(tmp_path):
    row = {"stage": "pretrain-heads", "rows": 9, "metrics": {"loss": 1.0}, "quality": sample()["quality"]}
    (tmp_path / "results.jsonl").write_text(json.dumps(row) + "\n")
    shown = Page(write_report([tmp_path])[0].read_text(encoding="utf-8"))
    loss = sample()["quality"]["heads"]["loss"]["3"]
    assert shown.cell("Quality by horizon", "loss, nats: heads", "h = 3") == f"{loss:.3f}"


def test_several_runs_share_a_page_with_a_table_of_contents(tmp_path):
    folders = [write_sample(tmp_path / "a", {**small(seeds=2), "title": "first"}), single_run(tmp_path / "second")]
    html, markdown = write_report(folders, tmp_path / "out")
    shown = Page(html.read_text(encoding="utf-8"))
    assert [a["href"] for tag, a in shown.tags if tag == "a"] == ["#run-1", "#run-2"]
    assert [a["id"] for tag, a in shown.tags if tag == "article"] == ["run-1", "run-2"]
    assert len(shown.ids) == len(set(shown.ids))
    assert (html, markdown) == (tmp_path / "out" / "report.html", tmp_path / "out" / "report.md")
    assert re.findall(r"^## (.*)", markdown.read_text(), flags=re.MULTILINE) == ["first", "second"]


def test_the_markdown_has_the_numbers_of_the_page(whole, page):
    markdown = (whole / "report.md").read_text(encoding="utf-8")
    shown = page.cell("molecules, 400 examples", "caft", "★ exact_match, %").partition("▲")[0]
    assert f"| caft | {shown} **▲** |" in markdown
    assert "<svg" not in markdown
    assert len(markdown) < 30_000


def test_numbers_have_true_minus_signs_and_no_minus_zero():
    assert [number(value, 1) for value in (-0.5, -0.004, 1234.5)] == ["−0.5", "0.0", "1,234.5"]


@pytest.mark.parametrize(("size", "places"), [(12.0, 1), (1.2, 1), (0.3, 2), (0.0031, 4), (1e-9, 4), (0.0, 1)])
def test_two_digits_of_an_interval_are_shown(size, places):
    assert places_for(size, 2) == places


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(CaftuneError, match=r"must hold compare/comparison\.json or results\.jsonl, got neither\. Run"):
        write_report([tmp_path])
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 2
    assert not list(tmp_path.iterdir())


def test_a_comparison_of_another_format_is_refused(tmp_path):
    with pytest.raises(CaftuneError, match="must be of format 1, got 2"):
        read_run(write_sample(tmp_path / "run", {**sample(), "format": 2}))
    (tmp_path / "run" / "compare" / "comparison.json").write_text("{")
    with pytest.raises(CaftuneError, match="must be JSON"):
        read_run(tmp_path / "run")


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named_with_the_remedy(tmp_path, package):
    write_sample(tmp_path / "run", small(seeds=1))
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from caftune.report.render import CaftuneError, write_report\n"
        f"try: write_report([{str(tmp_path / 'run')!r}])\n"
        "except CaftuneError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (
        ran.stdout.strip() == f"{package} must be installed for a report, got none. Run pip install 'caftune[report]'."
    )


def test_the_command_prints_where_the_report_is(tmp_path):
    folder = write_sample(tmp_path / "run", small(seeds=1))
    ran = CliRunner().invoke(app, ["report", str(folder), "--output", str(tmp_path / "out")])
    assert ran.exit_code == 0, ran.output
    said = "".join(ran.output.split())
    assert all(f"Report:{tmp_path}/out/report.{kind}" in said for kind in ("html", "md"))
    assert (tmp_path / "out" / "report.html").is_file()


def test_reading_a_report_does_not_import_torch():
    code = "import sys, caftune.report.render, caftune.report.sections; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_browser_finds_no_error_and_asks_for_nothing(whole, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is on PATH: the page's own errors and requests are not checked")
    log = tmp_path / "net.json"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    options += [f"--log-net-log={log}", f"--user-data-dir={tmp_path / 'profile'}", "--disable-background-networking"]
    page = (whole / "report.html").as_uri()
    ran = subprocess.run([chromium, *options, "--dump-dom", page], capture_output=True, text=True, timeout=120)
    assert "Provenance" in ran.stdout
    assert "CONSOLE" not in ran.stderr
    asked = [url for url in re.findall(r'"url":"(http[^"]*|file:[^"]*)"', log.read_text()) if url != page]
    assert [url for url in asked if "google" not in url and "gvt1" not in url] == []
