"""A run folder keeps two runs apart: by recipe, by the files it was made from, by what is finished."""

import json
import multiprocessing
import os
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import PartialState
from opened import head_rows, stage_one_config, stage_two_config
from safetensors.torch import load_file

from caftune.compare import runner as comparing
from caftune.demo.chemistry import completion, molecules, prompt
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.pipeline import folder
from caftune.pipeline.adapt import adapt_heads
from caftune.pipeline.evaluate import evaluate_model
from caftune.pipeline.finetune import export_checkpoint, finetune_model
from caftune.pipeline.folder import RunFolder, Stage, last_checkpoint
from caftune.pipeline.label import label_prompts
from caftune.pipeline.pretrain import measure_quality, pretrain_heads
from caftune.pipeline.schema import Recipe

FAST = {"per_device_train_batch_size": 8, "use_cpu": True, "gradient_checkpointing": False, "logging_steps": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run and its data, to be copied and changed."""
    folder = tmp_path_factory.mktemp("finished")
    write(folder / "data.jsonl", seed=5)
    recipe = recipe_in(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        label_prompts(recipe)
        pretrain_heads(recipe)
        finetune_model(recipe)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def write(path, *, seed, count=24):
    rows = [
        {"prompt": prompt(m), "completion": completion(m)} for m in molecules(count, seed=seed, substituents=(0, 2))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe_in(folder, **sections):
    # Relative, so that a copied folder is the same run.
    values = {
        "output": str(folder / "out"),
        "model": {"name": str(BASE)},
        "labels": {"prompts": "data.jsonl", "max_new_tokens": 30},
        "heads": {"count": 2},
        "pretrain": {**FAST, "max_steps": 2, "save_steps": 2},
        "data": {"train": "data.jsonl"},
        "trainer": {**FAST, "max_steps": 4, "save_steps": 2},
    }
    merged = {
        name: {**part, **sections.get(name, {})} if isinstance(part, dict) else part for name, part in values.items()
    }
    return Recipe.model_validate({**sections, **merged})


@pytest.fixture(autouse=True)
def _in_the_folder(request, monkeypatch):
    if "copied" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("copied"))


@pytest.mark.parametrize("keeps", [False, True])
def test_it_is_told_whether_answers_cut_off_are_trained_on(copied, keeps, capfd):
    label_prompts(recipe_in(copied, labels={"max_new_tokens": 2, "keep_truncated": keeps}))
    what = "keeps" if keeps else "leaves out unless labels.keep_truncated"
    assert f"24 cut off by labels.max_new_tokens, which the training {what}; 0 later" in capfd.readouterr().err


def test_a_stage_whose_data_file_changed_is_refused(copied):
    write(copied / "data.jsonl", seed=6)
    with pytest.raises(CaftuneError, match=r"of another recipe \(the contents of train changed"):
        finetune_model(recipe_in(copied))


def test_other_prompts_are_labelled_in_the_same_folder_and_stage_one_then_refuses_them(copied):
    write(copied / "data.jsonl", seed=6)
    label_prompts(recipe_in(copied))
    with pytest.raises(CaftuneError, match=r"of another recipe \(the contents of labels changed"):
        pretrain_heads(recipe_in(copied))


def test_training_on_other_heads_than_before_is_refused(copied):
    shutil.rmtree(copied / "out" / "pretrain")
    shutil.rmtree(copied / "out" / "heads")
    recipe = recipe_in(copied, pretrain={"learning_rate": 0.01})
    pretrain_heads(recipe)
    with pytest.raises(CaftuneError, match=r"of another recipe \(the contents of heads changed"):
        finetune_model(recipe)


def test_pretraining_waits_for_all_labels(copied):
    path = copied / "out" / "labels" / "labels.jsonl"
    path.unlink()
    shutil.rmtree(copied / "out" / "pretrain")
    with pytest.raises(CaftuneError, match=r"labels.jsonl is missing. Run `caftune label` \(again\)"):
        pretrain_heads(recipe_in(copied))


def test_pretraining_on_changed_labels_is_refused(copied):
    path = copied / "out" / "labels" / "labels.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:] + lines[:1]))
    with pytest.raises(CaftuneError, match=r"of another recipe \(the contents of labels changed"):
        pretrain_heads(recipe_in(copied))


def test_pretraining_with_finished_heads_named_is_refused(copied):
    with pytest.raises(CaftuneError, match="heads.path names finished heads"):
        pretrain_heads(recipe_in(copied, heads={"path": "heads"}))


@pytest.mark.parametrize(("key", "value", "found"), [("count", 7, "2"), ("kind", "mlp", "'decoder'")])
def test_heads_that_differ_from_those_named_are_refused(copied, key, value, found):
    heads = {"count": 2, "path": str(copied / "out" / "heads"), key: value}
    with pytest.raises(CaftuneError, match=f"heads.{key} must be {found}"):
        finetune_model(recipe_in(copied, heads=heads))


@pytest.mark.parametrize(("key", "value", "found"), [("count", 1, "2"), ("kind", "mlp", "'decoder'")])
def test_heads_made_here_must_be_those_the_recipe_asks_for(copied, key, value, found):
    with pytest.raises(CaftuneError, match=f"heads.{key} must be {found}, as in .*heads, got {value!r}. Set it back"):
        stage_two_config(recipe_in(copied, heads={key: value}), copied)


@pytest.mark.parametrize(("key", "value"), [("name", "other"), ("revision", "v1")])
def test_labels_of_another_base_are_refused(copied, key, value):
    recipe = recipe_in(copied, model={key: value})
    with pytest.raises(CaftuneError, match=rf"made with another recipe \(model\.{key}: .*Run `caftune label` again"):
        head_rows(recipe, stage_one_config(recipe_in(copied), copied))


def folder_of_stage_one(tmp_path, length, **pretrain):
    """The folder of a stage 1 that was begun, and its recipe with another data.max_length."""
    values = {"output": str(tmp_path), "model": {"name": "x"}, "pretrain": pretrain, "data": {"max_length": 64}}
    folder = Stage(Recipe.model_validate(values), "pretrain", {}).open()
    (folder / "checkpoint-1").mkdir()
    return folder, Recipe.model_validate({**values, "data": {"max_length": length}})


def test_another_length_is_another_stage_one_where_it_cuts(tmp_path):
    _, changed = folder_of_stage_one(tmp_path / "packed", 32, packing=True)
    with pytest.raises(CaftuneError, match=r"of another recipe \(data\.max_length: 64 -> 32\)"):
        Stage(changed, "pretrain", {}).open()
    _, changed = folder_of_stage_one(tmp_path / "labels", 32)
    Stage(changed, "pretrain", {}).open()


def test_a_stage_one_whose_length_was_not_kept_goes_on(tmp_path):
    folder, changed = folder_of_stage_one(tmp_path, 32, packing=True)
    kept = yaml.safe_load((folder / "recipe.yaml").read_text())
    del kept["data.max_length"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(kept))
    Stage(changed, "pretrain", {}).open()


def test_export_with_another_recipe_is_refused(copied):
    with pytest.raises(CaftuneError, match=r"of another recipe \(trainer.learning_rate: None -> 1.0\)"):
        export_checkpoint(recipe_in(copied, trainer={"learning_rate": 1.0}))


def test_a_finished_stage_run_again_changes_nothing(copied):
    before = load_file(copied / "out" / "model" / "model.safetensors")
    provenance = (copied / "out" / "train" / "provenance.json").read_text()
    finetune_model(recipe_in(copied))
    after = load_file(copied / "out" / "model" / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (copied / "out" / "train" / "provenance.json").read_text() == provenance
    stages = [json.loads(line)["stage"] for line in (copied / "out" / "results.jsonl").read_text().splitlines()]
    assert sorted(stages) == ["label", "pretrain-heads", "train"]


@pytest.mark.parametrize("stage", ["pretrain", "train"])
def test_a_half_written_checkpoint_is_passed_over(copied, stage):
    newest = Path(last_checkpoint(copied / "out" / stage))
    half = newest.with_name("checkpoint-99")
    half.mkdir()
    (half / "rng_state.pth").write_bytes(b"half")
    assert last_checkpoint(copied / "out" / stage) == str(newest)
    (pretrain_heads if stage == "pretrain" else finetune_model)(recipe_in(copied))


def test_export_takes_the_best_checkpoint_where_training_did(copied):
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1e-3}
    options |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # so that the best is not the last
    shutil.rmtree(copied / "out" / "train")
    recipe = recipe_in(copied, trainer=options, data={"eval": "data.jsonl"})
    best = load_file(finetune_model(recipe) / "model.safetensors")
    state = json.loads((copied / "out" / "train" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].endswith("checkpoint-2")  # or the test would not see the difference
    again = load_file(export_checkpoint(recipe) / "model.safetensors")
    assert all(torch.equal(best[key], again[key]) for key in best)


def test_the_revision_reaches_both_stages(copied):
    recipe = recipe_in(copied, model={"name": str(BASE), "revision": "v1"})
    one = stage_one_config(recipe, copied)
    two = stage_two_config(recipe, copied)
    assert two.model_init_kwargs == {"revision": "v1"}
    assert one.model_init_kwargs == {"revision": "v1", "dtype": "float32"}


def test_the_pipeline_prepares_rows_as_the_trainer_does(copied):
    options = {"packing": True, "packing_strategy": "bfd_split", "shuffle_dataset": True}
    recipe = recipe_in(copied, trainer=options, data={"max_length": 24}, loss={"weight": 0})
    shutil.rmtree(copied / "out" / "train")
    finetune_model(recipe)  # truncating first would leave rows without an answer, which is refused
    row = json.loads(Path("out/results.jsonl").read_text().splitlines()[-1])
    assert row["rows"] == 24


def test_a_stage_that_was_refused_before_it_began_takes_on_the_changed_recipe(tmp_path):
    first = Recipe.model_validate({"output": str(tmp_path), "model": {"name": "x"}})
    folder = Stage(first, "train", {}).open()
    changed = Recipe.model_validate({"output": str(tmp_path), "model": {"name": "x"}, "heads": {"force": True}})
    assert Stage(changed, "train", {}).open() == folder
    (folder / "checkpoint-1").mkdir()
    with pytest.raises(CaftuneError, match=r"of another recipe \(heads\.force: True -> False\)"):
        Stage(first, "train", {}).open()


def test_only_the_main_process_writes_into_a_stages_folder(tmp_path, monkeypatch):
    recipe = Recipe.model_validate({"output": str(tmp_path), "model": {"name": "x"}})
    folder = Stage(recipe, "train", {}).open()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setenv("RANK", "2")
    Stage(recipe, "train", {}).open()
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    monkeypatch.setenv("RANK", "0")
    Stage(recipe, "train", {}).open()  # again by the main process: both are written again
    assert all(path.stat().st_mtime_ns > before[path] for path in folder.iterdir())


def test_a_stage_whose_folder_was_removed_is_not_done(copied, monkeypatch):
    """As the refusal of a changed recipe tells: what is removed is made anew, and nothing goes on with what was."""
    recipe = recipe_in(copied, pretrain={"learning_rate": 0.01})
    shutil.rmtree(copied / "out" / "pretrain")
    with pytest.raises(CaftuneError, match=r"out/pretrain is missing. Run `caftune pretrain-heads` first"):
        measure_quality(recipe)
    with pytest.raises(CaftuneError, match=r"Run `caftune label` and `caftune pretrain-heads` before single runs"):
        comparing._ensure_heads(recipe, make=False)
    with monkeypatch.context() as patch:
        patch.setattr(
            "caftune.pipeline.pretrain.run_training", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            pretrain_heads(recipe)
    shutil.rmtree(copied / "out" / "train")
    with pytest.raises(CaftuneError, match=r"out/pretrain is not finished, so .* Run `caftune pretrain-heads` first"):
        finetune_model(recipe)
    with pytest.raises(CaftuneError, match=r"Run `caftune label` and `caftune pretrain-heads` before single runs"):
        comparing._ensure_heads(recipe, make=False)
    pretrain_heads(recipe_in(copied, pretrain={"learning_rate": 0.02}))  # nothing was done in the folder
    assert RunFolder(recipe.output).is_done("pretrain")


def test_labels_of_another_recipe_are_named_before_the_stage_made_of_them(copied):
    label_prompts(recipe_in(copied, labels={"temperature": 0.5}))
    with pytest.raises(CaftuneError, match=r"labels.jsonl was made with another recipe \(labels.temperature: 0.5 -> "):
        measure_quality(recipe_in(copied))


def test_runs_made_with_other_heads_are_refused_before_new_ones_are_made(copied):
    shutil.rmtree(copied / "out" / "pretrain")
    made = copied / "out" / "compare" / "caft" / "42" / "compare"
    made.mkdir(parents=True)
    (made / "recipe.yaml").touch()
    with pytest.raises(
        CaftuneError, match=r"compare/caft/42 was made with other heads .* remove .*out/compare to repeat"
    ):
        comparing.compare(recipe_in(copied, data={"eval": "data.jsonl"}))
    assert not (copied / "out" / "pretrain").exists()


def test_no_run_goes_on_without_its_optimizer(copied):
    shutil.rmtree(copied / "out" / "train")
    recipe = recipe_in(copied, trainer={"save_only_model": True})
    model = finetune_model(recipe)
    assert finetune_model(recipe) == model  # no steps are left
    shutil.rmtree(copied / "out" / "train" / "checkpoint-4")
    with pytest.raises(ValueError, match=r"checkpoint-2 must hold an optimizer's state .* \(save_only_model\)"):
        finetune_model(recipe)


def test_heads_are_adapted_where_the_recipe_says_so(copied):
    with pytest.raises(CaftuneError, match="adapt must be in the recipe, got none"):
        adapt_heads(recipe_in(copied))


ASKED = {"tasks": ["exact_match"], "data": {"exact_match": "data.jsonl"}}


@pytest.mark.parametrize(
    ("start", "asked"), [(comparing.compare, {}), (comparing.compare, ASKED), (evaluate_model, ASKED)]
)
def test_without_scipy_the_remedy_is_told_before_anything_is_trained_or_asked(start, asked, copied, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(CaftuneError, match=r"scipy must be installed .* 'caftune\[eval\]'"):
        start(recipe_in(copied, eval=asked, data={"eval": "data.jsonl"}))
    assert not (copied / "out" / "compare").exists()


def test_a_split_of_the_hub_to_evaluate_on_must_be_named(copied):
    shutil.rmtree(copied / "out" / "train")
    with pytest.raises(CaftuneError, match=r"data.eval must be a file that exists or name a split .* owner/name"):
        finetune_model(recipe_in(copied, data={"eval": "owner/name"}))
    with pytest.raises(
        CaftuneError, match=r"eval.data.exact_match must be a file that exists or name a split .* owner/name"
    ):
        evaluate_model(recipe_in(copied, eval={**ASKED, "data": {"exact_match": "owner/name"}}))


def test_an_evaluation_in_half_precision_rounds_nothing_that_is_written(copied):
    for stage in ("train", "pretrain"):
        shutil.rmtree(copied / "out" / stage)
    half = {"bf16_full_eval": True}
    recipe = recipe_in(copied, trainer=half, pretrain=half, data={"eval": "data.jsonl"})
    heads = load_file(pretrain_heads(recipe) / "heads.safetensors")
    assert heads.keys() == load_file(copied / "out" / "pretrain" / "checkpoint-2" / "heads.safetensors").keys()
    model = load_file(finetune_model(recipe) / "model.safetensors")
    for written, kept in ((heads, "pretrain/checkpoint-2/heads"), (model, "train/checkpoint-4/model")):
        exact = load_file(copied / "out" / f"{kept}.safetensors")
        assert all(torch.equal(tensor, exact[name]) for name, tensor in written.items())


def open_all(rank, port, cases, queue):
    """Open stages as one of two processes, each in the folder of its host; errors, or folders, go to the queue."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    PartialState(cpu=True, backend="gloo")
    folder._PAUSES_S = (0.01,)
    late = Path("late.jsonl")  # a file that a network file system shows after a while
    folder.time = SimpleNamespace(sleep=lambda _: late.is_file() and late.rename("data.jsonl"))
    found = {}
    for case, hosts, recipes in cases:
        os.chdir(hosts[rank])
        recipe = Recipe.model_validate(recipes[rank])
        try:
            found[case] = str(Stage(recipe, "train", {"train": recipe.data.train}).open())
        except CaftuneError as error:
            found[case] = str(error)
    queue.put((rank, found))
    queue.close()
    queue.join_thread()
    torch.distributed.destroy_process_group()


# What of the second host differs -> what the error of both names.
OTHER_HOST = {
    "nothing": None,
    "output": "out/train",
    "rows": "data.jsonl",
    "no rows": "data.jsonl",
    "late rows": None,
    "seed": "The recipe",
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """What both processes found, by case."""
    made = [hosts_of(tmp_path_factory.mktemp("hosts"), case) for case in OTHER_HOST]
    refused = tmp_path_factory.mktemp("refused")
    write(refused / "data.jsonl", seed=0)
    (refused / "out" / "train").mkdir(parents=True)
    (refused / "out" / "train" / "notes.txt").touch()
    made.append(("refused", [refused] * 2, [recipe_in(refused).model_dump(mode="json")] * 2))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawning = multiprocessing.get_context("spawn")
    queue = spawning.Queue()
    ranks = [spawning.Process(target=open_all, args=(rank, port, made, queue)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    found = dict(queue.get(timeout=300) for _ in ranks)
    for process in ranks:
        process.join(60)
    return {case: [found[rank][case] for rank in (0, 1)] for case, _, _ in made}


def hosts_of(parent, case):
    hosts = [parent / name for name in ("a", "b")]
    for number, host in enumerate(hosts):
        (host / "out").mkdir(parents=True)
        write(host / "data.jsonl", seed=number if case == "rows" else 0)
    if case != "output":
        (hosts[1] / "out").rmdir()
        (hosts[1] / "out").symlink_to(hosts[0] / "out")
    if case in ("no rows", "late rows"):
        (hosts[1] / "data.jsonl").rename(hosts[1] / case.replace(" rows", ".jsonl"))
    recipes = [recipe_in(Path(), **({"seed": 7} if case == "seed" and rank else {})) for rank in (0, 1)]
    return case, hosts, [recipe.model_dump(mode="json") for recipe in recipes]


@pytest.mark.parametrize("case", OTHER_HOST)
def test_processes_on_two_hosts_begin_with_one_folder_one_recipe_and_the_same_rows_or_not_at_all(opened, case):
    found = opened[case]
    if OTHER_HOST[case] is None:
        assert found == ["out/train"] * 2
    else:
        assert found[0] == found[1]
        assert found[0].startswith(f"{OTHER_HOST[case]} must have the same contents for all processes")


def test_a_folder_that_the_main_process_refuses_is_refused_by_all(opened):
    found = opened["refused"]
    assert found[0] == found[1]
    assert "must be empty or a folder of caftune" in found[0]
