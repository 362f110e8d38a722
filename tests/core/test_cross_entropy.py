"""log_likelihood and the divergences equal the computation with all logits, in value, precision and gradient."""

import pytest
import torch

from caftune.core import cross_entropy
from caftune.core.cross_entropy import Unembedding, divergence, log_likelihood, summed_loss, top_divergence, top_tokens

ROWS, WIDTH, VOCABULARY = 23, 8, 37
TRANSFORMS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 1.5},
    "all": {"bias": True, "scale": 2.0, "softcap": 3.0},
}


def tensors(dtype=torch.float64):
    hidden = torch.randn(ROWS, WIDTH, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(VOCABULARY, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(VOCABULARY, (ROWS,))


def full(hidden, weight, targets, *, bias=None, scale=1.0, softcap=None):
    logits = hidden @ weight.T
    logits = logits if bias is None else logits + bias
    logits = logits * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_p = logits - torch.logsumexp(logits, -1, keepdim=True)
    return log_p[torch.arange(len(targets)), targets], logits.argmax(-1) == targets


def both(name, dtype=torch.float64):
    hidden, weight, bias, targets = tensors(dtype)
    settings = dict(TRANSFORMS[name])
    settings["bias"] = bias if settings.pop("bias", False) else None
    leaves = [hidden, weight] + ([bias] if settings["bias"] is not None else [])
    return hidden, weight, targets, settings, leaves


@pytest.fixture(params=[1, 3 * VOCABULARY, 7 * VOCABULARY + 5, 2**26], ids=["1row", "3rows", "7rows", "one_chunk"])
def chunk_values(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_VALUES", request.param)
    return request.param


@pytest.mark.parametrize("name", TRANSFORMS)
def test_values_and_hits_equal_the_full_computation_at_every_chunk_size(name, chunk_values):
    hidden, weight, targets, settings, _ = both(name)
    likelihood, hits = log_likelihood(hidden, Unembedding(weight, **settings), targets)
    expected, expected_hits = full(hidden, weight, targets, **settings)
    torch.testing.assert_close(likelihood, expected, rtol=0, atol=1e-9)
    assert torch.equal(hits, expected_hits)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_gradients_equal_the_full_computation_at_every_chunk_size(name, chunk_values):
    hidden, weight, targets, settings, leaves = both(name)
    weighting = torch.randn(ROWS, dtype=torch.float64)  # one loss per row, so that no row's error hides in a sum
    likelihood, _ = log_likelihood(hidden, Unembedding(weight, **settings), targets)
    found = torch.autograd.grad((weighting * likelihood).sum(), leaves)
    expected = torch.autograd.grad((weighting * full(hidden, weight, targets, **settings)[0]).sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_hits_are_the_rows_whose_target_is_the_most_likely_token():
    weight = torch.eye(4, dtype=torch.float64)
    _, hits = log_likelihood(weight[[0, 1, 2]], Unembedding(weight), torch.tensor([0, 3, 2]))
    assert hits.tolist() == [True, False, True]


@pytest.mark.parametrize("name", ["plain", "all"])
def test_bfloat16_is_no_worse_than_the_plain_computation_in_bfloat16(name):
    hidden, weight, targets, settings, leaves = both(name, torch.bfloat16)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    plain = {**settings, "bias": doubles[2] if len(doubles) == 3 else None}
    truth = full(doubles[0], doubles[1], targets, **plain)[0]
    ours = log_likelihood(hidden, Unembedding(weight, **settings), targets)[0]
    naive = full(hidden, weight, targets, **settings)[0]
    assert ours.dtype == torch.float32

    def error(values, reference):
        return sum((one.double() - other).abs().mean().item() for one, other in zip(values, reference, strict=True))

    assert error([ours], [truth]) <= error([naive], [truth])
    exact = torch.autograd.grad(truth.sum(), doubles)
    assert error(torch.autograd.grad(ours.sum(), leaves), exact) <= 1.05 * error(  # 5%: both round at the same places
        torch.autograd.grad(naive.sum(), leaves), exact
    )


def test_zero_rows_give_an_empty_result_with_zero_gradients():
    hidden, weight, bias, targets = tensors()
    likelihood, hits = log_likelihood(hidden[:0], Unembedding(weight, bias), targets[:0])
    assert likelihood.shape == hits.shape == (0,)
    for gradient in torch.autograd.grad(likelihood.sum(), [hidden, weight, bias]):
        assert not gradient.any()


def test_no_more_logits_are_held_for_the_backward_pass_than_hidden_states(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_VALUES", 2 * VOCABULARY)
    hidden, weight, _, targets = tensors()
    kept = []

    def pack(tensor):
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        log_likelihood(hidden, Unembedding(weight), targets)
    assert not [shape for shape in kept if VOCABULARY in shape and shape != weight.shape]


def test_logits_follow_the_documented_order_of_bias_scale_and_softcap():
    unembedding = Unembedding(torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, -1.0]), scale=2.0, softcap=4.0)
    expected = 4.0 * torch.tanh(2.0 * torch.tensor([[4.0, 5.0]]) / 4.0)
    torch.testing.assert_close(unembedding.logits(torch.tensor([[3.0]])), expected)


@pytest.mark.parametrize("bad", ["targets", "width"])
def test_wrong_shapes_are_refused_by_the_annotations(bad):
    hidden, weight, _, targets = tensors()
    hidden, targets = (hidden, targets[:-1]) if bad == "targets" else (hidden[:, :-1], targets)
    with pytest.raises(Exception, match=r"[Tt]ype-check|mat1 and mat2|shape"):
        log_likelihood(hidden, Unembedding(weight), targets)


def test_divergence_and_its_gradients_are_those_of_the_formula():
    generator = torch.Generator().manual_seed(1)
    shapes = ((7, 5), (11, 5), (7, 5), (11,))
    hidden, weight, teacher, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    for tensor in (hidden, weight, teacher):
        tensor.requires_grad_()
    unembedding = Unembedding(weight, bias, scale=0.7, softcap=3.0)
    found, same = divergence(hidden, unembedding, teacher)

    def distribution(rows, matrix):
        return (3.0 * torch.tanh(0.7 * (rows @ matrix.T + bias) / 3.0)).softmax(-1)

    p, q = distribution(teacher.detach(), weight.detach()), distribution(hidden, weight)
    expected = (p * (p.log() - q.log())).sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert same.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    ours = torch.autograd.grad(found.sum(), (hidden, weight), retain_graph=True)
    theirs = torch.autograd.grad(expected.sum(), (hidden, weight))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert torch.autograd.grad(found.sum(), teacher, allow_unused=True)[0] is None


def test_divergence_does_not_depend_on_the_chunks(monkeypatch):
    hidden, weight, teacher = torch.randn(9, 4).double(), torch.randn(6, 4).double(), torch.randn(9, 4).double()
    whole = divergence(hidden, Unembedding(weight), teacher)
    monkeypatch.setattr("caftune.core.cross_entropy.CHUNK_VALUES", 12)
    chunked = divergence(hidden, Unembedding(weight), teacher)
    torch.testing.assert_close(chunked[0], whole[0], rtol=1e-12, atol=0)
    assert torch.equal(chunked[1], whole[1])


# A teacher of whom only the likeliest tokens are kept.

KEPT = 5


def transformed(hidden, weight, *, bias=None, scale=1.0, softcap=None):
    logits = scale * (hidden @ weight.T + (0.0 if bias is None else bias))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def full_top(hidden, weight, teacher, k, **settings):
    kept = transformed(teacher, weight, **settings).detach().topk(k)
    p, q = kept.values.softmax(-1), transformed(hidden, weight, **settings).log_softmax(-1).gather(-1, kept.indices)
    return (p * (p.log() - q)).sum(-1)


def taught(name):
    hidden, weight, _, settings, leaves = both(name)
    return hidden, weight, torch.randn(ROWS, WIDTH, dtype=torch.float64), settings, leaves


def ours_top(hidden, weight, teacher, k, **settings):
    unembedding = Unembedding(weight, **settings)
    return top_divergence(hidden, unembedding, *top_tokens(teacher, unembedding, k))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_top_divergence_is_that_of_the_formula_at_every_chunk_size(name, chunk_values):
    hidden, weight, teacher, settings, _ = taught(name)
    found, _ = ours_top(hidden, weight, teacher, KEPT, **settings)
    torch.testing.assert_close(found, full_top(hidden, weight, teacher, KEPT, **settings), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_gradients_of_top_divergence_are_those_of_the_formula_at_every_chunk_size(name, chunk_values):
    hidden, weight, teacher, settings, leaves = taught(name)
    weighting = torch.randn(ROWS, dtype=torch.float64)
    found = (weighting * ours_top(hidden, weight, teacher, KEPT, **settings)[0]).sum()
    expected = (weighting * full_top(hidden, weight, teacher, KEPT, **settings)).sum()
    for one, other in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("k", [VOCABULARY, VOCABULARY + 1])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_top_divergence_of_the_whole_vocabulary_is_divergence(name, k):
    hidden, weight, teacher, settings, leaves = taught(name)
    found, hits = ours_top(hidden, weight, teacher, k, **settings)
    expected, expected_hits = divergence(hidden, Unembedding(weight, **settings), teacher)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert torch.equal(hits, expected_hits)
    gradients = [torch.autograd.grad(value.sum(), leaves) for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)


def test_top_divergence_hits_are_the_rows_where_both_have_the_same_most_likely_token():
    weight = torch.eye(4, dtype=torch.float64)
    hidden, teacher = weight[[0, 1, 2]], 2 * weight[[0, 3, 2]]
    assert ours_top(hidden, weight, teacher, 2)[1].tolist() == [True, False, True]


def test_top_tokens_are_the_likeliest_first_with_probabilities_that_add_up_to_one():
    unembedding = Unembedding(torch.tensor([[1.0], [4.0], [2.0], [3.0]], dtype=torch.float64).log())
    tokens, logs = top_tokens(torch.ones(1, 1, dtype=torch.float64), unembedding, 3)
    assert tokens.tolist() == [[1, 3, 2]]
    torch.testing.assert_close(logs.exp(), torch.tensor([[4 / 9, 3 / 9, 2 / 9]], dtype=torch.float64))


def test_top_tokens_do_not_depend_on_the_chunks(monkeypatch):
    _, weight, teacher, _, _ = taught("plain")
    tokens, logs = top_tokens(teacher, Unembedding(weight), KEPT)
    monkeypatch.setattr(cross_entropy, "CHUNK_VALUES", 3 * VOCABULARY)
    chunked_tokens, chunked_logs = top_tokens(teacher, Unembedding(weight), KEPT)
    assert torch.equal(chunked_tokens, tokens)
    torch.testing.assert_close(chunked_logs, logs, rtol=0, atol=1e-12)


def test_no_gradient_reaches_the_teacher_through_its_top_tokens():
    _, weight, teacher, _, _ = taught("plain")
    _, logs = top_tokens(teacher.requires_grad_(), Unembedding(weight), KEPT)
    assert not logs.requires_grad


def test_no_gradient_reaches_the_log_probabilities_that_top_divergence_is_given():
    hidden, weight, teacher, _, _ = taught("plain")
    tokens, logs = top_tokens(teacher, Unembedding(weight), KEPT)
    found, _ = top_divergence(hidden, Unembedding(weight), tokens, logs.requires_grad_())
    assert torch.autograd.grad(found.sum(), logs, allow_unused=True) == (None,)


def test_top_tokens_of_no_rows_are_none():
    tokens, logs = top_tokens(torch.zeros(0, WIDTH), Unembedding(torch.randn(VOCABULARY, WIDTH)), KEPT)
    assert tokens.shape == logs.shape == (0, KEPT)


def test_logits_in_half_precision_are_compared_in_float32():
    hidden, weight, _, _, _ = both("plain", torch.bfloat16)
    unembedding = Unembedding(weight)
    tokens, logs = top_tokens(hidden, unembedding, KEPT)
    assert logs.dtype == top_divergence(hidden, unembedding, tokens, logs)[0].dtype == torch.float32


# The sum with its gradients at once.


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_sum_and_its_gradients_equal_the_full_computation_at_every_chunk_size(name, chunk_values):
    hidden, weight, targets, settings, leaves = both(name)
    loss, hits = summed_loss(hidden, Unembedding(weight, **settings), targets)
    expected, expected_hits = full(hidden, weight, targets, **settings)
    torch.testing.assert_close(loss, -expected.sum(), rtol=1e-12, atol=1e-9)
    assert hits == expected_hits.sum()
    found = torch.autograd.grad(-0.3 * loss, leaves)
    for one, other in zip(found, torch.autograd.grad(0.3 * expected.sum(), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_the_sum_has_gradients_for_what_is_trained_alone(trained):
    hidden, weight, targets, settings, leaves = both("all")
    expected = torch.autograd.grad(-full(hidden, weight, targets, **settings)[0].sum(), leaves)[trained]
    for place, leaf in enumerate(leaves):
        leaf.requires_grad_(place == trained)
    summed_loss(hidden, Unembedding(weight, **settings), targets)[0].backward()
    torch.testing.assert_close(leaves[trained].grad, expected, rtol=0, atol=1e-9)
    assert [leaf.grad is None for leaf in leaves] == [place != trained for place in range(3)]


@pytest.mark.parametrize("name", ["plain", "all"])
def test_the_sum_in_bfloat16_is_no_worse_than_the_plain_computation(name):
    hidden, weight, targets, settings, leaves = both(name, torch.bfloat16)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = full(*doubles[:2], targets, **{**settings, "bias": doubles[2] if len(doubles) == 3 else None})[0].sum()
    exact = torch.autograd.grad(truth, doubles)
    ours = summed_loss(hidden, Unembedding(weight, **settings), targets)[0]
    naive = full(hidden, weight, targets, **settings)[0].sum()
    assert ours.dtype == torch.float32
    errors = [
        [(one.double() - other).abs().mean().item() for one, other in zip(gradients, exact, strict=True)]
        for gradients in (torch.autograd.grad(-ours, leaves), torch.autograd.grad(naive, leaves))
    ]
    assert all(one <= 1.05 * other for one, other in zip(*errors, strict=True))


def test_the_sum_keeps_master_weights_under_autocast():
    hidden, weight, targets, _, leaves = both("plain", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = summed_loss(hidden, Unembedding(weight), targets)
    found = torch.autograd.grad(-loss, leaves)
    assert [gradient.dtype for gradient in found] == [torch.float32, torch.float32]
    for one, other in zip(found, torch.autograd.grad(full(hidden, weight, targets)[0].sum(), leaves), strict=True):
        assert (one - other).norm() < 0.03 * other.norm()


def test_the_sum_of_no_rows_is_zero_with_zero_gradients():
    hidden, weight, bias, targets = tensors()
    loss, hits = summed_loss(hidden[:0], Unembedding(weight, bias), targets[:0])
    assert loss == hits == 0
    for gradient in torch.autograd.grad(loss, [hidden, weight, bias]):
        assert not gradient.any()


def summed(name="all"):
    hidden, weight, targets, settings, leaves = both(name)
    return summed_loss(hidden, Unembedding(weight, **settings), targets)[0], leaves


def test_a_second_backward_pass_of_the_summed_loss_alone_is_as_for_any_function():
    loss, leaves = summed()
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(3 * loss, leaves)
    for one, three in zip(once, again, strict=True):
        torch.testing.assert_close(three, 3 * one, rtol=1e-9, atol=1e-12)
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


def test_hooks_of_tensors_see_the_gradients_of_the_summed_loss():
    loss, leaves = summed("plain")
    seen = []
    leaves[0].register_hook(lambda gradient: seen.append(gradient.clone()) or 2 * gradient)
    loss.backward()
    torch.testing.assert_close(leaves[0].grad, 2 * seen[0])
