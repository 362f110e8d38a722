"""What is said of a comparison follows from its numbers."""

import pytest

from caftune.compare import verdict as verdicts
from caftune.compare.measures import Values, compare_arms
from caftune.compare.summary import Comparison
from caftune.evals.statistics import holm


def typed(base):
    """The comparison of a comparison.json that holds this; what a verdict does not need is filled in."""
    rows = [{"effect_size": None, "minimum_detectable": None, "over": "runs", **row} for row in base["comparisons"]]
    measures = [{"mean": sum(row["values"]) / len(row["values"]), "half": None, **row} for row in base["measures"]]
    tasks = [{"examples": 400, **task} for task in base["tasks"]]
    return Comparison.from_json(
        {**base, "title": "names", "verdict": "", "comparisons": rows, "measures": measures, "tasks": tasks}
    )


def verdict(base):
    return verdicts.verdict(typed(base))


def remarks(base):
    return verdicts.remarks(typed(base))


def found(difference=0.02, low=0.005, high=0.035, p_value=0.01, *, seeds=5, **changes):
    values = {"base": [0.1], "ntp": [0.20] * seeds, "caft": [0.20 + difference] * seeds}
    pair = {"difference": difference, "low": low, "high": high, "p_value": p_value, "minimum_detectable": 0.021}
    pair |= {"task": "molecules", "measure": "exact_match", "arm": "caft", "baseline": "ntp", "p_holm": p_value}
    return {
        "arms": ["ntp", "caft"],
        "seeds": list(range(seeds)),
        "missing": [],
        "tasks": [{"name": "molecules", "primary": "exact_match", "lower_is_better": ["levenshtein"]}],
        "measures": [
            {"task": "molecules", "measure": "exact_match", "arm": arm, "values": value}
            for arm, value in values.items()
        ],
        "comparisons": [pair] if seeds > 1 else [],
        "costs": {"ntp": {"seconds": [1.0] * seeds}, "caft": {"seconds": [1.5] * seeds}},
        "checks": {"start": 1e-7, "beta0": None},
        "device": "cpu",
        **changes,
    }


def with_measure(base, measure, values, pair):
    base["measures"] += [
        {"task": "molecules", "measure": measure, "arm": arm, "values": value} for arm, value in values.items()
    ]
    base["comparisons"].append({"task": "molecules", "measure": measure, "arm": "caft", "baseline": "ntp", **pair})
    return base


def test_an_interval_above_zero_is_help():
    assert verdict(found()) == (
        "CAFT helped: exact_match on molecules +2.0 percentage points (95% interval +0.5 to +3.5) compared with next-token "
        "fine-tuning."
    )


def test_an_interval_below_zero_is_harm():
    assert verdict(found(-0.02, -0.035, -0.005)).startswith(
        "CAFT did harm: exact_match on molecules −2.0 percentage points"
    )


@pytest.mark.parametrize(
    ("low", "high", "p_value"), [(-0.01, 0.05, 0.2), (0.0001, 0.04, 0.051), (-0.0001, 0.04, 0.049)]
)
def test_an_interval_with_zero_or_a_large_p_value_decides_nothing_and_says_what_it_could_have_found(low, high, p_value):
    said = verdict(found(0.02, low, high, p_value))
    assert said.startswith(
        "This comparison cannot tell whether CAFT helped: exact_match on molecules +2.0 percentage points"
    )
    assert said.endswith("a true difference of 2.1 percentage points would be detected four times out of five.")


def test_less_is_better_turns_help_into_harm():
    base = found()
    base["tasks"][0]["lower_is_better"] = ["exact_match"]
    assert verdict(base).startswith("CAFT did harm: exact_match on molecules +0.020 (95% interval")


def test_a_loss_is_told_in_nats_and_less_of_it_is_better():
    base = found(-0.1, -0.15, -0.05)
    for row in (*base["measures"], *base["comparisons"]):
        row |= {"task": "held-out text", "measure": "loss"}
    base["tasks"] = []
    assert verdict(base) == (
        "CAFT helped: loss on held-out text −0.100 nats (95% interval −0.150 to −0.050) compared with next-token fine-tuning."
    )


def test_runs_that_differ_in_nothing_say_nothing_of_what_could_have_been_found():
    base = found(0.0, 0.0, 0.0, 1.0)
    base["comparisons"][0]["minimum_detectable"] = None
    assert verdict(base).endswith("the runs are too few or too similar to estimate the smallest detectable difference.")


def test_a_count_of_faults_below_one_is_no_share():
    base = found(-0.2, -0.3, -0.1)
    base["tasks"][0] = {"name": "molecules", "primary": "exact_match", "lower_is_better": ["exact_match"]}
    assert verdict(base).startswith("CAFT helped: exact_match on molecules −0.20 (95% interval −0.30 to −0.10)")


def test_runs_on_different_devices_are_not_timed_against_each_other():
    said = remarks(found(checks={"start": 0.0, "devices": 2}, device="cpu, NVIDIA X"))
    assert any("Runs used different devices (cpu, NVIDIA X)" in line for line in said)
    assert not any("times the time" in line for line in said)


def test_one_seed_decides_nothing():
    assert verdict(found(seeds=1)) == (
        "One seed cannot tell CAFT from chance: exact_match on molecules is 22.0% with it and 20.0% without. Run more seeds."
    )


def left_out(base, task, measure):
    """As a comparison is written in which caft/44 has no number for that measure."""
    of_caft = {"task": task, "measure": measure, "arm": "caft"}
    for name in ("measures", "comparisons"):
        base[name] = [row for row in base[name] if not of_caft.items() <= row.items()]
    return {**base, "left_out": [{**of_caft, "run": "caft/44", "value": "nan"}]}


@pytest.mark.parametrize("seeds", [1, 5])
def test_without_a_number_for_what_decides_nothing_is_decided_by_another_measure(seeds):
    other = {"difference": 1.0, "low": 0.5, "high": 1.5, "p_value": 0.01, "p_holm": 0.01, "minimum_detectable": 0.1}
    base = with_measure(found(seeds=seeds), "valid", {"ntp": [0.1] * seeds, "caft": [0.9] * seeds}, other)
    base = left_out(base, "molecules", "exact_match")
    assert verdict(base) == (
        "This comparison cannot tell whether CAFT helped: exact_match on molecules is not a finite number in caft/44."
    )
    assert "caft/44: exact_match on molecules is nan, so caft has no mean and no test in it." in remarks(base)
    assert any("Of 1 other measures, these differ" in said for said in remarks(base))


def test_other_measures_stay_corrected_where_what_decides_is_left_out():
    values = {"caft": [0.1, 0.3, 0.4], "ntp": [0.0, 0.1, 0.4]}
    table = {("task", name, arm): Values(values[arm]) for name in ("exact_match", "valid", "bleu") for arm in values}
    table["task", "exact_match", "caft"] = Values([0.1, 0.3, float("nan")])
    rows = compare_arms(table, ["ntp", "caft"])
    assert [row.measure for row in rows] == ["valid", "bleu"]
    assert [row.p_holm for row in rows] == holm([row.p_value for row in rows]).tolist()
    assert rows[0].p_holm > rows[0].p_value


def test_a_number_that_another_measure_lacks_leaves_the_verdict_as_it_is():
    base = left_out(with_measure(found(), "valid", {"ntp": [0.9] * 5, "caft": [0.9] * 5}, {}), "molecules", "valid")
    assert verdict(base) == verdict(found())


def test_without_a_whole_seed_nothing_is_said():
    base = found(measures=[], missing=["caft/42"], comparisons=[])
    assert verdict(base) == "There is no result yet: no seed has finished in all arms (missing runs: 1)."
    assert remarks(base) == ["Missing runs: caft/42."]


def test_other_measures_are_told_after_holms_correction_alone():
    base = with_measure(
        found(),
        "levenshtein",
        {"ntp": [8.0] * 5, "caft": [7.0] * 5},
        {"difference": -1.0, "low": -1.5, "high": -0.5, "p_value": 0.01, "p_holm": 0.04, "minimum_detectable": 0.6},
    )
    assert any(
        "these differ" in said and "levenshtein on molecules −1.00 (95% interval −1.50 to −0.50)" in said
        for said in remarks(base)
    )
    base["comparisons"][-1]["p_holm"] = 0.06
    assert "None of the 1 other measures differs after Holm's correction." in remarks(base)


def test_a_control_that_does_as_well_is_named():
    base = found(arms=["ntp", "caft", "random_heads"])
    pair = {**base["comparisons"][0], "baseline": "random_heads", "difference": 0.001, "low": -0.01, "high": 0.012}
    base["comparisons"].append({**pair, "p_value": 0.8})
    assert remarks(base)[0] == (
        "CAFT compared with random_heads: exact_match on molecules +0.1 percentage points (95% interval −1.0 to +1.2); the "
        "difference is not significant."
    )


def test_arms_that_did_not_begin_alike_are_told():
    assert any("did not start from the same state" in said for said in remarks(found(checks={"start": 0.02})))
    assert not any("did not start from the same state" in said for said in remarks(found()))


def test_beta_zero_that_differs_from_the_baseline_is_told():
    checks = {"start": 0.0, "beta0": 3, "answers": 400}
    assert any("3 of 400 answers differ from those" in said for said in remarks(found(checks=checks)))
    checks["beta0"] = 0
    assert any("all 400 answers equal those" in said for said in remarks(found(checks=checks)))


def test_one_run_that_something_held_up_does_not_make_the_price():
    costs = {"ntp": {"seconds": [1.0, 1.0, 1.0, 1.0, 40.0]}, "caft": {"seconds": [1.5] * 5}}
    assert "A training step of CAFT took 1.50 times the time of next-token fine-tuning." in remarks(found(costs=costs))


def test_frozen_heads_have_a_price_and_a_verdict_of_their_own():
    costs = {"ntp": {"seconds": [1.0] * 5}, "caft": {"seconds": [1.5] * 5}, "caft_frozen": {"seconds": [1.25] * 5}}
    said = remarks(found(arms=["ntp", "caft", "caft_frozen"], costs=costs))
    assert "A training step of CAFT took 1.50 times the time of next-token fine-tuning." in said
    assert "A training step of CAFT with frozen heads took 1.25 times the time of next-token fine-tuning." in said
    base = found(arms=["ntp", "caft_frozen"], costs=costs)
    for row in (*base["measures"], *base["comparisons"]):
        row["arm"] = row["arm"].replace("caft", "caft_frozen")
    assert verdict(base).startswith("CAFT with frozen heads helped: exact_match on molecules +2.0 percentage points")


def test_the_price_is_told():
    assert "A training step of CAFT took 1.50 times the time of next-token fine-tuning." in remarks(found())
