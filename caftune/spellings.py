"""The token ids of an answer that a server gave as text.

A text has many spellings as tokens. The right one follows the prompt's tokens and is decoded, behind them, to exactly this
text: that is how servers decode, a token at a time. Decoding the answer alone is another thing, for some decoders (Llama 2's)
drop the space before the first word of a text; servers that do so are read accordingly.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# How a server decodes an answer: behind its prompt, alone, or nobody knows.
Decoding = Literal["behind", "alone", "unknown"]
# What an answer may follow to be tokenized by itself, where together with its prompt some tokens would span both.
_SEPARATORS = ("\n", ".", "|")


@dataclass(frozen=True)
class _Spelling:
    ids: list[int]
    is_behind: bool  # decoded behind the prompt it is the text
    is_alone: bool  # decoded alone it is the text
    is_joint: bool  # the tokenizer writes prompt and answer in this way


def find_spelling(
    text: str,
    prompt: Sequence[int],
    before: str,
    tokenizer: Any,
    *,
    ends: Sequence[int],
    lengths: Sequence[int] = (),
    decoding: Decoding = "unknown",
    adds_special: bool = True,
) -> list[int] | None:
    """Token ids that write `text` behind a prompt; None where no spelling was found that gives this text and no other.

    Args:
        prompt: its token ids.
        before: the text that the tokenizer makes these ids of, with its special tokens added where `adds_special`.
        ends: end-of-text tokens, which a text does not hold.
        lengths: how many tokens the answer has by the server's own count, the likelier number first. Among spellings of the
            same text they decide.
        decoding: how the server decodes.
    """
    if not text:
        return []
    found = list(_spellings(text, list(prompt), before, tokenizer, ends, adds_special=adds_special))
    fitting = _fitting(found, text, before, decoding)
    counted = (spelling.ids for length in lengths for spelling in fitting if len(spelling.ids) == length)
    return next(counted, fitting[0].ids if fitting else None)


def _fitting(found: Sequence[_Spelling], text: str, before: str, decoding: Decoding) -> list[_Spelling]:
    """The spellings of this text, the likeliest first."""
    behind = [spelling for spelling in found if spelling.is_behind]
    alone = [spelling for spelling in found if spelling.is_alone]
    if decoding == "alone":
        spaced = not before[-1:].isspace()  # then a word usually begins with a space, which the server has dropped
        return sorted(alone, key=lambda spelling: (not spelling.is_joint, spelling.is_behind == spaced)) or behind
    if decoding == "unknown" and _is_letter(before[-1:]) and _is_letter(text[0]):
        # "upon" and "a" make no word: more likely is a server that has dropped the space.
        return [spelling for spelling in alone if spelling.is_joint and not spelling.is_behind] + behind
    return behind or alone


def _is_letter(character: str) -> bool:
    return character.isascii() and character.isalpha()


def _spellings(
    text: str, prompt: list[int], before: str, tokenizer: Any, ends: Sequence[int], *, adds_special: bool
) -> Iterator[_Spelling]:
    """Candidates, with what they are decoded to."""
    seen = []
    for ids, is_joint in _candidates(text, prompt, before, tokenizer, adds_special=adds_special):
        ids = ids[:-1] if ids and ids[-1] in ends else ids  # some tokenizers close every text
        if ids in seen or any(token in ends for token in ids):
            continue
        seen.append(ids)
        is_behind = any(_behind(prompt, ids, tokenizer, skip=skip) == text for skip in (True, False))
        is_alone = any(_decoded(ids, tokenizer, skip=skip) == text for skip in (True, False))
        yield _Spelling(ids, is_behind, is_alone, is_joint)


def _candidates(
    text: str, prompt: list[int], before: str, tokenizer: Any, *, adds_special: bool
) -> Iterator[tuple[list[int], bool]]:
    """Ways to write the answer: together with the prompt first, then by itself; with a space before it or without."""
    for gap in ("", " "):
        joint = tokenizer(before + gap + text, add_special_tokens=adds_special)["input_ids"]
        if joint[: len(prompt)] == prompt:
            yield joint[len(prompt) :], True
    for gap in ("", " "):
        for splits in (False, True):  # a special token may also be written out letter by letter
            yield from ((ids, False) for ids in _by_itself(gap + text, tokenizer, splits=splits))
    yield tokenizer(text, add_special_tokens=False)["input_ids"], False


def _by_itself(text: str, tokenizer: Any, *, splits: bool) -> Iterator[list[int]]:
    """Ways to write a text that may stand anywhere, without a space of the tokenizer's own before it or a special token."""
    how = {"add_special_tokens": False, "split_special_tokens": splits}
    names = [] if splits else [re.escape(name) for name in tokenizer.all_special_tokens]
    parts = re.split(f"({'|'.join(names)})", text) if names else [text]
    for separator in _SEPARATORS:
        start, ids = tokenizer(separator, **how)["input_ids"], []
        for part in filter(None, parts):
            is_special = part in tokenizer.all_special_tokens and not splits
            whole = tokenizer(part if is_special else separator + part, **how)["input_ids"]
            if not is_special and whole[: len(start)] != start:
                break
            ids += whole if is_special else whole[len(start) :]
        else:
            yield ids


def _behind(prompt: Sequence[int], ids: Sequence[int], tokenizer: Any, *, skip: bool) -> str | None:
    """What decoding adds to the prompt's text when these tokens follow it; None where it changes what stood there."""
    before, whole = (_decoded(tokens, tokenizer, skip=skip) for tokens in (prompt, [*prompt, *ids]))
    return whole.removeprefix(before) if whole.startswith(before) else None


def _decoded(ids: Sequence[int], tokenizer: Any, *, skip: bool) -> str:
    """The text of tokens. A server's text has spaces before full stops where the model wrote them: nothing is cleaned up."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    return text
