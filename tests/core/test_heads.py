"""Heads inside a model: what they see, that nothing else changes, and that every way to lay out rows gives the same."""

import pytest
import torch
from models import VOCABULARY, build

from caftune.core.attach import ATTRIBUTE, attach_heads
from caftune.core.backbone import Backbone, UnsupportedModelError
from caftune.core.heads import AuxiliaryHeads, HeadsConfig

IDS = torch.randint(3, VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(5))
KINDS = ["decoder", "mlp"]


def carrying(family="llama", kind="decoder", *, count=3, final_norm=True, **options):
    """A model with heads whose weights are moved apart from the last layer's."""
    model = build(family, **options)
    backbone = Backbone.of(model)
    heads = AuxiliaryHeads.build(backbone, HeadsConfig(count, kind, final_norm=final_norm))
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    attach_heads(backbone, heads)
    return model, backbone, heads


def hidden_of(model, backbone, heads, **inputs):
    with torch.no_grad(), backbone.capture() as call:
        model(**inputs, use_cache=False)
        return torch.stack([heads.hidden(index, backbone, call) for index in range(heads.config.count)])


def changed(ids, columns):
    ids = ids.clone()
    ids[:, columns] = (ids[:, columns] - 3 + 7) % (VOCABULARY - 3) + 3
    return ids


# No head sees what comes later, what is padding, or another document.


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
def test_no_head_sees_later_tokens_or_padding(family, kind, attention, padding):
    if family == "bloom" and attention == "sdpa":
        pytest.skip("Bloom has eager attention only")
    # float32, as eager attention in Llama masks whole rows with float64's minimum, which its float32 softmax makes NaN
    model, backbone, heads = carrying(family, kind, attention=attention, dtype=torch.float32)
    real, pads = {None: (range(10), []), "left": (range(3, 10), [0, 1, 2]), "right": (range(7), [7, 8, 9])}[padding]
    mask = torch.ones_like(IDS)
    mask[:, pads] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    where = {"attention_mask": mask} | ({"position_ids": positions} if family in ("llama", "gpt2") else {})
    before = hidden_of(model, backbone, heads, input_ids=IDS, **where)
    cut = real[3]  # tokens after this one change
    later = [t for t in range(10) if t > cut or t in pads]
    after = hidden_of(model, backbone, heads, input_ids=changed(IDS, later), **where)
    seen = [t for t in real if t <= cut]
    torch.testing.assert_close(after[:, :, seen], before[:, :, seen], rtol=0, atol=1e-5)
    unseen = [t for t in real if t > cut]
    assert (after[:, :, unseen] - before[:, :, unseen]).abs().amin((0, 1)).amax() > 1e-3, "nothing moved at all"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_documents_do_not_see_each_other(family, attention, kind):
    model, backbone, heads = carrying(family, kind, attention=attention)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    before = hidden_of(model, backbone, heads, input_ids=IDS[:1], position_ids=positions)
    for mine, other in ((slice(0, 4), slice(4, 10)), (slice(4, 10), slice(0, 4))):
        after = hidden_of(model, backbone, heads, input_ids=changed(IDS[:1], other), position_ids=positions)
        torch.testing.assert_close(after[:, :, mine], before[:, :, mine], rtol=0, atol=1e-9)
        assert not torch.allclose(after[:, :, other], before[:, :, other])


# One row per document, packed, left padded, right padded: one and the same.

DOCUMENTS = [[5, 9, 11, 30, 7, 8], [12, 4, 55, 6], [21, 22, 23, 24, 25]]
PROMPTS = [2, 1, 3]


def separate():
    for ids, prompt in zip(DOCUMENTS, PROMPTS, strict=True):
        yield {"input_ids": torch.tensor([ids]), "labels": torch.tensor([[-100] * prompt + ids[prompt:]])}


def packed():
    rows = list(separate())
    yield {name: torch.cat([row[name] for row in rows], 1) for name in rows[0]} | {
        "position_ids": torch.tensor([[t for ids in DOCUMENTS for t in range(len(ids))]])
    }


def padded(side):
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    columns = {name: [] for name in fill}
    for row in separate():
        row["attention_mask"] = torch.ones_like(row["input_ids"])
        for name, value in fill.items():
            space = 8 - row[name].shape[1]
            pad = (space, 0) if side == "left" else (0, space)
            columns[name].append(torch.nn.functional.pad(row[name], pad, value=value))
    batch = {name: torch.cat(rows) for name, rows in columns.items()}
    yield batch | {"position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


LAYOUTS = {"packed": packed, "left": lambda: padded("left"), "right": lambda: padded("right")}


def sums_and_gradients(model, batches, **options):
    model.zero_grad()
    total = {"nll": 0.0, "count": 0, "correct": 0}
    for batch in batches:
        scores = model(**batch, **{"use_cache": False, "auxiliary": "add", **options})["auxiliary"]
        (scores["nll"] * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        total = {name: total[name] + scores[name].detach() for name in total}
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other, atol=1e-9):
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=atol)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=1e-9, atol=atol, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_layout_of_rows_gives_the_same_sums_and_gradients(family, kind, layout):
    model, _, _ = carrying(family, kind, attention="sdpa")
    alone = sums_and_gradients(model, separate())
    assert alone[0]["count"].tolist() == [8, 6, 3]  # by hand: horizon 2 has 4 + 2 + 2 targets
    assert_same(sums_and_gradients(model, LAYOUTS[layout]()), alone)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_without_the_final_norm_do_so_too(layout):
    model, _, _ = carrying("llama", final_norm=False, attention="sdpa")
    alone = sums_and_gradients(model, separate())
    assert_same(sums_and_gradients(model, LAYOUTS[layout]()), alone)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    (batch,) = LAYOUTS[layout]()
    model.zero_grad()
    model(**batch, use_cache=False, auxiliary="add", auxiliary_weights=weights)["auxiliary"]["loss"].backward()
    one_by_one = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same((alone[0], one_by_one), alone)


@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "eager"), ("llama", "sdpa"), ("gpt2", "eager"), ("gpt2", "sdpa"), ("gptj", "eager"), ("mamba", "eager")],
)
def test_a_cache_in_the_forward_pass_changes_nothing(family, attention):
    model, _, _ = carrying(family, attention=attention)
    expected = model(input_ids=IDS, labels=IDS, use_cache=False, auxiliary="add")["auxiliary"]["nll"]
    found = model(input_ids=IDS, labels=IDS, use_cache=True, auxiliary="add")["auxiliary"]["nll"]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # GPT-J and Mamba compute partly in float32


@pytest.mark.parametrize("name", ["attention_mask", "position_ids"])
def test_arguments_by_position_count_like_arguments_by_name(name):
    model, _, _ = carrying(attention="sdpa")  # eager gives NaN for wholly masked rows in float64
    batch = next(padded("left") if name == "attention_mask" else packed())
    by_name = model(**batch, auxiliary="add")["auxiliary"]
    order = [batch["input_ids"], batch.get("attention_mask"), batch["position_ids"]]
    by_position = model(*order, labels=batch["labels"], auxiliary="add")["auxiliary"]
    assert torch.equal(by_position["count"], by_name["count"])
    torch.testing.assert_close(by_position["nll"], by_name["nll"])


# Gradient checkpointing.


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_neither_sums_nor_gradients(family, kind, reentrant):
    model, _, _ = carrying(family, kind, attention="sdpa")
    model.train()
    expected = sums_and_gradients(model, separate())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_same(sums_and_gradients(model, separate()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_only_leaves_no_gradient_on_the_layers_and_scores_like_add(kind):
    model, _, heads = carrying("llama", kind)
    expected, _ = sums_and_gradients(model, separate())
    found, gradients = sums_and_gradients(model, separate(), auxiliary="only")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    own = {name for name in gradients if name.startswith(ATTRIBUTE)}
    # The final norm and the unembedding are the heads' too; the trainer freezes them in stage 1.
    assert {name for name in gradients if name not in own} <= {"model.norm.weight", "lm_head.weight"}
    assert own == {f"{ATTRIBUTE}.{name}" for name, _ in heads.named_parameters()}


def test_heads_return_only_sums_never_logits():
    model, _, _ = carrying()
    assert set(model(input_ids=IDS, labels=IDS, auxiliary="only")) == {"auxiliary"}
    scores = model(input_ids=IDS, labels=IDS, auxiliary="add")["auxiliary"]
    assert {name: tuple(value.shape) for name, value in scores.items()} == {"nll": (3,), "count": (3,), "correct": (3,)}


def test_fresh_heads_repeat_the_models_own_prediction():
    for kind in KINDS:
        model = build("llama")
        backbone = Backbone.of(model)
        heads = AuxiliaryHeads.build(backbone, HeadsConfig(2, kind))
        found = hidden_of(model, backbone, heads, input_ids=IDS)
        with torch.no_grad():
            own = model.model(input_ids=IDS).last_hidden_state
        torch.testing.assert_close(found, own.expand_as(found), rtol=0, atol=1e-9)


def test_building_heads_does_not_move_the_random_state():
    backbone = Backbone.of(build("llama"))
    state = torch.get_rng_state()
    for kind in KINDS:
        AuxiliaryHeads.build(backbone, HeadsConfig(2, kind))
    assert torch.equal(torch.get_rng_state(), state)


def test_copied_heads_share_nothing_with_the_last_layer_and_carry_no_hooks():
    model = build("llama")
    layer = model.model.layers[-1]
    layer.register_forward_hook(lambda *_: None)
    layer.self_attn.register_forward_pre_hook(lambda *_, **__: None, with_kwargs=True)
    layer.mlp.register_full_backward_hook(lambda *_: None)
    layer.requires_grad_(False)
    heads = AuxiliaryHeads.build(Backbone.of(model), HeadsConfig(2))
    for head in heads.heads:
        for module in head.modules():
            assert not [name for name, value in vars(module).items() if "_hooks" in name and value]
        assert all(parameter.requires_grad for parameter in head.parameters())
    storages = [p.data_ptr() for part in (layer, *heads.heads) for p in part.parameters()]
    assert len(storages) == len(set(storages))
    assert layer._forward_hooks
    assert layer.mlp._backward_hooks


def test_heads_on_a_model_wrapped_by_peft_are_refused():
    peft = pytest.importorskip("peft")
    model = build("llama", dtype=torch.float32)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(UnsupportedModelError, match="already carries LoRA weights, which its heads would copy"):
        AuxiliaryHeads.build(Backbone.of(model), HeadsConfig(1))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"kind": "big"}, "kind must be one of decoder, mlp, got 'big'"),
    ],
)
def test_a_bad_heads_config_is_refused_with_a_sentence(values, sentence):
    config = object.__new__(HeadsConfig)  # past the checked annotations, which refuse some values before the class does
    vars(config).update({"count": 4, "kind": "decoder", **values})
    with pytest.raises(ValueError, match=sentence):
        config.__post_init__()


def test_an_mlp_head_changes_every_stream_of_a_model_with_several_by_the_same():
    model, backbone, heads = carrying("deepseek_v4", "mlp", dtype=torch.float32)
    with torch.no_grad(), backbone.capture() as call:
        model(input_ids=IDS, use_cache=False)
        change = heads.heads[0](call.hidden, backbone.close(call.hidden)) - call.hidden
    assert change.shape == (*IDS.shape, 4, call.hidden.shape[-1])
    assert change.any()
    torch.testing.assert_close(change, change[:, :, :1].expand_as(change), rtol=1e-4, atol=1e-4)


def test_no_cache_is_made_where_heads_run():
    model, _, _ = carrying()
    outputs = model(input_ids=IDS, labels=IDS, use_cache=True, auxiliary="add")
    assert outputs.past_key_values is None
    assert model(input_ids=IDS, use_cache=True).past_key_values is not None


# Soft targets: what the model itself says later.


def soft_batch(layout):
    """Two prompts and their answers: as two rows, or packed into one."""
    ids = torch.randint(3, VOCABULARY, (2, 8) if layout == "rows" else (1, 14))
    labels = ids.clone()
    labels[:, :2] = -100
    labels[-1, 5] = -100
    positions = {"rows": [[*range(8)]] * 2, "packed": [[*range(8), *range(6)]]}[layout]
    return {"input_ids": ids, "labels": labels, "position_ids": torch.tensor(positions)}


def soft_by_formula(model, backbone, heads, batch, kept):
    """Divergence, targets and agreements of every horizon, target by target, from the full logits of model and heads."""
    ids, labels, positions = batch.values()
    with torch.no_grad(), backbone.capture() as call:
        teacher = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        students = [backbone.unembedding().logits(heads.hidden(i, backbone, call)) for i in range(heads.config.count)]
    found = torch.zeros(3, len(students), dtype=torch.float64)
    for index, horizon in enumerate(heads.config.horizons):
        for row, t in torch.cartesian_prod(torch.arange(len(ids)), torch.arange(ids.shape[1] - horizon)).tolist():
            if labels[row, t + horizon] == -100 or positions[row, t + horizon] < horizon:
                continue
            top = teacher[row, t + horizon - 1].topk(kept)
            p, q = top.values.log_softmax(-1), students[index][row, t].log_softmax(-1)
            is_same = top.indices[0] == q.argmax()
            found[:, index] += torch.stack([(p.exp() * (p - q[top.indices])).sum(), torch.ones(()), is_same])
    return dict(zip(("nll", "count", "correct"), found, strict=True))


@pytest.mark.parametrize("kept", [None, 1, 4], ids=["all", "top1", "top4"])
@pytest.mark.parametrize("layout", ["rows", "packed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_soft_targets_are_what_the_model_says_later(family, kind, layout, kept):
    model, backbone, heads = carrying(family, kind)
    batch = soft_batch(layout)
    scores = model(**batch, auxiliary="soft", soft_top_k=kept)["auxiliary"]
    expected = soft_by_formula(model, backbone, heads, batch, kept or VOCABULARY)
    assert expected["count"].all()
    for name, values in expected.items():
        torch.testing.assert_close(scores[name], values, rtol=1e-9, atol=1e-9, check_dtype=False)


@pytest.mark.parametrize("kept", [None, 4], ids=["all", "top4"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_soft_targets_move_every_head_and_no_layer_of_the_model(family, kind, kept):
    model, _, heads = carrying(family, kind)
    model(**soft_batch("packed"), auxiliary="soft", soft_top_k=kept)["auxiliary"]["nll"].sum().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if ".0." in name and ATTRIBUTE not in name)
    assert all(p.grad is not None for p in heads.parameters())


@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_as_many_likeliest_tokens_as_the_vocabulary_has_are_plain_soft_targets(layout):
    model, _, _ = carrying()
    batch = soft_batch(layout)
    plain = sums_and_gradients(model, [batch], auxiliary="soft")
    assert_same(sums_and_gradients(model, [batch], auxiliary="soft", soft_top_k=VOCABULARY), plain)


@pytest.mark.parametrize("kept", [None, 4])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_soft_target(side, kept):
    model, _, _ = carrying(attention="sdpa")
    alone = sums_and_gradients(model, separate(), auxiliary="soft", soft_top_k=kept)
    assert_same(sums_and_gradients(model, padded(side), auxiliary="soft", soft_top_k=kept), alone)
