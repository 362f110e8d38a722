"""Recipes: strict, overridable, checked before anything is loaded."""

import pytest
import yaml

from caftune.errors import CaftuneError
from caftune.pipeline.recipe import first_difference, load_recipe, trainer_config
from caftune.pipeline.schema import Recipe

MINIMAL = "output: runs/x\nmodel: {name: some/model}\n"


@pytest.fixture
def recipe(tmp_path):
    def write(text=MINIMAL, overrides=()):
        (tmp_path / "recipe.yaml").write_text(text)
        return load_recipe(tmp_path / "recipe.yaml", overrides)

    return write


def test_defaults_are_the_papers(recipe):
    loaded = recipe()
    assert (loaded.loss.weight, loaded.loss.decay, loaded.loss.schedule) == (0.01, 0.8, "reflected_sine")
    assert (loaded.heads.count, loaded.heads.kind) == (4, "decoder")


def test_overrides_reach_any_depth(recipe):
    loaded = recipe(
        overrides=["loss.weight=0.5", "model.lora.r=4", "trainer.learning_rate=1e-5", "data.columns={prompt: q}"]
    )
    assert (loaded.loss.weight, loaded.model.lora.r) == (0.5, 4)
    assert loaded.trainer == {"learning_rate": 1e-5}
    assert loaded.data.columns == {"prompt": "q"}


def test_an_override_changes_its_own_section_alone_where_others_are_the_same_by_an_alias(recipe):
    text = MINIMAL + "adapt: &same {learning_rate: 1.0, model_init_kwargs: {dtype: bfloat16}}\n"
    for alias in ("trainer: *same", "trainer: {<<: *same}"):
        loaded = recipe(text + alias, ["trainer.learning_rate=2.0", "trainer.model_init_kwargs.dtype=float32"])
        assert loaded.adapt == {"learning_rate": 1.0, "model_init_kwargs": {"dtype": "bfloat16"}}
        assert loaded.trainer == {"learning_rate": 2.0, "model_init_kwargs": {"dtype": "float32"}}


def test_scientific_notation_is_a_number(recipe):
    assert recipe(MINIMAL + "trainer: {learning_rate: 1e-4}").trainer["learning_rate"] == 1e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "los: {weight: 1}", r"los is not a key of a recipe. Did you mean loss\?"),
        (MINIMAL + "loss: {wieght: 1}", r"loss.wieght is not a key of a recipe. Did you mean loss.weight\?"),
        (MINIMAL + "loss: {decay: 1.5}", "loss.decay must be less than or equal to 1, got 1.5"),
        (MINIMAL + "heads: {kind: linear}", "heads.kind must be 'decoder' or 'mlp', got 'linear'"),
        ("output: x\n", "model must be given"),
        ("output: [\n", r"line 2: is not valid YAML \(.*\). Fix the line"),
        (MINIMAL + "heads: runs/x/heads", r"heads must be a section \(with count, kind, targets, .*got 'runs/x/heads'"),
        (MINIMAL + "trainer: fast", r"trainer must be a section \(with names of options\), got 'fast'"),
        ("- a\n", "must hold a mapping of sections"),
    ],
)
def test_mistakes_are_named_with_their_place(recipe, text, message):
    with pytest.raises(CaftuneError, match=message):
        recipe(text)


def test_a_missing_recipe_is_refused(tmp_path):
    with pytest.raises(CaftuneError, match="must be a recipe file"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("override", ["loss.weight", "=1"])
def test_a_malformed_override_is_refused(recipe, override):
    with pytest.raises(CaftuneError, match=r"An override must be key.sub=value"):
        recipe(overrides=[override])


@pytest.mark.parametrize("value", ["Answer: in a word: yes", "{a: b", "@home"])
def test_a_value_that_is_no_yaml_is_refused(recipe, value):
    with pytest.raises(CaftuneError, match=r"labels.system=.* must hold valid YAML. Put the value into quotes"):
        recipe(overrides=[f"labels.system={value}"])


def test_a_control_character_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("output: a\x01b\n")
    with pytest.raises(CaftuneError, match=r"recipe.yaml is not valid YAML \(.*Fix the file"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"learning_rat": 1},
            r"trainer.learning_rat is not an option of CAFTConfig. Did you mean trainer.learning_rate\?",
        ),
        ({"lr": 1}, r"trainer.lr is not an option of CAFTConfig. Known: accelerator_config, .* and \d+ more\."),
        ({"learning_rate": "fast"}, "trainer.learning_rate must be a number, got 'fast'"),
        ({"packing": "yes"}, "trainer.packing must be true or false, got 'yes'"),
        ({"aux_weight": 1}, "trainer.aux_weight is set by loss.weight in a recipe"),
    ],
)
def test_trainer_options_are_checked(options, message):
    built = Recipe.model_validate({**yaml.safe_load(MINIMAL), "trainer": options})
    with pytest.raises(CaftuneError, match=message):
        trainer_config(built, "trainer", output_dir="x", aux_weight=0.0)


def test_what_heads_refuse_is_named_with_its_section():
    options = {"packing": True, "packing_strategy": "wrapped"}
    built = Recipe.model_validate({**yaml.safe_load(MINIMAL), "trainer": options})
    trainer_config(built, "trainer", output_dir="x", aux_weight=0.0)  # as SFTTrainer has it
    with pytest.raises(CaftuneError, match="trainer: packing_strategy must be 'bfd'"):
        trainer_config(built, "trainer", output_dir="x", aux_weight=0.01, heads="heads")


def test_the_first_difference_is_named():
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b: 1 -> 2"
    assert first_difference({"a": 1}, {"a": 1}) is None
    assert first_difference({}, {"a": 1}) == "a: None -> 1"


def test_a_stage_is_saved_every_epoch_unless_the_recipe_says_otherwise():
    def strategy(options):
        built = Recipe.model_validate({**yaml.safe_load(MINIMAL), "trainer": options})
        return str(trainer_config(built, "trainer", output_dir="x", aux_weight=0.0).save_strategy.value)

    assert strategy({}) == "epoch"
    assert strategy({"save_total_limit": 1}) == strategy({"save_only_model": True}) == "epoch"
    assert strategy({"save_steps": 5}) == "steps"
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 50}
    assert strategy(best) == strategy({**best, "save_total_limit": 2}) == "steps"
    assert strategy({**best, "eval_strategy": "epoch"}) == "epoch"
    assert strategy({"save_strategy": "no"}) == "no"


def test_no_means_no_in_a_strategy(recipe):
    loaded = recipe(MINIMAL + "trainer: {save_strategy: no, use_cpu: true}\nloss: {weight: 0}")
    assert trainer_config(loaded, "trainer", output_dir="x", aux_weight=0.0).save_strategy == "no"


def test_likeliest_tokens_need_distributions(tmp_path):
    (tmp_path / "recipe.yaml").write_text("{output: x, model: {name: y}, heads: {top_k: 4}}")
    with pytest.raises(CaftuneError, match="heads must be given without top_k, or with targets: model"):
        load_recipe(tmp_path / "recipe.yaml")
