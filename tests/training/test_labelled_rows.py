"""The next-token loss beside heads: TRL's own kernel, given the labelled rows alone."""

import copy

import pytest
import torch
import trl.trainer.utils as trl_utils
from bases import write_heads
from datasets import Dataset
from examination import base, with_heads
from trainers import OPTIONS, config, lora, trained
from transformers import LlamaConfig
from trl import SFTConfig, SFTTrainer

from caftune import CAFTTrainer
from caftune.demo.chemistry import completion, molecules, prompt
from caftune.demo.run import BASE
from caftune.training.estimate import estimate
from caftune.training.run_setup import Setup

LAYOUTS = ("plain", "padded", "packed", "unlabelled")
# Positions whose next token is a label, counted by hand from `batch_of`.
LABELLED = {"plain": 14, "padded": 11, "packed": 15, "unlabelled": 0}
FIELDS = ("log_probs", "entropy", "is_top1", "label_mask")


@pytest.fixture
def scored(monkeypatch):
    """How many rows TRL's kernel was given, a number a call."""
    counts, kernel = [], trl_utils._ChunkedLogProbFunction

    class Counting:
        @staticmethod
        def apply(hidden, *others):
            counts.append(len(hidden))
            return kernel.apply(hidden, *others)

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Counting)
    return counts


def fused(family):
    """A model as SFTTrainer patches it, and heads attached to it."""
    model = copy.deepcopy(base(family)).train()
    trl_utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    with_heads(family, "mlp", model)
    return model


def batch_of(layout):
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :5] = labels[1, 3:7] = -100
    batch = {"input_ids": ids, "labels": labels}
    if layout == "padded":
        labels[1, 9:] = -100
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][1, 9:] = 0
    if layout == "packed":
        batch = {name: values.view(1, -1) for name, values in batch.items()}
        batch["position_ids"] = torch.cat([torch.arange(10), torch.arange(14)])[None]
    if layout == "unlabelled":
        labels[:] = -100
    return batch


def run(model, batch, **options):
    """The outputs, and the gradients of a loss by log-probabilities and entropies."""
    model.zero_grad()
    outputs = model(**batch, fused_lm_head=True, use_cache=False, **options)
    (outputs.entropy.sum() - outputs.log_probs.sum()).backward()
    return outputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere", "mixtral", "mamba2", "gemma3n"])
def test_it_is_that_of_all_rows(family, layout, scored):
    model, batch = fused(family), batch_of(layout)
    whole, expected = run(model, batch)
    found, gradients = run(model, batch, auxiliary="add")
    assert scored == [22 if layout != "packed" else 23, LABELLED[layout]]
    assert found.label_mask.all()
    assert found.label_mask.shape == (1, LABELLED[layout])
    for name in FIELDS:
        ours, theirs = getattr(found, name)[0], getattr(whole, name)[whole.label_mask]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, whole.loss)
    assert gradients.keys() == expected.keys()
    assert any(gradient.any() for gradient in expected.values()) == (layout != "unlabelled")
    for name, gradient in gradients.items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=2e-5 * scale + 1e-12)


def test_the_balance_of_experts_still_looks_at_all_rows():
    model, batch = fused("mixtral"), batch_of("padded")
    whole = model(**batch, fused_lm_head=True, output_router_logits=True)
    found = model(**batch, fused_lm_head=True, output_router_logits=True, auxiliary="add")
    assert torch.equal(found.aux_loss, whole.aux_loss)


def test_labels_shifted_by_the_caller_are_left_alone(scored):
    model, batch = fused("llama"), batch_of("plain")
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    model(**batch, shift_labels=shifted, fused_lm_head=True, auxiliary="add")
    assert scored == [24]


def test_nothing_is_left_behind_where_the_forward_pass_fails(monkeypatch):
    model, batch = fused("llama"), batch_of("plain")

    def fail(*_args):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(trl_utils._ChunkedLogProbFunction, "apply", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(**batch, fused_lm_head=True, auxiliary="add")
    assert model(batch["input_ids"]).logits.shape[:2] == (2, 12)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.filterwarnings("ignore:.*flash:UserWarning")
def test_beside_heads_that_weigh_nothing_steps_and_evaluations_are_those_of_sft_trainer(tmp_path, tuning, packing):
    rows = Dataset.from_list(
        [{"prompt": prompt(m), "completion": completion(m)} for m in molecules(24, seed=7, substituents=(0, 2))]
    )
    options = {"packing": packing, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    adapter = lora() if tuning == "lora" else None

    def logs(kind, args):
        run = kind(str(BASE), args, train_dataset=rows, eval_dataset=rows, peft_config=adapter)
        names = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
        wanted = {prefix + name for prefix in ("", "eval_") for name in names}
        history = trained(run).state.log_history[:-1]  # but for the summary
        assert ("h2_loss" in history[0]) == (kind is CAFTTrainer)
        return [{name: float(log[name]) for name in wanted & log.keys()} for log in history]

    theirs = logs(SFTTrainer, SFTConfig(str(tmp_path / "a"), **{**OPTIONS, **options}))
    heads = write_heads("llama", tmp_path / "heads")
    ours = logs(CAFTTrainer, config(tmp_path / "b", heads=heads, aux_weight=1e-12, **options))
    assert len(ours) == len(theirs) == 6
    assert [len(log) for log in ours] == [5, 5, 4, 5, 5, 4]  # an evaluation has no gradient
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_plan_knows_of_it():
    shape = {"batch_size": 4, "length": 256, "mean_length": 256, "labelled": 0.25, "checkpointing": False}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=8192, **sizes)
    plain, beside, sometimes, gpu = (
        estimate(config, Setup(**shape, **more))
        for more in ({"heads": 0}, {}, {"leaves_out_heads": True}, {"heads": 0, "on_gpu": True})
    )
    # TRL's kernel: 8.25 tiles of float32, and the gradient of what goes in.
    saved = round(4 * 255 * (8.25 * 4 * 8192 + 4 * 64)) - round(4 * 64 * (8.25 * 4 * 8192 + 4 * 64))
    assert sometimes.memory.peak - beside.memory.peak == pytest.approx(saved, rel=0.01)
    assert plain.memory.peak > beside.memory.peak
    assert plain.overhead_here == gpu.overhead_here == 1
    # 8 of the unembedding's products (forward, twice backward, and the logits once more) at every row and at a quarter.
    logits = 2 * 4 * 64 * 8192
    assert plain.flops.total - gpu.flops.total == pytest.approx(0.75 * logits)
