"""The study's script: runs resume, the baseline is SFTTrainer, the variants do what the protocol says, the table is right."""

import math
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import study
import study_data
from study import Cell, Run, Stage, Study
from study_table import Line, differences, tables
from study_variants import SCREENED, Reverse, WarmUp, concept_mask, only_inside

from caftune.compare.control_heads import write_untrained_heads
from caftune.core.heads import HeadsConfig
from caftune.core.objective import AuxiliaryWeights, HorizonTargets

CONTROL = Cell("control", "prefix_sums", "full", 48)
NAMES = Cell("demo", "names", "full", 400)


@pytest.fixture(scope="module")
def small():
    """Small splits, a step of few rows, and heads of the demo's base that are copies of its last layer."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"TRAINED_ON": 24, "VALIDATED": 4, "TESTED": 6, "SUMS_TESTED": 40}.items():
            patch.setattr(study_data, name, value)
        yield


@pytest.fixture(scope="module")
def made(small, tmp_path_factory):
    made = Study(tmp_path_factory.mktemp("study"), Path("no-data"), Path("no-models"))
    tokenizer = AutoTokenizer.from_pretrained(study_data.BASE)
    model = AutoModelForCausalLM.from_pretrained(study_data.BASE)
    write_untrained_heads(model, tokenizer, HeadsConfig(), made.heads_folder("demo"), revision=None)
    return made


def test_runs_resume_without_repeating_and_a_cut_line_is_run_again(made, capsys):
    stage = Stage([CONTROL], ["ntp", "mtp"], [1, 2], is_tuned=False)
    options = {"scores": False, "most": None}
    assert study.run_stage(made, stage, lambda _: True, scores=False, most=3) == 3
    assert study.run_stage(made, stage, lambda _: True, **options) == 1
    before = made.file.read_text()
    assert study.run_stage(made, stage, lambda _: True, **options) == 0
    made.file.write_text(before[:-40])  # as a crash in the middle of a write leaves it
    assert study.run_stage(made, stage, lambda _: True, **options) == 1
    again = made.results()
    assert len(again) == 4
    assert {(line["arm"], line["seed"]) for line in again.values()} == {(a, s) for a in ("ntp", "mtp") for s in (1, 2)}
    losses = [line["loss"] for line in again.values()]
    assert len(set(losses)) == 4
    assert all(map(math.isfinite, losses))
    assert (
        again[Run(CONTROL, "mtp", study.CONTROL_RATE, 1, 1).key]["flops"]
        > again[Run(CONTROL, "ntp", study.CONTROL_RATE, 1, 1).key]["flops"]
    )
    repeated = made.execute(Run(CONTROL, "mtp", study.CONTROL_RATE, 1, 2))
    assert repeated["loss"] == again[repeated["key"]]["loss"]
    assert "loss" in capsys.readouterr().out


def test_a_run_of_another_process_is_left_to_it(made, monkeypatch):
    stage = Stage([CONTROL], ["ntp", "mtp"], [7], is_tuned=False)
    own, other = study.pending(made, stage, CONTROL)
    executed = []

    def execute(run, *, scores):
        executed.append(run)
        return {"key": run.key, **asdict(run), "loss": 1.0, "cpu_s": {"train": 1.0}}

    def wait(_seconds):  # the other process finishes meanwhile
        held.__exit__(None, None, None)
        made.record({"key": other.key, **asdict(other), "loss": 2.0})

    monkeypatch.setattr(made, "execute", execute)
    monkeypatch.setattr(study.time, "sleep", wait)
    held = study.locked(made.folder / "locks" / study.lock_name(other))
    assert held.__enter__()
    assert study.run_stage(made, stage, lambda _: True, scores=False, most=None) == 1
    assert executed == [own]
    assert study.pending(made, stage, CONTROL) == []


def test_the_baseline_is_sft_trainer(made, tmp_path):
    run = Run(NAMES, "ntp", 1e-3, 1, 5)
    splits = made.splits("demo", "names")
    stock = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(study_data.BASE, dtype=torch.float32),
        SFTConfig(str(tmp_path), **study.run_options(run)),
        train_dataset=made.train_rows(NAMES, 5),
        eval_dataset=splits.test,
        processing_class=AutoTokenizer.from_pretrained(study_data.BASE),
    )
    done = stock.train()
    found = made.execute(run)
    assert (found["train_loss"], found["steps"]) == (done.training_loss, 2)
    assert found["loss"] == stock.evaluate()["eval_loss"]


@pytest.fixture(scope="module")
def plain(made):
    return made.execute(Run(NAMES, "ntp", 1e-3, 1, 6))


@pytest.mark.parametrize(
    "arm", [name for name in SCREENED if name not in ("ntp", "paper", "w0.03", "w0.3", "paper_adapt")]
)
def test_every_arm_trains_on_the_same_rows_and_ends_elsewhere(made, plain, arm):
    found = made.execute(Run(NAMES, arm, 1e-3, 1, 6))
    assert (found["steps"], found["rows_used"]) == (plain["steps"], plain["rows_used"])
    assert math.isfinite(found["loss"])
    assert found["loss"] != plain["loss"]
    assert ("agreement" in found) == (arm == "agree")


def weights(trainer, step, steps, schedule):
    made = AuxiliaryWeights(0.1, 0.8, schedule)
    fields = {"state": SimpleNamespace(max_steps=steps, global_step=step)}
    fields |= {"args": SimpleNamespace(auxiliary_weights=made), "heads": SimpleNamespace(config=HeadsConfig())}
    own = trainer.__new__(trainer)
    vars(own).update(fields)
    return own, own._weights_at(step)


def test_in_the_reverse_curriculum_horizons_end_one_after_another():
    a, b, c, d = 0.08, 0.064, 0.0512, 0.04096
    by_part = [[a, b, c, d], [a, b, c, 0], [a, b, 0, 0], [a, 0, 0, 0], [0, 0, 0, 0]]
    expected = [row for row in by_part for _ in range(2)]
    for step, row in enumerate(expected):
        trainer, found = weights(Reverse, step, 10, "constant")
        assert found == pytest.approx(row)
        assert trainer._scored_horizons == sum(value > 0 for value in row)


def test_a_warm_up_reaches_the_whole_weight_after_a_tenth_of_the_steps():
    shares = [weights(WarmUp, step, 40, "constant")[1][0] / 0.08 for step in range(6)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_concepts_are_marked_in_the_answer_alone():
    tokenizer = AutoTokenizer.from_pretrained(study_data.BASE)
    asked, answer = "Name: ethanoic acid\nSMILES:", " CC(=O)O"
    start, ids = len(tokenizer(asked)["input_ids"]), tokenizer(asked + answer)["input_ids"]
    inside = concept_mask(ids, [-100] * start + ids[start:], tokenizer, "smiles")
    assert not any(inside[:start])
    assert any(inside[start:])
    assert not all(inside[start:])  # the methyl group is in none


def test_targets_outside_the_mask_are_left_out():
    labels = torch.tensor([[-100, 5, 6, 7, 8]])
    every = HorizonTargets.of({"labels": labels}, [1, 2])
    mask = torch.tensor([False, False, True, True, False])
    kept = only_inside(every, mask, [1, 2])
    assert [kept.at(horizon)[1].tolist() for horizon in (1, 2)] == [[6, 7], [6, 7]]
    assert [kept.at(horizon)[0].tolist() for horizon in (1, 2)] == [[1, 2], [0, 1]]
    assert kept.counts == {1: 2, 2: 2}


def test_the_controls_answers_are_sums_of_ever_fewer_numbers():
    for number in range(20):
        asked, answer = study_data.prefix_sums(random.Random(number))
        numbers = [int(word) for word in asked.removesuffix(" =").split()]
        assert len(numbers) == study_data.NUMBERS
        assert [int(word) for word in answer.split()] == [sum(numbers[:end]) % 5 for end in (5, 4, 3, 2, 1)]
    rows = study_data.control_rows(3, 1, study_data.control_tokenizer())
    assert [sum(label != -100 for label in labels) for labels in rows["labels"]] == [6, 6, 6]


def finished(cell, arm, pairs, split="validation", seed=study.TUNING_SEED):
    runs = {Run(cell, arm, rate, epochs, seed, split): loss for (rate, epochs), loss in pairs.items()}
    return {run.key: {"loss": loss, **study.asdict(run)} for run, loss in runs.items()}


def test_the_grid_is_extended_for_all_arms_where_one_has_its_best_at_an_end():
    grid = [(rate, epochs) for rate in (3e-4, 1e-3, 3e-3) for epochs in (3, 8)]
    middle = {pair: abs(pair[0] - 1e-3) for pair in grid}
    high = {pair: -pair[0] for pair in grid}
    found = finished(NAMES, "ntp", middle) | finished(NAMES, "paper", middle)
    assert study.rates_of(NAMES, ["ntp", "paper"], found) == (3e-4, 1e-3, 3e-3)
    found |= finished(NAMES, "paper", high)
    assert study.rates_of(NAMES, ["ntp", "paper"], found) == (3e-4, 1e-3, 3e-3, 9e-3)
    stage = Stage([NAMES], ["ntp", "paper"], [1], matched=["paper"])
    screened = {"ntp": SCREENED["ntp"], "paper": SCREENED["paper"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "SCREENED", screened)
        todo = [run for run in study.runs_of(stage, NAMES, found, lambda _: 1.5) if run.key not in found]
        assert {(run.arm, run.rate) for run in todo} == {("ntp", 9e-3), ("paper", 9e-3)}
        for arm in screened:
            found |= finished(NAMES, arm, {(9e-3, 3): 9.0, (9e-3, 8): 9.0})
        todo = [run for run in study.runs_of(stage, NAMES, found, lambda _: 1.5) if run.key not in found]
    assert {(run.arm, run.epochs, run.seed) for run in todo} == {
        ("ntp=paper", 4.5, study.TUNING_SEED),  # paper's three epochs, at one and a half times the operations
        ("ntp", 3, 1),
        ("paper", 3, 1),
    }


def test_the_two_best_arms_of_finished_cells_are_confirmed():
    other = Cell("demo", "names", "full", 100)
    loss = dict.fromkeys(SCREENED, 1.01) | {"ntp": 1.0, "top": 0.98, "soft": 0.97, "random": 0.5}
    found = {}
    for seed in study.SEEDS["screen"]:
        for arm, value in loss.items():
            found |= finished(NAMES, arm, {(1e-3, 3): value}, "test", seed)
    found |= finished(other, "w0.3", {(1e-3, 3): 0.1}, "test", 301)  # an unfinished cell
    assert study.choice(found, [NAMES, other]) == ["paper", "soft", "top"]
    assert study.choice({}, [NAMES]) == ["paper", "w0.1"]


SMOL = Cell("smollm2", "names", "lora", 100)


def checked(cell, arm, rate, losses):
    cost = {"flops": 1e9, "protocol": "abc1234", "cpu_s": {"set_up": 1.0, "train": 2.0}}
    found = {}
    for seed, loss in zip(study.SEEDS["confirm"], losses, strict=False):
        found |= finished(cell, arm, {(rate, 2): loss}, "test", seed)
    return {key: {**line, **cost} for key, line in found.items()}


def test_runs_of_an_extended_grid_have_a_table_of_their_own_and_are_mixed_with_no_others():
    found = {}
    for arm, loss in {"ntp": 2.0, "paper": 1.9, "top": 2.1}.items():
        found |= finished(SMOL, arm, {(1e-3, 2): loss + 1, (3e-3, 2): loss}) | checked(SMOL, arm, 3e-3, [loss] * 5)
    assert {line.cell for line in study.lines_of(found)} == {"smollm2/names/lora/100"}
    for arm, loss in {"ntp": 1.5, "paper": 1.4, "top": 2.2}.items():  # top stays at 3e-3
        found |= finished(SMOL, arm, {(9e-3, 2): loss})
    found |= checked(SMOL, "ntp", 9e-3, [1.5] * 5)
    assert {line.cell for line in study.lines_of(found)} == {"smollm2/names/lora/100"}  # paper's runs are missing
    found |= checked(SMOL, "paper", 9e-3, [1.4] * 5)
    cells = {}
    for line in study.lines_of(found):
        cells.setdefault(line.cell, {}).setdefault(line.arm, []).append((line.rate, line.loss))
    assert cells == {
        "smollm2/names/lora/100": {
            arm: [(3e-3, loss)] * 5 for arm, loss in {"ntp": 2.0, "paper": 1.9, "top": 2.1}.items()
        },
        "smollm2/names/lora/100, rates 0.001 to 0.009": {
            **{"ntp": [(9e-3, 1.5)] * 5, "paper": [(9e-3, 1.4)] * 5},
            "top": [(3e-3, 2.1)] * 5,
        },
    }


def test_equal_operations_are_run_where_all_seeds_say_that_an_arm_is_better():
    found, arms = {}, ["ntp", "paper", "top"]
    for arm in arms:
        found |= finished(SMOL, arm, {(1e-3, 2): 0.9, (3e-3, 2): 1.0, (3.3e-4, 2): 1.0})
    losses = {"ntp": [1.0, 1.1, 1.2, 1.3, 1.4], "paper": [0.9, 1.01, 1.1, 1.21, 1.3], "top": [1.3, 0.9, 1.2, 1.5, 1.0]}
    for arm, own in losses.items():
        found |= checked(SMOL, arm, 1e-3, own)
    # The best rate is the lower end, so the grid is extended; its end is worse.
    for arm in arms:
        found |= finished(SMOL, arm, {(3.3e-4, 2): 1.2})
    assert study.is_better(SMOL, "paper", arms, found)
    assert not study.is_better(SMOL, "top", arms, found)
    missing = next(key for key in found if key.endswith("ntp/0.001/2/405/test"))
    assert not study.is_better(SMOL, "paper", arms, {key: line for key, line in found.items() if key != missing})
    worse = {
        key: {**line, "loss": line["loss"] + ("/paper/" in key) * (line["split"] == "test")}
        for key, line in found.items()
    }
    assert not study.is_better(SMOL, "paper", arms, worse)
    # Where the extended grid is better, the test runs of the first grid say nothing.
    lower = {key: {**line, "loss": 0.5} if line["rate"] == 3.3e-4 else line for key, line in found.items()}
    assert not study.is_better(SMOL, "paper", arms, lower)


def test_the_plan_counts_a_cell_once():
    study_of = SimpleNamespace(results=dict)
    names = [
        line.split("|")[2].strip() for line in study.plan(study_of, ["confirm"], lambda _: True).splitlines()[2:-2]
    ]
    assert len(names) == len(set(names)) == 18


LOSSES = {
    "ntp": [1.0, 1.2, 0.9, 1.1],
    "a": [0.9, 1.15, 0.86, 0.97],
    "b": [1.0, 1.3, 0.8, 1.2],
    "ntp=a": [0.95, 1.1, 0.9, 1.0],
}


def lines(losses):
    return [
        Line("screen", "cell", arm, 1e-3, 2, seed, loss, 1e9, 1.0, "abc1234")
        for arm, row in losses.items()
        for seed, loss in enumerate(row)
    ]


def test_arms_are_confirmed_only_when_the_screening_of_two_models_is_finished(made, capsys):
    hundred = [Cell("demo", "names", "full", 100), Cell("smiles-gpt2", "chebi20", "full", 100)]
    stage = study.stages("small", {})[0]
    assert stage.chosen_from == hundred
    assert study.run_stage(made, stage, lambda _: True, scores=False, most=None) == 0
    assert "demo/names/full/100, smiles-gpt2/chebi20/full/100 is finished" in capsys.readouterr().out
    found = {}
    for cell, best in zip(hundred, ("soft", "top"), strict=True):
        for arm in SCREENED:
            for seed in study.SEEDS["screen"]:
                run = Run(cell, arm, 1e-3, 4, seed)
                found[run.key] = {**asdict(run), "loss": 0.9 if arm == best else 1.0 if arm == "ntp" else 1.05}
    assert study.stages("small", found)[0].matched == ["paper", "soft", "top"]
    assert study.stages("small", found)[1].matched == ["paper", "w0.1"]  # 400 rows: nothing is finished
    assert all(study.is_screened(found, cell) for cell in hundred)
    del found[run.key]
    assert not study.is_screened(found, hundred[1])


def test_finer_epochs_are_tuned_over_their_own_grid_with_the_rates_of_the_screening():
    stage, claimed = study.stages("fine", {})
    assert [cell.model for part in (stage, claimed) for cell in part.cells] == ["demo", "smiles-gpt2"]
    assert (stage.matched, claimed.matched) == ((), ("paper", "adapt", "w0.1"))
    cell = stage.cells[0]
    found = {}
    for arm in SCREENED:
        found |= finished(cell, arm, {(rate, epochs): rate for rate in (3e-4, 1e-3, 3e-3) for epochs in (4, 12)})
    runs = study.runs_of(stage, cell, found, lambda _: 1.0)
    assert {run.rate for run in runs} == {9e-5, 3e-4, 1e-3, 3e-3}  # the screening extended its grid
    assert {run.epochs for run in runs} == {4, 5, 6, 8}
    for arm in stage.arms:
        found |= finished(
            cell, arm, {(rate, n): abs(n - 5) + rate for rate in (9e-5, 3e-4, 1e-3, 3e-3) for n in (4, 5, 6, 8)}
        )
    tested = [run for run in study.runs_of(stage, cell, found, lambda _: 1.0) if run.split == "test"]
    assert {(run.rate, run.epochs) for run in tested} == {(9e-5, 5)}
    assert {run.seed for run in tested} == set(range(421, 431))
    assert {run.arm for run in tested} == set(stage.arms)


def test_an_arm_is_also_compared_with_a_cheaper_baseline_that_is_better():
    made = lines(LOSSES | {"ntp=b": [0.9, 1.0, 0.8, 0.9]})
    cheap = [replace(line, flops=5e8) if line.arm == "ntp=b" else line for line in made]
    text = tables(cheap, {"ntp": "baseline", "a": "arm", "b": "arm"})
    assert "picked by these losses): `a` +0.0700 [" in text
    assert text.rstrip().endswith("(`ntp=b`).")
    dear = [replace(line, flops=5e9) if line.arm == "ntp=b" else line for line in made]
    assert "picked" not in tables([line for line in dear if line.arm != "b"], {"ntp": "baseline", "a": "arm"})


def test_intervals_are_those_of_a_paired_t_test_and_p_is_holms():
    arms = {arm: {line.seed: line for line in lines({arm: row})} for arm, row in LOSSES.items()}
    found = {item.arm: item for item in differences(arms, [("a", "ntp"), ("b", "ntp")])}
    tests = {arm: stats.ttest_rel(LOSSES[arm], LOSSES["ntp"]) for arm in ("a", "b")}
    for arm, test in tests.items():
        interval = test.confidence_interval(0.95)
        assert (found[arm].result.low, found[arm].result.high) == pytest.approx(tuple(interval))
        assert found[arm].result.p_value == pytest.approx(test.pvalue)
    assert tests["a"].pvalue < tests["b"].pvalue
    assert found["a"].corrected == pytest.approx(2 * tests["a"].pvalue)
    assert found["b"].corrected == pytest.approx(max(2 * tests["a"].pvalue, tests["b"].pvalue))


def test_a_table_names_its_protocol_and_compares_at_equal_operations():
    roles = {"ntp": "baseline", "a": "arm", "b": "control"}
    text = tables(lines(LOSSES), roles)
    assert "## screen: cell" in text
    assert "Protocol: abc1234." in text
    row = next(line for line in text.splitlines() if line.startswith("| a |"))
    assert "| -0.0800 [" in row
    assert "| -0.0175 [" in row


def test_an_arm_with_a_diverged_run_has_no_difference():
    text = tables(lines(LOSSES | {"a": [0.9, math.nan, 0.8, 0.9]}), {"ntp": "baseline", "a": "arm", "b": "arm"})
    row = next(line for line in text.splitlines() if line.startswith("| a |"))
    assert "1 diverged" in row
