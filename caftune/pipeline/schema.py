"""The sections of a recipe, the one YAML file that every command reads.

`heads`, `loss` and `model` have the options of CAFTConfig whose place in a recipe is there (training/options.py), and keys
that are the pipeline's alone.
"""

import re
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator

from caftune.errors import CaftuneError
from caftune.training.options import OPTIONS, HeadKind, Option, Training

_SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
_Class = TypeVar("_Class", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _with_options(section: str) -> Callable[[type[_Class]], type[_Class]]:
    """Give a section its options of CAFTConfig. The class declares only those that our code reads by name (for mypy)."""

    def extended(cls: type[_Class]) -> type[_Class]:
        places = {option.recipe.section_and_key: option for option in OPTIONS.values()}
        made: dict[str, Any] = {key: _key(option) for (place, key), option in places.items() if place == section}
        return create_model(cls.__name__, __base__=cls, __doc__=cls.__doc__, __module__=cls.__module__, **made)

    return extended


def _key(option: Option) -> tuple[Any, Any]:
    """Type and field of an option's key in a recipe."""
    kind, default = option.type, option.default
    if option.recipe.words:
        kind = Literal[tuple(option.recipe.words)]
        default = next(word for word, value in option.recipe.words.items() if value == default)
    elif option.recipe.default is not None:  # null has no meaning then
        kind = next(each for each in get_args(kind) if each is not NoneType)
        default = option.recipe.default
    return kind, Field(default, description=option.text, **option.recipe.bounds)


class LoraSection(_Section):
    """LoRA, handed to `peft.LoraConfig`."""

    r: int = Field(8, gt=0, description="Rank of the adapters.")
    alpha: int = Field(16, gt=0, description="The adapters are scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapters.")
    target_modules: str | list[str] = Field("all-linear", description="Modules that get adapters, as in PEFT.")
    modules_to_save: list[str] = Field([], description="Modules trained in full, such as lm_head.")
    dora: bool = Field(False, description="DoRA: train a magnitude next to the low-rank direction.")
    merge: bool = Field(True, description="Export the base with the adapter merged in. false: the adapter alone.")


@_with_options("model")
class ModelSection(_Section):
    """The base model, and which of its weights are trained."""

    name: str = Field(description="A folder or a hub id.")
    revision: str | None = Field(None, description="Branch, tag or commit of the base on the hub. None: main.")
    trust_remote_code: bool | None = Field(None, description="Run the Python code in the base's repository.")
    tuning: Literal["full", "lora", "qlora"] = Field("full", description="qlora: LoRA on a base in 4 bits.")
    lora: LoraSection = LoraSection()
    freeze_unembedding: bool

    @model_validator(mode="after")
    def _freezes_what_is_trained(self) -> "ModelSection":
        if self.freeze_unembedding and self.tuning != "full":
            raise CaftuneError("given without freeze_unembedding, or with tuning: full (adapters leave it as it is)")
        return self


class ServerSection(_Section):
    """A server with an OpenAI-compatible interface, for labels.backend: server."""

    url: str = Field("http://127.0.0.1:8000/v1", description="The server's address, up to /v1.")
    model: str | None = Field(None, description="The base's name on the server. None: model.name.")
    concurrency: int = Field(16, gt=0, description="Number of requests at a time.")
    retries: int = Field(10, ge=0, description="Retries of one request. The wait doubles from 0.5 to 8 seconds.")
    timeout_s: float = Field(600.0, gt=0, description="Timeout of one request, in seconds.")
    requests_per_minute: float | None = Field(None, gt=0, description="Upper limit, retries included.")
    key_variable: str = Field("OPENAI_API_KEY", description="The environment variable that holds the API key.")


class AnswersSection(_Section):
    """How answers are sampled from a model, and where it runs."""

    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens with this total probability.")
    top_k: int = Field(0, ge=0, description="0: all tokens.")
    backend: Literal["transformers", "vllm", "server"] = Field("transformers", description="What runs the model.")
    batching: Literal["auto", "continuous", "static"] = Field("auto", description="Of the transformers backend.")
    batch_size: int = Field(64, gt=0, description="Answers at a time, of the transformers backend.")
    vllm: dict[str, Any] = Field({}, description="Arguments of vllm.LLM, such as tensor_parallel_size.")
    server: ServerSection = ServerSection()


class LabelsSection(AnswersSection):
    """Self-generated answers, the training data of the heads."""

    prompts: str | None = Field(None, description="A file or hub id with the prompts to answer.")
    columns: dict[str, str] = Field(
        {}, description="caftune's name of a column: the file's name, as {prompt: question}."
    )
    limit: int | None = Field(None, gt=0, description="Number of prompts to answer, from the first. None: all.")
    chat: bool | None = Field(None, description="Text prompts as user messages. None: if there is a chat template.")
    skip_long_prompts: bool = Field(False, description="Skip prompts that leave no room for max_new_tokens.")
    max_new_tokens: int = Field(256, gt=0, description="Longest answer, in tokens.")
    temperature: float = Field(0.7, ge=0, description="0 is greedy.")
    batch_size: int = Field(128, gt=0, description="Answers at a time, of the transformers backend.")
    system: str | None = Field(None, description="A system message for conversations that have none.")
    keep_truncated: bool = Field(False, description="Also train on answers that max_new_tokens cut off.")
    skip_failed: bool = Field(False, description="Skip prompts that the server gave no answer to.")
    cache: str | None = Field(None, description="The file in which answers are cached. None: in the run folder.")


@_with_options("heads")
class HeadsSection(_Section):
    """The auxiliary heads."""

    count: int
    kind: HeadKind
    targets: Literal["tokens", "model"]
    top_k: int | None
    path: str | None
    force: bool
    train: bool
    lora_rank: int | None
    text: str | None = Field(None, description="Stage 1 on this file or hub id (labels.columns) instead of labels.")
    keep: bool = Field(
        False,
        description="Write the heads next to the model, so that they can draft for it. By default loss.schedule is then sine.",
    )
    target_share: float = Field(
        0.25, gt=0, le=1, description="Stage 1: share of each horizon's targets in its loss, sampled for each batch."
    )
    held_out: float = Field(0.1, gt=0, lt=1, description="Share of the rows of stage 1 kept for evaluating the heads.")

    @model_validator(mode="after")
    def _needs_targets(self) -> "HeadsSection":
        if self.top_k is not None and self.targets != "model":
            raise CaftuneError("given without top_k, or with targets: model")
        return self


@_with_options("loss")
class LossSection(_Section):
    """The auxiliary losses: beta, alpha and gamma."""

    weight: float
    decay: float
    target_share: float
    min_weight: float


class DataSection(_Section):
    """The task's data."""

    train: str | None = Field(None, description="A file or hub id.")
    eval: str | None = Field(None, description="A file or hub id (with its split) for the evaluation loss.")
    columns: dict[str, str] = Field(
        {}, description="caftune's name of a column: the file's name, as {prompt: question}."
    )
    separator: str = Field("", description="Text between prompt and completion, where these are text.")
    chat: bool | None = Field(
        None,
        description="Turn prompts and completions that are text into conversations. None: alpaca rows, for a chat model.",
    )
    max_length: int | Literal["auto"] | None = Field(
        "auto", description="In tokens. auto: the model's context, at most 1024; null: rows are not cut."
    )
    limit: int | None = Field(None, gt=0, description="Number of rows to use, from the first. None: all.")

    @field_validator("max_length", mode="before")
    @classmethod
    def _is_a_length(cls, value: Any) -> Any:
        is_number = isinstance(value, int | float) and value > 1 and float(value).is_integer()
        if not (value in (None, "auto") or is_number):
            raise CaftuneError("a whole number above 1, auto or null")
        return value


class EvalSection(AnswersSection):
    """Tasks, their data, and how the model answers."""

    tasks: list[str] = Field([], description="Names of tasks; lm_eval:NAME is one of lm-evaluation-harness.")
    data: dict[str, str] = Field(
        {}, description="A task's name: the file or hub id with its rows; of lm_eval:NAME its YAML file or folder."
    )
    columns: dict[str, str] = Field(
        {}, description="The data set's name of a column: the file's name. prompt: replaces the task's own prompt."
    )
    limit: int | None = Field(None, gt=0, description="Number of rows to use, from the first. None: all.")
    model: str | None = Field(None, description="`base`, a folder or a hub id. None: the model/ of the run.")
    chat: bool | None = Field(
        None,
        description="Prompt in a conversation. None: if there is a chat template and data.train is not plain text.",
    )
    runs: int = Field(1, gt=0, description="Independent runs, with the seeds seed, seed + 1, ...")
    temperature: float = Field(0.0, ge=0, description="0 is greedy.")
    max_new_tokens: int | None = Field(None, gt=0, description="None: what the task needs.")
    structures: str | None = Field(None, description="ESMFold that folds `proteins` (facebook/esmfold_v1, a folder).")


class ConceptsSection(_Section):
    """What counts as a concept of several tokens."""

    kind: Literal["words", "code", "smiles"] = Field(
        "words", description="Words; identifiers of Python; functional groups of SMILES (RDKit)."
    )
    terms: str | None = Field(None, description="A file with further concepts, one term a line.")
    limit: int | None = Field(200, gt=0, description="Number of rows of data.eval to study, from the first. None: all.")


Arm = Literal["ntp", "caft", "caft_frozen", "beta0", "random_heads", "shuffled_horizons", "no_pretraining"]


class CompareSection(_Section):
    """Arms and seeds of a comparison."""

    arms: list[Arm] = Field(["ntp", "caft", "beta0", "random_heads"], description="ntp is the baseline of the others.")
    seeds: int = Field(5, gt=0, description="Runs of each arm, with the seeds seed, seed + 1, ...")
    concepts: ConceptsSection = ConceptsSection()
    keep_models: bool = Field(False, description="Keep the models. By default they are removed after their evaluation.")

    @model_validator(mode="after")
    def _needs_a_baseline(self) -> "CompareSection":
        if len(set(self.arms)) < len(self.arms) or len(self.arms) < 2 or "ntp" not in self.arms:
            raise CaftuneError("given with arms that hold ntp and at least one other arm, each once")
        return self


class Recipe(_Section):
    """Everything a run needs."""

    output: str = Field(description="The run folder.")
    seed: int = Field(42, description="Seed of labels, training and evaluation.")
    model: ModelSection
    labels: LabelsSection = LabelsSection()
    heads: HeadsSection = HeadsSection.model_validate({})
    pretrain: dict[str, Any] = Field({}, description="Options of CAFTConfig for stage 1.")
    loss: LossSection = LossSection.model_validate({})
    data: DataSection = DataSection()
    adapt: dict[str, Any] | None = Field(
        None, description="Options of CAFTConfig for an epoch of the heads on data.train before stage 2. None: none."
    )
    trainer: dict[str, Any] = Field({}, description="Options of CAFTConfig for stage 2.")
    eval: EvalSection = EvalSection()
    compare: CompareSection = CompareSection()

    @property
    def head_source(self) -> str:
        """The file or hub id that stage 1 trains on."""
        return self.heads.text or str(Path(self.output, "labels", "labels.jsonl"))

    @property
    def cuts_stage_one(self) -> bool:
        """Whether data.max_length applies to stage 1: texts are cut and packed rows have a length; labels are never cut."""
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
            return {**values, "loss": {"schedule": "sine", **loss}}
        return values

    def options_for(self, training: Training) -> dict[str, Any]:
        """The options of CAFTConfig that the recipe sets in `heads`, `loss` and `model`, for one of its trainings."""
        found = {}
        for name, option in OPTIONS.items():
            if training in option.recipe.trainings:
                section, key = option.recipe.section_and_key
                value = getattr(getattr(self, section), key)
                found[name] = option.recipe.words.get(value, value)
        return found


def _with_number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) else value
