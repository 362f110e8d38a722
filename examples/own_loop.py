"""CAFT in your own training loop, without TRL: torch, transformers and `caftune.core`.

    python examples/own_loop.py MODEL_FOLDER      (default: the base model of the demo)

It runs stage 1 on a few texts, then stage 2, and writes an ordinary checkpoint to ./own_loop_model.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import caftune

TEXTS = ["Name: 2-chloropropan-1-ol\nSMILES: OCC(C)Cl", "Name: 3-methylbutanoic acid\nSMILES: OC(=O)CC(C)C"] * 8
STEPS = 20


def main(name: str, output: str = "own_loop_model") -> list[float]:
    """Returns the total loss of every stage 2 step."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    backbone = caftune.Backbone.of(model)
    heads = caftune.AuxiliaryHeads.build(backbone, caftune.HeadsConfig(count=4))
    caftune.attach_heads(backbone, heads)
    batch = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    # Stage 1 trains the heads alone; the trunk runs without a graph.
    constant = caftune.AuxiliaryWeights(weight=1.0, schedule="constant")
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-3)
    for step in range(STEPS):
        scores = model(**batch, auxiliary="only")["auxiliary"]
        weights = constant.at(step, STEPS, heads.config.horizons)
        caftune.auxiliary_loss(scores["nll"], scores["count"], weights).backward()
        optimizer.step()
        optimizer.zero_grad()
    caftune.save_heads(Path(output, "heads"), heads, backbone, tokenizer)

    # Stage 2 trains model and heads, which are part of it now. L = L_1 + beta * gamma(t) * sum_h alpha^(h-1) * L_h.
    # (heads.requires_grad_(False) would freeze the heads: cheaper, and not the paper's method.)
    paper = caftune.AuxiliaryWeights()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses = []
    for step in range(STEPS):
        outputs = model(**batch, auxiliary="add")
        scores = outputs["auxiliary"]
        weights = paper.at(step, STEPS, heads.config.horizons)
        loss = outputs.loss + caftune.auxiliary_loss(scores["nll"], scores["count"], weights)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    caftune.detach_heads(model)
    caftune.export_model(model, output, tokenizer)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; an ordinary model is in {output}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(Path(caftune.__file__).parent / "demo" / "base"))
