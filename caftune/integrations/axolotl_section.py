"""The section `caft:` of an Axolotl configuration, and the options of Axolotl that do not work with heads."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, ValidationError, create_model

from caftune.errors import CaftuneError
from caftune.files import read_json
from caftune.training.options import OPTIONS, CAFTOptions

# Keys are the names of CAFTOptions, those of the auxiliary losses without "aux_", as in a recipe's `loss`.
_OWN = ("early_stopping_patience",)  # Axolotl has this option itself
_FIELDS = {name.removeprefix("aux_"): name for name in OPTIONS if name not in _OWN}
_SPELLINGS = {"train": "train_heads"}  # as in a recipe's `heads`


@dataclass
class AxolotlOptions(CAFTOptions):
    """CAFTOptions for Axolotl's training arguments, all of which inherit them: without the section there are no heads."""

    aux_weight: float | None = 0.0


def _model() -> Any:
    made: dict[str, Any] = {
        key: (OPTIONS[name].type, Field(OPTIONS[name].default, **OPTIONS[name].recipe.bounds))
        for key, name in _FIELDS.items()
    }
    return create_model("CaftSection", __config__=ConfigDict(extra="forbid"), **made)


def read_section(section: Any) -> dict[str, Any]:
    """The fields of CAFTOptions that a section sets, checked; `aux_weight` is None, its default, where it sets none.

    Raises:
        CaftuneError: it is no section, an unknown key (with the nearest known one), a value out of range, or options that
            exclude each other.
    """
    if not isinstance(section, Mapping):
        keys = ", ".join(_FIELDS)
        raise CaftuneError(f"caft must be a section (with {keys}), got {section!r}. Remove it, or give it keys.")
    values = {_SPELLINGS.get(key, str(key)): value for key, value in section.items()}
    if len(values) < len(section):
        raise CaftuneError("caft.train and caft.train_heads are the same option, got both. Remove one.")
    try:
        given = _model().model_validate(values).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise CaftuneError(_explain(error)) from error
    options = {"aux_weight": None, **{_FIELDS[key]: value for key, value in given.items()}}
    try:
        AxolotlOptions(**options)
    except CaftuneError as error:
        raise CaftuneError(f"caft: {str(error).replace('aux_', '')}") from error
    return options


def _explain(error: ValidationError) -> str:
    """The first problem of the section, in one sentence."""
    problem = error.errors()[0]
    key = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key.removeprefix("aux_"), _FIELDS, n=1, cutoff=0.5)
        return f"caft.{key} is not a key of caft. " + (
            f"Did you mean caft.{near[0]}?" if near else f"Known: {', '.join(_FIELDS)}."
        )
    wanted = problem["msg"].removeprefix("Input should be ")
    return f"caft.{key} must be {wanted}, got {problem['input']!r}. Change it."


def refuse_options(cfg: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise CaftuneError for the first option of a validated configuration that does not work with heads."""
    for problem in _problems(cfg, bool(options.get("pretrain_heads"))):
        raise CaftuneError(problem)


# Options that are None or False where they are not used, and the reason why heads do not work with them.
_REFUSED = {
    "rl": "heads are trained on the tokens of answers, not on preferences or rewards",
    "reward_model": "a reward model predicts no tokens",
    "process_reward_model": "a reward model predicts no tokens",
    **dict.fromkeys(
        ("liger_fused_linear_cross_entropy", "cut_cross_entropy", "chunked_cross_entropy"),
        "the model's own loss must be that of transformers (heads never hold whole logits)",
    ),
    "activation_offloading": "the heads' gradients are computed within the forward pass, which it takes for the end of a step",
    "tiled_mlp": "it adds gradients to weights by itself, past those of the heads",
    "balance_labels": "its sampler reads the data collator, which also computes the heads' targets",
    "relora": "it would merge and reset the heads' adapters as the model's",
    "pretraining_dataset": "its batches do not say where documents begin, so heads would predict into the next one; use "
    "`datasets` with `type: completion`",
    "streaming": "its batches do not say where documents begin, so heads would predict into the next one; use `datasets`",
}
_PARALLEL = ("context_parallel_size", "tensor_parallel_size", "expert_parallel_size", "sequence_parallel_degree")


def _problems(cfg: Mapping[str, Any], stage_one: bool) -> Iterator[str]:
    for name, reason in _REFUSED.items():
        if cfg.get(name):
            found = getattr(cfg[name], "value", cfg[name])  # of an enumeration
            yield f"{name} must not be set with a caft section, got {found!r}: {reason}. Remove one of them."
    for name in _PARALLEL:
        if (cfg.get(name) or 1) > 1:
            yield f"{name} must be 1 with a caft section, got {cfg[name]}: heads need whole sequences and whole weights."
    for name in ("adapter", "load_in_4bit", "load_in_8bit") if stage_one else ():
        if cfg.get(name):
            yield (
                f"{name} must not be set with caft.pretrain_heads, got {cfg[name]!r}: stage 1 trains heads of the plain base. "
                "Use it in stage 2."
            )
    yield from _packing_problems(cfg)
    yield from _sharding_problems(cfg)


def _packing_problems(cfg: Mapping[str, Any]) -> Iterator[str]:
    for name in ("sample_packing", "eval_sample_packing"):
        if cfg.get(name) and not cfg.get("attn_decontaminates_packing"):
            yield (
                f"{name} must be false with attn_implementation={cfg.get('attn_implementation')!r} and a caft section: packed "
                "documents would see each other. Set attn_implementation to sdpa, eager or flash_attention_2."
            )


def _sharding_problems(cfg: Mapping[str, Any]) -> Iterator[str]:
    deepspeed, fsdp = cfg.get("deepspeed") or {}, cfg.get("fsdp_config") or {}
    settings = read_json(Path(deepspeed)) if isinstance(deepspeed, str) else deepspeed  # most name a file
    if (settings.get("zero_optimization") or {}).get("stage") == 3:
        yield (
            "deepspeed must name ZeRO stage 2 or lower with a caft section, got stage 3: the unembedding, which heads share, "
            "is empty there outside its own call. FSDP2 (fsdp_version: 2) shards the weights, too."
        )
    if fsdp.get("cpu_ram_efficient_loading"):
        yield (
            "fsdp_config.cpu_ram_efficient_loading must be false with a caft section, got true: every process copies the heads "
            "from the base, which then only the first one holds."
        )
