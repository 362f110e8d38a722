"""Examine every family of tests/families.py and write what was found to docs/models.md.

    python scripts/models_table.py

It takes three to four minutes on one core. tests/core/test_families.py compares the page with the same examination.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"

Found = dict[str, str]
_INTRODUCTION = """# Models

Which causal language models of transformers carry heads. {counts}
`python scripts/models_table.py` writes this page from the examination that `tests/core/test_families.py` asserts; a stale page
fails the tests. Made {date} on a CPU with one thread: {versions}.

Every model was **built tiny from its configuration** (two to five layers, width 16, random weights, float32), so the table
is about the architectures' code; nothing here was measured on published weights. Several rows of one model type are
variants of it; hybrid models are examined with each kind of layer as the last one. RWKV of more than six layers
needs `rescale_every: 0` in its config.json.

**yes** for a kind of head means:

- the model is accepted; replaying the last layer, what follows it and the unembedding gives the model's own logits (eager and
  sdpa attention, training and evaluation mode, with a cache, with padding);
- changing a later token changes no head; each horizon's loss equals that of a plain model whose last layer is the head;
- gradients reach the embeddings and every head; gradient checkpointing (where the model has it) changes neither loss nor
  gradients;
- the heads alone learn, and are the same bit for bit after saving and loading;
- the exported model has the keys, shapes and dtypes of the base's own checkpoint, and its logits.

**drafts**: speculative decoding ([decoding](decoding.md)) with decoder heads, or with MLP heads where there are none: greedy
texts are those of `generate` token for token, and heads predict the same with and without their caches. *no*: the model
cannot read several tokens at once after a cache and remove some of them again. **LoRA**: adapters train next to the heads and
are merged in the export, on *all linear* layers or, where PEFT cannot wrap each of those (routers, Mamba's output projection),
on input *projections*. **Packing**: two documents in one row, separated by their positions alone, without flash attention:
*yes*: the second does not see the first; *leaks*: it does (in the model's own loss too: pack such a model's rows only with an
attention that separates them, or not at all); *-*: the model has no such attention implementation.
"""


def main() -> None:
    """Write docs/models.md."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from examination import examine
    from families import FAMILIES

    results = {}
    for family in FAMILIES:
        print(family, flush=True)
        results[family] = examine(family)
    introduction = _INTRODUCTION.format(counts=counts(results), date=time.strftime("%Y-%m-%d"), versions=versions())
    PAGE.write_text(introduction + "\n" + tables(results))


def versions() -> str:
    """The versions that the table depends on."""
    import peft
    import torch
    import transformers

    return (
        f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}, peft {peft.__version__}"
    )


def counts(results: dict[str, Found]) -> str:
    """How many model types carry which heads."""
    kinds: dict[str, set[str]] = {"both": set(), "mlp": set(), "none": set()}
    for found in results.values():
        kind = "none" if "refused" in found else "mlp" if "decoder refused" in found else "both"
        kinds[kind].add(found["model type"])
    kinds["mlp"] -= kinds["both"]
    kinds["none"] -= kinds["both"] | kinds["mlp"]
    both, mlp, none = (len(kinds[kind]) for kind in ("both", "mlp", "none"))
    return (
        f"Of {both + mlp + none} model types ({len(results)} rows),\n"
        f"{both} carry decoder and MLP heads, {mlp} MLP heads only, and {none} are refused."
    )


def tables(results: dict[str, Found]) -> str:
    """The page without its introduction."""
    accepted = {family: found for family, found in results.items() if "refused" not in found}
    lines = ["| family | model type | decoder heads | MLP heads | drafts | LoRA | packing, eager | packing, sdpa |"]
    lines += ["|---|---|---|---|---|---|---|---|", *(row(family, found) for family, found in accepted.items())]
    lines += ["", "## MLP heads only", "", 'What `head_kind="decoder"` says:', ""]
    lines += [
        f'- {family}: "{found["decoder refused"]}"' for family, found in accepted.items() if "decoder refused" in found
    ]
    lines += ["", "## LoRA", "", "Why adapters do not work, in the words of the library that stops:", ""]
    lines += [f"- {family}: {found['lora']}" for family, found in accepted.items() if is_refused(found["lora"])]
    lines += ["", "## Refused", "", "What `Backbone.of(model)` says:", ""]
    lines += [f'- {family}: "{found["refused"]}"' for family, found in results.items() if "refused" in found]
    return "\n".join(lines) + "\n"


def row(family: str, found: Found) -> str:
    """One line of the table."""
    lora = "no" if is_refused(found["lora"]) else found["lora"]
    cells: list[Any] = [family, f"`{found['model type']}`", verdict(found, "decoder"), verdict(found, "mlp")]
    return f"| {' | '.join([*cells, found['drafts'], lora, found['packing eager'], found['packing sdpa']])} |"


def is_refused(lora: str) -> bool:
    """Whether what was found of LoRA is a reason."""
    return lora not in ("all linear", "projections")


def verdict(found: Found, kind: str) -> str:
    """Yes, no, or the properties that fail."""
    if kind == "decoder" and "decoder refused" in found:
        return "no"
    shared = ("replay", "exports")
    failed = [name for name, said in found.items() if (name.endswith(f" {kind}") or name in shared) and said != "yes"]
    return f"FAILS: {', '.join(failed)}" if failed else "yes"


if __name__ == "__main__":
    main()
