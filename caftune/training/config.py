"""`CAFTConfig`: TRL's `SFTConfig` and what concept-aware fine-tuning adds to it."""

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig
from trl.trainer.utils import get_config_model_id

from caftune.core.heads import HeadsConfig
from caftune.core.objective import AuxiliaryWeights
from caftune.errors import CaftuneError
from caftune.training.options import CAFTOptions


@dataclass
class CAFTConfig(CAFTOptions, SFTConfig):
    """`SFTConfig` with the options of concept-aware fine-tuning (options.py; docs/papers.md has the paper's values).

    Stage 2 needs `heads` unless `aux_weight` is 0; in stage 1, `heads` are trained further. Without `heads` and with
    `aux_weight=0`, CAFTTrainer is SFTTrainer.

    Raises:
        CaftuneError: a value outside its range, or options that exclude each other.
    """

    def __post_init__(self) -> None:
        if self.bf16 is None and not is_torch_bf16_gpu_available():
            self.bf16 = False  # SFTConfig's own default, True, stops on a CPU
        super().__post_init__()
        if self.aux_weight is None:
            self.aux_weight = 1.0 if self.pretrain_heads else 0.01
        if self.aux_schedule is None:
            self.aux_schedule = "constant" if self.pretrain_heads else "reflected_sine"
        self.auxiliary_weights  # noqa: B018  (checks the three values)
        HeadsConfig(self.num_heads, self.head_kind)
        if self.pretrain_heads:
            self._check_stage_one()
        else:
            self._check_stage_two()
        if self.soft_top_k is not None and not (self.soft_targets and self.soft_top_k >= 1):
            raise CaftuneError(f"soft_top_k must be at least 1, and needs soft_targets=True, got {self.soft_top_k}.")
        self._check_trained_heads()
        self.refuse_out_of_bounds()
        if self.has_heads:
            self._check_packing()

    def _check_stage_one(self) -> None:
        if self.aux_weight == 0:
            raise CaftuneError("aux_weight must be above 0 in stage 1 (pretrain_heads=True), got 0.")
        if self.label_smoothing_factor > 0:
            raise CaftuneError(
                f"label_smoothing_factor must be 0 in stage 1 (pretrain_heads=True), got {self.label_smoothing_factor}: it "
                "smooths the model's own loss, which stage 1 does not compute. Set it in stage 2."
            )

    def _check_stage_two(self) -> None:
        if self.soft_targets:
            raise CaftuneError("soft_targets must be False in stage 2: there the tokens of the task are the targets.")
        if self.heads is None and self.auxiliary_weights.weight > 0:
            raise CaftuneError(
                "heads must name a folder of pretrained heads, got None. Pretrain some with pretrain_heads=True (or "
                "`caftune pretrain-heads`), or set aux_weight=0 for plain fine-tuning."
            )

    def _check_trained_heads(self) -> None:
        """Options that only trained heads have, or only frozen ones."""
        if self.heads_max_grad_norm is not None and self.max_grad_norm == 0:
            raise CaftuneError(
                "heads_max_grad_norm must be None with max_grad_norm=0, which switches all clipping off. Use a large "
                "max_grad_norm to clip the heads alone."
            )
        for name in ("heads_lora_rank", "heads_learning_rate", "heads_max_grad_norm"):
            value = getattr(self, name)
            if value is not None and (self.pretrain_heads or not self.train_heads):
                raise CaftuneError(
                    f"{name} must be None unless stage 2 trains the heads (train_heads=True), got {value}. Leave it out."
                )
        if self.aux_min_weight > 0 and (self.pretrain_heads or self.train_heads):
            raise CaftuneError(
                f"aux_min_weight must be 0 where heads are trained (pretrain_heads, train_heads), got {self.aux_min_weight}: "
                "heads that are left out would not learn. Freeze them in stage 2 (train_heads=False), or leave it out."
            )

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

    @property
    def has_heads(self) -> bool:
        """Whether the run has heads. Without them CAFTTrainer is SFTTrainer."""
        return self.pretrain_heads or self.heads is not None

    @property
    def trains_heads(self) -> bool:
        """Whether the heads' weights are trained: in stage 1, and in stage 2 with `train_heads` and an `aux_weight` above 0."""
        return self.has_heads and bool(self.aux_weight) and (self.pretrain_heads or self.train_heads)

    @property
    def auxiliary_weights(self) -> AuxiliaryWeights:
        """alpha, beta and gamma."""
        return AuxiliaryWeights(float(self.aux_weight or 0), self.aux_decay, str(self.aux_schedule))


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
