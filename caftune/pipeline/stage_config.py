"""From a recipe to what the trainer is given: the options of each stage, the adapter, the quantisation, the tokenizer."""

import gc
import sys
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers.utils import is_bitsandbytes_available

from caftune.checkpoints.heads_folder import describe_heads, find_heads
from caftune.checkpoints.opening import opening
from caftune.core.finite import refuse_not_finite
from caftune.errors import CaftuneError
from caftune.generation.backends import Backend, Sampling, end_tokens, transformers_backend, vllm_backend
from caftune.generation.server import Server, server_backend
from caftune.pipeline.recipe import trainer_config
from caftune.pipeline.schema import AnswersSection, Recipe
from caftune.training.config import CAFTConfig
from caftune.training.prepare import ROW_OPTIONS

_DEFAULT_LENGTH = 1024


def stage_one_config(recipe: Recipe, folder: Path) -> CAFTConfig:
    """CAFTConfig of stage 1."""
    _refuse_packing_without_length(recipe, "pretrain")
    return trainer_config(
        recipe,
        "pretrain",
        output_dir=str(folder),
        pretrain_heads=True,
        max_length=_training_length(recipe) if recipe.cuts_stage_one else None,
        **_model_options(recipe, "pretrain"),
    )


def stage_two_config(recipe: Recipe, folder: Path, **ours: Any) -> CAFTConfig:
    """CAFTConfig of stage 2."""
    loss = recipe.loss
    _refuse_packing_without_length(recipe, "trainer")
    heads = None if "heads" in ours else stage_two_heads(recipe)
    for key in ("lora_rank", "learning_rate", "max_grad_norm"):
        if getattr(recipe.heads, key) is not None and not recipe.heads.train:
            raise CaftuneError(f"heads.{key} needs heads.train: true, for heads are frozen in stage 2 otherwise.")
    if recipe.heads.keep and loss.weight == 0:
        raise CaftuneError("heads.keep needs loss.weight above 0: without it there are no heads to keep. Change one.")
    if recipe.heads.keep and recipe.model.tuning != "full" and not recipe.model.lora.merge:
        raise CaftuneError(
            "heads.keep needs model.lora.merge: true, for heads are kept beside a whole model. Change one."
        )
    chosen = {
        "heads": None if heads is None else str(heads),
        "aux_min_weight": 0.0 if loss.weight == 0 else loss.min_weight,
        "max_length": _training_length(recipe),
        "output_dir": str(folder),
        **_model_options(recipe, "trainer"),
    }
    return trainer_config(recipe, "trainer", **{**chosen, **ours})


def stage_two_heads(recipe: Recipe) -> Path | None:
    """The folder of the heads that stage 2 starts from: adapted to the task where the recipe says so. None without."""
    if recipe.loss.weight == 0:
        return pretrained_heads(recipe) if recipe.heads.path is not None else None
    return adapted_heads(recipe) if recipe.adapt is not None else pretrained_heads(recipe)


def adapted_heads(recipe: Recipe) -> Path:
    """Where heads are that were adapted to the task."""
    return Path(recipe.output, "adapt", "heads")


def pretrained_heads(recipe: Recipe) -> Path:
    """The folder of heads.path (fetched, where that is a hub id) or of the heads made here.

    Raises:
        CaftuneError: there are none, or others than the recipe asks for.
        CaftuneError: heads.path is neither a folder nor on the hub.
    """
    if recipe.heads.path is not None:
        _refuse_other_heads(recipe, recipe.heads.path, recipe.heads.model_fields_set, "Remove it.")
        return find_heads(recipe.heads.path)
    heads = Path(recipe.output, "heads")
    if not heads.is_dir():
        raise CaftuneError(
            f"{heads} is missing. Run `caftune pretrain-heads` first, name other heads in heads.path, or set loss.weight=0."
        )
    _refuse_other_heads(recipe, heads, {"count", "kind"}, "Set it back, or run `caftune pretrain-heads` with it.")
    return heads


def with_inherited_options(recipe: Recipe) -> Recipe:
    """The recipe with what stage 2 says of rows and tokens in `adapt` too, so that heads are adapted to what it trains on.

    Raises:
        CaftuneError: the recipe has no `adapt`.
    """
    if recipe.adapt is None:
        raise CaftuneError(
            "adapt must be in the recipe, got none: stage 2 would not use these heads. Add adapt={learning_rate: 1.0e-4}, say."
        )
    inherited = {name: recipe.trainer[name] for name in (*ROW_OPTIONS, "model_init_kwargs") if name in recipe.trainer}
    return recipe.model_copy(update={"adapt": {**inherited, **recipe.adapt}})


def adapt_config(recipe: Recipe, folder: Path, heads: Path) -> CAFTConfig:
    """CAFTConfig of the heads' epoch on the task's data."""
    _refuse_packing_without_length(recipe, "adapt")
    return trainer_config(
        recipe,
        "adapt",
        output_dir=str(folder),
        pretrain_heads=True,
        heads=str(heads),
        num_train_epochs=(recipe.adapt or {}).get("num_train_epochs", 1),
        max_length=_training_length(recipe),
        **_model_options(recipe, "adapt"),
    )


def _training_length(recipe: Recipe) -> int | None:
    """The number of tokens that rows are cut to; None: rows are not cut."""
    length = recipe.data.max_length
    if length is None:
        return None
    context = context_length(recipe)
    if length == "auto":
        return min(_DEFAULT_LENGTH, context or _DEFAULT_LENGTH)
    if context is not None and length > context:
        raise CaftuneError(f"data.max_length must be at most the model's context of {context} tokens, got {length}.")
    return length


def _refuse_packing_without_length(recipe: Recipe, section: Literal["pretrain", "adapt", "trainer"]) -> None:
    packing = {"packing", "eval_packing"} & {name for name, value in (getattr(recipe, section) or {}).items() if value}
    if packing and recipe.data.max_length is None:
        raise CaftuneError(
            f"data.max_length must be a number with {section}.{packing.pop()}, which fills rows up to it, got null. Set it."
        )


def for_prepared_rows(args: CAFTConfig) -> CAFTConfig:
    """The options for a trainer whose rows are already cut: TRL takes padding_free only without a max_length."""
    if args.padding_free and not args.packing:
        args.max_length = None
    return args


def _model_options(recipe: Recipe, section: Literal["pretrain", "adapt", "trainer"]) -> dict[str, Any]:
    """What `from_pretrained` is given beyond the name: the base's revision, bfloat16 around 4 bits."""
    options = {"revision": recipe.model.revision} if recipe.model.revision is not None else {}
    trust = {"trust_remote_code": True} if recipe.model.trust_remote_code else {}
    if section == "trainer" and recipe.model.tuning == "qlora":
        options["dtype"] = "bfloat16"
    given = (getattr(recipe, section) or {}).get("model_init_kwargs", {})
    return trust | ({"model_init_kwargs": {**options, **given}} if options else {})


def _refuse_other_heads(recipe: Recipe, heads: str | Path, keys: Collection[str], remedy: str) -> None:
    """Raise CaftuneError where options of the recipe (`keys`) differ from those of `heads`."""
    found = describe_heads(heads)
    for key, value in {"count": len(found["horizons"]), "kind": found["kind"]}.items():
        if key in keys and getattr(recipe.heads, key) != value:
            raise CaftuneError(
                f"heads.{key} must be {value!r}, as in {heads}, got {getattr(recipe.heads, key)!r}. {remedy}"
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


def refuse_quantised_base(recipe: Recipe) -> None:
    """Raise CaftuneError where an adapter would have to be merged into a base that is published quantised."""
    config = load_config(recipe)
    if recipe.model.lora.merge and getattr(config, "quantization_config", None):
        raise CaftuneError(
            f"model.name must be an unquantised base, and {recipe.model.name} is published quantised: an adapter cannot be "
            "merged into it. Name the unquantised base (tuning: qlora rounds it), or set model.lora.merge=false."
        )


def quantization(recipe: Recipe) -> Any:
    """Four bits with the settings of the QLoRA paper (NormalFloat4, double quantisation, bfloat16), None for other tunings."""
    refuse_quantised_base(recipe)
    if recipe.model.tuning != "qlora":
        return None
    if not is_bitsandbytes_available():
        raise CaftuneError("model.tuning=qlora needs bitsandbytes. Install it with `pip install caftune[qlora]`.")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
    )


def context_length(recipe: Recipe, name: str | None = None) -> int | None:
    """The context of the base (or another model) in tokens, None where its configuration names none."""
    return getattr(load_config(recipe, name).get_text_config(), "max_position_embeddings", None)


def embedding_rows(recipe: Recipe, args: CAFTConfig) -> int:
    """The rows of the base's embeddings in training; sys.maxsize where its configuration does not say."""
    if args.chat_template_path is not None and not Path(args.chat_template_path).is_file():
        return sys.maxsize  # TRL then adds rows for the tokens of the template's tokenizer
    return getattr(load_config(recipe).get_text_config(), "vocab_size", None) or sys.maxsize


def load_tokenizer(recipe: Recipe, name: str | None = None) -> Any:
    """The tokenizer of the base (or another model)."""
    with opening_model(recipe, name):
        return AutoTokenizer.from_pretrained(name or recipe.model.name, **_where(recipe, name))


def load_config(recipe: Recipe, name: str | None = None) -> Any:
    """The configuration of the base (or another model)."""
    with opening_model(recipe, name):
        return AutoConfig.from_pretrained(name or recipe.model.name, **_where(recipe, name))


def trained_tokenizer(recipe: Recipe, checkpoint: str) -> tuple[Any, int | None]:
    """The tokenizer of a checkpoint of stage 2, and the rows its embeddings were resized to (None: as in the base)."""
    has_own = Path(checkpoint, "tokenizer_config.json").is_file()
    own = AutoTokenizer.from_pretrained(checkpoint, **_where(recipe, checkpoint)) if has_own else None
    tokenizer = own or load_tokenizer(recipe)
    # SFTTrainer leaves as many rows as tokens where it takes the template of another tokenizer (TRL 1.16).
    is_resized = not (recipe.trainer.get("chat_template_path") or ".jinja").endswith((".jinja", ".j2"))
    return tokenizer, len(tokenizer) if is_resized else None


def load_model(recipe: Recipe, name: str | None = None) -> Any:
    """The base (or another model), in the dtype it was published in, on the GPU where there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with opening_model(recipe, name):
        model: Any = AutoModelForCausalLM.from_pretrained(
            name or recipe.model.name, dtype="auto", **_where(recipe, name)
        )
    place = f"model.name ({recipe.model.name})" if name is None else f"The model in {name}"
    refuse_not_finite(
        dict(model.named_parameters()), place, "Its answers would be noise: use another model or checkpoint."
    )
    return model.to(device).eval()


def free_memory() -> None:
    """Let go of models and trainers that nobody holds any more, and of what torch keeps of the GPU for later use.

    vLLM starts only where nearly the whole GPU is free.
    """
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def answer_backend(
    recipe: Recipe,
    section: AnswersSection,
    tokenizer: Any,
    sampling: Sampling,
    *,
    name: str | None = None,
    loaded: dict[str, Any] | None = None,
) -> Backend:
    """The section's backend, which answers prompts with the base (or another model).

    Args:
        loaded: a dict in which the model is kept for further backends; clear it to free the model.
    """
    loaded = {} if loaded is None else loaded
    if not loaded:
        free_memory()
    if section.backend == "transformers":
        if "model" not in loaded:
            loaded["model"] = load_model(recipe, name)
        model = loaded["model"]
        return transformers_backend(
            model, tokenizer, sampling, batching=section.batching, batch_size=section.batch_size
        )
    model_name = name or recipe.model.name
    eos = stop_tokens(recipe, tokenizer, model_name)
    if section.backend == "vllm":
        where = _where(recipe, name)
        own = {"trust_remote_code": where["trust_remote_code"], **_engine_dtype(recipe, model_name, section.vllm)}
        engine = {**own, **section.vllm}
        return vllm_backend(model_name, where["revision"], sampling, eos, engine, loaded)
    server = Server(**{**section.server.model_dump(), "model": section.server.model or model_name})
    return server_backend(server, tokenizer, sampling, eos)


def _engine_dtype(recipe: Recipe, name: str, engine: Mapping[str, Any]) -> dict[str, str]:
    """The dtype for vLLM: that of `load_model`. By default vLLM would round a float32 model to bfloat16.

    Empty where `engine` names another model, a dtype or a quantization, which are part of `who_answers`.
    """
    if {"model", "quantization", "dtype"} & set(engine):
        return {}
    config = load_config(recipe, name)
    if getattr(config, "quantization_config", None):
        return {}
    dtype = config.dtype or getattr(config.get_text_config(), "dtype", None) or _dtype_of_weights(recipe, name)
    return {"dtype": str(dtype).removeprefix("torch.")}


def _dtype_of_weights(recipe: Recipe, name: str) -> Any:
    """The dtype of a model whose configuration names none: transformers takes the weights' dtype."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="meta", **_where(recipe, name))
    return model.dtype


def stop_tokens(recipe: Recipe, tokenizer: Any, name: str | None = None) -> list[int]:
    """The tokens that end an answer of the base (or another model)."""
    return end_tokens(_generation_config(recipe, name or recipe.model.name), tokenizer)


def who_answers(section: AnswersSection) -> str:
    """What tells the answers of one backend from those of another, beyond the model: empty where nothing does."""
    if section.backend == "server":
        return section.server.model or ""
    engine = {name: section.vllm[name] for name in ("model", "quantization", "dtype") if name in section.vllm}
    return str(engine) if engine and section.backend == "vllm" else ""


def _where(recipe: Recipe, name: str | None = None) -> dict[str, Any]:
    """What `from_pretrained` is given. The recipe's revision is the base's; other models are taken as they are."""
    revision = recipe.model.revision if name in (None, recipe.model.name) else None
    return {"revision": revision or "main", "trust_remote_code": bool(recipe.model.trust_remote_code)}


def _generation_config(recipe: Recipe, name: str) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(name, **_where(recipe, name))
    except OSError:  # older models have none: it is part of their configuration
        return GenerationConfig.from_model_config(load_config(recipe, name))


def opening_model(recipe: Recipe, name: str | None = None) -> AbstractContextManager[None]:
    """The context in which the base (or another model) is opened: see `opening`."""
    where = _where(recipe, name)
    place = (
        "model.name"
        if name in (None, recipe.model.name)
        else "eval.model"
        if name == recipe.eval.model
        else "The model"
    )
    return opening(name or recipe.model.name, place, revision=where["revision"], trust=where["trust_remote_code"])
