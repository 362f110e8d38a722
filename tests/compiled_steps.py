"""Ten steps of a compiled model with heads, for test_compiled.py: in a process without checked annotations, which torch
cannot trace. Prints what was compiled again, and the largest difference from the steps without compilation."""

import json
import sys

import torch
from models import VOCABULARY, build
from torch._dynamo.utils import get_compilation_metrics

from caftune.core.attach import attach_heads
from caftune.core.backbone import Backbone
from caftune.core.heads import AuxiliaryHeads, HeadsConfig
from caftune.core.objective import IGNORED

WEIGHTS = torch.tensor([0.8, 0.3])
LENGTHS = (9, 14, 11, 17, 8, 21, 12, 19, 10, 16)


def recompilations():
    """The functions that were compiled again, by name: those whose compilation has a number above 0 for its frame."""
    metrics = [found for found in get_compilation_metrics() if found.compile_id]
    return [found.co_name for found in metrics if int(found.compile_id.split("/")[1].split("_")[0]) > 0]


def steps(kind, *, compiled):
    model = build("llama", dtype=torch.float32, attention="sdpa")
    backbone = Backbone.of(model)
    attach_heads(backbone, AuxiliaryHeads.build(backbone, HeadsConfig(2, kind)))
    run = torch.compile(model, backend="eager") if compiled else model
    found = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(number))
        labels = ids.clone()
        labels[0, : 2 + number % 4] = IGNORED
        model.zero_grad()
        outputs = run(input_ids=ids, labels=labels, auxiliary="add", auxiliary_weights=WEIGHTS)
        (outputs.loss + outputs["auxiliary"]["loss"]).backward()
        found.append((outputs["auxiliary"]["nll"], model.model.layers[0].mlp.up_proj.weight.grad.clone()))
    return found


if __name__ == "__main__":
    compiled = steps(sys.argv[1], compiled=True)
    again = recompilations()
    plain = steps(sys.argv[1], compiled=False)
    pairs = [pair for ours, theirs in zip(compiled, plain, strict=True) for pair in zip(ours, theirs, strict=True)]
    apart = max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)
    print(json.dumps({"compiled": len(get_compilation_metrics()), "again": again, "apart": apart}))
