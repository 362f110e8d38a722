"""One measurement in a process of its own; benchmarks/reference.py runs it with the reference's Python and with ours.

`agree` writes every per-head loss, weight and total of a schedule; `heads` prints the losses of heads that the reference
trained; `cost` prints what one training step takes. What only one of the two environments has is imported inside its own
functions.
"""

import argparse
import json
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ALPHA, BETA, NUM_HEADS, TOTAL_STEPS = 0.8, 0.01, 4, 40
# The reference's names of the schedules, and ours.
SCHEDULES = {"rsine": "reflected_sine", "sine": "sine", "linear": "linear", "constant": "constant"}
BATCH, TOKENS = 4, 256

# Of one step: the losses of all horizons, their weights (that of horizon 1 first), the total.
Terms = tuple[Tensor, Tensor, Tensor]


def reference_terms(logits: Tensor, labels: Tensor, schedule: str, step: int) -> Terms:
    """What the reference's own `compute_loss` makes of the logits.

    A head's loss is what `torch.nn.CrossEntropyLoss`, the only module it calls, returned; a head's weight is the derivative
    of its total with respect to that loss. No formula of the reference is repeated here.
    """
    compute_loss = reference_compute_loss(schedule, step)
    losses: list[Tensor] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda _module, _inputs, loss: losses.append(loss))
    total = compute_loss(lambda **_: logits.requires_grad_(), {"labels": labels})
    handle.remove()
    weights = torch.autograd.grad(total, losses)
    return torch.stack(losses), torch.stack(weights), total


def reference_compute_loss(schedule: str, step: int) -> Callable[[Callable[..., Tensor], dict[str, Tensor]], Tensor]:
    """`Trainer.compute_loss` as the reference replaces it, bound to a trainer that knows nothing but the step."""
    import transformers
    import transformers.trainer
    from caft import add_caft_loss

    add_caft_loss(transformers, caft_heads_coefficient=BETA, caft_decay_coefficient=ALPHA, caft_scheduler=schedule)
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=step, max_steps=TOTAL_STEPS))
    return lambda model, inputs: transformers.trainer.Trainer.compute_loss(trainer, model, inputs)


def caftune_terms(logits: Tensor, labels: Tensor, schedule: str, step: int) -> Terms:
    """What caftune makes of the logits: `AuxiliaryHeads.forward`, its heads replaced by stored outputs.

    An identity unembedding turns the stored logits into what a head would hand over, and row numbers stand for the trunk's
    hidden states, so caftune's own targets and cross-entropy are used as in training. Horizon 1, which training leaves to
    TRL, goes through the same two functions.
    """
    from caftune.core.cross_entropy import Unembedding, log_likelihood
    from caftune.core.heads import AuxiliaryHeads, HeadsConfig
    from caftune.core.objective import IGNORED, AuxiliaryWeights, HorizonTargets, auxiliary_loss, horizon_targets
    from caftune.core.replay import LayerCall

    class StoredHead(torch.nn.Module):
        def __init__(self, output: Tensor) -> None:
            super().__init__()
            self.output = output

        def forward(self, rows: Tensor, _normed: Tensor) -> Tensor:
            return self.output.flatten(0, 1)[rows[..., 0]]

    identity = Unembedding(torch.eye(logits.shape[-1], dtype=logits.dtype))
    backbone = SimpleNamespace(close=lambda hidden: hidden, unembedding=lambda: identity)
    heads = AuxiliaryHeads(HeadsConfig(count=NUM_HEADS, kind="mlp"), [StoredHead(output) for output in logits[1:]])
    numbers = torch.arange(labels.numel()).view(*labels.shape, 1)
    scores = heads(backbone, LayerCall(output=numbers), HorizonTargets.of({"labels": labels}, heads.config.horizons))
    targets = horizon_targets(labels, 1)
    rows = targets != IGNORED
    main = -log_likelihood(logits[0][rows], identity, targets[rows])[0].mean()
    weights = AuxiliaryWeights(BETA, ALPHA, SCHEDULES[schedule]).at(step, TOTAL_STEPS, heads.config.horizons)
    total = main + auxiliary_loss(scores["nll"], scores["count"], weights)
    return (
        torch.stack([main, *(scores["nll"] / scores["count"])]),
        torch.tensor([1.0, *weights], dtype=logits.dtype),
        total,
    )


def agree(terms: Callable[..., Terms], data: Path, output: Path) -> None:
    """Every schedule over all its steps, on both kinds of labels, in both precisions."""
    batch = load_file(data)
    result: dict[str, Tensor] = {}
    for dtype in (torch.float32, torch.float64):
        for labels in ("masked", "all"):
            for schedule in SCHEDULES:
                logits = batch["logits"].to(dtype)
                steps = [terms(logits, batch[labels][step], schedule, step) for step in range(TOTAL_STEPS)]
                for name, values in zip(("loss", "weight", "total"), zip(*steps, strict=True), strict=True):
                    result[f"{dtype}/{labels}/{schedule}/{name}"] = torch.stack(values).detach().double()
    save_file(result, output)


def heads_batch(vocabulary: int) -> dict[str, Tensor]:
    """Three rows with prompts of 2, 7 and 11 tokens without labels, padded on the right to the longest."""
    ids = torch.randint(1, vocabulary, (3, 40), generator=torch.Generator().manual_seed(1))
    places = torch.arange(ids.shape[1])
    seen = places < torch.tensor([[40], [31], [22]])
    labels = ids.where(seen & (places >= torch.tensor([[2], [7], [11]])), -100)
    return {"input_ids": ids.where(seen, 0), "labels": labels, "attention_mask": seen.long()}


def reference_heads(base: Path, folder: Path, dtype: torch.dtype) -> list[float]:
    """Train the reference's heads for a few steps, save them as its script does, and return the losses that it has then."""
    from caft import add_auxiliary_heads
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=dtype)
    add_auxiliary_heads(model, caft_num_heads=NUM_HEADS, caft_only_heads=True)
    batch = heads_batch(model.config.vocab_size)
    compute_loss = reference_compute_loss("constant", step=0)
    optimizer = torch.optim.AdamW(model.auxiliary_head.parameters(), lr=1e-2)
    for _ in range(5):
        step(lambda: compute_loss(model, batch), optimizer)
    folder.mkdir()
    torch.save(model.auxiliary_head.state_dict(), folder / "heads.pth")
    with torch.no_grad():
        logits = model(**batch)
    losses, _, _ = reference_terms(logits.detach(), batch["labels"], "constant", step=0)
    return losses[1:].tolist()


def caftune_heads(base: Path, folder: Path, dtype: torch.dtype) -> list[float]:
    """The losses of the same heads, imported."""
    from transformers import AutoModelForCausalLM

    from caftune import Backbone, attach_heads, load_heads
    from caftune.checkpoints.reference_heads import import_heads

    heads = import_heads(str(folder), str(base), folder / "imported")
    backbone = Backbone.of(AutoModelForCausalLM.from_pretrained(base, dtype=dtype))
    attach_heads(backbone, load_heads(heads, backbone))
    with torch.no_grad():
        scores = backbone.model(**heads_batch(backbone.model.config.vocab_size), auxiliary="only")["auxiliary"]
    losses: list[float] = (scores["nll"] / scores["count"]).tolist()
    return losses


def reference_loss(model: torch.nn.Module, ids: Tensor, labels: Tensor, *, train_heads: bool) -> Callable[[], Tensor]:
    """The reference's model and loss, all else at its defaults."""
    from caft import add_auxiliary_heads

    add_auxiliary_heads(model, caft_num_heads=NUM_HEADS, requires_grad=train_heads)
    compute_loss = reference_compute_loss("rsine", step=0)
    return lambda: compute_loss(model, {"input_ids": ids, "labels": labels})


def caftune_loss(
    model: torch.nn.Module, ids: Tensor, labels: Tensor, *, train_heads: bool, is_fused: bool
) -> Callable[[], Tensor]:
    """caftune's heads and loss in a plain loop. L_1 is TRL's fused one, as in CAFTTrainer, or the model's own."""
    from caftune import AuxiliaryHeads, AuxiliaryWeights, Backbone, HeadsConfig, attach_heads, auxiliary_loss

    backbone = Backbone.of(model)
    heads = AuxiliaryHeads.build(backbone, HeadsConfig(count=NUM_HEADS)).requires_grad_(train_heads)
    options = main_loss_options(model, is_fused=is_fused)
    attach_heads(backbone, heads)
    weights = AuxiliaryWeights(BETA, ALPHA).at(0, TOTAL_STEPS, heads.config.horizons)

    def loss() -> Tensor:
        outputs = model(input_ids=ids, labels=labels, auxiliary="add", **options)
        scores = outputs["auxiliary"]
        return outputs.loss + auxiliary_loss(scores["nll"], scores["count"], weights)

    return loss


def next_token_loss(model: torch.nn.Module, ids: Tensor, labels: Tensor, *, is_fused: bool) -> Callable[[], Tensor]:
    """Plain fine-tuning: the same model without heads."""
    options = main_loss_options(model, is_fused=is_fused)
    return lambda: model(input_ids=ids, labels=labels, **options).loss


def main_loss_options(model: torch.nn.Module, *, is_fused: bool) -> dict[str, bool]:
    """The forward's argument for TRL's fused loss, after setting it up as SFTTrainer does; none for the model's own."""
    if not is_fused:
        return {}
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return {"fused_lm_head": True}


# Names starting with "reference" run in the reference's environment.
CASES: dict[str, Callable[[torch.nn.Module, Tensor, Tensor], Callable[[], Tensor]]] = {
    "reference, heads trained": partial(reference_loss, train_heads=True),
    "reference, heads frozen": partial(reference_loss, train_heads=False),
    "caftune, heads trained": partial(caftune_loss, train_heads=True, is_fused=False),
    "caftune, heads frozen": partial(caftune_loss, train_heads=False, is_fused=False),
    "caftune, heads frozen, L_1 by TRL": partial(caftune_loss, train_heads=False, is_fused=True),
    "next token only": partial(next_token_loss, is_fused=False),
    "next token only, L_1 by TRL": partial(next_token_loss, is_fused=True),
}


def cost(case: str, folder: Path, labelled: str, steps: int) -> dict[str, float]:
    """Seconds of processor time of one step, how many of them in the kernel, and MiB the steps need above the built model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).train()
    ids = torch.randint(model.config.vocab_size, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    if labelled == "half":
        labels[:, : TOKENS // 2] = -100
    with torch.no_grad():
        start = model(input_ids=ids[:1], labels=labels[:1]).loss.item()
    loss_of = CASES[case](model, ids, labels)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    built, highest = resident_mib("VmRSS"), resident_mib("VmHWM")
    step(loss_of, optimizer)  # makes AdamW's state
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(steps):
        step(loss_of, optimizer)
    after = resource.getrusage(resource.RUSAGE_SELF)
    user, kernel = (after.ru_utime - before.ru_utime) / steps, (after.ru_stime - before.ru_stime) / steps
    peak = resident_mib("VmHWM")
    if peak <= highest:
        raise RuntimeError(f"The steps' peak must be above that of building the model, {highest} MiB, got {peak}.")
    return {"seconds": user + kernel, "kernel": kernel, "mib": peak - built, "start": start}


def step(loss_of: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Forward, backward, AdamW."""
    optimizer.zero_grad()
    loss_of().backward()
    optimizer.step()


def resident_mib(name: str) -> float:
    """This process's memory: VmRSS now, VmHWM at its highest. Unlike getrusage, not inherited from the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":"))


def main() -> None:
    """Run one measurement; `cost` prints its result as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    modes = parser.add_subparsers(dest="mode", required=True)
    agreement = modes.add_parser("agree")
    agreement.add_argument("side", choices=("reference", "caftune"))
    agreement.add_argument("data", type=Path)
    agreement.add_argument("output", type=Path)
    heads = modes.add_parser("heads")
    heads.add_argument("side", choices=("reference", "caftune"))
    heads.add_argument("model", type=Path)
    heads.add_argument("folder", type=Path)
    heads.add_argument("dtype", choices=("torch.float32", "torch.float64"))
    costs = modes.add_parser("cost")
    costs.add_argument("case", choices=CASES)
    costs.add_argument("model", type=Path)
    costs.add_argument("labelled", choices=("all", "half"))
    costs.add_argument("steps", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.mode == "agree":
        terms = reference_terms if arguments.side == "reference" else caftune_terms
        agree(terms, arguments.data, arguments.output)
    elif arguments.mode == "heads":
        losses_of = reference_heads if arguments.side == "reference" else caftune_heads
        dtype = getattr(torch, arguments.dtype.removeprefix("torch."))
        print(json.dumps(losses_of(arguments.model, arguments.folder, dtype)))
    else:
        print(json.dumps(cost(arguments.case, arguments.model, arguments.labelled, arguments.steps)))


if __name__ == "__main__":
    main()
