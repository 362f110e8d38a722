"""`CAFTConfig`: TRL's `SFTConfig` and what concept-aware fine-tuning adds to it."""

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from caftune.errors import CaftuneError
from caftune.training._trl import SFTConfig, get_config_model_id
from caftune.training.options import CAFTOptions


@dataclass
class CAFTConfig(CAFTOptions, SFTConfig):
    """`SFTConfig` with the options of concept-aware fine-tuning: see `CAFTOptions`.

    Raises:
        CaftuneError: a value outside its range, or options that exclude each other.
    """

    def __post_init__(self) -> None:
        if self.bf16 is None and not is_torch_bf16_gpu_available():
            self.bf16 = False  # SFTConfig's own default, True, stops on a CPU
        super().__post_init__()
        if self.has_heads:
            self._check_packing()

    def _check_packing(self) -> None:
        if self.packing and self.packing_strategy == "wrapped":
            raise CaftuneError(
                "packing_strategy must be 'bfd' or 'bfd_split' with heads, got 'wrapped', which cuts documents without marking "
                "where, so heads would be trained to predict into the next document. Leave out `heads` to train without them."
            )
        if self.eval_packing and not self.packing:
            raise CaftuneError(
                "eval_packing must not be True without packing in a run with heads: TRL (1.16) would then not mark where "
                "documents begin, and heads would be evaluated across them. Set packing=True too, or leave eval_packing out."
            )


def as_caft_config(args: TrainingArguments | None, model: Any) -> CAFTConfig:
    """`args` as a CAFTConfig. None, an SFTConfig and TrainingArguments mean what they mean to SFTTrainer: no heads.

    Args:
        model: the model, or its name, from which the output folder is named where `args` is None.
    """
    if isinstance(args, CAFTConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return CAFTConfig(f"{name.split('/')[-1]}-SFT", aux_weight=0.0)
    if not isinstance(args, TrainingArguments):
        raise TypeError(
            f"args must be a CAFTConfig, an SFTConfig or TrainingArguments, got {type(args).__name__}. Use CAFTConfig."
        )
    if not isinstance(args, SFTConfig):
        args = SFTConfig(**{**args.to_dict(), "hub_token": args.hub_token})  # to_dict hides the token
    # __init__ would repeat SFTConfig's checks on values that it has already changed.
    config = CAFTConfig.__new__(CAFTConfig)
    config.__dict__ = vars(args)  # shared, so that later changes of `args` count, as with SFTTrainer
    config.aux_weight, config.aux_schedule = 0.0, "constant"
    return config
