"""The measured quality of heads is what plain loops over single rows and full logits give."""

import collections
import copy
import json
import types

import pytest
import torch
from datasets import Dataset
from models import VOCABULARY, build
from trainers import config
from transformers import AutoModelForCausalLM, AutoTokenizer

from caftune.checkpoints.heads_folder import load_heads
from caftune.core.backbone import Backbone
from caftune.core.heads import AuxiliaryHeads, HeadsConfig
from caftune.demo.chemistry import completion, molecules, prompt
from caftune.demo.run import BASE
from caftune.pipeline.head_quality import _agreement, _draw_places, measure_heads
from caftune.training.prepare import prepare

HORIZONS = [2, 3, 4]
REACH = 4  # tokens of a continuation: as far as the last horizon looks
DRAFTS = ["heads", "untrained"]
KINDS = ["trunk", *DRAFTS]
# More rows than a batch takes, some shorter than the last horizon.
LENGTHS = [2, 3, 4, 5, 5, 6, 7, 7, 8, 9, 9, 10, 11, 12, 13, 14, 15, 17, 19, 21]
CASES = [("llama", "decoder"), ("gpt2", "decoder"), ("llama", "mlp")]
TOLERANCE = 1e-9


def moved_heads(backbone, kind="decoder"):
    """Heads that are near their untrained copies, and no two alike."""
    heads = AuxiliaryHeads.build(backbone, HeadsConfig(len(HORIZONS), kind))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return heads


@torch.no_grad()
def greedy(model, ids, count):
    """Up to `count` tokens, each the likeliest after all before it; the end-of-text token is the last where it is written."""
    written = []
    while len(written) < count and model.generation_config.eos_token_id not in written:
        written.append(int(model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax()))
    return written


def text_of(model):
    """Rows that begin with drawn tokens and go on in the model's own, so that it is neither always right nor never.

    A prompt, and in every third row one token in the middle, is no target.
    """
    generator = torch.Generator().manual_seed(4)
    rows = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(VOCABULARY, (length - length // 3,), generator=generator).tolist()
        ids += greedy(model, ids, length // 3)
        labels = [-100] * (length // 4) + ids[length // 4 :]
        if number % 3 == 0:
            labels[length // 2] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def all_places(rows):
    for row in rows:
        for t in range(len(row["input_ids"]) - REACH):
            if row["labels"][t + 1] != -100:
                yield row["input_ids"], t


def with_head(model, head, kind):
    """A copy of the model with a decoder head in the place of its last layer, or an MLP head behind it."""
    twin = copy.deepcopy(model)
    layers = twin.transformer.h if hasattr(twin, "transformer") else twin.model.layers
    if kind == "decoder":
        layers[-1] = copy.deepcopy(head)
    else:
        layers[-1].register_forward_hook(lambda _layer, _args, output: head(output, twin.model.norm(output)))
    return twin


def mean(values):
    values = [float(value) for value in values]
    return sum(values) / len(values)


@torch.no_grad()
def by_hand(model, heads, rows):
    """The report in plain loops: row after row, no padding, all logits, nothing captured or replayed."""
    speakers = {
        "heads": [with_head(model, head, heads.config.kind) for head in heads.heads],
        "untrained": [model] * len(HORIZONS),  # a fresh head says what the model says, and its target is a later token
    }
    tally = collections.defaultdict(list)
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        said = {name: [one(input_ids=ids).logits[0] for one in speakers[name]] for name in DRAFTS}
        score_targets(tally, row["labels"], model(input_ids=ids).logits[0], said)
        for tokens, t in all_places([row]):
            written = greedy(model, tokens[: t + 1], REACH)
            tally["written"].append(len(written))
            for name in DRAFTS:
                compare(tally, name, [int(logits[t].argmax()) for logits in said[name]], written)
    report = {"targets": {str(h): len(tally["trunk", "loss", h]) for h in HORIZONS}, "positions": len(tally["written"])}
    for name in KINDS:
        measures = ("loss", "top1", "top5", "agreement") if name in DRAFTS else ("loss", "top1", "top5")
        report[name] = {m: {str(h): mean(tally[name, m, h]) for h in HORIZONS} for m in measures}
    for name in DRAFTS:
        report[name]["accepted_length"] = mean(tally[name, "accepted_length"])
    return report, set(tally["written"])


def score_targets(tally, labels, own, said):
    """The target of position t at horizon h is token t + h, which the model itself predicts from t + h - 1."""
    for i, h in enumerate(HORIZONS):
        for t in range(len(labels) - h):
            target = labels[t + h]
            if target == -100:
                continue
            for name, logits in (("trunk", own[t + h - 1]), *((name, said[name][i][t]) for name in DRAFTS)):
                tally[name, "loss", h].append(-logits.log_softmax(-1)[target])
                tally[name, "top1", h].append(logits.argmax() == target)
                tally[name, "top5", h].append(target in logits.topk(5).indices)


def compare(tally, name, guesses, written):
    """What one place adds: a horizon beyond the end of the continuation adds nothing."""
    accepted, is_unbroken = 0, True
    for guess, h in zip(guesses, HORIZONS, strict=True):
        if h > len(written):
            break
        tally[name, "agreement", h].append(guess == written[h - 1])
        is_unbroken = is_unbroken and guess == written[h - 1]
        accepted += is_unbroken
    tally[name, "accepted_length"].append(accepted)


def prepared(family="llama", kind="decoder", **options):
    """A model that at times ends its continuations, its heads, and rows; sdpa, as eager attention gives NaN in float64."""
    model = build(family, attention="sdpa", **options)
    model.generation_config.eos_token_id = None
    rows = text_of(model)
    written = [greedy(model, ids[: t + 1], REACH) for ids, t in all_places(rows)]
    later = collections.Counter(token for tokens in written for token in tokens[1:3])
    model.generation_config.eos_token_id = later.most_common(1)[0][0]
    backbone = Backbone.of(model)
    return model, backbone, moved_heads(backbone, kind), rows


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def measured(request):
    model, backbone, heads, rows = prepared(*request.param)
    found = measure_heads(backbone, heads, Dataset.from_list(rows), positions=10**6)
    expected, lengths = by_hand(model, heads, rows)
    return types.SimpleNamespace(found=found, expected=expected, lengths=lengths)


@pytest.fixture(scope="module")
def small():
    return prepared("gpt2")


def test_targets_and_places_are_counted_as_by_hand(measured):
    assert measured.found["targets"] == measured.expected["targets"]
    assert measured.found["positions"] == measured.expected["positions"]
    assert len({*measured.found["targets"].values()}) == len(HORIZONS)


@pytest.mark.parametrize("name", KINDS)
def test_losses_are_those_of_single_rows_at_every_horizon(measured, name):
    assert measured.found[name]["loss"] == pytest.approx(measured.expected[name]["loss"], rel=0, abs=TOLERANCE)


@pytest.mark.parametrize("measure", ["top1", "top5"])
@pytest.mark.parametrize("name", KINDS)
def test_first_guesses_are_counted_as_in_single_rows_at_every_horizon(measured, name, measure):
    assert measured.found[name][measure] == pytest.approx(measured.expected[name][measure], abs=1e-9)
    assert any(0 < share < 1 for share in measured.found[name][measure].values())


@pytest.mark.parametrize("name", DRAFTS)
def test_agreement_is_with_what_the_model_writes_token_by_token(measured, name):
    assert measured.found[name]["agreement"] == pytest.approx(measured.expected[name]["agreement"], abs=1e-9)
    assert any(0 < share < 1 for share in measured.found[name]["agreement"].values())


@pytest.mark.parametrize("name", DRAFTS)
def test_accepted_length_is_with_what_the_model_writes_token_by_token(measured, name):
    assert measured.found[name]["accepted_length"] == pytest.approx(
        measured.expected[name]["accepted_length"], abs=1e-9
    )
    assert 0 < measured.found[name]["accepted_length"] < len(HORIZONS)


def test_the_text_of_these_tests_has_continuations_of_every_length(measured):
    assert measured.lengths == {1, 2, 3, 4}


def test_the_heads_of_these_tests_differ_from_their_untrained_copies(measured):
    for measure in ("loss", "agreement", "accepted_length"):
        assert measured.found["heads"][measure] != measured.found["untrained"][measure]


# Agreement and accepted length, by hand. Horizon h guesses the continuation's token h - 1 (from 0).


@pytest.mark.parametrize(
    ("guesses", "own", "agreement", "length"),
    [
        pytest.param([[5, 6, 7]], [[9, 5, 6, 7]], [1, 1, 1], 3, id="all_right"),
        pytest.param([[5, 0, 7]], [[9, 5, 6, 7]], [1, 0, 1], 1, id="first_right"),
        pytest.param([[0, 6, 7]], [[9, 5, 6, 7]], [0, 1, 1], 0, id="first_wrong"),
        pytest.param([[9, 5, 6]], [[9, 5, 6, 7]], [0, 0, 0], 0, id="one_token_early"),
        pytest.param([[5, 6, 7]], [[9, 5]], [1, 0, 0], 1, id="ended_early"),
        pytest.param([[5, 6, 7]], [[9]], [0, 0, 0], 0, id="ended_at_once"),
        pytest.param([[5, 6, 7], [5, 0, 0]], [[9, 5, 6, 7], [9, 5]], [1, 1, 1], 2, id="places_that_ended_do_not_count"),
        pytest.param([[5, 6, 7], [0, 6, 0]], [[9, 5, 6, 7]] * 2, [0.5, 1, 0.5], 1.5, id="mean_over_places"),
    ],
)
def test_agreement_and_accepted_length_of_small_cases(guesses, own, agreement, length):
    expected = {"agreement": dict(zip(("2", "3", "4"), agreement, strict=True)), "accepted_length": length}
    assert _agreement(torch.tensor(guesses), own, HORIZONS) == expected


# Places.


def test_the_same_seed_draws_the_same_places(small):
    rows = Dataset.from_list(small[-1])
    drawn = [_draw_places(rows, 9, seed, reach=REACH) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_drawn_places_are_labelled_and_have_enough_of_their_row_to_come(small):
    found = _draw_places(Dataset.from_list(small[-1]), 10**6, 0, reach=REACH)
    ids = [row["input_ids"] for row in small[-1]]
    assert [(ids[row], t) for row, t in found] == list(all_places(small[-1]))


def test_no_more_places_are_drawn_than_asked_for(small):
    _, backbone, heads, rows = small
    assert measure_heads(backbone, heads, Dataset.from_list(rows), positions=9)["positions"] == 9


def test_the_seed_moves_the_places_and_not_the_text(small):
    _, backbone, heads, rows = small
    one, same, other = (measure_heads(backbone, heads, Dataset.from_list(rows), positions=9, seed=s) for s in (1, 1, 2))
    assert one == same
    assert one["heads"]["agreement"] != other["heads"]["agreement"]
    assert one["heads"]["loss"] == other["heads"]["loss"]


def test_rows_too_short_for_any_target_give_zeros(small):
    _, backbone, heads, _ = small
    rows = Dataset.from_list([{"input_ids": [3, 4], "labels": [3, 4]}, {"input_ids": [5], "labels": [5]}])
    report = measure_heads(backbone, heads, rows)
    zeros = dict.fromkeys(("2", "3", "4"), 0)
    assert (report["targets"], report["positions"]) == (zeros, 0)
    assert report["heads"] == {**dict.fromkeys(("loss", "top1", "top5", "agreement"), zeros), "accepted_length": 0}


# What measuring leaves alone, and what leaves the measures alone.


def test_measuring_changes_no_weight_and_no_mode(small):
    model, backbone, heads, rows = small
    model.train()
    model.transformer.h[0].eval()
    heads.train()
    heads.heads[1].eval()
    modules = [*model.modules(), *heads.modules()]
    modes = [module.training for module in modules]
    weights = copy.deepcopy([model.state_dict(), heads.state_dict()])
    measure_heads(backbone, heads, Dataset.from_list(rows), positions=9)
    assert [module.training for module in modules] == modes
    for before, after in zip(weights, (model.state_dict(), heads.state_dict()), strict=True):
        assert all(torch.equal(value, after[key]) for key, value in before.items())
    model.eval()
    heads.eval()


def test_the_model_can_be_trained_after_measuring(small):
    """Measuring runs in inference mode, whose tensors no gradient may pass through later."""
    model, backbone, heads, rows = small
    measure_heads(backbone, heads, Dataset.from_list(rows), positions=9)
    with backbone.capture() as call:
        model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
    heads.hidden(0, backbone, call).sum().backward()
    assert all(parameter.grad is not None for parameter in heads.heads[0].parameters())
    model.zero_grad()
    heads.zero_grad()


def test_dropout_is_off_in_the_model_its_heads_and_their_copies():
    model, backbone, heads, rows = prepared("gpt2", resid_pdrop=0.5)
    expected = measure_heads(backbone, heads, Dataset.from_list(rows))
    model.train()
    heads.train()
    assert measure_heads(backbone, heads, Dataset.from_list(rows)) == expected


def test_the_continuation_is_greedy_whatever_the_model_says_of_generation(small):
    model, backbone, heads, rows = small
    expected = measure_heads(backbone, heads, Dataset.from_list(rows))
    before = copy.deepcopy(model.generation_config)
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.do_sample = True
    found = measure_heads(backbone, heads, Dataset.from_list(rows))
    model.generation_config = before
    assert found == expected


def test_a_report_survives_json(small):
    _, backbone, heads, rows = small
    report = measure_heads(backbone, heads, Dataset.from_list(rows))
    assert json.loads(json.dumps(report)) == report


def test_trained_heads_of_the_embedded_base_beat_their_untrained_copies_at_every_horizon(heads, tmp_path):
    """After four steps of training, on molecules of another seed."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    drawn = molecules(40, seed=8, substituents=(0, 2))
    text = Dataset.from_list([{"prompt": prompt(m), "completion": completion(m)} for m in drawn])
    backbone = Backbone.of(AutoModelForCausalLM.from_pretrained(BASE))
    held_out = prepare(text, tokenizer, config(tmp_path, pretrain_heads=True), name="eval").rows
    report = measure_heads(backbone, load_heads(heads, backbone, tokenizer), held_out)
    for h in report["targets"]:
        assert report["heads"]["loss"][h] < report["untrained"]["loss"][h]
