"""Which token each horizon is held to, what it weighs, and the loss against an independent computation in float64."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCABULARY, build

from caftune.core.attach import ATTRIBUTE, attach_heads
from caftune.core.backbone import Backbone
from caftune.core.heads import AuxiliaryHeads, HeadsConfig
from caftune.core.objective import (
    IGNORED,
    SCHEDULES,
    AuxiliaryWeights,
    HorizonTargets,
    auxiliary_loss,
    horizon_targets,
)

_ = IGNORED


def targets_of(labels, horizon, **where):
    where = {name: torch.tensor([row]) for name, row in where.items()}
    return horizon_targets(torch.tensor([labels]), horizon, **where)[0].tolist()


PACKED = {
    1: [11, 12, 13, _, 21, 22, _],
    2: [12, 13, _, _, 22, _, _],
    3: [13, _, _, _, _, _, _],
    4: [_, _, _, _, _, _, _],
    5: [_, _, _, _, _, _, _],
}


@pytest.mark.parametrize("horizon", PACKED)
def test_targets_never_cross_a_document(horizon):
    labels, positions = [10, 11, 12, 13, 20, 21, 22], [0, 1, 2, 3, 0, 1, 2]
    assert targets_of(labels, horizon, position_ids=positions) == PACKED[horizon]


BLOCKS = torch.block_diag(torch.ones(4, 4), torch.ones(3, 3)).tril().bool()[None, None]
MARKS = {
    "positions from 0": {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]])},
    "positions from 2": {"position_ids": torch.tensor([[2, 3, 4, 5, 2, 3, 4]])},
    "the end of a long document": {"position_ids": torch.tensor([[0, 1, 2, 3, 900, 901, 902]])},
    "a numbered mask": {"attention_mask": torch.tensor([[1, 1, 1, 1, 2, 2, 2]])},
    "a mask of pairs": {"attention_mask": BLOCKS},
    "a mask that is added": {"attention_mask": torch.zeros(1, 1, 7, 7).masked_fill(~BLOCKS, -1e9)},
    "numbers": {"seq_idx": torch.tensor([[0, 0, 0, 0, 1, 1, 1]], dtype=torch.int32)},
    "ends": {"cu_seq_lens_q": torch.tensor([0, 4, 7], dtype=torch.int32)},
}


@pytest.mark.parametrize("marks", MARKS)
def test_documents_are_found_by_any_mark_of_a_collator(marks):
    batch = {"labels": torch.tensor([[10, 11, 12, 13, 20, 21, 22]]), **MARKS[marks]}
    found = HorizonTargets.of(batch, [*PACKED])
    for horizon, expected in PACKED.items():
        positions, tokens = found.at(horizon)
        assert dict(zip(positions.tolist(), tokens.tolist(), strict=True)) == {
            t: target for t, target in enumerate(expected) if target != _
        }


def test_targets_ignore_a_masked_prompt_but_are_predicted_from_within_it():
    labels = [_, _, _, 13, 14, 15]
    assert targets_of(labels, 1) == [_, _, 13, 14, 15, _]
    assert targets_of(labels, 2) == [_, 13, 14, 15, _, _]
    assert targets_of(labels, 4) == [14, 15, _, _, _, _]


def test_left_padding_predicts_nothing():
    labels, mask = [_, _, 10, 11, 12], [0, 0, 1, 1, 1]
    assert targets_of(labels, 1, attention_mask=mask) == [_, _, 11, 12, _]
    assert targets_of(labels, 2, attention_mask=mask) == [_, _, 12, _, _]


def test_right_padding_is_never_a_target():
    labels, mask = [10, 11, 12, _, _], [1, 1, 1, 0, 0]
    assert targets_of(labels, 1, attention_mask=mask) == [11, 12, _, _, _]
    assert targets_of(labels, 2, attention_mask=mask) == [12, _, _, _, _]


def test_padding_is_never_a_target_even_where_it_is_labelled():
    labels, mask = [10, 11, 12, 0, 0], [1, 1, 1, 0, 0]
    assert targets_of(labels, 1, attention_mask=mask) == [11, 12, _, _, _]


def test_padding_after_packed_documents_belongs_to_none():
    labels, positions, mask = [10, 11, 20, 21, _, _], [0, 1, 0, 1, 0, 1], [1, 1, 1, 1, 0, 0]
    assert targets_of(labels, 1, position_ids=positions, attention_mask=mask) == [11, _, 21, _, _, _]


@pytest.mark.parametrize("horizon", [3, 4, 100])
def test_a_horizon_beyond_the_row_has_no_targets(horizon):
    assert targets_of([10, 11, 12], horizon) == [_, _, _]


def test_one_row_of_positions_serves_all_rows_and_the_labels_stay_untouched():
    labels = torch.arange(8).view(2, 4)
    before = labels.clone()
    found = horizon_targets(labels, 1, position_ids=torch.tensor([[0, 1, 0, 1]]))
    assert found.tolist() == [[1, _, 3, _], [5, _, 7, _]]
    assert torch.equal(labels, before)


documents = st.lists(st.integers(1, 6), min_size=1, max_size=5)


@settings(deadline=None, max_examples=60)
@given(documents=documents, horizon=st.integers(1, 8), data=st.data())
def test_every_target_is_the_label_that_far_ahead_in_the_same_document(documents, horizon, data):
    tokens = sum(documents)
    labels = data.draw(st.lists(st.sampled_from([_, 3, 4, 5]), min_size=tokens, max_size=tokens))
    owner = [number for number, length in enumerate(documents) for _unused in range(length)]
    positions = [position for length in documents for position in range(length)]
    for t, target in enumerate(targets_of(labels, horizon, position_ids=positions)):
        inside = t + horizon < tokens and owner[t] == owner[t + horizon]
        assert target == (labels[t + horizon] if inside else _)


@settings(deadline=None, max_examples=60)
@given(documents=documents, horizon=st.integers(1, 8))
def test_a_document_of_n_labels_has_n_minus_horizon_targets(documents, horizon):
    positions = [position for length in documents for position in range(length)]
    found = targets_of([7] * sum(documents), horizon, position_ids=positions)
    assert sum(target != _ for target in found) == sum(max(length - horizon, 0) for length in documents)


def test_the_papers_weights_at_the_start():
    found = AuxiliaryWeights().at(0, 1000, [2, 3, 4, 5])
    assert found == pytest.approx([0.008, 0.0064, 0.00512, 0.004096], abs=1e-15)


FORMULAS = {
    "reflected_sine": lambda t, total: math.sin((total - t) / total * math.pi / 2),
    "sine": lambda t, total: math.sin(t / total * math.pi / 2),
    "linear": lambda t, total: t / total,
    "constant": lambda t, total: 1.0,
}


def test_the_four_schedules_are_all_there_are():
    assert set(SCHEDULES) == set(FORMULAS)


@pytest.mark.parametrize("schedule", FORMULAS)
def test_a_schedule_follows_its_formula_over_a_whole_run(schedule):
    weights = AuxiliaryWeights(weight=0.3, decay=0.7, schedule=schedule)
    for step in range(20):
        gamma = FORMULAS[schedule](step, 20)
        expected = [0.3 * gamma * 0.7, 0.3 * gamma * 0.7**2, 0.3 * gamma * 0.7**4]
        assert weights.at(step, 20, [2, 3, 5]) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("total", [1, 2, 1000])
def test_the_reflected_sine_starts_at_one_and_is_above_zero_at_the_last_step(total):
    weights = AuxiliaryWeights(weight=1.0, decay=1.0)
    assert weights.at(0, total, [2]) == [1.0]
    assert weights.at(total - 1, total, [2])[0] > 0


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"weight": -0.1}, r"weight \(beta\) must be a number >= 0, got -0\.1\."),
        ({"weight": math.nan}, r"weight \(beta\) must be a number >= 0, got nan\."),
        ({"weight": math.inf}, r"weight \(beta\) must be a number >= 0, got inf\."),
        ({"decay": 0.0}, r"decay \(alpha\) must be in \(0, 1\], got 0\.0\."),
        ({"decay": 1.5}, r"decay \(alpha\) must be in \(0, 1\], got 1\.5\."),
        ({"decay": math.nan}, r"decay \(alpha\) must be in \(0, 1\], got nan\."),
        ({"schedule": "cosine"}, r"schedule \(gamma\) must be one of .*reflected_sine.*, got 'cosine'\."),
    ],
)
def test_a_bad_weight_is_refused_with_a_sentence(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        AuxiliaryWeights(**values)


def test_the_loss_is_the_weighted_sum_of_the_horizons_means():
    nll, counts = torch.tensor([6.0, 10.0, 5.0], dtype=torch.float64), torch.tensor([3, 5, 0])
    assert float(auxiliary_loss(nll, counts, [0.5, 0.25, 7.0])) == 0.5 * 2 + 0.25 * 2 + 7.0 * 5
    assert float(auxiliary_loss(torch.zeros(1), torch.tensor([0]), [1.0])) == 0.0


# The reference: full logits, a loop over rows and positions, alpha, beta and gamma written out.

BETA, ALPHA, STEP, TOTAL = 0.37, 0.8, 3, 10
IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def batch_of(kind):
    labels, mask = IDS.clone(), torch.ones_like(IDS)
    if kind == "packed":
        first = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2, 3, 4, 5]])
        return {"input_ids": IDS, "labels": labels, "position_ids": first}
    if kind == "masked":
        labels[:, :4] = _
    elif kind == "left":
        labels[0, :3], mask[0, :3] = _, 0
        labels[0, 3] = _  # else horizon 1 of the model itself is predicted from a pad
    else:
        labels[1, 6:], mask[1, 6:] = _, 0
    return {"input_ids": IDS, "labels": labels, "attention_mask": mask}


def reference_loss(model, heads, batch):
    """L_1 + beta * gamma * sum alpha^(h-1) * L_h with one full copy of the model per horizon, and its logits."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = {1: model(**inputs, use_cache=False).logits}
    for index, head in enumerate(heads.heads):
        logits[index + 2] = logits_of_head(model, heads, head, inputs)
    gamma = math.sin((TOTAL - STEP) / TOTAL * math.pi / 2)
    loss = 0.0
    for horizon, values in logits.items():
        log_p, terms = torch.log_softmax(values.double(), -1), []
        for row in range(IDS.shape[0]):
            for t in range(IDS.shape[1] - horizon):
                label = int(batch["labels"][row, t + horizon])
                if label != _ and legal(batch, row, t, horizon):
                    terms.append(-log_p[row, t, label])
        weight = 1.0 if horizon == 1 else BETA * gamma * ALPHA ** (horizon - 1)
        loss = loss + weight * torch.stack(terms).sum() / len(terms)
    return loss


def next_token_loss(logits, batch):
    """Hugging Face's own loss, which `outputs.loss` holds in float32 only."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def legal(batch, row, t, horizon):
    if "attention_mask" in batch and not batch["attention_mask"][row, t]:
        return False
    if horizon == 1 or "position_ids" not in batch:
        return True  # at horizon 1 the model's own loss is Hugging Face's, which knows no documents
    return not (batch["position_ids"][row, t + 1 : t + horizon + 1] == 0).any()


def logits_of_head(model, heads, head, inputs):
    """A decoder head takes the place of the last layer; an mlp head is written out where the norm's input passes."""
    name, _dot, index = Backbone.of(model).layer_name.rpartition(".")
    layers = model.get_submodule(name)
    own = layers[int(index)]
    if heads.config.kind == "decoder":
        layers[int(index)] = head
        try:
            return model(**inputs, use_cache=False).logits
        finally:
            layers[int(index)] = own
    norm = model.base_model.get_submodule("ln_f" if hasattr(model.base_model, "ln_f") else "norm")

    def residual(_module, arguments):
        inner = head.up(norm.forward(arguments[0]))
        return (arguments[0] + head.down(inner * torch.sigmoid(inner)),)

    handle = norm.register_forward_pre_hook(residual)
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        handle.remove()


def model_and_heads(family, kind):
    # Eager attention takes its softmax in float32; Gemma 2 has no other.
    model = build(family, attention="eager" if family == "gemma2" else "sdpa")
    heads = AuxiliaryHeads.build(Backbone.of(model), HeadsConfig(3, kind))
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, heads


@pytest.mark.parametrize("rows", ["masked", "left", "right", "packed"])
@pytest.mark.parametrize("kind", ["decoder", "mlp"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite", "cohere"])
def test_loss_and_all_gradients_equal_the_full_logits_reference(family, kind, rows):
    if (family, rows) == ("gemma2", "left"):
        pytest.skip("transformers' eager attention makes NaN of a wholly masked row in float64")
    model, heads = model_and_heads(family, kind)
    batch = batch_of(rows)
    twin, twin_heads = copy.deepcopy((model, heads))
    expected = reference_loss(twin, twin_heads, batch)
    expected.backward()

    attach_heads(Backbone.of(model), heads)
    outputs = model(**batch, use_cache=False, auxiliary="add")
    scores = outputs["auxiliary"]
    weights = AuxiliaryWeights(BETA, ALPHA).at(STEP, TOTAL, heads.config.horizons)
    loss = next_token_loss(outputs.logits, batch) + auxiliary_loss(scores["nll"], scores["count"], weights)
    loss.backward()

    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    # Cohere's rotary phases and eager attention's softmax are in float32 even here, and gradients add up in another order.
    tolerance = 1e-6 if family in ("cohere", "gemma2") else 1e-9
    theirs = dict(twin.named_parameters()) | {f"{ATTRIBUTE}.{n}": p for n, p in twin_heads.named_parameters()}
    ours = dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("kind", ["decoder", "mlp"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_all_ignored_batch_gives_zero_loss_and_zero_gradients(family, kind):
    model, heads = model_and_heads(family, kind)
    attach_heads(Backbone.of(model), heads)
    labels = torch.full_like(IDS, _)
    scores = model(input_ids=IDS, labels=labels, use_cache=False, auxiliary="add")["auxiliary"]
    loss = auxiliary_loss(scores["nll"], scores["count"], [1.0, 1.0, 1.0])
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert scores["count"].tolist() == scores["correct"].tolist() == [0, 0, 0]
    unused = Backbone.of(model).layer_name  # decoder heads leave before the last layer
    for name, parameter in model.named_parameters():
        if kind == "decoder" and name.startswith(unused):
            continue
        assert parameter.grad is not None, f"{name} has no gradient"
        assert not parameter.grad.any(), name
