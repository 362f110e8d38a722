"""`CAFTPlugin`: concept-aware fine-tuning in Axolotl, by a section `caft:` of its configuration.

    plugins: [caftune.integrations.axolotl.CAFTPlugin]
    caft:
      heads: outputs/stage1

Without the section the plugin does nothing. Only this package imports Axolotl.
"""

import functools
from types import SimpleNamespace
from typing import Any

from pydantic import BaseModel
from transformers import AutoTokenizer, TrainerCallback

from caftune.core.attach import ATTRIBUTE, detach_heads
from caftune.errors import CaftuneError
from caftune.integrations.axolotl_section import AxolotlOptions, read_section, refuse_options
from caftune.training.loading import Start, load_or_build_heads
from caftune.training.mixin import CAFTMixin

try:
    from axolotl.integrations.base import BasePlugin
except ModuleNotFoundError:  # without Axolotl the module can still be imported, and checks a section
    BasePlugin = object


class CAFTArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration."""

    caft: dict[str, Any] | None = None


class CAFTPlugin(BasePlugin):
    """Stage 1 and stage 2 of CAFT in Axolotl: see docs/axolotl.md.

    Raises:
        CaftuneError: a wrong section, an option of Axolotl that does not work with heads, or heads of another model.
    """

    def __init__(self) -> None:
        super().__init__()
        self._options: dict[str, Any] | None = None  # fields of CAFTOptions; None without a section
        self._start: Start | None = None
        self._trainer: Any = None
        self._asking = False

    def register(self, cfg: Any) -> None:
        """Check the section, before anything is loaded."""
        self._options = read_section(cfg["caft"]) if "caft" in cfg else None

    def get_input_args(self) -> str:
        """Where the section's model is."""
        return f"{__name__}.CAFTArgs"

    def get_training_args_mixin(self) -> str:
        """Where the options are that Axolotl's training arguments inherit."""
        return f"{AxolotlOptions.__module__}.{AxolotlOptions.__name__}"

    def get_training_args(self, cfg: Any) -> dict[str, Any] | None:
        """The options that the section sets."""
        return self._options

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Refuse what does not work with heads; Axolotl then prepares the data itself."""
        if self._options is not None:
            refuse_options(cfg, self._options)

    def pre_model_load(self, cfg: Any) -> None:
        """The same, for those who call Axolotl's functions."""
        self.load_datasets(cfg)

    def post_model_build(self, cfg: Any, model: Any) -> None:
        """Build or load the heads, on the plain model: before Axolotl adds tokens and adapters, or changes dtypes."""
        if self._options is None or cfg.get("merge_lora"):
            return
        _let_copies_run(model)
        args = AxolotlOptions(**self._options)
        name, trust = cfg["tokenizer_config"] or cfg["base_model"], bool(cfg.get("trust_remote_code"))
        tokenizer = AutoTokenizer.from_pretrained(name, revision=cfg.get("revision_of_model"), trust_remote_code=trust)
        self._start = load_or_build_heads(model, args, tokenizer)

    def get_trainer_cls(self, cfg: Any) -> type | None:
        """The trainer that Axolotl would use, with heads."""
        if self._options is None or self._asking:
            return None
        from axolotl.core.builders.causal import HFCausalTrainerBuilder

        self._asking = True  # the builder asks the plugins first
        try:
            kind = HFCausalTrainerBuilder._get_trainer_cls(SimpleNamespace(cfg=cfg))
        finally:
            self._asking = False
        return with_heads(kind, self._start, cfg.get("revision_of_model"))

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Say which heads are active, and keep them out of what is saved."""
        if self._options is None:
            return
        if not isinstance(trainer, CAFTMixin):
            raise CaftuneError(
                f"The trainer must be the one of CAFTPlugin, got {type(trainer).__name__}, which another plugin gives. Name "
                "CAFTPlugin first in plugins: its trainer is then that one with heads."
            )
        self._trainer = trainer
        trainer.add_callback(_FirstLosses())
        _logger().info(_active_heads(trainer))
        trainer.model.save_pretrained = functools.partial(_save_without_heads, trainer)

    def post_train(self, cfg: Any, model: Any) -> None:
        """Before Axolotl saves the result, take the heads out of the model. (In stage 1 its saving writes the heads.)"""
        trainer, self._trainer = self._trainer, None
        if trainer is not None and not trainer.args.pretrain_heads and trainer.heads is not None:
            del trainer.model.save_pretrained
            detach_heads(trainer.backbone.model)

    def post_train_unload(self, cfg: Any) -> None:
        """Forget the run: Axolotl keeps its plugins for the next one of the process, which may be without a section."""
        self._options = self._start = self._trainer = None

    on_config_validation_error = post_train_unload


def with_heads(kind: type, start: Start | None, revision: str | None) -> type:
    """A trainer class of Axolotl with heads, which were loaded before the model was changed."""

    class AxolotlTrainerWithHeads(CAFTMixin, kind):
        """Axolotl's trainer with auxiliary heads."""

        _revision = revision

        @property
        def reports_token_perplexity(self) -> bool:
            """Whether Axolotl logs exp(loss) as perplexity: not where the loss holds the heads' too."""
            return not (self.args.has_heads and self.args.aux_weight)

        def _find_heads(self) -> Start:
            return start or super()._find_heads()

    return AxolotlTrainerWithHeads


def _save_without_heads(trainer: Any, folder: Any, state_dict: Any = None, **options: Any) -> Any:
    """`save_pretrained` of a model that carries heads: in stage 1 of the heads, otherwise without them.

    PEFT would save the heads' adapters with the model's.
    """
    if trainer.args.pretrain_heads:
        return trainer.save_model(str(folder))
    model = trainer.model
    if state_dict is None and hasattr(model, "peft_config"):
        state_dict = {key: value for key, value in model.state_dict().items() if f"{ATTRIBUTE}." not in key}
    return type(model).save_pretrained(model, folder, state_dict=state_dict, **options)


def _active_heads(trainer: Any) -> str:
    """One sentence on the heads of a run."""
    args = trainer.args
    if trainer.heads is None:
        return "CAFT: no heads, since caft.weight is 0 and caft.heads names none."
    horizons = trainer.heads.config.horizons
    source = args.heads or "new"
    what = f"{len(horizons)} {trainer.heads.config.kind} heads (horizons {horizons[0]} to {horizons[-1]}, {source})"
    if args.pretrain_heads:
        return f"CAFT, stage 1: {what} are trained; the model stays as it is."
    if not args.trains_heads:
        frozen = "frozen" if args.aux_weight else "evaluated only"
        return f"CAFT, stage 2: {what}, {frozen}, weight {args.aux_weight:g} {args.aux_schedule}."
    return f"CAFT, stage 2: {what}, trained with the model, weight {args.aux_weight:g} {args.aux_schedule}."


class _FirstLosses(TrainerCallback):
    """Writes the heads' losses of the first logged step."""

    def __init__(self) -> None:
        self._is_written = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Write them once."""
        losses = {
            name: value for name, value in (logs or {}).items() if name.startswith("h") and name.endswith("_loss")
        }
        if losses and not self._is_written:
            self._is_written = True
            shown = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
            _logger().info(f"CAFT: first losses of the heads, step {state.global_step}: {shown}")


def _logger() -> Any:
    """Axolotl's kind of logger, whose messages it shows and only the main process writes."""
    from axolotl.utils.logging import get_logger

    return get_logger("axolotl.caftune")


def _let_copies_run(model: Any) -> None:
    """Give attention classes that Axolotl's LoRA kernels have rewritten the methods that they call.

    It sets them on each module once there are adapters. The model runs before, and heads are copies without adapters.
    """
    rewritten = {type(module) for module in model.modules() if hasattr(type(module), "_original_forward")}
    if rewritten:
        from axolotl.monkeypatch.lora_kernels import original_apply_o, original_apply_qkv_optional_v

        for kind in rewritten:
            kind.apply_qkv, kind.apply_o = original_apply_qkv_optional_v, original_apply_o
