"""The arms of the study (docs/study/protocol.md), and the trainers of the variants that caftune does not offer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from caftune import CAFTTrainer
from caftune.core.objective import IGNORED, AuxiliaryWeights, HorizonTargets, horizon_targets
from caftune.evals.concepts import find_concepts, offsets_of, token_positions
from caftune.training.mixin import with_targets

HORIZONS = (2, 3, 4, 5)


class Reverse(CAFTTrainer):
    """Horizons end one after another: of five equal parts of the steps the first uses all four, the last none."""

    def _weights_at(self, step: int) -> list[float]:
        weights = super()._weights_at(step)
        kept = len(weights) - step * (len(weights) + 1) // max(self.state.max_steps, 1)
        return [weight if place < kept else 0.0 for place, weight in enumerate(weights)]

    @property
    def _scored_horizons(self) -> int:
        return sum(weight > 0 for weight in self._weights_at(self.state.global_step))


class WarmUp(CAFTTrainer):
    """beta rises linearly over the first tenth of the steps."""

    def _weights_at(self, step: int) -> list[float]:
        share = min(1.0, (step + 1) / max(0.1 * self.state.max_steps, 1))
        return [share * weight for weight in super()._weights_at(step)]


class Soft(CAFTTrainer):
    """In training the heads' targets are the model's own distributions, without gradient."""

    def _attach(self) -> None:
        super()._attach()
        plain = self.heads.forward
        self.heads.forward = lambda *given, **named: plain(*given, **named | {"soft": self.model.training})


class Agree(CAFTTrainer):
    """beta times the cosine, where positive, of both losses' gradients at the input of the last layer."""

    def _attach(self) -> None:
        super()._attach()
        self.agreements: list[float] = []
        self.backbone.layer.register_forward_pre_hook(self._keep_fork, with_kwargs=True)

    def _keep_fork(self, _layer: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._fork = given[0] if given else named["hidden_states"]

    def _record(self, scores: dict[str, Any]) -> None:
        super()._record(scores)
        self._auxiliary = scores.get("loss")

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """L_1 plus the scaled auxiliary losses."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            return result
        main = result - self._auxiliary
        gradients = [torch.autograd.grad(loss, self._fork, retain_graph=True)[0] for loss in (main, self._auxiliary)]
        cosine = functional.cosine_similarity(*(gradient.flatten() for gradient in gradients), dim=0)
        self.agreements.append(cosine.item())
        return main + cosine.clamp(min=0) * self._auxiliary


class Order(CAFTTrainer):
    """One head predicts the next five tokens at once, weighted by exp(-distance): the order in which they come."""

    def _attach(self) -> None:
        super()._attach()
        plain = self.heads.forward
        self.heads.forward = lambda *given, **named: (order_scores if self.model.training else plain)(
            *given, **named | ({"heads": self.heads} if self.model.training else {})
        )


def order_scores(
    backbone: Any, call: Any, targets: HorizonTargets, *, heads: Any, weights: Tensor, **_: Any
) -> dict[str, Tensor]:
    """As `AuxiliaryHeads.forward`, with head 0 for all distances: 1 to 5."""
    distances = range(1, 6)
    counts = targets.counts_of(HORIZONS).to(call.hidden.device)
    targets = targets.to(call.hidden.device)
    parts = [targets.at(distance) for distance in distances]
    positions = torch.cat([at for at, _ in parts]).unique()
    logits = backbone.unembedding().logits(heads.hidden_at(0, backbone, call, positions)).float()
    logs = logits.log_softmax(-1)
    rows = torch.zeros(call.hidden.shape[:2].numel(), dtype=torch.long, device=logs.device)
    rows[positions] = torch.arange(len(positions), device=logs.device)
    losses = [-logs[rows[at], tokens].sum() for at, tokens in parts]
    shares = torch.tensor([-float(d) for d in distances], device=logs.device).softmax(0)
    means = torch.stack([loss / max(len(at), 1) for loss, (at, _) in zip(losses, parts, strict=True)])
    scale = weights[0] * counts[0]  # beta * gamma, as the arm's alpha is 1
    nll = torch.stack(losses[1:]).detach()
    return {"nll": nll, "correct": torch.zeros_like(counts), "count": counts, "loss": scale * (shares * means).sum()}


class Concepts(CAFTTrainer):
    """Heads are trained only on targets inside concepts of several tokens. `kind` is set before training."""

    kind = "words"

    def get_train_dataloader(self) -> Any:
        """As the trainer's, with fewer targets."""
        plain, masks = self.data_collator, {}
        for ids, labels in zip(self.train_dataset["input_ids"], self.train_dataset["labels"], strict=True):
            masks[tuple(ids)] = concept_mask(ids, labels, self.processing_class, self.kind)
        self.data_collator = partial(_collate_concepts, plain, masks, self.heads.config.horizons)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain


def concept_mask(ids: list[int], labels: list[int], tokenizer: Any, kind: str) -> list[bool]:
    """Which tokens of the answer belong to a concept of at least two tokens."""
    start = next(place for place, label in enumerate(labels) if label != IGNORED)
    text, offsets = offsets_of(ids[start:], tokenizer)
    found = token_positions(find_concepts(text, kind), offsets)
    inside = {start + place for _, places in found for place in places}
    return [place in inside for place in range(len(ids))]


def _collate_concepts(
    collate: Callable[..., Any], masks: Mapping[Any, list[bool]], horizons: Any, examples: Any
) -> Any:
    batch = with_targets(collate(examples), horizons)
    mask = torch.zeros(batch["labels"].shape, dtype=torch.bool)
    for row, example in enumerate(examples):
        own = masks[tuple(int(token) for token in example["input_ids"])]
        mask[row, : len(own)] = torch.tensor(own)
    batch["auxiliary_targets"] = only_inside(batch["auxiliary_targets"], mask.flatten(), [1, *horizons])
    return batch


def only_inside(targets: HorizonTargets, mask: Tensor, horizons: list[int]) -> HorizonTargets:
    """The targets whose token is in the mask (of the flattened batch)."""
    parts = [(horizon, *targets.at(horizon)) for horizon in horizons]
    kept = [(horizon, at[mask[at + horizon]], tokens[mask[at + horizon]]) for horizon, at, tokens in parts]
    positions, tokens = (torch.cat([part[place] for part in kept]) for place in (1, 2))
    return HorizonTargets(positions, tokens, {horizon: len(at) for horizon, at, _ in kept})


class Headless(CAFTTrainer):
    """No heads: the model's own logits are trained on the later tokens too. `beta` is set before training."""

    beta = 0.1

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """L_1 plus the later tokens' losses by the same logits."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            return result
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"), use_cache=False
        ).logits
        weights = AuxiliaryWeights(self.beta).at(self.state.global_step, max(self.state.max_steps, 1), HORIZONS)
        for weight, horizon in zip(weights, HORIZONS, strict=True):
            targets = horizon_targets(inputs["labels"], horizon, attention_mask=inputs.get("attention_mask"))
            if (targets != IGNORED).any():
                result = result + weight * functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return result


@dataclass(frozen=True)
class Arm:
    """What an arm changes of the paper's recipe.

    Args:
        options: of CAFTConfig.
        trainer: the class that trains it.
        heads: pretrained, random (their entries shuffled), untrained (copies of the last layer) or none.
        adapts: the heads are first trained for an epoch on the task's rows alone.
        role: `arm` can be chosen for confirmation, `control` cannot.
        used: the share of the steps' heads that run, for the estimate of operations, as numbers of heads in equal parts.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    trainer: type[CAFTTrainer] = CAFTTrainer
    heads: Literal["pretrained", "random", "untrained", "none"] = "pretrained"
    adapts: bool = False
    role: Literal["arm", "control", "baseline"] = "arm"
    used: tuple[int, ...] = (4,)

    @property
    def trains_heads(self) -> bool:
        """Whether the heads are trained along."""
        return bool(self.options.get("train_heads", True))


def _weighted(weight: float, **options: Any) -> dict[str, Any]:
    return {"aux_weight": weight, **options}


SCREENED = {
    "ntp": Arm({"aux_weight": 0.0}, heads="none", role="baseline", used=(0,)),
    "paper": Arm(_weighted(0.01)),
    "paper_adapt": Arm(_weighted(0.01), adapts=True),
    "w0.03": Arm(_weighted(0.03)),
    "w0.1": Arm(_weighted(0.1)),
    "w0.3": Arm(_weighted(0.3)),
    "constant": Arm(_weighted(0.1, aux_schedule="constant")),
    "frozen": Arm(_weighted(0.1, train_heads=False)),
    "adapt": Arm(_weighted(0.1), adapts=True),
    "reverse": Arm(_weighted(0.1, aux_schedule="constant"), Reverse, used=(4, 3, 2, 1, 0)),
    "warmup": Arm(_weighted(0.1), WarmUp),
    "soft": Arm(_weighted(0.1), Soft),
    "top": Arm(_weighted(0.1, aux_decay=1.0), Order, used=(1,)),
    "concepts": Arm(_weighted(0.1), Concepts),
    "agree": Arm(_weighted(0.1), Agree),
    "random": Arm(_weighted(0.1), heads="random", role="control"),
    "headless": Arm({"aux_weight": 0.0}, Headless, heads="none", role="control", used=(0,)),
}
CONTROL = {
    "ntp": SCREENED["ntp"],
    "mtp": Arm(_weighted(1.0, aux_decay=1.0, aux_schedule="constant"), heads="untrained"),
}
ARMS = {**CONTROL, **SCREENED}
