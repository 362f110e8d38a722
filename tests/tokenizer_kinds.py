"""Tokenizers of the kinds that treat the space between prompt and answer differently: built here, and real ones."""

import functools

from models import fetched
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

TEXTS = [
    "Ask: sun",
    "The question is: what shines by day? It is the sun.",
    "New York is a city",
    "def f(x):\n    return x",
] * 4
TOKENS = ["<s>", "</s>", "<pad>"]
BUILT = ("metaspace-always", "metaspace-never", "llama-2", "byte-level", "byte-level-newlines", "closing")
REAL = ("stories260k", "gemma3-270m", "smollm2-135m-instruct")
# Qwen's and Llama 3's way: a line break belongs to the mark before it.
_NEWLINES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|\s+(?!\S)|\s+"


def built(kind):
    """A tokenizer of 320 to 400 tokens, which has every byte or every letter of TEXTS."""
    backend = Tokenizer(models.BPE(byte_fallback=not kind.startswith("byte"), unk_token=None))
    alphabet = []
    if kind.startswith("metaspace"):
        scheme = kind.removeprefix("metaspace-")
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
        if scheme == "never":
            backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        else:
            ends = decoders.Strip(" ", 1, 0)
            steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), ends]
            backend.decoder = decoders.Sequence(steps)
    elif kind == "llama-2":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(steps)
    else:
        pattern = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if kind == "byte-level-newlines":
            from tokenizers import Regex

            split = pre_tokenizers.Split(Regex(_NEWLINES), "isolated")
            pattern = pre_tokenizers.Sequence(
                [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
            )
        backend.pre_tokenizer, backend.decoder = pattern, decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    bytes_ = [] if alphabet else [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*TOKENS, *bytes_], initial_alphabet=alphabet)
    backend.train_from_iterator([*TEXTS, "?\n", "?\n", ":\n", ":\n"], trainer)
    if kind != "byte-level":
        ends = " </s>" if kind == "closing" else ""
        template = processors.TemplateProcessing(f"<s> $A{ends}", special_tokens=[("<s>", 0), ("</s>", 1)])
        backend.post_processor = template
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def tokenizer_of(kind, shared):
    """A tokenizer by its name in BUILT or REAL (these with the tokens of `with_calls`), or a skipped test."""
    if kind in BUILT:
        return built(kind)
    return _real(str(shared() / "models" / kind if kind == "stories260k" else fetched(kind)))


@functools.cache
def _real(folder):
    return with_calls(AutoTokenizer.from_pretrained(folder))  # once, because Gemma's takes seconds


def with_calls(tokenizer, **options):
    """The tokenizer with two special tokens that answers may hold."""
    tokenizer.add_tokens(
        [AddedToken(text, special=True, **options) for text in ("<call>", "</call>")], special_tokens=True
    )
    return tokenizer


def save_base(tokenizer, folder):
    """A folder that stands for a base: a tokenizer (a built one: others take seconds) and a configuration."""
    if len(tokenizer) < 1000:
        tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.save_pretrained(folder)
    return config
