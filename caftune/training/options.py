"""The options that CAFTConfig adds to TRL's SFTConfig, each declared here.

config.py fills the defaults that depend on the stage. The recipe's sections `heads` and `loss` follow from this list, with
their messages and descriptions (pipeline/schema.py). Importing it loads neither torch nor TRL, so that a recipe is checked
before they are.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

from caftune.errors import CaftuneError

Training = Literal["pretrain", "adapt", "trainer"]  # by its section of a recipe, which holds the other options
HeadKind = Literal["decoder", "mlp"]
Schedule = Literal["reflected_sine", "sine", "linear", "constant"]


class InRecipe(NamedTuple):
    """Where a recipe sets an option, and its bounds.

    Args:
        place: the key of the recipe, with its section.
        trainings: the trainings that get the option from there. Empty: a command sets it.
        bounds: gt, ge, le, as pydantic and `operator` name them.
        default: the recipe's, where CAFTConfig's is None and depends on the stage.
        words: how the recipe writes the option's values, where it has words for them.
    """

    place: str
    trainings: tuple[Training, ...] = ()
    bounds: Mapping[str, Any] = {}
    default: Any = None
    words: Mapping[str, Any] = {}

    @property
    def section_and_key(self) -> tuple[str, str]:
        """The place, divided."""
        section, _, key = self.place.partition(".")
        return section, key


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
    """The fields of CAFTConfig that are not SFTConfig's."""

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

    def refuse_out_of_bounds(self) -> None:
        """Raise CaftuneError for a number outside the bounds of its option."""
        for name, option in OPTIONS.items():
            value, bounds = getattr(self, name), option.recipe.bounds
            if value is not None and not all(getattr(operator, key)(value, bound) for key, bound in bounds.items()):
                wanted = _BOUNDS_IN_WORDS[tuple(bounds)].format(*bounds.values())
                raise CaftuneError(f"{name} must be {wanted}, got {value}.")


class Option(NamedTuple):
    """An option of CAFTConfig: its field there, and its place in a recipe."""

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
