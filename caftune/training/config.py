"""`CAFTConfig`: TRL's `SFTConfig` and what concept-aware fine-tuning adds to it."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig
from trl.trainer.utils import get_config_model_id

from caftune.core.heads import HeadsConfig
from caftune.core.objective import SCHEDULES, AuxiliaryWeights
from caftune.errors import CaftuneError


@dataclass
class CAFTConfig(SFTConfig):
    """`SFTConfig` and what concept-aware fine-tuning adds. See docs/papers.md for the paper's values.

    Args:
        heads: folder of pretrained heads. Needed in stage 2 unless `aux_weight` is 0; in stage 1, heads to train further.
            Without `heads` and with `aux_weight=0`, CAFTTrainer is SFTTrainer.
        pretrain_heads: stage 1: train the heads, leave the model as it is.
        num_heads: stage 1: number of new heads; head i predicts horizon i + 2.
        head_kind: stage 1: "decoder" (a copy of the last layer) or "mlp".
        soft_targets: stage 1: hold horizon h to the model's own next-token distribution h - 1 positions later instead of to
            the token of the data. Evaluation is by the tokens either way.
        soft_top_k: with soft_targets: keep the so many likeliest tokens of each distribution. None: all.
        force_heads: accept heads of a relative: same architecture and tokenizer, other weights (a fine-tuned child).
        train_heads: stage 2: train the heads along with the model. They are dropped at export either way.
        heads_lora_rank: with train_heads: train a LoRA of this rank on the heads instead of all their weights.
        heads_learning_rate: with train_heads: their learning rate, under the same scheduler. None: learning_rate.
        heads_max_grad_norm: with train_heads: the norm their gradients are clipped to, apart from the model's. None:
            max_grad_norm. (DeepSpeed clips everything together.)
        aux_weight: beta. None: 0.01 in stage 2, 1 in stage 1.
        aux_decay: alpha.
        aux_schedule: gamma: reflected_sine, sine, linear or constant. None: reflected_sine in stage 2, constant in stage 1.
        aux_rows: the share of each horizon's targets that its loss is computed on, drawn anew for every batch and horizon and
            weighted so that loss and gradient are the same on average. 1: all targets.
        aux_min_weight: stage 2, frozen heads: leave out the horizons whose weight, beta * gamma * alpha^(h-1), is below it;
            their losses are then not logged. 0: none.

    Raises:
        CaftuneError: a value outside its range.
    """

    heads: str | None = field(default=None, metadata={"help": "Folder of pretrained heads."})
    pretrain_heads: bool = field(default=False, metadata={"help": "Stage 1: train the heads alone."})
    num_heads: int = field(default=4, metadata={"help": "Stage 1: number of new heads."})
    head_kind: str = field(default="decoder", metadata={"help": "Stage 1: decoder or mlp."})
    soft_targets: bool = field(default=False, metadata={"help": "Stage 1: the model's own distributions as targets."})
    soft_top_k: int | None = field(default=None, metadata={"help": "With soft_targets: its likeliest tokens alone."})
    force_heads: bool = field(default=False, metadata={"help": "Accept heads of a base of the same kind."})
    train_heads: bool = field(default=False, metadata={"help": "Stage 2: train the heads along."})
    heads_lora_rank: int | None = field(default=None, metadata={"help": "Train a LoRA of this rank on the heads."})
    heads_learning_rate: float | None = field(default=None, metadata={"help": "None: learning_rate."})
    heads_max_grad_norm: float | None = field(default=None, metadata={"help": "None: max_grad_norm."})
    aux_weight: float | None = field(default=None, metadata={"help": "beta; None: 0.01, or 1 in stage 1."})
    aux_decay: float = field(default=0.8, metadata={"help": "alpha."})
    aux_schedule: str | None = field(
        default=None,
        metadata={"help": f"gamma, one of {', '.join(SCHEDULES)}; None: reflected_sine, constant in stage 1."},
    )
    aux_rows: float = field(default=1.0, metadata={"help": "Share of the targets in the auxiliary losses."})
    aux_min_weight: float = field(default=0.0, metadata={"help": "Leave out horizons whose weight is below it."})

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
        self._check_training_of_heads()
        self._check_soft_targets()
        self._check_savings()
        if self.pretrain_heads and self.aux_weight == 0:
            raise CaftuneError("aux_weight must be above 0 in stage 1 (pretrain_heads=True), got 0.")
        if not self.pretrain_heads and self.heads is None and self.aux_weight > 0:
            raise CaftuneError(
                "heads must name a folder of pretrained heads, got None. Pretrain some with pretrain_heads=True (or "
                "`caftune pretrain-heads`), or set aux_weight=0 for plain fine-tuning."
            )
        if self.has_heads:
            self._check_packing()
        if self.label_smoothing_factor > 0 and self.pretrain_heads:
            raise CaftuneError(
                f"label_smoothing_factor must be 0 in stage 1 (pretrain_heads=True), got {self.label_smoothing_factor}: it "
                "smooths the model's own loss, which stage 1 does not compute. Set it in stage 2."
            )

    def _check_soft_targets(self) -> None:
        if self.soft_targets and not self.pretrain_heads:
            raise CaftuneError("soft_targets must be False in stage 2: there the tokens of the task are the targets.")
        if self.soft_top_k is not None and not (self.soft_targets and self.soft_top_k >= 1):
            raise CaftuneError(f"soft_top_k must be at least 1, and needs soft_targets=True, got {self.soft_top_k}.")

    def _check_savings(self) -> None:
        if not 0 < self.aux_rows <= 1:
            raise CaftuneError(f"aux_rows must be in (0, 1], got {self.aux_rows}.")
        if self.aux_min_weight < 0:
            raise CaftuneError(f"aux_min_weight must be a number >= 0, got {self.aux_min_weight}.")
        if self.aux_min_weight > 0 and (self.pretrain_heads or self.train_heads):
            raise CaftuneError(
                f"aux_min_weight must be 0 where heads are trained (pretrain_heads, train_heads), got {self.aux_min_weight}: "
                "heads that are left out would not learn."
            )

    def _check_packing(self) -> None:
        if self.packing and self.packing_strategy == "wrapped":
            raise CaftuneError(
                "packing_strategy must be 'bfd' or 'bfd_split' with heads, got 'wrapped', which cuts documents without marking "
                "where, so heads would be trained to predict into the next document. Leave out `heads` to train without them."
            )
        if self.eval_packing and not self.packing:
            raise CaftuneError(
                "eval_packing must not be True without packing where there are heads: TRL (1.16) would then not mark where "
                "documents begin, and heads would be evaluated across them. Set packing=True too, or leave eval_packing out."
            )

    def _check_training_of_heads(self) -> None:
        if self.heads_max_grad_norm is not None and self.max_grad_norm == 0:
            raise CaftuneError(
                "heads_max_grad_norm must be None with max_grad_norm=0, which switches all clipping off. Use a large "
                "max_grad_norm to clip the heads alone."
            )
        for name in ("heads_lora_rank", "heads_learning_rate", "heads_max_grad_norm"):
            value = getattr(self, name)
            if value is None:
                continue
            if not self.train_heads or self.pretrain_heads:
                raise CaftuneError(
                    f"{name} must be None unless stage 2 trains the heads (train_heads=True), got {value}."
                )
            if value <= 0:
                raise CaftuneError(f"{name} must be above 0, got {value}.")

    @property
    def has_heads(self) -> bool:
        """Whether the run has heads. Without them CAFTTrainer is SFTTrainer."""
        return self.pretrain_heads or self.heads is not None

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
    config = CAFTConfig.__new__(
        CAFTConfig
    )  # __init__ would repeat SFTConfig's checks on values that it has already changed
    config.__dict__ = vars(args)  # shared, so that later changes of `args` count, as with SFTTrainer
    config.aux_weight, config.aux_schedule = 0.0, "constant"
    return config
