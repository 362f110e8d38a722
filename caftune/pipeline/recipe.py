"""Reading a recipe: the file, overrides, and messages that name the place. It is checked before a model or torch is loaded."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from caftune.errors import CaftuneError
from caftune.files import write_text
from caftune.pipeline.recipe_text import parse_yaml, read_yaml
from caftune.pipeline.schema import Recipe
from caftune.training.options import OPTIONS, Training

# Options of SFTConfig that a recipe sets in other sections.
_SET_ELSEWHERE = {
    "output_dir": "output",
    "seed": "seed",
    "trust_remote_code": "model.trust_remote_code",
    "dataset_text_field": "data.columns",
    "dataset_kwargs": "data",  # skip_prepare_dataset would leave packing out
    "max_length": "data.max_length",
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; `overrides` are `key.sub=value`, the value in YAML.

    Raises:
        CaftuneError: no such file, malformed YAML, a key or an override given twice, an unknown key (with the nearest known
            one) or a value out of range.
    """
    file = Path(path)
    if not file.is_file():
        raise CaftuneError(f"{path} must be a recipe file (YAML), got no such file. Check the path.")
    values = read_yaml(file)
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise CaftuneError(f"{path} must hold a mapping of sections (output, model, ...), got {found}. Fix the file.")
    _refuse_repeated_overrides(overrides)
    for override in overrides:
        _override(values, override)
    return parse_recipe(values)


def parse_recipe(values: Any) -> Recipe:
    """The recipe of parsed YAML, with its defaults.

    Raises:
        CaftuneError: an unknown key (with the nearest known one) or a value out of range.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise CaftuneError(_explain(error)) from error


def trainer_config(recipe: Recipe, section: Training, *, defaults: Mapping[str, Any] | None = None, **ours: Any) -> Any:
    """The CAFTConfig of a training: its section, its options in `heads`, `loss` and `model`, and `ours`, which go first.

    Args:
        defaults: options of the section where the recipe gives none.

    Raises:
        CaftuneError: an option CAFTConfig does not have, one that belongs elsewhere, or a value it refuses.
    """
    import torch

    from caftune.training.config import CAFTConfig

    options = dict(getattr(recipe, section) or {})
    for name in ("save_strategy", "eval_strategy", "logging_strategy"):
        if options.get(name) is False:  # YAML 1.1 reads `no` as false
            options[name] = "no"
    _refuse_unknown_options(
        section, options, {each.name: each.default for each in dataclasses.fields(CAFTConfig) if each.init}
    )
    has_gpu = torch.accelerator.is_available()
    defaults = {
        **(defaults or {}),
        "report_to": [],
        "seed": recipe.seed,
        "use_cpu": not has_gpu,
        "dataloader_pin_memory": has_gpu,
    }
    defaults["include_num_input_tokens_seen"] = "non_padding"
    defaults["logging_nan_inf_filter"] = False  # the filter logs 0 or an earlier loss instead of NaN
    follows = options.get("load_best_model_at_end") and options.get("eval_strategy") == "steps"  # saved when evaluated
    if not (follows or {"save_strategy", "save_steps"} & options.keys()):
        defaults |= {"save_strategy": "epoch", "save_total_limit": 2}  # so that a stopped run has where to resume
    try:
        return CAFTConfig(**{**defaults, **options, **recipe.options_for(section), **ours})
    except (ValueError, TypeError) as error:
        raise CaftuneError(f"{section}: {error}") from error


def _refuse_unknown_options(section: str, options: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse options that CAFTConfig does not have or that a recipe sets elsewhere, and values of another type.

    CAFTConfig takes any type and fails late: numbers and switches are checked here against its defaults.
    """
    elsewhere = _SET_ELSEWHERE | {name: option.recipe.place for name, option in OPTIONS.items() if option.recipe.place}
    for name, value in options.items():
        place = f"{section}.{name}"
        if name in elsewhere:
            raise CaftuneError(f"{place} is set by {elsewhere[name]} in a recipe. Remove it.")
        if name not in known:
            raise CaftuneError(f"{place} is not an option of CAFTConfig.{_nearest(name, known, f'{section}.')}")
        is_switch, is_number = (isinstance(known[name], kind) for kind in (bool, int | float))
        if is_switch and not isinstance(value, bool):
            raise CaftuneError(f"{place} must be true or false, got {value!r}.")
        if is_number and not isinstance(value, int | float):
            raise CaftuneError(f"{place} must be a number, got {value!r}.")
    _refuse_optimizer_arguments(section, options.get("optim_args"))


def _refuse_optimizer_arguments(section: str, value: Any) -> None:
    """transformers (5.23) fails on other forms when it makes the optimizer, without naming the option."""
    parts = value.split(",") if isinstance(value, str) and value else []
    if value is not None and (not isinstance(value, str) or any(part.count("=") != 1 for part in parts)):
        raise CaftuneError(
            f"{section}.optim_args must be key=value, several with commas between them, got {value!r}. Write rank=8, "
            "for example."
        )


def save_recipe(path: Path, sections: Mapping[str, Any]) -> None:
    """Write sections of a recipe as YAML, whole or not at all."""
    write_text(path, yaml.safe_dump(dict(sections), sort_keys=False))


def first_difference(one: Any, other: Any, place: str = "") -> str | None:
    """Where two parsed recipes first differ, as `key.sub: one -> other`; None where they agree."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in [*one, *(key for key in other if key not in one)]:
            found = first_difference(one.get(key), other.get(key), f"{place}.{key}" if place else str(key))
            if found:
                return found
        return None
    return None if one == other else f"{place}: {one!r} -> {other!r}"


def _override(values: dict[str, Any], override: str) -> None:
    place, equals, text = override.partition("=")
    if not equals or not place:
        raise CaftuneError(f"An override must be key.sub=value, got {override!r}.")
    *sections, key = place.split(".")
    for section in sections:
        inner = values.get(section, {})
        if not isinstance(inner, dict):
            raise CaftuneError(
                f"{override!r} must set a key of a section, got {section}, which is a value. Fix the key."
            )
        values[section] = dict(inner)  # a copy: by an alias in the YAML, it may be part of other sections too
        values = values[section]
    try:
        values[key] = parse_yaml(text, f"The override {override!r}")
    except CaftuneError as error:
        if not isinstance(error.__cause__, yaml.YAMLError):
            raise
        raise CaftuneError(
            f"{override!r} must hold valid YAML. Put the value into quotes: '{place}=\"...\"'."
        ) from error


def _refuse_repeated_overrides(overrides: Sequence[str]) -> None:
    """Raise CaftuneError where a later override sets the same key or a section that holds it."""
    before: dict[str, str] = {}
    for override in overrides:
        place = override.partition("=")[0]
        lost = next((text for other, text in before.items() if f"{other}.".startswith(f"{place}.")), None)
        if lost is not None:
            raise CaftuneError(f"{override!r} overrides {lost!r}, which is given before it. Remove one.")
        before[place] = override


def _explain(error: ValidationError) -> str:
    """The first problem of a recipe, in one sentence."""
    problem = error.errors()[0]
    place = ".".join(_shown(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        *sections, key = problem["loc"]
        return f"{place} is not a key of a recipe.{_nearest(str(key), _keys_of(sections), '.'.join([*map(str, sections), '']))}"
    if problem["type"] == "missing":
        return f"{place} must be given. Add it to the recipe."
    if problem["type"] in ("model_type", "dict_type"):
        keys = ", ".join(_keys_of(problem["loc"])) if problem["type"] == "model_type" else "names of options"
        remedy = " Remove it, or give it keys." if problem["input"] is None else ""
        return f"{place} must be a section (with {keys}), got {problem['input']!r}.{remedy}"
    if problem["type"] == "invalid_key" or problem["loc"][-1] == "[key]":
        section = ".".join(str(part) for part in problem["loc"][:-2]) or "the recipe"
        return f"A key of {section} must be text, got {problem['input']!r}. Put it in quotes, or remove it."
    message = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    is_plain = isinstance(problem["input"], bool | int | float)
    remedy = " Put it in quotes." if problem["type"] == "string_type" and is_plain else ""
    return f"{place} must be {message}, got {problem['input']!r}.{remedy}"


def _shown(key: Any) -> str:
    """A key as it is, in quotes where it begins or ends with white space."""
    return repr(key) if isinstance(key, str) and key != key.strip() else str(key)


def _keys_of(sections: Sequence[Any]) -> list[str]:
    model: type[BaseModel] = Recipe
    for section in sections:
        model = model.model_fields[str(section)].annotation  # type: ignore[assignment]
    return list(model.model_fields)


def _nearest(key: str, known: Any, prefix: str) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    more = f" and {len(known) - 12} more" if len(known) > 12 else ""
    return f" Did you mean {prefix}{near[0]}?" if near else f" Known: {', '.join(sorted(known)[:12])}{more}."
