"""From a recipe to the trainer's options: CAFTConfig of each stage, the adapter, the quantization."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from caftune.errors import CaftuneError
from caftune.pipeline.base_model import BaseModel
from caftune.pipeline.recipe import trainer_config
from caftune.pipeline.schema import HeadsSection, LossSection, ModelSection, Recipe
from caftune.training.config import CAFTConfig
from caftune.training.prepare import ROW_OPTIONS

_DEFAULT_LENGTH = 1024
_MEASURED_RATE, _MEASURED_WIDTH = 3e-3, 576  # of stage 1, on SmolLM2-135M


def stage_one_config(recipe: Recipe, base: BaseModel, folder: Path) -> CAFTConfig:
    """CAFTConfig of stage 1."""
    _refuse_packing_without_length("pretrain", recipe.pretrain, recipe.data.max_length)
    return trainer_config(
        recipe,
        "pretrain",
        defaults={
            "learning_rate": _stage_one_rate(base),
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.05,  # a share of all steps
        },
        output_dir=str(folder),
        pretrain_heads=True,
        aux_target_share=recipe.heads.target_share,
        max_length=_training_length(recipe.data.max_length, base) if recipe.cuts_stage_one else None,
        **_model_options(base, recipe.pretrain, dtype=_frozen_dtype(base)),
    )


def _frozen_dtype(base: BaseModel) -> str:
    """The dtype of a model that is not trained: its own where that is bfloat16, in which it has written the labels.

    Others run in float32: float16 has too little range for the heads' gradients, and weights without a dtype in the
    configuration may be float16.
    """
    published = getattr(base.config.get_text_config(), "dtype", None) or getattr(base.config, "dtype", None)
    return "auto" if str(published).endswith("bfloat16") else "float32"


def _stage_one_rate(base: BaseModel) -> float:
    """The learning rate of new heads: docs/results/real_heads.md. Wider models need smaller ones, as 1 / width."""
    width = getattr(base.config.get_text_config(), "hidden_size", None) or _MEASURED_WIDTH
    return _MEASURED_RATE * min(1.0, _MEASURED_WIDTH / width)


def adapt_config(recipe: Recipe, base: BaseModel, folder: Path, heads: Path) -> CAFTConfig:
    """CAFTConfig of the heads' epoch on the task's data."""
    options = recipe.adapt or {}
    _refuse_packing_without_length("adapt", options, recipe.data.max_length)
    return trainer_config(
        recipe,
        "adapt",
        output_dir=str(folder),
        pretrain_heads=True,
        heads=str(heads),
        num_train_epochs=options.get("num_train_epochs", 1),
        max_length=_training_length(recipe.data.max_length, base),
        **_model_options(base, options),
    )


def stage_two_config(recipe: Recipe, base: BaseModel, folder: Path, heads: Path | None, **ours: Any) -> CAFTConfig:
    """CAFTConfig of stage 2.

    Args:
        heads: the folder of the heads that it starts from.
        ours: options that replace the recipe's.
    """
    loss, dtype = recipe.loss, "bfloat16" if recipe.model.tuning == "qlora" else None
    _refuse_packing_without_length("trainer", recipe.trainer, recipe.data.max_length)
    refuse_heads_options(recipe.heads, recipe.loss, recipe.model)
    chosen = {
        "heads": None if heads is None else str(heads),
        "aux_min_weight": 0.0 if loss.weight == 0 else loss.min_weight,
        "max_length": _training_length(recipe.data.max_length, base),
        "output_dir": str(folder),
        **_model_options(base, recipe.trainer, dtype=dtype),
    }
    return trainer_config(recipe, "trainer", **{**chosen, **ours})


def inherited_options(adapt: Mapping[str, Any] | None, trainer: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `adapt` and what `trainer` says of rows and tokens, so that both stages train on the same tokens.

    Raises:
        CaftuneError: the recipe has no `adapt`.
    """
    if adapt is None:
        raise CaftuneError(
            "adapt must be in the recipe, got none: stage 2 would not use these heads. Add "
            "adapt={learning_rate: 1.0e-4}, for example."
        )
    return {**{name: trainer[name] for name in (*ROW_OPTIONS, "model_init_kwargs") if name in trainer}, **adapt}


def refuse_evaluation_without_rows(recipe: Recipe) -> None:
    """Raise CaftuneError where a training is to be evaluated and data.eval is missing."""
    for section in ("adapt", "trainer"):
        strategy = (getattr(recipe, section) or {}).get("eval_strategy", "no")
        if strategy not in ("no", False) and recipe.data.eval is None:  # YAML 1.1 reads `no` as false
            raise CaftuneError(
                f"data.eval must name a file or hub id with {section}.eval_strategy={strategy}, got nothing. Add it, or leave "
                f"{section}.eval_strategy out."
            )


def refuse_heads_options(heads: HeadsSection, loss: LossSection, model: ModelSection) -> None:
    """Raise CaftuneError for options of stage 2's heads that exclude each other."""
    for key in ("lora_rank", "learning_rate", "max_grad_norm"):
        if getattr(heads, key) is not None and not heads.train:
            raise CaftuneError(
                f"heads.{key} needs heads.train: true, because heads are frozen in stage 2 otherwise. Change one."
            )
    if loss.min_weight > 0 and loss.weight > 0 and heads.train:
        raise CaftuneError(
            "loss.min_weight needs heads.train: false, because heads that are left out would not learn. Change one."
        )
    if heads.keep and not loss.weight > 0:
        raise CaftuneError("heads.keep needs loss.weight above 0: without it there are no heads to keep. Change one.")
    if heads.keep and model.tuning != "full" and not model.lora.merge:
        raise CaftuneError(
            "heads.keep needs model.lora.merge: true, because heads are kept next to a whole model. Change one."
        )


def _training_length(length: int | str | None, base: BaseModel) -> int | None:
    """The number of tokens that rows are cut to; None: rows are not cut."""
    if length is None:
        return None
    context = base.context
    if isinstance(length, str):  # auto
        return min(_DEFAULT_LENGTH, context or _DEFAULT_LENGTH)
    if context is not None and length > context:
        raise CaftuneError(f"data.max_length must be at most the model's context of {context} tokens, got {length}.")
    return length


def _refuse_packing_without_length(section: str, options: Mapping[str, Any], length: int | str | None) -> None:
    packing = next((name for name in ("packing", "eval_packing") if options.get(name)), None)
    if packing and length is None:
        raise CaftuneError(
            f"data.max_length must be a number with {section}.{packing}, which fills rows up to it, got null. Set it."
        )


def _model_options(base: BaseModel, options: Mapping[str, Any], *, dtype: str | None = None) -> dict[str, Any]:
    """What `from_pretrained` is given beyond the name: the base's revision, and the dtype around 4 bits."""
    chosen = {"revision": base.revision, "dtype": dtype}
    init = {name: value for name, value in chosen.items() if value is not None}
    trust = {"trust_remote_code": True} if base.trust_remote_code else {}
    return trust | ({"model_init_kwargs": {**init, **options.get("model_init_kwargs", {})}} if init else {})


def lora_config(section: ModelSection) -> Any:
    """The recipe's LoraConfig, None for full fine-tuning."""
    if section.tuning == "full":
        return None
    from peft import LoraConfig

    lora = section.lora
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save or None,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
    )


def refuse_quantised_base(base: BaseModel, *, merge: bool) -> None:
    """Raise CaftuneError where an adapter would have to be merged into a base that is published quantised."""
    if merge and getattr(base.config, "quantization_config", None):
        raise CaftuneError(
            f"model.name must be an unquantised base, got {base.name}, which is published quantised: an adapter cannot be "
            "merged into it. Name the unquantised base (tuning: qlora rounds it), or set model.lora.merge=false."
        )


def quantization(section: ModelSection, base: BaseModel) -> Any:
    """Four bits with the settings of the QLoRA paper (NormalFloat4, double quantisation, bfloat16), None for other tunings."""
    refuse_quantised_base(base, merge=section.lora.merge)
    if section.tuning != "qlora":
        return None
    if not is_bitsandbytes_available():
        raise CaftuneError("model.tuning=qlora needs bitsandbytes. Install it with `pip install 'caftune[qlora]'`.")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
    )


def embedding_rows(base: BaseModel, args: CAFTConfig) -> int:
    """The rows of the base's embeddings in training; sys.maxsize where its configuration does not say."""
    if args.chat_template_path is not None and not Path(args.chat_template_path).is_file():
        return sys.maxsize  # TRL then adds rows for the tokens of the template's tokenizer
    return getattr(base.config.get_text_config(), "vocab_size", None) or sys.maxsize
