"""Speculative decoding with a model's heads: they draft the next tokens, and one forward pass of the model checks them all.

The output is the model's: greedy answers token for token, sampled ones from the same distribution. The loop is transformers'
assisted generation, and this module supplies its drafts. From the last accepted token, the head of horizon h predicts the
h-th token after it. Decoder heads have a separate copy of the model's cache: they are called as the last layer was, with its
hidden states, mask and position ids, and their cache is cropped with the model's.

Source: arXiv 2211.17192 (acceptance of sampled drafts), arXiv 2401.10774 (drafts from heads, Medusa).
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import (
    CandidateGenerator,
    GenerationMode,
    LogitsProcessorList,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from caftune.core._compat import has_sparse_attention
from caftune.core.backbone import Backbone, UnsupportedModelError, evaluating, is_close, probe
from caftune.core.cross_entropy import in_full
from caftune.core.heads import AuxiliaryHeads, autocast_like
from caftune.core.probes import try_call
from caftune.core.replay import LayerCall
from caftune.errors import CaftuneError

# Rates at which the estimated shares of accepted tokens follow new checks, and drift back to 1 where nothing is drafted, so
# that a horizon is tried again when those before it are accepted often.
_FOLLOW, _DRIFT = 0.1, 0.01
_WAITING = 32  # number of unread passes of the model after which a head reads them even without drafting
# Processors that keep state between calls or run the model, so that calls for drafts would change their results.
_REFUSED_PROCESSORS = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)

_OTHER_WAY = (
    "Speculative decoding must be greedy or plain sampling, got arguments for another method (such as beam search). Use "
    "model.generate."
)


@dataclass
class Drafting:
    """Draft statistics: passes, drafted, accepted."""

    passes: int = 0  # forward passes of the model, that over the prompt included
    checks: int = 0  # of these, those that checked a draft
    tokens: int = 0  # new tokens
    drafted: list[int] = field(default_factory=list)  # of each head
    accepted: list[int] = field(default_factory=list)  # of each head

    @property
    def accepted_length(self) -> float:
        """Mean number of accepted tokens of a draft."""
        return sum(self.accepted) / max(self.checks, 1)

    def add(self, other: "Drafting") -> None:
        """Add the counts of `other`."""
        self.passes += other.passes
        self.checks += other.checks
        self.tokens += other.tokens
        for mine, more in ((self.drafted, other.drafted), (self.accepted, other.accepted)):
            mine += [0] * (len(more) - len(mine))
            mine[: len(more)] = [a + b for a, b in zip(mine, more, strict=False)]


class SpeculativeDecoding:
    """Generation in which a model's heads draft and the model checks.

        decoding = SpeculativeDecoding(backbone, load_heads("heads", backbone, tokenizer))
        output = decoding.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=200)

    Args:
        heads: of this model. Heads of another model cost time, but do not change the output.
        length: maximum number of tokens of a draft; None: chosen by recent acceptance.

    Attributes:
        total: statistics of all drafts so far.

    Raises:
        UnsupportedModelError: the model cannot check a draft.
    """

    def __init__(self, backbone: Backbone, heads: AuxiliaryHeads, *, length: int | None = None) -> None:
        if length is not None and not 1 <= length <= len(heads.heads):
            raise CaftuneError(f"length must be from 1 to {len(heads.heads)}, the number of heads, got {length}.")
        model = backbone.model
        self.model = model.get_base_model() if hasattr(model, "peft_config") else model  # with its adapters in it
        if not _takes_tokens_back(self.model):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} cannot read several tokens behind a cache and take some of them back, as "
                "checking a draft needs (state spaces and linear attention cannot). Use model.generate."
            )
        self.backbone, self.heads, self.length = backbone, heads, length
        self.total = Drafting()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate` with the same arguments, for one row: greedy or sampled.

        Logits processors and stopping criteria must depend on the text only, because they are also called for drafts.
        Equal to `model.generate` up to rounding: the model computes several positions at once, and in half precision two
        tokens of nearly equal probability can change places.

        Raises:
            CaftuneError: several rows, beams or return sequences, a cache that is not empty, a model in training mode, a
                processor that keeps state, or a length from which on the model's rotary phases depend on the length.
        """
        if self.model.training:
            raise CaftuneError("The model must be in evaluation mode for speculative decoding. Call model.eval().")
        count = len(self.heads.heads)
        if kwargs.get("generation_config") is not None:
            config = kwargs["generation_config"] = copy.deepcopy(kwargs["generation_config"])
            config.prompt_lookup_num_tokens = count
            config.use_cache = True
        else:
            kwargs |= {"prompt_lookup_num_tokens": count, "use_cache": True}
        drafts: list[_Drafts] = []
        with self.backbone.capture() as call, evaluating(self.heads), self._drafts_from_heads(call, drafts):
            output = self.model.generate(*args, **kwargs)
        if not drafts:
            raise CaftuneError(_OTHER_WAY)
        self.total.add(drafts[0].found)
        return output

    @contextmanager
    def _drafts_from_heads(self, call: LayerCall, drafts: "list[_Drafts]") -> Iterator[None]:
        """Within the block, the model's assisted generation gets its candidates from the heads."""
        model = self.model
        own_criteria, criteria = model._get_stopping_criteria, StoppingCriteriaList()

        def stopping_criteria(**given: Any) -> StoppingCriteriaList:
            _refuse_other_ways(given["generation_config"])  # before the first pass of the model
            criteria.extend(own_criteria(**given))
            return criteria

        def candidate_generator(
            *,
            generation_config: GenerationConfig,
            logits_processor: LogitsProcessorList,
            input_ids: Tensor,
            model_kwargs: dict[str, Any],
            **_others: Any,
        ) -> CandidateGenerator:
            cache = model_kwargs["past_key_values"]
            _refuse(model, generation_config, logits_processor, input_ids, cache)
            drafts.append(_Drafts(self, call, cache, generation_config, logits_processor, criteria))
            return drafts[0]

        model._get_stopping_criteria = stopping_criteria
        model._get_candidate_generator = candidate_generator
        try:
            yield
        finally:
            del model._get_stopping_criteria, model._get_candidate_generator


def _refuse_other_ways(config: GenerationConfig) -> None:
    """Raise CaftuneError for beam search and other methods that take no drafts."""
    if config.get_generation_mode() != GenerationMode.ASSISTED_GENERATION:
        raise CaftuneError(_OTHER_WAY)


def _refuse(
    model: Any, config: GenerationConfig, processors: LogitsProcessorList, ids: Int[Tensor, "rows tokens"], cache: Cache
) -> None:
    """Raise CaftuneError for inputs that cannot be drafted for, or whose results drafts would change."""
    if len(ids) > 1:
        raise CaftuneError(f"Speculative decoding must be given 1 row, got {len(ids)}. Give them one by one.")
    if cache.get_seq_length() > 0:
        raise CaftuneError(
            f"past_key_values must be empty for speculative decoding, got {cache.get_seq_length()} tokens, which "
            "the heads have not read. Pass the whole prompt."
        )
    if config.assistant_ensemble_weight is not None:
        raise CaftuneError(
            "assistant_ensemble_weight must be None for speculative decoding: it changes the distribution."
        )
    for processor in processors:
        if isinstance(processor, _REFUSED_PROCESSORS):
            raise CaftuneError(
                f"{type(processor).__name__} keeps state, which calls for drafts would change. Use model.generate."
            )
    context = _changing_context(model.config.get_text_config())
    if context is not None and int(config.max_length or 0) > context:
        raise CaftuneError(
            f"A text must end within {context} tokens for speculative decoding with this model, whose rotary phases change "
            f"with its length from there on; prompt and new tokens may come to {config.max_length}. Use model.generate."
        )


def _changing_context(config: Any) -> int | None:
    """The length from which on the phases of early tokens depend on the length (dynamic NTK, LongRoPE); None: none."""
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [given, *(part for part in given.values() if isinstance(part, dict))]
    changing = [part for part in kinds if part.get("rope_type") in ("dynamic", "longrope")]
    if not changing:
        return None
    original = changing[0].get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    return int(original or config.max_position_embeddings)


class _Drafts(CandidateGenerator):
    """The drafts of one generation."""

    requires_model_outputs = True  # drafts begin once the model has read the prompt
    model_kwargs_overrides: dict[str, Any] = {}  # noqa: RUF012

    def __init__(
        self,
        decoding: SpeculativeDecoding,
        call: LayerCall,
        cache: Cache,
        config: GenerationConfig,
        processor: LogitsProcessorList,
        criteria: StoppingCriteriaList,
    ) -> None:
        self.backbone, self.heads, self.length = decoding.backbone, decoding.heads, decoding.length
        self.call, self.config, self.processor, self.criteria = call, config, processor, criteria
        count = self.length or len(self.heads.heads)
        self.is_stateless = self.heads.config.kind == "mlp"
        self.caches = [copy.deepcopy(cache) for _ in range(count)]  # empty: of its kind and settings
        self.behind: list[list[_Read]] = [[] for _ in range(count)]  # passes of the model that a head has not read
        self.latest: list[Tensor] = [torch.empty(0)] * count  # each head's output at the last token it has read
        self.limit = int(config.max_length or 0)
        self.size, self.draft = 0, torch.empty(0)  # the draft that is being checked
        self.price = relative_price(self.backbone, self.heads)
        # Estimated acceptance of each head's token, given that those before it are accepted.
        self.shares = [1.0] * count
        self.found = Drafting(drafted=[0] * count, accepted=[0] * count)

    def get_candidates(  # type: ignore[override]
        self, input_ids: Int[Tensor, "1 tokens"], *, is_first_iteration: bool, n_last_matches: int, **_outputs: Any
    ) -> tuple[Int[Tensor, "1 longer"], Float[Tensor, "1 drafted vocabulary"] | None]:
        """The text followed by a draft and, if tokens are sampled, the logits from which the draft was drawn."""
        if is_first_iteration:
            return input_ids, None
        read = _Read(copy.copy(self.call), self.size - int(n_last_matches))
        for index, waiting in enumerate(self.behind):
            if self.is_stateless:
                waiting.clear()
            waiting.append(read)
            if len(waiting) > _WAITING:
                self._catch_up(index)
        room = self.limit - input_ids.shape[1] - 1  # the model adds one token
        longer, logits = self._drafted(input_ids, min(self._wanted(), room))
        self.draft = longer[0, input_ids.shape[1] :]
        self.size = len(self.draft)
        for index in range(self.size):
            self.found.drafted[index] += 1
        return longer, torch.cat(logits, 1) if logits and self.config.do_sample else None

    def update_candidate_strategy(self, ids: Int[Tensor, "1 tokens"], _scores: Tensor, num_matches: int) -> None:
        """Count what was accepted. (`num_matches` is one too low if the text ends with a draft that is accepted entirely.)"""
        new = int(num_matches) + 1
        kept = ids[0, ids.shape[1] - new :][: self.size]
        matches = int((kept == self.draft[: len(kept)].to(kept.device)).cumprod(0).sum())
        self.found.passes += 1
        self.found.checks += self.size > 0
        self.found.tokens += new
        for index in range(len(self.shares)):
            if index < matches:
                self.found.accepted[index] += 1
            if index < min(matches + 1, self.size):
                self.shares[index] += _FOLLOW * ((index < matches) - self.shares[index])
            elif index >= self.size:
                self.shares[index] += _DRIFT * (1 - self.shares[index])

    def _wanted(self) -> int:
        """The draft length with the most expected tokens (accepted ones and the model's own) per operation."""
        if self.length is not None:
            return self.length
        best, wanted, reached, tokens = 1.0, 0, 1.0, 1.0
        for length, share in enumerate(self.shares, start=1):
            reached *= share
            tokens += reached
            if tokens / (1 + length * self.price) > best:
                best, wanted = tokens / (1 + length * self.price), length
        return wanted

    def _drafted(self, ids: Tensor, count: int) -> tuple[Tensor, list[Tensor]]:
        """`ids` and at most `count` more tokens, up to the first that ends the text, and the processed logits of each."""
        found: list[Tensor] = []
        self.config.max_length = self.limit
        for index in range(count):
            logits = in_full(self.backbone.unembedding().logits(self._hidden(index))).to(ids.device)
            logits = self.processor(ids, logits)  # type: ignore[arg-type]
            token = _drawn(logits) if self.config.do_sample else logits.argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], 1)
            found.append(logits[:, None])
            if bool(self.criteria(ids, None).any()):
                # The loop adds a token of the model behind a draft that it accepts, and cuts the text at this length.
                self.config.max_length = ids.shape[1]
                break
        return ids, found

    def _hidden(self, index: int) -> Float[Tensor, "1 width"]:
        """Head `index` at the last accepted token."""
        self._catch_up(index)
        hidden = self.latest[index]
        with autocast_like(hidden):
            if self.is_stateless:
                hidden = self.heads.heads[index](hidden, self.backbone.close(hidden))
            return self.heads.close(hidden, self.backbone)[:, 0]

    def _catch_up(self, index: int) -> None:
        """Let head `index` read the passes it has not read yet."""
        head, cache = self.heads.heads[index], self.caches[index]
        for read in self.behind[index]:
            with autocast_like(read.call.hidden):
                hidden = read.call.hidden if self.is_stateless else read.call.replay(head, cache)
            self.latest[index] = hidden[:, : hidden.shape[1] - read.refused][:, -1:]
            for layer in cache.layers:
                if _is_used(layer):
                    layer.crop(-read.refused)  # type: ignore[union-attr]
        self.behind[index].clear()


def _is_used(layer: Any) -> bool:
    """Whether a layer of a cache holds anything. In a head's cache the trunk's layers do not, and some cannot be cropped."""
    convolutions = getattr(layer, "is_conv_states_initialized", {})
    return bool(getattr(layer, "is_initialized", False)) or any(convolutions.values())


def _takes_tokens_back(model: Any) -> bool:
    """Whether eight tokens, read in parts of which one is cropped again, give the same logits as in one pass."""
    ids = probe(model)
    if model._is_stateful or not model._supports_default_dynamic_cache():
        return False
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if has_sparse_attention(cache):
        return False
    cache.activate_past_recording()

    def in_parts() -> bool:
        expected = model(input_ids=ids, use_cache=False).logits[:, -2:]
        for part, refused in ((ids[:, :3], 0), (ids[:, 3:7], 2), (ids[:, 5:], 0)):
            found = model(input_ids=part, past_key_values=cache, use_cache=True).logits[:, -2:]
            cache.crop(-refused)
        return is_close(found, expected)

    with torch.no_grad(), evaluating(model):
        return bool(try_call(in_parts))


def _drawn(logits: Float[Tensor, "1 vocabulary"]) -> Int[Tensor, "1 1"]:
    return torch.multinomial(logits.softmax(-1), 1)


@dataclass(frozen=True)
class _Read:
    """A forward pass of the model over new tokens, as its last layer saw it; the last `refused` tokens were rejected."""

    call: LayerCall
    refused: int


def relative_price(backbone: Backbone, heads: AuxiliaryHeads) -> float:
    """Weights that a head's draft reads (its own and the unembedding) / those that a forward pass of the model reads."""
    unembedding = backbone.unembedding().weight.numel()
    embeddings = backbone.model.get_input_embeddings().weight.numel()
    trunk = sum(weight.numel() for weight in backbone.trunk.parameters()) - embeddings
    head = sum(weight.numel() for weight in heads.heads[0].parameters())
    return (head + unembedding) / (trunk + unembedding)
