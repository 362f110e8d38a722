"""However the documents of an optimizer step are laid out, the step is the same: for L_1 and every horizon, and the weights.

One epoch is one optimizer step here, so runs that lay out an epoch differently see the same documents in every step. SGD with
a large learning rate and without clipping: a gradient that is off by a factor shows in the weights. Horizons weigh nearly as
much as L_1 (beta = 1), and the heads are trained along, with LoRA through a LoRA.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import models
import pytest
import torch
from bases import HEADS, load_base, write_heads
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from trainers import config, lora
from transformers import AutoTokenizer

from caftune import AuxiliaryHeads, AuxiliaryWeights, Backbone, CAFTTrainer, HeadsConfig, attach_heads, auxiliary_loss
from caftune.core.objective import IGNORED
from caftune.demo.chemistry import completion, molecules, prompt
from caftune.demo.run import BASE

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*flash:UserWarning"),  # packing asks for it; none on a CPU
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),  # PEFT sets it for GPT-2, and says so
]

SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "aux_weight": 1.0}
EPOCHS = {"max_steps": -1, "num_train_epochs": 3}
HORIZONS = range(1, HEADS + 2)
TOGETHER = {"per_device_train_batch_size": 8}
PADDING_FREE = {"padding_free": True, "max_length": None}
PACKED = {"packing": True, "max_length": 128}  # the documents fill three rows of this length
LAYOUTS = {
    "8 x 1": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "4 x 2": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "3 + 3 + 2": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
    "padding-free, 4 x 2": {**PADDING_FREE, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "packed, row by row": {**PACKED, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
}


@dataclass
class Steps:
    """What a run did: each step's losses of all horizons, and the weights (heads included) at its start and end."""

    losses: list[list[float]]
    start: dict[str, torch.Tensor]
    end: dict[str, torch.Tensor]

    def moved(self):
        return max((self.end[key] - self.start[key]).abs().max().item() for key in self.end)


@dataclass
class Runs:
    """Runs of one base, fully fine-tuned or by LoRA."""

    base: str
    tuning: str
    heads: str
    folder: Path

    def train(self, rows, *, attention="sdpa", **options) -> Steps:
        full = self.tuning == "full"
        args = config(self.folder, heads=self.heads, **{**SGD, **EPOCHS, **options})
        trainer = CAFTTrainer(
            load_base(self.base, attention),
            args,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(BASE),
            peft_config=None if full else lora(),
        )
        start = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        losses = [[entry[f"h{h}_loss"] for h in HORIZONS] for entry in logs]
        return Steps(losses, start, trainer.model.state_dict())


@pytest.fixture(scope="module", params=["llama full", "llama lora", "gpt2 full", "gpt2 lora"])
def runs(request, tmp_path_factory):
    base, tuning = request.param.split()
    folder = tmp_path_factory.mktemp(base)
    return Runs(base, tuning, write_heads(base, folder / "heads"), folder / "run")


@pytest.fixture(scope="module")
def reference(runs):
    """Eight documents of 2 to 54 tokens as one padded batch, three times over."""
    return runs.train(DOCUMENTS, **TOGETHER)


def document(molecule):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    asked = tokenizer(prompt(molecule))["input_ids"]
    ids = tokenizer(prompt(molecule) + completion(molecule))["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": ids, "labels": [IGNORED] * len(asked) + ids[len(asked) :]}


SHORT = {"input_ids": [0, 40], "labels": [IGNORED, 40]}  # a target for L_1, none for any other horizon
DOCUMENTS = [document(m) for m in molecules(7, seed=7, substituents=(0, 2))] + [SHORT]


def assert_same(one, other):
    """Equal up to float32 sums in another order: 1e-6 of losses of 0.1 to 12, and of weights moved by 0.005 to 0.2."""
    assert min(one.moved(), other.moved()) > 0.004
    assert len(one.losses) == len(other.losses) == 3
    for ours, theirs in zip(one.losses, other.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert one.end.keys() == other.end.keys()
    for key, value in one.end.items():
        torch.testing.assert_close(
            value, other.end[key], rtol=1e-5, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_same_documents_takes_the_same_steps(runs, reference, layout):
    assert_same(runs.train(DOCUMENTS, **LAYOUTS[layout]), reference)


def test_packed_documents_do_not_see_each_other_in_eager_attention_either(runs, reference):
    assert_same(runs.train(DOCUMENTS, attention="eager", **PACKED, per_device_train_batch_size=3), reference)


def test_packing_cuts_documents_where_truncation_does(runs):
    assert max(len(row["input_ids"]) for row in DOCUMENTS) > 45
    packed = runs.train(DOCUMENTS, packing=True, max_length=45, per_device_train_batch_size=8)
    assert_same(packed, runs.train(DOCUMENTS, max_length=45, **TOGETHER))


def test_bfd_split_trains_on_the_pieces_as_documents_of_their_own(runs):
    cuts = range(0, 60, 16)
    pieces = [{name: row[name][cut : cut + 16] for name in row} for row in DOCUMENTS for cut in cuts]
    pieces = [piece for piece in pieces if piece["input_ids"]]
    for (
        piece
    ) in pieces:  # nothing stands before it; for GPT-2 transformers 5.23 counts it among the targets all the same
        piece["labels"][0] = IGNORED
    assert len(pieces) > 2 * len(DOCUMENTS)
    options = {"packing": True, "packing_strategy": "bfd_split", "max_length": 16}
    split = runs.train(DOCUMENTS, **options, per_device_train_batch_size=32)
    assert_same(split, runs.train(pieces, max_length=None, per_device_train_batch_size=32))


def test_a_micro_batch_without_a_target_changes_nothing(runs, reference):
    silent = [{**row, "labels": [IGNORED] * len(row["labels"])} for row in DOCUMENTS[:2]]
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 10}
    # Without max_length such rows get through; with it they are refused.
    assert_same(runs.train(silent + DOCUMENTS, max_length=None, **options), reference)


def test_tokenized_rows_without_a_target_are_left_out_where_there_is_a_max_length(runs, reference):
    silent = {**DOCUMENTS[0], "labels": [IGNORED] * len(DOCUMENTS[0]["labels"])}
    assert_same(runs.train([*DOCUMENTS, silent], **TOGETHER), reference)


def test_documents_too_short_for_any_horizon_train_as_without_heads(runs):
    short = [{"input_ids": [0, token], "labels": [IGNORED, token]} for token in range(40, 48)]
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    ours = runs.train(short, **options, train_heads=False)
    plain = runs.train(short, **options, train_heads=False, aux_weight=1e-30)
    assert [losses[1:] for losses in ours.losses] == [[0.0] * HEADS] * 3
    assert_same(ours, plain)


def test_the_last_smaller_window_is_a_smaller_batch(runs):
    rows = [document(m) for m in molecules(18, seed=8, substituents=(0, 2))] + [SHORT, SHORT]
    windows = runs.train(rows, num_train_epochs=1, **LAYOUTS["8 x 1"])  # 8, 8 and 4 rows: three steps
    assert_same(windows, runs.train(rows, num_train_epochs=1, **TOGETHER))


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_left_padding_equals_right_padding_in_a_loop_of_ones_own(base, tuning):
    right, left = (own_loop(base, tuning, side=side) for side in ("right", "left"))
    tolerance = {"llama": 1e-7, "gpt2": 1e-9}[base]  # transformers computes rotary phases in float32
    assert right[0] == pytest.approx(left[0], rel=tolerance)
    for key, value in right[1].items():
        torch.testing.assert_close(value, left[1][key], rtol=tolerance, atol=tolerance)


def own_loop(base, tuning, *, side):
    """Three steps in float64 on rows of 3 to 17 tokens: all losses, all weights."""
    model = models.build(base, attention="sdpa")  # eager attention of a wholly masked row is no number in float64
    backbone = Backbone.of(model)
    heads = AuxiliaryHeads.build(backbone, HeadsConfig(HEADS))
    torch.manual_seed(0)
    if tuning == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).double()
    attach_heads(backbone, heads)
    heads.requires_grad_(tuning == "full")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = copy.deepcopy(model.state_dict())
    batch = padded([17, 9, 3, 12], side)
    if base == "llama":
        del batch["position_ids"]  # rotary positions are relative, so only attention_mask tells padding from text
    losses = []
    for step in range(3):
        outputs = model(**batch, auxiliary="add")
        scores = outputs["auxiliary"]
        weights = AuxiliaryWeights(weight=1.0).at(step, 3, heads.config.horizons)
        # transformers' own loss goes through float32
        main = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        (main + auxiliary_loss(scores["nll"], scores["count"], weights)).backward()
        losses += [main.item(), *scores["nll"].tolist()]
        with torch.no_grad():
            for parameter in trained:
                parameter -= 1e-3 * parameter.grad
                parameter.grad = None
    end = model.state_dict()
    assert max((end[key] - start[key]).abs().max() for key in end) > 1e-3
    return losses, end


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_a_packed_row_in_a_loop_of_ones_own_is_its_documents_one_by_one(base):
    model = models.build(base, attention="sdpa")
    backbone = Backbone.of(model)
    attach_heads(backbone, AuxiliaryHeads.build(backbone, HeadsConfig(HEADS)))
    documents = [{k: v for k, v in padded([length], "right").items() if k != "attention_mask"} for length in (9, 2, 12)]
    packed = {name: torch.cat([document[name] for document in documents], 1) for name in documents[0]}
    together = model(**packed, auxiliary="add")
    apart = [model(**document, auxiliary="add") for document in documents]
    nll, logits = sum(one["auxiliary"]["nll"] for one in apart), torch.cat([one.logits for one in apart], 1)
    torch.testing.assert_close(together["auxiliary"]["nll"], nll, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(together.logits, logits, rtol=1e-9, atol=1e-9)
    assert together["auxiliary"]["count"].tolist() == [17, 15, 13]  # 9 - h, none of 2 tokens, and 12 - h


def padded(lengths, side):
    """Rows whose first token has no label: on the left, padding stands before it, and transformers' L_1 would use that."""
    batch = {name: [] for name in ("input_ids", "labels", "attention_mask", "position_ids")}
    for length in lengths:
        ids, gap = [3 + (7 * length + 5 * i) % 50 for i in range(length)], max(lengths) - length
        row = {
            "input_ids": (ids, 0),
            "labels": ([IGNORED, *ids[1:]], IGNORED),
            "attention_mask": ([1] * length, 0),
            "position_ids": (list(range(length)), 0),
        }
        for name, (values, padding) in row.items():
            batch[name].append([padding] * gap + values if side == "left" else values + [padding] * gap)
    return {name: torch.tensor(values) for name, values in batch.items()}
