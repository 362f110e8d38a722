"""`caftune report`: what the runs cost, and what `caftune plan` had said."""

from statistics import median

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from report_page import page_of
from report_sample import small


def test_costs_have_ratios_to_the_baseline_and_gaps_are_named(tmp_path):
    found = small()
    found["costs"]["caft"]["flops"] = [2e12, None, 2.2e12, 1.8e12, 2e12]
    shown = page_of(tmp_path, found)
    assert shown.cell("Training on cpu", "ntp", "seconds") == f"{median(found['costs']['ntp']['seconds']):.1f}"
    assert shown.cell("Training on cpu", "caft", "FLOPs") == "2.00 × 10¹² (×1.96), 4 of 5 runs"
    assert shown.cell("Training on cpu", "beta0", "peak memory, GiB") == "not measured"


def test_the_plan_stands_beside_what_was_measured(tmp_path):
    found = small()
    found["costs"]["caft"]["seconds"] = [30.6] * 5
    found["costs"]["random_heads"] = {"tokens": [None], "flops": [None], "seconds": [1.0], "peak_memory_bytes": [2**30]}
    shown = page_of(tmp_path, found)
    costs = found["costs"]
    per_token = 1.02e12 * 1.24 / 183_204
    grown = costs["caft"]["peak_memory_bytes"][0] - 2**29
    time = 30.6 / median(costs["ntp"]["seconds"])
    said = ["caft", "6.24 × 10⁶", f"{per_token / 1e6:.2f} × 10⁶", "×1.20", "×1.24", f"×{time:.2f}", "720"]
    rows = {cells[0]: cells for cells in shown.tables["Plan and measurement"]}
    assert rows["caft"] == [*said, f"{grown / 2**20:.0f}"]
    assert rows["random_heads"][2:] == ["not measured", "×1.20", "not measured", "not measured", "720", "not measured"]
    assert f"| {' | '.join(rows['caft'])} |" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")


def test_a_run_without_a_plan_has_no_table_of_it(tmp_path):
    found = small(seeds=1)
    del found["plans"]["caft"]
    assert [cells[0] for cells in page_of(tmp_path, found).tables["Plan and measurement"][1:]] == [
        *("ntp", "beta0", "random_heads")
    ]
    del found["plans"]
    assert "Plan and measurement" not in page_of(tmp_path / "other", found).tables
