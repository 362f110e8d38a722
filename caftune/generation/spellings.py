"""The token ids of an answer that a server gave as text.

A text has many spellings as tokens. The right one, decoded together with the prompt's tokens, gives exactly this text: most
servers decode so, a token at a time. Decoding the answer alone can differ, because some decoders (Llama 2's) drop the space
before the first word; servers that do so are handled separately.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# How a server decodes an answer: together with its prompt, alone, or unknown.
Decoding = Literal["behind", "alone", "unknown"]
# Prefixes after which an answer is tokenized separately, where some token would span prompt and answer.
_SEPARATORS = ("\n", ".", "|")


@dataclass(frozen=True)
class _Spelling:
    ids: list[int]
    is_behind: bool  # decoded with the prompt, it gives the text
    is_alone: bool  # decoded alone, it gives the text
    is_joint: bool  # the tokenizer spells prompt and answer together like this


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
    """Token ids that spell `text` after a prompt; None where no spelling decodes to exactly this text.

    Args:
        prompt: its token ids.
        before: the prompt's text, tokenized with added special tokens where `adds_special`.
        ends: end-of-text tokens, which are not part of the text.
        lengths: the answer's number of tokens by the server's count, the likelier first; they decide between spellings of the
            same text.
        decoding: how the server decodes.
    """
    if not text:
        return []
    found = list(_spellings(text, list(prompt), before, tokenizer, ends, adds_special=adds_special))
    fitting = _fitting(found, text, before, decoding)
    counted = (spelling.ids for length in lengths for spelling in fitting if len(spelling.ids) == length)
    return next(counted, fitting[0].ids if fitting else None)


def _fitting(found: Sequence[_Spelling], text: str, before: str, decoding: Decoding) -> list[_Spelling]:
    """The spellings that decode to this text, the likeliest first."""
    behind = [spelling for spelling in found if spelling.is_behind]
    alone = [spelling for spelling in found if spelling.is_alone]
    if decoding == "alone":
        spaced = not before[-1:].isspace()  # then a word usually begins with a space, which the server has dropped
        return sorted(alone, key=lambda spelling: (not spelling.is_joint, spelling.is_behind == spaced)) or behind
    if decoding == "unknown" and _is_letter(before[-1:]) and _is_letter(text[0]):
        # "upon" then "a": the server has more likely dropped a space than written "upona".
        return [spelling for spelling in alone if spelling.is_joint and not spelling.is_behind] + behind
    return behind or alone


def _is_letter(character: str) -> bool:
    return character.isascii() and character.isalpha()


def _spellings(
    text: str, prompt: list[int], before: str, tokenizer: Any, ends: Sequence[int], *, adds_special: bool
) -> Iterator[_Spelling]:
    """Candidates, and whether they decode to the text."""
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
    """Ways to spell the answer: together with the prompt, then separately; without and with a space before it."""
    for gap in ("", " "):
        joint = tokenizer(before + gap + text, add_special_tokens=adds_special)["input_ids"]
        if joint[: len(prompt)] == prompt:
            yield joint[len(prompt) :], True
    for gap in ("", " "):
        for splits in (False, True):  # a special token may also be written out letter by letter
            yield from ((ids, False) for ids in _by_itself(gap + text, tokenizer, splits=splits))
    yield tokenizer(text, add_special_tokens=False)["input_ids"], False


def _by_itself(text: str, tokenizer: Any, *, splits: bool) -> Iterator[list[int]]:
    """Ways to spell a text separately, without the space or special token that the tokenizer adds at the start."""
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
    """What these tokens add to the decoded prompt; None where they change the prompt's text."""
    before, whole = (_decoded(tokens, tokenizer, skip=skip) for tokens in (prompt, [*prompt, *ids]))
    return whole.removeprefix(before) if whole.startswith(before) else None


def _decoded(ids: Sequence[int], tokenizer: Any, *, skip: bool) -> str:
    """The text of tokens. Spaces are not cleaned up, as servers return them unchanged."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    return text
