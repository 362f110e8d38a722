"""From a recipe to what the trainer is given: the options of each stage, the adapter, the quantisation, the tokenizer."""

from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from caftune.checkpoint import describe_heads
from caftune.config import CAFTConfig
from caftune.recipe import Recipe, RecipeError, trainer_config

_DEFAULT_LENGTH = 1024


def stage_one_config(recipe: Recipe, folder: Path) -> CAFTConfig:
    """CAFTConfig of stage 1."""
    return trainer_config(
        recipe,
        "pretrain",
        output_dir=str(folder),
        pretrain_heads=True,
        num_heads=recipe.heads.count,
        head_kind=recipe.heads.kind,
        soft_targets=recipe.heads.targets == "model",
        aux_decay=recipe.loss.decay,
        # Labels have the length they have; packing needs one.
        max_length=_training_length(recipe) if recipe.heads.text or recipe.pretrain.get("packing") else None,
        **_model_options(recipe, "pretrain"),
    )


def stage_two_config(recipe: Recipe, folder: Path, **ours: Any) -> CAFTConfig:
    """CAFTConfig of stage 2."""
    loss = recipe.loss
    heads = recipe.heads.path or str(Path(recipe.output, "heads"))
    if loss.weight > 0 and "heads" not in ours and recipe.heads.path is None and not Path(heads).is_dir():
        raise RecipeError(
            f"{heads} is missing. Run `caftune pretrain-heads` first, name other heads in heads.path, or set loss.weight=0."
        )
    _refuse_other_heads(recipe)
    for key in ("lora_rank", "learning_rate", "max_grad_norm"):
        if getattr(recipe.heads, key) is not None and not recipe.heads.train:
            raise RecipeError(f"heads.{key} needs heads.train: true, for heads are frozen in stage 2 otherwise.")
    chosen = {
        "heads": heads if loss.weight > 0 else None,
        "force_heads": recipe.heads.force,
        "train_heads": recipe.heads.train,
        "heads_lora_rank": recipe.heads.lora_rank,
        "heads_learning_rate": recipe.heads.learning_rate,
        "heads_max_grad_norm": recipe.heads.max_grad_norm,
        "aux_weight": loss.weight,
        "aux_decay": loss.decay,
        "aux_schedule": loss.schedule,
        "max_length": _training_length(recipe),
        "output_dir": str(folder),
        **_model_options(recipe, "trainer"),
    }
    return trainer_config(recipe, "trainer", **{**chosen, **ours})


def _training_length(recipe: Recipe) -> int:
    context = context_length(recipe)
    length = recipe.data.max_length or min(_DEFAULT_LENGTH, context or _DEFAULT_LENGTH)
    if context is not None and length > context:
        raise RecipeError(f"data.max_length must be at most the model's context of {context} tokens, got {length}.")
    return length


def _model_options(recipe: Recipe, section: Literal["pretrain", "trainer"]) -> dict[str, Any]:
    """What `from_pretrained` is given beyond the name: the base's revision, bfloat16 around 4 bits."""
    options = {"revision": recipe.model.revision} if recipe.model.revision is not None else {}
    if section == "trainer" and recipe.model.tuning == "qlora":
        options["dtype"] = "bfloat16"
    given = getattr(recipe, section).get("model_init_kwargs", {})
    return {"model_init_kwargs": {**options, **given}} if options else {}


def _refuse_other_heads(recipe: Recipe) -> None:
    """Raise RecipeError where the recipe asks for other heads than heads.path holds."""
    if recipe.heads.path is None or recipe.loss.weight == 0:
        return
    found = describe_heads(recipe.heads.path)
    for key, value in {"count": len(found["horizons"]), "kind": found["kind"]}.items():
        if key in recipe.heads.model_fields_set and getattr(recipe.heads, key) != value:
            raise RecipeError(
                f"heads.{key} must be {value!r}, as in {recipe.heads.path}, got {getattr(recipe.heads, key)!r}. Remove it."
            )


def lora_config(recipe: Recipe) -> Any:
    """The recipe's LoraConfig, None for full fine-tuning."""
    if recipe.model.tuning == "full":
        return None
    from peft import LoraConfig

    lora = recipe.model.lora
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save or None,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
    )


def quantization(recipe: Recipe) -> Any:
    """Four bits with the settings of the QLoRA paper (NormalFloat4, double quantisation, bfloat16), None for other tunings."""
    config = AutoConfig.from_pretrained(recipe.model.name, revision=recipe.model.revision or "main")
    if recipe.model.lora.merge and getattr(config, "quantization_config", None):
        raise RecipeError(
            f"model.name must be an unquantised base, and {recipe.model.name} is published quantised: an adapter cannot be "
            "merged into it. Name the unquantised base (tuning: qlora rounds it), or set model.lora.merge=false."
        )
    if recipe.model.tuning != "qlora":
        return None
    if not is_bitsandbytes_available():
        raise RecipeError("model.tuning=qlora needs bitsandbytes. Install it with `pip install caftune[qlora]`.")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
    )


def context_length(recipe: Recipe) -> int | None:
    """The base's context in tokens, None where its configuration names none."""
    config = AutoConfig.from_pretrained(recipe.model.name, revision=recipe.model.revision or "main")
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_tokenizer(recipe: Recipe) -> Any:
    """The base's tokenizer."""
    _refuse_missing_model(recipe)
    return AutoTokenizer.from_pretrained(recipe.model.name, revision=recipe.model.revision or "main")


def _refuse_missing_model(recipe: Recipe) -> None:
    name = recipe.model.name
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name, "config.json").is_file():
        raise RecipeError(f"model.name must be a folder with a config.json or a hub id, and {name} is no such folder.")
