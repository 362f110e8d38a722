"""Decoding with heads writes what the model writes, in fewer passes of it."""

import itertools

import pytest
import torch
from models import VOCABULARY, build
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from caftune.checkpoints.heads_folder import load_heads
from caftune.core import speculative
from caftune.core.backbone import Backbone, UnsupportedModelError
from caftune.core.heads import AuxiliaryHeads, HeadsConfig
from caftune.core.speculative import Drafting, SpeculativeDecoding
from caftune.demo.run import BASE
from caftune.errors import CaftuneError

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def ids_of(length, seed=0, vocabulary=VOCABULARY):
    return torch.randint(3, vocabulary, (1, length), generator=torch.Generator().manual_seed(seed))


def decoding_of(model, count=3, kind="decoder", **options):
    backbone = Backbone.of(model)
    return SpeculativeDecoding(backbone, AuxiliaryHeads.build(backbone, HeadsConfig(count, kind)), **options)


@pytest.fixture(scope="module")
def llama():
    return build("llama", dtype=torch.float32)


@pytest.fixture
def oracle(monkeypatch):
    """Heads that know the text: drafts are always right."""

    def of(model, text, count=3):
        decoding = decoding_of(model, count, length=count)
        with torch.no_grad(), decoding.backbone.capture() as call:
            model(input_ids=text, use_cache=False)
            whole = decoding.backbone.close(call.hidden)
        drafted, length = speculative._Drafts._drafted, 0

        def begin(self, ids, wanted):
            nonlocal length
            length = ids.shape[1]
            return drafted(self, ids, wanted)

        monkeypatch.setattr(speculative._Drafts, "_drafted", begin)
        monkeypatch.setattr(speculative._Drafts, "_hidden", lambda _self, index: whole[:, length - 1 + index])
        return decoding

    return of


@pytest.mark.parametrize("length", [1, 3, None])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral", "qwen3_moe", "lfm2_conv"])
def test_greedy_texts_are_those_of_generate_at_any_length_of_draft(family, length):
    model = build(family, dtype=torch.float32)
    decoding = decoding_of(model, length=length)
    for tokens in (1, 4, 9):
        ids = ids_of(tokens, seed=tokens)
        expected = model.generate(ids, max_new_tokens=30, **GREEDY)
        assert torch.equal(decoding.generate(ids, max_new_tokens=30, **GREEDY), expected)
    assert decoding.total.tokens == 90
    assert len(decoding.total.drafted) == (length or 3)  # the other heads have no caches


@pytest.mark.parametrize("name", ["stories260k", "smiles-gpt2-0.5m"])
def test_greedy_texts_of_real_models_are_those_of_generate(shared, name):
    model = AutoModelForCausalLM.from_pretrained(shared / "models" / name)
    vocabulary = model.config.vocab_size
    decoding = decoding_of(model.eval(), 4, length=4)
    for number in range(200):
        ids = ids_of(3 + number % 20, seed=number, vocabulary=vocabulary)
        expected = model.generate(ids, max_new_tokens=16, **GREEDY)
        assert torch.equal(decoding.generate(ids, max_new_tokens=16, **GREEDY), expected), number
    assert sum(decoding.total.accepted) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": [4, 9, 11]},
        {"min_new_tokens": 15, "eos_token_id": [5, 8]},
        {"forced_eos_token_id": 6, "eos_token_id": 6},
    ],
)
def test_processors_of_logits_are_honoured(llama, options):
    decoding = decoding_of(llama, length=3)
    for seed in range(4):
        ids = ids_of(5, seed)
        expected = llama.generate(ids, max_new_tokens=25, **{**GREEDY, **options})
        assert torch.equal(decoding.generate(ids, max_new_tokens=25, **{**GREEDY, **options}), expected)


def test_drafts_that_are_right_save_passes(llama, oracle):
    ids = ids_of(4)
    text = llama.generate(ids, max_new_tokens=41, **GREEDY)
    decoding = oracle(llama, text)
    assert torch.equal(decoding.generate(ids, max_new_tokens=41, **GREEDY), text)
    # The prompt's pass gives one token, each other one that of the model behind three drafted ones.
    assert decoding.total.passes == 1 + 10
    assert decoding.total.tokens == 41
    assert decoding.total.accepted == [10, 10, 10]
    assert decoding.total.accepted_length == 3


@pytest.mark.parametrize("place", range(4, 12))
def test_an_end_of_text_inside_an_accepted_draft_ends_it(llama, oracle, place):
    ids = ids_of(4)
    text = llama.generate(ids, max_new_tokens=30, **GREEDY)
    options = {**GREEDY, "eos_token_id": int(text[0, place])}
    expected = llama.generate(ids, max_new_tokens=20, **options)
    assert expected.shape[1] < 24
    assert torch.equal(oracle(llama, text).generate(ids, max_new_tokens=20, **options), expected)


def test_a_draft_that_ends_the_text_counts_as_accepted(llama, oracle):
    ids = ids_of(4)
    text = llama.generate(ids, max_new_tokens=30, **GREEDY)
    decoding = oracle(llama, text)
    new = [place for place in range(5, 30) if text[0, place] not in text[0, 4:place]]
    assert {(place - 5) % 4 for place in new} > {0, 1}  # first and second of a draft, and more
    for place in new:
        decoding.total = Drafting()
        decoding.generate(ids, max_new_tokens=30, **{**GREEDY, "eos_token_id": int(text[0, place])})
        assert decoding.total.tokens == place - 3
        assert sum(decoding.total.drafted) == sum(decoding.total.accepted)


@pytest.mark.parametrize("new", range(1, 10))
def test_a_draft_does_not_pass_the_limit(llama, oracle, new):
    ids = ids_of(4)
    text = llama.generate(ids, max_new_tokens=20, **GREEDY)
    output = oracle(llama, text).generate(ids, max_new_tokens=new, **GREEDY)
    assert torch.equal(output, text[:, : 4 + new])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_context_can_be_filled_to_its_last_token(family, oracle):
    model = build(family, dtype=torch.float32)
    context = model.config.max_position_embeddings
    ids = ids_of(4)
    text = model.generate(ids, max_length=context, **GREEDY)
    assert text.shape[1] == context
    assert torch.equal(oracle(model, text).generate(ids, max_length=context, **GREEDY), text)


def test_stop_strings_end_where_they_end_without_drafts(oracle):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE).eval(), AutoTokenizer.from_pretrained(BASE)
    ids = tokenizer("2-chlorobutane", return_tensors="pt").input_ids
    text = model.generate(ids, max_new_tokens=24, **GREEDY)
    written = tokenizer.decode(text[0, ids.shape[1] :])
    decoding, stopped = oracle(model, text), 0
    for start in range(len(written) - 1):
        options = {**GREEDY, "stop_strings": written[start : start + 2], "tokenizer": tokenizer, "max_new_tokens": 20}
        expected = model.generate(ids, **options)
        assert torch.equal(decoding.generate(ids, **options), expected)
        stopped += expected.shape[1] < ids.shape[1] + 20
    assert stopped > 5


def test_criteria_of_ones_own_end_a_text_inside_a_draft(llama, oracle):
    ids = ids_of(4)
    text = llama.generate(ids, max_new_tokens=20, **GREEDY)

    def is_long(found, _scores, **_):
        return torch.tensor([found.shape[1] >= 11])

    options = {**GREEDY, "max_new_tokens": 20, "stopping_criteria": [is_long]}
    assert torch.equal(oracle(llama, text).generate(ids, **options), text[:, :11])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom"])
def test_padding_on_the_left_is_not_read(family):
    model = build(family, dtype=torch.float32)
    ids = ids_of(6)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)
    mask = (torch.arange(11) >= 5).long()[None]
    decoding = decoding_of(model, length=3)
    output = decoding.generate(padded, attention_mask=mask, max_new_tokens=25, **GREEDY)
    assert torch.equal(output, model.generate(padded, attention_mask=mask, max_new_tokens=25, **GREEDY))
    assert torch.equal(output[:, 5:], model.generate(ids, max_new_tokens=25, **GREEDY))


def test_a_refused_draft_leaves_nothing_in_the_heads_caches():
    """Whatever was drafted and refused before, a head says what it says without a cache (examination.py: in every family)."""
    model = build("llama", dtype=torch.float32)
    backbone = Backbone.of(model)
    heads = AuxiliaryHeads.build(backbone, HeadsConfig(2))
    said = []

    class Noted(speculative._Drafts):
        def _drafted(self, ids, count):
            self.here = ids
            return super()._drafted(ids, count)

        def _hidden(self, index):
            said.append((index, self.here, super()._hidden(index)))
            return torch.roll(said[-1][-1], 1 + index, -1)  # another draft, which is refused now and then

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculative, "_Drafts", Noted)
        decoding = SpeculativeDecoding(backbone, heads, length=2)
        decoding.generate(ids_of(4), max_new_tokens=20, **GREEDY)
    assert decoding.total.drafted[0] > decoding.total.accepted[0]
    for index, ids, hidden in said:
        with torch.no_grad(), backbone.capture() as call:
            model(input_ids=ids[:, :-1], use_cache=False)
            expected = heads.hidden(index, backbone, call)[:, -1]
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)


def test_drafts_become_shorter_where_they_are_refused(llama, oracle):
    ids = ids_of(4)
    text = llama.generate(ids, max_new_tokens=50, **GREEDY)
    decoding = decoding_of(llama, 3, kind="mlp")
    with torch.no_grad():  # heads that are wrong throughout
        for head in decoding.heads.heads:
            torch.nn.init.normal_(head.down.weight, std=10.0)
    assert torch.equal(decoding.generate(ids, max_new_tokens=50, **GREEDY), text)
    total = decoding.total
    assert total.checks < total.passes - 10
    assert total.drafted[2] <= total.drafted[1] <= total.drafted[0] < 40
    right = oracle(llama, text)
    right.length = None
    right.generate(ids, max_new_tokens=50, **GREEDY)
    assert right.total.drafted[2] >= 11


def test_half_precision_runs_and_counts(llama):
    model = build("llama", dtype=torch.bfloat16)
    decoding = decoding_of(model, length=3)
    output = decoding.generate(ids_of(4), max_new_tokens=20, **GREEDY)
    assert output.shape == (1, 24)
    assert decoding.total.tokens == 20


def test_heads_trained_on_a_model_draft_for_it(heads):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE).eval(), AutoTokenizer.from_pretrained(BASE)
    backbone = Backbone.of(model)
    decoding = SpeculativeDecoding(backbone, load_heads(heads, backbone, tokenizer), length=3)
    ids = tokenizer("2-chlorobutane", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=20, **GREEDY)
    assert torch.equal(decoding.generate(ids, max_new_tokens=20, **GREEDY), expected)


def test_the_model_is_as_it_was_afterwards(llama):
    before = set(vars(llama))
    decoding_of(llama).generate(ids_of(4), max_new_tokens=5, **GREEDY)
    assert set(vars(llama)) == before
    with pytest.raises(ValueError, match="must be given 1 row, got 2"):
        decoding_of(llama).generate(torch.cat([ids_of(4)] * 2), max_new_tokens=5, **GREEDY)
    assert set(vars(llama)) == before
    assert not any(module._forward_pre_hooks for module in llama.modules())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_beams": 3}, r"must be greedy or plain sampling.*\(such as beam search\)\. Use model\.generate"),
        ({"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidanceLogitsProcessor keeps state, which calls for drafts"),
        ({"assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight must be None for speculative decoding"),
    ],
)
def test_ways_of_generating_that_drafts_would_change_are_refused(llama, options, said):
    with pytest.raises(ValueError, match=said):
        decoding_of(llama).generate(ids_of(4), max_new_tokens=5, **{**GREEDY, **options})


def test_what_cannot_be_decoded_with_heads_is_refused(llama):
    decoding = decoding_of(llama)
    cache = llama(ids_of(3), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values must be empty for speculative decoding, got 3 tokens"):
        decoding.generate(ids_of(4), past_key_values=cache, max_new_tokens=5, **GREEDY)
    with pytest.raises(ValueError, match="length must be from 1 to 3, the number of heads, got 4"):
        decoding_of(llama, 3, length=4)
    with pytest.raises(UnsupportedModelError, match="cannot read several tokens behind a cache and take some of them"):
        decoding_of(build("falcon_mamba", dtype=torch.float32))
    training = build("llama", dtype=torch.float32).train()
    with pytest.raises(ValueError, match="must be in evaluation mode"):
        decoding_of(training).generate(ids_of(4), max_new_tokens=5, **GREEDY)


@pytest.mark.parametrize(
    "options",
    [
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, "max_position_embeddings": 20},
        {
            "rope_parameters": {
                **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 20},
                **{"short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
            },
            "max_position_embeddings": 64,
        },
    ],
)
def test_texts_end_where_rotary_phases_begin_to_change(options):
    model = build("llama", dtype=torch.float32, **options)
    decoding = decoding_of(model)
    expected = model.generate(ids_of(4), max_length=20, **GREEDY)
    assert torch.equal(decoding.generate(ids_of(4), max_length=20, **GREEDY), expected)
    with pytest.raises(ValueError, match="A text must end within 20 tokens for speculative decoding with this model"):
        decoding.generate(ids_of(4), max_length=21, **GREEDY)


def test_an_adapted_model_is_decoded_with_its_adapter():
    model = build("llama", dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    backbone = Backbone.of(adapted.eval())
    heads = AuxiliaryHeads.build(Backbone.of(build("llama", dtype=torch.float32)), HeadsConfig(2))
    expected = adapted.generate(input_ids=ids_of(4), max_new_tokens=20, **GREEDY)
    found = SpeculativeDecoding(backbone, heads).generate(input_ids=ids_of(4), max_new_tokens=20, **GREEDY)
    assert torch.equal(found, expected)
    with adapted.disable_adapter():
        assert not torch.equal(adapted.generate(input_ids=ids_of(4), max_new_tokens=20, **GREEDY), expected)


def test_a_configuration_given_is_not_changed(llama):
    config = GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=0)
    before = config.to_dict()
    output = decoding_of(llama).generate(ids_of(4), generation_config=config)
    assert config.to_dict() == before
    assert torch.equal(output, llama.generate(ids_of(4), generation_config=config))


def test_a_streamer_gets_every_token_in_order(llama):
    class Kept(list):
        def put(self, tokens):
            self.extend(tokens.flatten().tolist())

        def end(self):
            self.append("end")

    streamer = Kept()
    output = decoding_of(llama).generate(ids_of(4), max_new_tokens=20, streamer=streamer, **GREEDY)
    assert streamer == [*output[0].tolist(), "end"]


@pytest.mark.parametrize("limit", [5, 7, 8])
def test_heads_that_are_not_asked_for_long_read_in_between(monkeypatch, llama, limit):
    monkeypatch.setattr(speculative, "_WAITING", limit)
    waiting, turn = [], iter(itertools.cycle([1, 1, 1, 1, 1, 1, 1, 1, 3]))

    def counted(self):
        waiting.append(max(map(len, self.behind)))
        return next(turn)  # every ninth time all, also right after they have caught up

    monkeypatch.setattr(speculative._Drafts, "_wanted", counted)
    for ids in (ids_of(4), ids_of(5)):
        expected = llama.generate(ids, max_new_tokens=56, **GREEDY)
        assert torch.equal(decoding_of(llama).generate(ids, max_new_tokens=56, **GREEDY), expected)
    assert max(waiting) == limit


def test_counts_of_several_texts_add_up():
    total = Drafting()
    for more in (Drafting(3, 2, 5, [2, 1], [1, 1]), Drafting(4, 3, 6, [3, 3, 1], [2, 1, 0])):
        total.add(more)
    assert total == Drafting(7, 5, 11, [5, 4, 1], [3, 2, 0])
    assert total.accepted_length == 1


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"num_beams": 2, "do_sample": True}, {"generation_config": GenerationConfig(num_beams=4)}],
    ids=str,
)
def test_other_ways_of_generating_are_refused_before_any_pass_of_the_model(llama, options):
    decoding, passes = decoding_of(llama), []
    handle = llama.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        with pytest.raises(CaftuneError, match=r"must be greedy or plain sampling.*Use model\.generate"):
            decoding.generate(ids_of(4), max_new_tokens=20, **options)
        assert passes == []
        decoding.generate(ids_of(4), max_new_tokens=4, **GREEDY)
        assert passes
    finally:
        handle.remove()
