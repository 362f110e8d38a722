"""The recipe: one YAML file for every command, checked in full before anything is loaded."""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from caftune.errors import CaftuneError
from caftune.files import write_text
from caftune.pipeline.recipe_text import parse_yaml, read_yaml

_SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
# Options of CAFTConfig that the recipe sets elsewhere.
_SET_ELSEWHERE = {
    "output_dir": "output",
    "seed": "seed",
    "trust_remote_code": "model.trust_remote_code",
    "dataset_text_field": "data.columns",
    "dataset_kwargs": "data",  # skip_prepare_dataset would leave packing out
    "heads": "heads.path",
    "num_heads": "heads.count",
    "head_kind": "heads.kind",
    "soft_targets": "heads.targets",
    "soft_top_k": "heads.top_k",
    "force_heads": "heads.force",
    "train_heads": "heads.train",
    "heads_lora_rank": "heads.lora_rank",
    "heads_learning_rate": "heads.learning_rate",
    "heads_max_grad_norm": "heads.max_grad_norm",
    "aux_weight": "loss.weight",
    "aux_decay": "loss.decay",
    "aux_schedule": "loss.schedule",
    "aux_rows": "loss.rows",
    "aux_min_weight": "loss.min_weight",
    "max_length": "data.max_length",
    "pretrain_heads": "the command `caftune pretrain-heads`",
}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraSection(_Section):
    """LoRA, handed to `peft.LoraConfig`."""

    r: int = Field(8, gt=0)
    alpha: int = Field(16, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    modules_to_save: list[str] = Field([], description="Modules trained in full, such as lm_head.")
    dora: bool = Field(False, description="DoRA: a trained magnitude beside the low-rank direction.")
    merge: bool = Field(True, description="Export the base with the adapter merged; false: the adapter alone.")


class ModelSection(_Section):
    """The base model, and which of its weights are trained."""

    name: str = Field(description="A folder or a hub id.")
    revision: str | None = None
    trust_remote_code: bool | None = Field(None, description="Run the code that the base brings along.")
    tuning: Literal["full", "lora", "qlora"] = Field("full", description="qlora: LoRA on a base in 4 bits.")
    lora: LoraSection = LoraSection()


class ServerSection(_Section):
    """A server with an OpenAI-compatible interface, for labels.backend: server."""

    url: str = Field("http://127.0.0.1:8000/v1", description="Its address, up to /v1.")
    model: str | None = Field(None, description="The name it serves the base under. None: model.name.")
    concurrency: int = Field(16, gt=0, description="Requests under way at a time.")
    retries: int = Field(10, ge=0, description="Of one request; the wait doubles from 0.5 to 8 seconds.")
    timeout_s: float = Field(600.0, gt=0, description="Of one request.")
    requests_per_minute: float | None = Field(None, gt=0, description="At most so many, retries included.")
    key_variable: str = Field("OPENAI_API_KEY", description="The environment variable that holds the API key.")


class AnswersSection(_Section):
    """How answers are drawn from a model, and where it runs."""

    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: all tokens.")
    backend: Literal["transformers", "vllm", "server"] = "transformers"
    batching: Literal["auto", "continuous", "static"] = Field("auto", description="Of the transformers backend.")
    batch_size: int = Field(64, gt=0)
    vllm: dict[str, Any] = Field({}, description="Arguments of vllm.LLM, such as tensor_parallel_size.")
    server: ServerSection = ServerSection()


class LabelsSection(AnswersSection):
    """Self-generated answers, the training data of the heads."""

    prompts: str | None = Field(None, description="A file or hub id with the prompts to answer.")
    columns: dict[str, str] = {}
    limit: int | None = Field(None, gt=0, description="Answer the first so many prompts.")
    chat: bool | None = Field(
        None,
        description="Give text prompts as user messages. None: if the tokenizer has a chat template.",
    )
    skip_long_prompts: bool = Field(False, description="Leave out prompts that max_new_tokens leaves no room for.")
    max_new_tokens: int = Field(256, gt=0)
    temperature: float = Field(0.7, ge=0, description="0 is greedy.")
    system: str | None = Field(None, description="A system message for conversations that have none.")
    keep_truncated: bool = Field(False, description="Train on answers that max_new_tokens cut off, too.")
    skip_failed: bool = Field(False, description="Do without the prompts that the server gave no answer to.")
    cache: str | None = Field(None, description="The file that keeps the answers. None: in the run folder.")


class HeadsSection(_Section):
    """The auxiliary heads."""

    count: int = Field(4, gt=0)
    kind: Literal["decoder", "mlp"] = "decoder"
    targets: Literal["tokens", "model"] = Field(
        "tokens", description="Stage 1: the tokens of the text, or the model's own distributions over it."
    )
    top_k: int | None = Field(None, gt=0, description="With targets: model, its so many likeliest tokens; None: all.")
    text: str | None = Field(None, description="Stage 1 on this file or hub id (labels.columns) instead of labels.")
    path: str | None = Field(None, description="Take these heads instead of training some.")
    force: bool = Field(False, description="Accept heads of a base with the same architecture and tokenizer.")
    keep: bool = Field(
        False,
        description="Write them beside the model, to draft for it: by default trained along, with a rising loss.schedule.",
    )
    train: bool = Field(False, description="Train the heads along in stage 2.")
    lora_rank: int | None = Field(None, gt=0, description="Train them through a LoRA of this rank.")
    learning_rate: float | None = Field(None, gt=0, description="Theirs in stage 2. None: trainer.learning_rate.")
    max_grad_norm: float | None = Field(None, gt=0, description="Theirs in stage 2. None: trainer.max_grad_norm.")
    held_out: float = Field(0.1, gt=0, lt=1, description="Share of the labels kept for evaluating the heads.")

    @model_validator(mode="after")
    def _needs_targets(self) -> "HeadsSection":
        if self.top_k is not None and self.targets != "model":
            raise CaftuneError("given without top_k, or with targets: model")
        return self


class LossSection(_Section):
    """beta, alpha and gamma."""

    weight: float = Field(
        0.01,
        ge=0,
        description="beta; 0 is plain fine-tuning (heads of heads.path are then measured, not trained with).",
    )
    decay: float = Field(0.8, gt=0, le=1, description="alpha")
    schedule: Literal["reflected_sine", "sine", "linear", "constant"] = "reflected_sine"
    rows: float = Field(1.0, gt=0, le=1, description="Share of the targets that the auxiliary losses are computed on.")
    min_weight: float = Field(0.0, ge=0, description="Leave out horizons whose weight is below it.")


class DataSection(_Section):
    """The task's data."""

    train: str | None = Field(None, description="A file or hub id.")
    eval: str | None = None
    columns: dict[str, str] = Field({}, description="Our name: the file's name.")
    separator: str = Field("", description="Put between prompt and completion, where these are text.")
    chat: bool | None = Field(
        None,
        description="Prompts and completions that are text as conversations. None: alpaca rows alone, for a chat model.",
    )
    max_length: int | Literal["auto"] | None = Field(
        "auto", description="In tokens. auto: the model's context, at most 1024; null: rows are not cut."
    )
    limit: int | None = Field(None, gt=0, description="Use the first so many rows.")

    @field_validator("max_length", mode="before")
    @classmethod
    def _is_a_length(cls, value: Any) -> Any:
        is_number = isinstance(value, int | float) and value > 1 and float(value).is_integer()
        if not (value in (None, "auto") or is_number):
            raise CaftuneError("a whole number above 1, auto or null")
        return value


class EvalSection(AnswersSection):
    """Tasks, their data, and how the model answers."""

    tasks: list[str] = Field([], description="Names of tasks.")
    data: dict[str, str] = Field({}, description="A task's name: the file or hub id with its rows.")
    columns: dict[str, str] = Field(
        {},
        description="The data set's name of a column: the file's name. prompt: asked as it is, in place of the task's own.",
    )
    limit: int | None = Field(None, gt=0, description="Use the first so many rows.")
    model: str | None = Field(None, description="`base`, a folder or a hub id. None: the model/ of the run.")
    chat: bool | None = Field(
        None,
        description="Ask in a conversation. None: where the tokenizer has a chat template and data.train is not plain text.",
    )
    runs: int = Field(1, gt=0, description="Independent runs, with the seeds seed, seed + 1, ...")
    temperature: float = Field(0.0, ge=0, description="0 is greedy.")
    max_new_tokens: int | None = Field(None, gt=0, description="None: what the task needs.")
    structures: str | None = Field(
        None, description="Fold `proteins` with this ESMFold (facebook/esmfold_v1, a folder)."
    )


class ConceptsSection(_Section):
    """What counts as a concept of several tokens."""

    kind: Literal["words", "code", "smiles"] = Field(
        "words", description="Words; identifiers of Python; functional groups of SMILES (RDKit)."
    )
    terms: str | None = Field(None, description="A file with terms, one a line, that are concepts too.")
    limit: int | None = Field(200, gt=0, description="Study the first so many rows of data.eval. None: all.")


Arm = Literal["ntp", "caft", "beta0", "random_heads", "shuffled_horizons", "no_pretraining"]


class CompareSection(_Section):
    """Arms and seeds of a comparison."""

    arms: list[Arm] = Field(["ntp", "caft", "beta0", "random_heads"], description="ntp is what the others are held to.")
    seeds: int = Field(5, gt=0, description="Runs of each arm, with the seeds seed, seed + 1, ...")
    concepts: ConceptsSection = ConceptsSection()
    keep_models: bool = Field(False, description="Keep the models, which are removed once they are evaluated.")

    @model_validator(mode="after")
    def _needs_a_baseline(self) -> "CompareSection":
        if len(set(self.arms)) < len(self.arms) or len(self.arms) < 2 or "ntp" not in self.arms:
            raise CaftuneError("given with arms that hold ntp and at least one other arm, each once")
        return self


class Recipe(_Section):
    """Everything a run needs."""

    output: str = Field(description="The run folder.")
    seed: int = 42
    model: ModelSection
    labels: LabelsSection = LabelsSection()
    heads: HeadsSection = HeadsSection()
    pretrain: dict[str, Any] = Field({}, description="Stage 1 options of CAFTConfig.")
    loss: LossSection = LossSection()
    data: DataSection = DataSection()
    adapt: dict[str, Any] | None = Field(
        None,
        description="Train the heads on data.train for an epoch before stage 2: options of CAFTConfig. None: do not.",
    )
    trainer: dict[str, Any] = Field({}, description="Stage 2 options of CAFTConfig.")
    eval: EvalSection = EvalSection()
    compare: CompareSection = CompareSection()

    @property
    def cuts_stage_one(self) -> bool:
        """Whether data.max_length is of stage 1 too. Labels have the length they have; a text is cut, and packing needs one."""
        return self.heads.text is not None or bool(self.pretrain.get("packing"))

    @field_validator("pretrain", "adapt", "trainer", mode="after")
    @classmethod
    def _quoted_numbers(cls, options: dict[str, Any] | None) -> dict[str, Any] | None:
        """Convert numbers in quotes, as pydantic does in the other sections: CAFTConfig takes any type."""
        return options and {name: _with_number(value) for name, value in options.items()}

    @model_validator(mode="before")
    @classmethod
    def _preset_of_kept_heads(cls, values: Any) -> Any:
        heads, loss = (values.get(name, {}) if isinstance(values, dict) else None for name in ("heads", "loss"))
        if isinstance(heads, dict) and isinstance(loss, dict) and heads.get("keep") is True:
            return {**values, "heads": {"train": True, **heads}, "loss": {"schedule": "sine", **loss}}
        return values


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; `overrides` are `key.sub=value`, the value in YAML.

    Raises:
        CaftuneError: no such file, malformed YAML, a key or an override given twice, an unknown key (with the nearest known
            one) or a value out of range.
    """
    file = Path(path)
    if not file.is_file():
        raise CaftuneError(f"{path} must be a recipe file (YAML), and there is no such file.")
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


def trainer_config(recipe: Recipe, section: Literal["pretrain", "adapt", "trainer"], **ours: Any) -> Any:
    """The CAFTConfig of a stage: the recipe's section, and what the recipe sets elsewhere.

    Raises:
        CaftuneError: an option CAFTConfig does not have, one that belongs elsewhere, or a value it refuses.
    """
    import torch

    from caftune.training.config import CAFTConfig

    has_gpu = torch.accelerator.is_available()
    defaults = {"report_to": [], "seed": recipe.seed, "use_cpu": not has_gpu, "dataloader_pin_memory": has_gpu}
    defaults["include_num_input_tokens_seen"] = "non_padding"
    defaults["logging_nan_inf_filter"] = False  # the filter logs 0 or an earlier loss instead of NaN
    known = {field.name: field.default for field in dataclasses.fields(CAFTConfig) if field.init}
    options = dict(getattr(recipe, section) or {})
    for name in ("save_strategy", "eval_strategy", "logging_strategy"):
        if options.get(name) is False:  # YAML 1.1 reads `no` as false
            options[name] = "no"
    follows = options.get("load_best_model_at_end") and options.get("eval_strategy") == "steps"  # saved when evaluated
    if not (follows or {"save_strategy", "save_steps"} & options.keys()):
        defaults |= {"save_strategy": "epoch", "save_total_limit": 2}  # so that a stopped run has where to go on from
    for name, value in options.items():
        if name in _SET_ELSEWHERE:
            raise CaftuneError(f"{section}.{name} is set by {_SET_ELSEWHERE[name]} in a recipe. Remove it.")
        if name not in known:
            raise CaftuneError(
                f"{section}.{name} is not an option of CAFTConfig.{_nearest(name, known, f'{section}.')}"
            )
        _refuse_other_type(f"{section}.{name}", value, known[name])
    _refuse_optimizer_arguments(section, options.get("optim_args"))
    try:
        return CAFTConfig(**{**defaults, **options, **ours})
    except (ValueError, TypeError) as error:
        raise CaftuneError(f"{section}: {error}") from error


def _refuse_optimizer_arguments(section: str, value: Any) -> None:
    """transformers (5.23) fails on other forms when it makes the optimizer, without naming the option."""
    parts = value.split(",") if isinstance(value, str) and value else []
    if value is not None and (not isinstance(value, str) or any(part.count("=") != 1 for part in parts)):
        raise CaftuneError(
            f"{section}.optim_args must be key=value, several with commas between them, got {value!r}. Write rank=8, "
            "for example."
        )


def _refuse_other_type(place: str, value: Any, default: Any) -> None:
    """CAFTConfig takes any type, and fails late: numbers and switches are checked here against its defaults."""
    if isinstance(default, bool) and not isinstance(value, bool):
        raise CaftuneError(f"{place} must be true or false, got {value!r}.")
    if isinstance(default, int | float) and not isinstance(default, bool) and not isinstance(value, int | float):
        raise CaftuneError(f"{place} must be a number, got {value!r}.")


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
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise CaftuneError(f"{override!r} sets a part of {section}, which is a value.")
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


def _with_number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) else value


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
    remedy = " Put it in quotes." if problem["type"] == "string_type" and _is_plain(problem["input"]) else ""
    return f"{place} must be {message}, got {problem['input']!r}.{remedy}"


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float)


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
