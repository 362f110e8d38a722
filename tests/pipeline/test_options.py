"""Each option of CAFTConfig is written once: the recipe's sections, messages and schema, and the way back, follow from it."""

import subprocess
import sys
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Annotated, Literal, get_args, get_origin

import pytest
from transformers import HfArgumentParser
from trl import SFTConfig

from caftune import CAFTConfig
from caftune.core.heads import FORK_POINTS
from caftune.core.objective import SCHEDULES
from caftune.errors import CaftuneError
from caftune.pipeline import schema
from caftune.pipeline.recipe import parse_recipe, trainer_config
from caftune.pipeline.schema import Recipe
from caftune.training.options import OPTIONS, CAFTOptions, HeadKind, InRecipe, Schedule, options_of

IN_RECIPE = {name: option for name, option in OPTIONS.items() if option.recipe.trainings}
NUMBERS = [name for name, option in IN_RECIPE.items() if option.recipe.bounds]


def recipe(**sections):
    return parse_recipe({"output": "x", "model": {"name": "y"}, **sections})


def other(option):
    """A value that is not the option's default, as CAFTConfig has it."""
    kind = next((each for each in get_args(option.type) if each is not NoneType), option.type)
    kind = option.type if get_origin(option.type) is Literal else kind
    if get_origin(kind) is Literal:
        return get_args(kind)[-1]
    return {bool: not option.default, int: 2, float: 0.5, str: "z"}[kind]


def written(option):
    """`other`, as a recipe has it."""
    return next((word for word, value in option.recipe.words.items() if value == other(option)), other(option))


def sections(options, value):
    found = {}
    for option in options:
        section, key = option.recipe.section_and_key
        found.setdefault(section, {})[key] = value(option)
    return found


def test_every_field_of_ours_has_a_place_in_a_recipe():
    ours = {each.name for each in fields(CAFTConfig)} - {each.name for each in fields(SFTConfig)}
    assert set(OPTIONS) == ours
    for name, option in OPTIONS.items():
        with pytest.raises(CaftuneError, match=f"trainer.{name} is set by {option.recipe.place} in a recipe"):
            trainer_config(recipe(trainer={name: 1}), "trainer", output_dir="x")


def test_every_option_goes_from_the_recipe_to_caft_config():
    given = recipe(**sections(IN_RECIPE.values(), written))
    for training in ("pretrain", "adapt", "trainer"):
        wanted = {name: other(option) for name, option in IN_RECIPE.items() if training in option.recipe.trainings}
        assert wanted
        assert given.options_for(training) == wanted
    assert all(other(option) != option.default for option in IN_RECIPE.values())


def test_the_defaults_of_a_recipe_are_those_of_caft_config():
    stages = {
        "pretrain": CAFTConfig("x", pretrain_heads=True),
        "adapt": CAFTConfig("x", pretrain_heads=True),
        "trainer": CAFTConfig("x", heads="h"),
    }
    for training, config in stages.items():
        for name, value in recipe().options_for(training).items():
            assert name == "heads" or getattr(config, name) == value


@pytest.mark.parametrize("name", IN_RECIPE)
def test_a_wrong_value_is_named_with_its_place(name):
    option = OPTIONS[name]
    with pytest.raises(CaftuneError, match=f"{option.recipe.place} must be .*, got {{}}"):
        recipe(**sections([option], lambda _: {}))


@pytest.mark.parametrize("name", NUMBERS)
def test_bounds_hold_in_the_recipe_and_in_python(name):
    option = OPTIONS[name]
    low = type(other(option))(-1)
    with pytest.raises(CaftuneError, match=f"{option.recipe.place} must be greater than .*, got -1"):
        recipe(**sections([option], lambda _: low))
    with pytest.raises(CaftuneError, match="must be .*, got -1"):
        CAFTConfig("x", **{"heads": "h", "pretrain_heads": "pretrain" in option.recipe.trainings, name: low})


def test_the_help_is_the_description_in_the_schema():
    shown = Recipe.model_json_schema()["$defs"]
    for option in IN_RECIPE.values():
        section, key = option.recipe.section_and_key
        assert shown[f"{section.capitalize()}Section"]["properties"][key]["description"] == option.text


@pytest.mark.parametrize("section", [schema.HeadsSection, schema.LossSection])
def test_what_the_code_reads_of_a_section_has_the_type_it_declares(section):
    for name, declared in section.__base__.model_fields.items():
        assert section.model_fields[name].annotation == declared.annotation


def test_a_new_option_needs_its_field_alone(monkeypatch):
    @dataclass
    class More(CAFTOptions):
        aux_margin: Annotated[float, InRecipe("loss.margin", ("trainer",), {"ge": 0})] = field(
            default=0.5, metadata={"help": "A margin."}
        )

    monkeypatch.setattr(schema, "OPTIONS", options_of(More))
    section = schema._with_options("loss")(schema.LossSection.__base__)
    assert section.model_validate({}).margin == 0.5
    assert section.model_fields["margin"].description == "A margin."
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        section.model_validate({"margin": -1})
    given = recipe().model_copy(update={"loss": section.model_validate({"margin": 2})})
    assert given.options_for("trainer")["aux_margin"] == 2


def test_the_kinds_and_schedules_are_those_of_the_method():
    assert get_args(HeadKind) == tuple(FORK_POINTS)
    assert get_args(Schedule) == tuple(SCHEDULES)


def test_the_options_are_arguments_of_trls_command_line():
    given = [f"--{name}={other(OPTIONS[name])}" for name in ("aux_target_share", "aux_decay")]
    parser = HfArgumentParser(CAFTConfig)
    assert "Share of each horizon's targets" in parser.format_help().replace("\n", " ")
    (found,) = parser.parse_args_into_dataclasses(["--output_dir", "x", "--aux_weight", "0", *given])
    assert (found.aux_target_share, found.aux_decay, found.heads) == (0.5, 0.5, None)


def test_a_recipe_is_checked_without_torch(tmp_path):
    (tmp_path / "recipe.yaml").write_text("{output: x, model: {name: y}}")
    code = (
        f"import sys; from caftune.pipeline.recipe import load_recipe; load_recipe({str(tmp_path / 'recipe.yaml')!r}); "
        "assert not {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
