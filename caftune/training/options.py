"""`CAFTOptions`: the options of concept-aware fine-tuning, each declared here, for any TrainingArguments.

The keys of the recipe's sections `heads`, `loss` and `model` follow from this list, with their messages and descriptions
(pipeline/schema.py). Importing it loads neither torch nor TRL, so that a recipe is checked before they are.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

from caftune.errors import CaftuneError

if TYPE_CHECKING:
    from caftune.core.objective import AuxiliaryWeights

Training = Literal["pretrain", "adapt", "trainer"]  # by its section of a recipe, which holds the other options
HeadKind = Literal["decoder", "mlp"]
Schedule = Literal["reflected_sine", "sine", "linear", "constant"]


class InRecipe(NamedTuple):
    """Where a recipe sets an option, and its bounds."""

    place: str  # the key of the recipe, with its section; empty: the option's name, in the section of each training
    trainings: tuple[Training, ...] = ()  # those that get the option from there; empty: a command sets it
    bounds: Mapping[str, Any] = {}  # gt, ge, le, as pydantic and `operator` name them
    default: Any = None  # the recipe's, where CAFTOptions' is None and depends on the stage
    words: Mapping[str, Any] = {}  # how the recipe writes the option's values, where it has words for them

    @property
    def section_and_key(self) -> tuple[str, str]:
        """The place, divided."""
        section, _, key = self.place.partition(".")
        return section, key


_OF_THE_MAIN_LOSS = "it changes the model's own loss, which stage 1 does not compute"
# Options of TrainingArguments and SFTConfig that would change nothing: their values that do so anyway, and why.
_UNUSED_IN_STAGE_ONE: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0,), _OF_THE_MAIN_LOSS),
    "loss_type": (("nll", "chunked_nll"), _OF_THE_MAIN_LOSS),
    "neftune_noise_alpha": ((None,), "it adds noise to the embeddings, which the frozen model of stage 1 runs without"),
}
_PER_TRAINING = InRecipe("")
_ABOVE_0, _FROM_0, _SHARE = {"gt": 0}, {"ge": 0}, {"gt": 0, "le": 1}
_BOUNDS_IN_WORDS = {("gt",): "above {}", ("ge",): "a number >= {}", ("gt", "le"): "in ({}, {}]"}
_STAGE_ONE: tuple[Training, ...] = ("pretrain",)
_STAGE_TWO: tuple[Training, ...] = ("trainer",)
_LATER: tuple[Training, ...] = ("adapt", "trainer")
_ALL: tuple[Training, ...] = ("pretrain", "adapt", "trainer")


def _option(default: Any, text: str) -> Any:
    """A field with its description, which is also the help of TRL's command line and of the recipe's schema."""
    return field(default=default, metadata={"help": text})


@dataclass
class CAFTOptions:
    """The options of a CAFTMixin's `args`, a subclass of both this class, which comes first, and TrainingArguments:

        @dataclass
        class Arguments(CAFTOptions, TrainingArguments): ...

    Stage 2 needs `heads` unless `aux_weight` is 0; in stage 1 (`pretrain_heads`), `heads` are trained further. Without `heads`
    and with `aux_weight=0` the trainer is the one it was. docs/papers.md has the paper's values.

    Raises:
        CaftuneError: a value outside its range, or options that exclude each other.
    """

    heads: Annotated[str | None, InRecipe("heads.path", _LATER)] = _option(
        None, "Pretrained heads to use instead of new ones: a folder or a hub id."
    )
    pretrain_heads: Annotated[bool, InRecipe("the command `caftune pretrain-heads`")] = _option(
        False, "Stage 1: train the heads and leave the model as it is."
    )
    num_heads: Annotated[int, InRecipe("heads.count", _STAGE_ONE, _ABOVE_0)] = _option(
        4, "Stage 1: number of new heads. Head i, from 0, predicts horizon i + 2."
    )
    head_kind: Annotated[HeadKind, InRecipe("heads.kind", _STAGE_ONE)] = _option(  # noqa: RUF009
        "decoder", "Stage 1: decoder (a copy of the last layer) or mlp."
    )
    soft_targets: Annotated[bool, InRecipe("heads.targets", _STAGE_ONE, words={"tokens": False, "model": True})] = (
        _option(
            False,
            "Stage 1: the targets are the tokens of the text, or the model's own next-token distributions over it. Evaluations "
            "always use the tokens.",
        )
    )
    soft_top_k: Annotated[int | None, InRecipe("heads.top_k", _STAGE_ONE, _ABOVE_0)] = _option(
        None, "With the model's distributions as targets: keep this many most likely tokens. None: all."
    )
    force_heads: Annotated[bool, InRecipe("heads.force", _LATER)] = _option(
        False, "Accept heads of another model with the same architecture and tokenizer."
    )
    train_heads: Annotated[bool, InRecipe("heads.train", _STAGE_TWO)] = _option(
        True,
        "Stage 2: train the heads together with the model, as the paper does. False: frozen heads, which cost less.",
    )
    heads_lora_rank: Annotated[int | None, InRecipe("heads.lora_rank", _STAGE_TWO, _FROM_0)] = _option(
        None,
        "Trained heads: train a LoRA of this rank; 0: all their weights. None: as the model is trained, by a LoRA of the "
        "adapters' rank, or in full.",
    )
    heads_learning_rate: Annotated[float | None, InRecipe("heads.learning_rate", _STAGE_TWO, _ABOVE_0)] = _option(
        None, "Trained heads: their learning rate, with the model's scheduler. None: the model's."
    )
    heads_max_grad_norm: Annotated[float | None, InRecipe("heads.max_grad_norm", _STAGE_TWO, _ABOVE_0)] = _option(
        None, "Trained heads: the norm their gradients are clipped to (not with DeepSpeed). None: the model's."
    )
    aux_weight: Annotated[float | None, InRecipe("loss.weight", _STAGE_TWO, _FROM_0, default=0.01)] = _option(
        None,
        "beta, the weight of the auxiliary losses. 0 is plain fine-tuning: heads, if named, are only evaluated. "
        "Default: 0.01 in stage 2, 1 in stage 1.",
    )
    aux_decay: Annotated[float, InRecipe("loss.decay", _ALL, _SHARE)] = _option(
        0.8, "alpha: the weight of a horizon relative to the one before."
    )
    aux_schedule: Annotated[Schedule | None, InRecipe("loss.schedule", _STAGE_TWO, default="reflected_sine")] = _option(  # noqa: RUF009
        None,
        "gamma, the schedule of the weight: reflected_sine (falls to 0), sine, linear (both rise from 0) or constant. "
        "Default: reflected_sine in stage 2, constant in stage 1.",
    )
    aux_target_share: Annotated[float, InRecipe("loss.target_share", _STAGE_TWO, _SHARE)] = _option(
        1.0,
        "Share of each horizon's targets in its loss, sampled for each batch. Loss and gradient are the same on average.",
    )
    aux_min_weight: Annotated[float, InRecipe("loss.min_weight", _STAGE_TWO, _FROM_0)] = _option(
        0.0, "Frozen heads: skip the loss of a horizon whose weight, beta gamma alpha^(h-1), is below this."
    )

    early_stopping_patience: Annotated[int | None, _PER_TRAINING] = _option(
        None,
        "Stop after this many evaluations in a row that do not improve the best one; needs load_best_model_at_end. "
        "None: train to the end.",
    )
    freeze_unembedding: Annotated[bool, InRecipe("model.freeze_unembedding", _STAGE_TWO)] = _option(
        False, "Full fine-tuning: leave the output layer as it is, and the embeddings where both are one matrix."
    )

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        names = [base.__name__ for base in cls.__mro__]
        if "TrainingArguments" in names and names.index("TrainingArguments") < names.index("CAFTOptions"):
            raise TypeError(
                f"CAFTOptions must come before TrainingArguments among the bases of {cls.__name__}. Put it first."
            )

    def __post_init__(self) -> None:
        getattr(super(), "__post_init__", lambda: None)()  # TrainingArguments' own
        if self.aux_weight is None:
            self.aux_weight = 1.0 if self.pretrain_heads else 0.01
        if self.aux_schedule is None:
            self.aux_schedule = "constant" if self.pretrain_heads else "reflected_sine"
        from caftune.core.heads import HeadsConfig  # here, because it loads torch

        self.auxiliary_weights  # noqa: B018  (checks the three values)
        HeadsConfig(self.num_heads, self.head_kind)
        if self.pretrain_heads:
            self._check_stage_one()
        else:
            self._check_stage_two()
        if self.soft_top_k is not None and not (self.soft_targets and self.soft_top_k >= 1):
            raise CaftuneError(f"soft_top_k must be at least 1, and needs soft_targets=True, got {self.soft_top_k}.")
        self._check_trained_heads()
        self._check_early_stopping()
        self.refuse_out_of_bounds()

    def _check_stage_one(self) -> None:
        if self.aux_weight == 0:
            raise CaftuneError("aux_weight must be above 0 in stage 1 (pretrain_heads=True), got 0.")
        if self.freeze_unembedding:
            raise CaftuneError("freeze_unembedding must be False in stage 1, which trains heads only. Leave it out.")
        for name, (unused, reason) in _UNUSED_IN_STAGE_ONE.items():
            value = self._trainers(name)
            if value and value not in unused:
                raise CaftuneError(
                    f"{name} must be {unused[0]} in stage 1 (pretrain_heads=True), got {value}: {reason}. Set it in stage 2."
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
        if self.heads_max_grad_norm is not None and self._trainers("max_grad_norm") == 0:
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

    def _check_early_stopping(self) -> None:
        patience = self.early_stopping_patience
        if patience is None:
            return
        if type(patience) is not int or patience < 1:
            raise CaftuneError(f"early_stopping_patience must be a whole number above 0, got {patience!r}.")
        if not self._trainers("load_best_model_at_end"):
            raise CaftuneError(
                "early_stopping_patience needs load_best_model_at_end=True, or the result would be the last of the evaluations "
                "that did not improve. Set it, with eval_strategy and save_strategy."
            )

    def _trainers(self, name: str) -> Any:
        """The value of an option of TrainingArguments, which the object is, too."""
        return getattr(self, name, None)

    def refuse_out_of_bounds(self) -> None:
        """Raise CaftuneError for a number outside the bounds of its option."""
        for name, option in OPTIONS.items():
            value, bounds = getattr(self, name), option.recipe.bounds
            if value is not None and not all(getattr(operator, key)(value, bound) for key, bound in bounds.items()):
                wanted = _BOUNDS_IN_WORDS[tuple(bounds)].format(*bounds.values())
                raise CaftuneError(f"{name} must be {wanted}, got {value}.")

    @property
    def has_heads(self) -> bool:
        """Whether the run has heads. Without them the trainer is the one it was."""
        return self.pretrain_heads or self.heads is not None

    @property
    def trains_heads(self) -> bool:
        """Whether the heads' weights are trained: in stage 1, and in stage 2 with `train_heads` and an `aux_weight` above 0."""
        return self.has_heads and bool(self.aux_weight) and (self.pretrain_heads or self.train_heads)

    @property
    def auxiliary_weights(self) -> "AuxiliaryWeights":
        """alpha, beta and gamma."""
        from caftune.core.objective import AuxiliaryWeights  # here, because it loads torch

        return AuxiliaryWeights(float(self.aux_weight or 0), self.aux_decay, str(self.aux_schedule))


class Option(NamedTuple):
    """An option: its field in CAFTOptions, and its place in a recipe."""

    type: Any
    default: Any
    text: str
    recipe: InRecipe


def options_of(kind: type) -> dict[str, Option]:
    """The options that a dataclass has as fields, by name."""
    hints = {name: get_args(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}
    given = {f.name: (f.default, f.metadata["help"]) for f in fields(kind)}
    return {name: Option(hints[name][0], *described, hints[name][1]) for name, described in given.items()}


OPTIONS: dict[str, Option] = options_of(CAFTOptions)
