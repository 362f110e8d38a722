"""Batches that ended answers leave: the answers of `generate` in any batch, and nothing computed for ended ones."""

import random
from types import SimpleNamespace

import pytest
import torch
from models import build
from transformers import AutoModelForCausalLM

from caftune.demo.run import BASE
from caftune.generation.backends import Sampling, until_end
from caftune.generation.batches import answer_in_batches, can_refill, refilled_batches

EOS = 7


def prompts(count, *, longest=12, seed=0):
    drawn = random.Random(seed)
    return [[drawn.randint(8, 40) for _ in range(drawn.randint(1, longest))] for _ in range(count)]


def alone(model, ids, config):
    output = model.generate(torch.tensor([ids]), generation_config=config)
    return until_end(output[0, len(ids) :].tolist(), {EOS}).ids


def greedy(count=20):
    return Sampling(count, temperature=0).generation_config([EOS], 0)


def often_ending(family, **changes):
    """A model that ends many of its answers, in float32: in float64 transformers' masks overflow where a row is padded."""
    attention = "eager" if family == "gemma2" else "sdpa"  # it has no other
    model = build(family, dtype=torch.float32, attention=attention, **changes)
    unembedding = model.get_output_embeddings()
    with torch.no_grad():
        bias = torch.zeros(unembedding.weight.shape[0], dtype=unembedding.weight.dtype)
        bias[EOS] = 1.0
    unembedding.register_forward_hook(
        lambda _module, _inputs, logits: logits + bias * logits.std(-1, keepdim=True) * 1.5
    )
    return model


REFILLED = ["llama", "gpt2", "gemma2", "qwen3", "mistral", "cohere2", "gemma3", "gpt_neox", "opt"]


@pytest.mark.parametrize("family", REFILLED)
@pytest.mark.parametrize("size", [1, 4, 64])
def test_greedy_answers_are_those_of_generate_one_by_one(family, size):
    model = often_ending(family)
    assert can_refill(model)
    asked = prompts(13)
    found = dict(answer_in_batches(model, asked, greedy(), batch_size=size))
    expected = {index: alone(model, ids, greedy()) for index, ids in enumerate(asked)}
    assert found == expected
    assert family == "opt" or len({len(ids) for ids in expected.values()}) > 2


def test_windows_that_are_shorter_than_the_answers_slide():
    model = often_ending("mistral", sliding_window=5)
    assert can_refill(model)
    asked = prompts(11, longest=17)
    found = dict(answer_in_batches(model, asked, greedy(30), batch_size=3))
    assert found == {index: alone(model, ids, greedy(30)) for index, ids in enumerate(asked)}


@pytest.mark.parametrize("family", ["mamba2", "qwen3_next_linear", "granitemoehybrid_mamba"])
def test_a_model_with_another_memory_is_left_to_generate(family):
    model = build(family, dtype=torch.float32)
    assert not can_refill(model)
    asked = prompts(5)
    found = dict(answer_in_batches(model, asked, greedy(8), batch_size=2))
    assert sorted(found) == list(range(5))


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.7}])
def test_a_sampled_answer_does_not_depend_on_its_batch(settings):
    model = often_ending("llama")
    config = Sampling(15, temperature=1.3, **settings).generation_config([EOS], 0)
    asked, seeds = prompts(9), list(range(100, 109))
    whole, small = (dict(refilled_batches(model, asked, config, batch_size=size, seeds=seeds)) for size in (9, 2))
    assert whole == small
    twice = dict(refilled_batches(model, [asked[0]] * 4, config, batch_size=4, seeds=[1, 1, 2, 3]))
    assert twice[0] == twice[1]
    assert len({tuple(ids) for ids in twice.values()}) > 1


def test_tokens_are_drawn_as_often_as_the_model_would_have_them():
    """Of 4,000 draws no token's share is further than five standard errors from its probability."""
    model = build("llama", dtype=torch.float32, attention="sdpa")
    ids, count = [5, 9, 11], 4000
    config = Sampling(1, temperature=2.0, top_k=6).generation_config([EOS], 0)
    drawn = refilled_batches(model, [ids] * count, config, batch_size=1000, seeds=range(count))
    tokens = torch.tensor([found[0] for _, found in drawn])
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1] / 2.0
    logits[logits < logits.topk(6).values[-1]] = -torch.inf
    probabilities = logits.softmax(-1)
    shares = torch.bincount(tokens, minlength=len(probabilities)) / count
    error = (probabilities * (1 - probabilities) / count).sqrt()
    assert ((shares - probabilities).abs() <= 5 * error).all()


def test_nothing_is_computed_for_answers_that_have_ended():
    model = AutoModelForCausalLM.from_pretrained(BASE).eval()
    rows = []
    model.register_forward_pre_hook(
        lambda _module, _args, given: rows.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    drawn = random.Random(3)
    asked = [[0] + [drawn.randint(3, 150) for _ in range(drawn.randint(2, 9))] for _ in range(24)]
    config = Sampling(40, temperature=0).generation_config([1], 2)
    found = dict(answer_in_batches(model, asked, config, batch_size=8))
    steps = sum(count for count, width in rows if width == 1)
    assert steps == sum(len(ids) - 1 for ids in found.values())  # the first token comes with the prompt
    assert max(count for count, _ in rows) <= 8


def test_answers_come_as_they_are_finished():
    model = often_ending("llama")
    lengths = [len(ids) for _, ids in answer_in_batches(model, prompts(12), greedy(), batch_size=12)]
    assert lengths == sorted(lengths)


def test_something_that_is_no_model_of_transformers_is_not_refilled():
    assert not can_refill(SimpleNamespace(config=None))
