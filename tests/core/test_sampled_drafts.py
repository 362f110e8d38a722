"""Sampled drafts: what comes out has the model's own distribution."""

from collections import Counter

import pytest
import torch
from models import build
from scipy.stats import chisquare
from transformers import LogitsProcessorList
from transformers.generation import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper

from caftune.core import speculative
from caftune.core.backbone import Backbone
from caftune.core.heads import AuxiliaryHeads, HeadsConfig
from caftune.core.speculative import SpeculativeDecoding

VOCABULARY, LENGTH, DRAWS = 7, 4, 900
IDS = torch.tensor([[3, 5, 4]])
SETTINGS = {"temperature": 1.3, "top_k": 5, "repetition_penalty": 1.2}
OPTIONS = {"do_sample": True, "eos_token_id": None, "pad_token_id": 0, **SETTINGS}


@pytest.fixture(scope="module")
def model():
    return build("llama", dtype=torch.float32, spread=16.0, vocab_size=VOCABULARY)


def decoding_of(model, length):
    """With heads that say something else than the model, so that many drafts are refused."""
    backbone = Backbone.of(model)
    heads = AuxiliaryHeads.build(backbone, HeadsConfig(2))
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in heads.parameters():
            weight.add_(weight.std().nan_to_num(0.1) * torch.randn(weight.shape, generator=noise))
    return SpeculativeDecoding(backbone, heads, length=length)


@pytest.mark.parametrize("length", [2, None])
def test_sampled_texts_have_the_models_own_distribution(model, length):
    """Four tokens, 900 times, against the product of the processed distributions: together, and each but the first alone."""
    decoding = decoding_of(model, length)
    torch.manual_seed(100)
    options = {**OPTIONS, "max_new_tokens": LENGTH}
    drawn = Counter(tuple(decoding.generate(IDS, **options)[0, 3:].tolist()) for _ in range(DRAWS))
    assert 90 < decoding.total.accepted[0] < decoding.total.drafted[0] - 90
    assert decoding.total.accepted[1] > 30
    expected = exact(model, SETTINGS)
    assert min(chances(drawn, expected)) > 0.01
    other = exact(model, {**SETTINGS, "temperature": 1.0})
    assert min(chances(drawn, other)) < 1e-4  # so few draws would tell another distribution apart


def test_drafts_are_drawn_from_the_logits_that_are_handed_on(monkeypatch, model):
    """Else acceptance would be judged by another distribution than the draft's."""
    drawn, handed = [], []
    draw, candidates = speculative._drawn, speculative._Drafts.get_candidates

    def drawing(logits):
        drawn.append(logits)
        return draw(logits)

    def handing(self, *args, **kwargs):
        drawn.clear()
        longer, logits = candidates(self, *args, **kwargs)
        if logits is not None:
            handed.append(logits)
            assert torch.equal(logits[0], torch.cat(drawn))
            assert (logits > -torch.inf).sum(-1).max() <= SETTINGS["top_k"]  # processed
        return longer, logits

    monkeypatch.setattr(speculative, "_drawn", drawing)
    monkeypatch.setattr(speculative._Drafts, "get_candidates", handing)
    torch.manual_seed(1)
    decoding_of(model, 2).generate(IDS, max_new_tokens=20, **OPTIONS)
    assert len(handed) > 5


def exact(model, settings):
    """The probability of each continuation."""
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]),
            TemperatureLogitsWarper(settings["temperature"]),
            TopKLogitsWarper(settings["top_k"]),
        ]
    )
    found = {(): 1.0}
    for _ in range(LENGTH):
        texts = torch.cat([IDS.expand(len(found), -1), torch.tensor(list(found), dtype=torch.long)], 1)
        with torch.no_grad():
            logits = model(input_ids=texts, use_cache=False).logits[:, -1]
        following = processors(texts, logits).softmax(-1).double().tolist()
        before = zip(found.items(), following, strict=True)
        found = {(*text, token): p * q for (text, p), after in before for token, q in enumerate(after)}
    return found


def chances(drawn, expected):
    """p-values of chi-square tests: whole continuations, and each token but the first, which is never drafted."""
    assert all(expected[text] > 0 for text in drawn)
    for part in (slice(None), *(slice(place, place + 1) for place in range(1, LENGTH))):
        observed, wanted = Counter(), Counter()
        for text, count in drawn.items():
            observed[text[part]] += count
        for text, probability in expected.items():
            wanted[text[part]] += probability * DRAWS
        often = [text for text, number in wanted.items() if number >= 8]
        seen, due = [observed[text] for text in often], [wanted[text] for text in often]
        rest = DRAWS - sum(due)
        if rest > 1e-6 * DRAWS:
            seen, due = [*seen, DRAWS - sum(seen)], [*due, rest]
        yield chisquare(seen, [number * sum(seen) / sum(due) for number in due]).pvalue
