"""DeepSpeed on two gloo ranks, by the configurations that are shipped, equals one process."""

import json
from functools import cache
from itertools import product

import pytest
import yaml
from bases import write_llama
from launches import CONFIGS, assert_equals_one_process, finish, launch, run_in_one_process, write_recipe

# Without the first two, accelerate sees one process where there is no GPU. DeepSpeed clips heads and model together; here
# nothing is clipped.
RANKS = {"use_cpu": False, "ddp_backend": "gloo", "max_grad_norm": 0}
CASES = {
    "zero2": [*product(("full", "lora"), ("trained", "frozen"), ("tied",))],
    "zero3": [("full", "trained", "tied"), ("full", "trained", "untied"), ("lora", "trained", "untied")],
}


def whole_configuration(folder, stage):
    """The file as it is shipped. ZeRO-3 leaves weights below 100,000 values whole, which are most here: none stays so."""
    if stage == "zero2":
        return CONFIGS / "zero2.yaml"
    sections = yaml.safe_load((CONFIGS / "zero3.yaml").read_text())
    shipped = sections["deepspeed_config"]
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero = {"stage": shipped["zero_stage"], "stage3_param_persistence_threshold": 0}
    zero["stage3_gather_16bit_weights_on_model_save"] = shipped["zero3_save_16bit_model"]
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": zero, **dict.fromkeys(automatic, "auto")}))
    sections["deepspeed_config"] = {"deepspeed_config_file": str(folder / "zero3.json")}
    (folder / "zero3.yaml").write_text(yaml.safe_dump(sections))
    return folder / "zero3.yaml"


@pytest.fixture(scope="module")
def runs(peer, tmp_path_factory):
    """The folder of a stage's recipes, all of whose cases have been run on two ranks."""
    python, folder = peer("deepspeed") / "bin" / "python", tmp_path_factory.mktemp("deepspeed")
    for base in ("tied", "untied"):
        write_llama(folder / base, is_tied=base == "tied")

    @cache
    def of(stage):
        recipes = [recipe_of(folder, stage, *case, batch=2, **RANKS) for case in CASES[stage]]
        # A launch that was killed leaves a lock on what DeepSpeed builds, for which later ones would wait.
        built = python.parent.parent / "extensions"
        for lock in built.glob("*/lock"):
            lock.unlink()
        environment = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(built)}
        finish(launch(python, whole_configuration(folder, stage), recipes, environment=environment))
        return folder

    return of


def recipe_of(folder, stage, tuning, heads, base, *, batch, **trainer):
    name = "-".join((stage, tuning, heads, base))
    options = {"train": heads == "trained", "path": f"{folder / base}-heads"}
    return write_recipe(folder, name, tuning, base=folder / base, batch=batch, heads=options, trainer=trainer)


@pytest.mark.parametrize(("stage", "case"), [(stage, case) for stage, cases in CASES.items() for case in cases])
def test_a_run_under_deepspeed_its_resumption_and_its_export_equal_one_process(runs, stage, case):
    folder = runs(stage)
    one = recipe_of(folder, "one", *case, batch=4, max_grad_norm=0)
    output = one.with_name(f"{one.stem}-whole")
    if not output.is_dir():
        run_in_one_process(one)
    assert_equals_one_process(folder / f"{'-'.join((stage, *case))}.yaml", output)
