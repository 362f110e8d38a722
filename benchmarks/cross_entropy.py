"""Ways to compute a linear cross-entropy, forward and backward: processor time and memory.

    python benchmarks/cross_entropy.py [--vocabulary 32000] [--rows 1024] [--width 512] [--rounds 3] [--threads 2]

All ways run in turn, round by round; printed are the median of the processor seconds with their range, and the largest
memory over that before the call. Linux only (the peak is the kernel's, reset before every call).
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from trl.kernels import ChunkedLogProbFunction

from caftune.core.cross_entropy import Unembedding, log_likelihood, summed_loss

OUTPUTS = ("log_probs", "entropy", "is_top1")  # what SFTTrainer asks for


def at_once(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """caftune's, as training uses it."""
    return summed_loss(hidden, Unembedding(weight), targets)[0]


def checkpointed(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """caftune's, computing logits again in the backward pass."""
    return -log_likelihood(hidden, Unembedding(weight), targets)[0].sum()


def by_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's own, chunked."""
    options = torch.nn.LinearCrossEntropyOptions()
    return functional.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def by_trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """TRL's, which SFTTrainer uses."""
    return -ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, OUTPUTS)[0].sum()


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits at a time."""
    return functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "caftune, gradients at once": at_once,
    "caftune, checkpointed chunks": checkpointed,
    "torch linear_cross_entropy": by_torch,
    "TRL's fused head": by_trl,
    "full logits": full_logits,
}


def memory(name: str) -> float:
    """VmRSS or VmHWM of this process in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Measure all ways, with a frozen and a trained weight."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"vocabulary": 32000, "rows": 1024, "width": 512, "rounds": 3, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    draw = torch.Generator().manual_seed(0)
    targets = torch.randint(arguments.vocabulary, (arguments.rows,), generator=draw)
    given = torch.randn(arguments.rows, arguments.width, generator=draw)
    weight = 0.05 * torch.randn(arguments.vocabulary, arguments.width, generator=draw)
    for trained in (False, True):
        weight.requires_grad_(trained)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
        for _, (name, way) in itertools.product(range(arguments.rounds + 1), WAYS.items()):
            hidden, weight.grad = given.clone().requires_grad_(), None
            before = memory("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            start = time.process_time()
            way(hidden, weight, targets).backward()
            found[name].append((time.process_time() - start, memory("VmHWM") - before))
        for name, runs in found.items():
            seconds, sizes = zip(*runs[1:], strict=True)  # the first warms up
            spread = f"{min(seconds):.2f}-{max(seconds):.2f}"
            kind = "trained" if trained else "frozen"
            print(f"| {kind} | {name} | {statistics.median(seconds):.2f} ({spread}) | {max(sizes):.0f} |", flush=True)


if __name__ == "__main__":
    main()
