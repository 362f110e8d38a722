"""Where a text has concepts that a tokenizer cuts into several tokens.

A concept is a word, an identifier of a program, a functional group of a molecule, or a term of a list, contiguous or not: in
CC(N)=O the atoms of the amide are the characters 1, 3 and 6. Concepts and density are our definitions, not the paper's.
"""

import io
import keyword
import re
import tokenize
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, takewhile
from pathlib import Path
from typing import Any

from caftune.errors import CaftuneError, not_utf8
from caftune.evals.molecules import molecule_of

Ranges = tuple[tuple[int, int], ...]

_WORD = re.compile(r"[am0]+(?:[-'][am0]+)*")  # of the shapes that `_shape` gives
_SMILES_PART = re.compile(
    r"(?P<atom>\[[^\]]*\]|Br|Cl|[BCNOPSFIbcnops*])|(?P<branch>[()])"
    r"|[-=#$:/\\~]?(?:%\((?P<long>\d+)\)|%(?P<two>\d\d)|(?P<one>\d))"
)
_BROKEN = "\ufffd"  # what a decoder writes for bytes that are not a whole character
_WINDOW = 16  # tokens that are decoded again before each new one


@dataclass(frozen=True)
class Concept:
    """One occurrence in a text: the name it counts under, and its character ranges [start, end), in order."""

    name: str
    ranges: Ranges


def find_concepts(text: str, kind: str, terms: Sequence[str] = ()) -> list[Concept]:
    """The concepts of a text, in the order of their first characters, whatever their number of tokens.

    - `words`: runs of letters, marks and digits with at least one letter, with inner hyphens and apostrophes.
    - `code`: identifiers of Python without keywords, each name of `a.b_c` separately, up to where Python's tokenizer gives up
      (3.12 and later also read the fields of f-strings, and give up earlier on prose).
    - `smiles`: the functional groups (RDKit's fr_*, each match) of the molecule that is the first word of the text. A group's
      characters are those of its atoms, all between two of them that are neighbours in the text, and the ring labels of its
      bonds; not hydrogen that is written as an atom.

    For any kind, every occurrence of one of `terms` is a concept, named by the term: whole words, in any case and spacing, the
    earliest first and of those the longest. Other concepts that share a character with it are left out.

    Raises:
        CaftuneError: no such kind, a term without a character, or RDKit is needed and not installed.
    """
    if kind not in _FINDERS:
        raise CaftuneError(f"kind must be one of {', '.join(_FINDERS)}, got {kind!r}. Name one of these.")
    named = list(_occurrences(text, terms))
    taken = {place for concept in named for place in _places(concept.ranges)}
    others = [concept for concept in _FINDERS[kind](text) if taken.isdisjoint(_places(concept.ranges))]
    return sorted(named + others, key=lambda concept: concept.ranges)


def read_terms(path: str | Path) -> list[str]:
    """The terms of a text file, one a line; blank lines and lines that begin with # are left out.

    Raises:
        CaftuneError: no such file, not UTF-8, or no terms in it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error
    except OSError as error:
        raise CaftuneError(
            f"{path} must be a readable file with one term per line, got: {error.strerror}. Check the path."
        ) from error
    terms = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not terms:
        raise CaftuneError(f"{path} must hold at least one term, got none. Write one term per line.")
    return terms


def token_positions(
    concepts: Sequence[Concept], offsets: Sequence[tuple[int, int]]
) -> list[tuple[Concept, tuple[int, ...]]]:
    """The concepts of at least two tokens, each with the positions of its tokens, in order.

    A token belongs to a concept if they share a character, even if it holds others too (a space before).

    >>> token_positions([Concept("acid", ((2, 6),)), Concept("is", ((7, 9),))], [(0, 1), (1, 4), (4, 6), (6, 9)])
    [(Concept(name='acid', ranges=((2, 6),)), (1, 2))]
    """
    holders: dict[int, list[int]] = {}
    for position, offset in enumerate(offsets):
        for place in range(*offset):
            holders.setdefault(place, []).append(position)
    found = []
    for concept in concepts:
        positions = sorted({position for place in _places(concept.ranges) for position in holders.get(place, ())})
        if len(positions) > 1:
            found.append((concept, tuple(positions)))
    return found


def density(text: str, kind: str, tokenizer: Any, terms: Sequence[str] = ()) -> float:
    """Share of a text's tokens that belong to a concept of at least two tokens; 0 for a text without tokens."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded, offsets = offsets_of(ids, tokenizer)
    found = token_positions(find_concepts(decoded, kind, terms), offsets)
    return len({position for _, positions in found for position in positions}) / max(len(ids), 1)


def offsets_of(ids: Sequence[int], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The text that tokens decode to, and the characters [start, end) of it that each token holds.

    Found by decoding one token more at a time, so it holds for any tokenizer. Tokens that are parts of one character hold that
    character, each of them; special tokens, and those that add nothing, hold nothing.
    """
    text = _decoded(ids, tokenizer)
    offsets = _grown(ids, tokenizer, text, _WINDOW)
    # A decoder that looks farther back than the window (none is known) gets all tokens before.
    return text, _grown(ids, tokenizer, text, len(ids)) if offsets is None else offsets  # type: ignore[return-value]


def _grown(ids: Sequence[int], tokenizer: Any, text: str, window: int) -> list[tuple[int, int]] | None:
    """`offsets_of`, with at least `window` tokens decoded before each; None where these were too few to agree with `text`."""
    offsets: list[tuple[int, int]] = []
    # ids[begin:] decode to text[before:]; ids[begin:end - 1] to `last`, of which text[:done] has its final form
    begin = before = done = 0
    last = piece = ""
    for end in range(1, len(ids) + 1):
        piece = _decoded(ids[begin:end], tokenizer)
        finished = max(done, before + _agreement(piece.rstrip(_BROKEN), text[before:]))
        is_final = text.startswith(piece, before)
        if piece == last and not piece.endswith(_BROKEN):
            reach = done
        elif is_final:
            reach = max(done, before + len(piece))
        else:
            reach = min(finished + 1, len(text))  # the character that it is a part of
        offsets.append((done, reach))
        done, last = finished, piece
        if end - begin > 2 * window and is_final and done == before + len(piece):
            overlap = _decoded(ids[end - window : end], tokenizer)
            if overlap and text.endswith(overlap, 0, done):
                begin, before, last = end - window, done - len(overlap), overlap
    return offsets if piece == text[before:] or window >= len(ids) else None


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _agreement(one: str, other: str) -> int:
    """How many characters both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _occurrences(text: str, terms: Sequence[str]) -> Iterator[Concept]:
    """Where `terms` stand in the text as whole words, without overlaps."""
    names = sorted(dict.fromkeys(terms), key=len, reverse=True)
    if not all(name.strip() for name in names):
        raise CaftuneError("A term must have characters, got a blank one. Remove it from the list.")
    if not names:
        return
    forms = (r"\s+".join(map(re.escape, name.split())) for name in names)
    pattern = rf"(?<!\w)(?:{'|'.join(f'({form})' for form in forms)})(?!\w)"
    for match in re.finditer(pattern, text, re.IGNORECASE):
        if unicodedata.category(text[match.end() : match.end() + 1] or " ")[0] == "M":
            continue  # a mark on the last letter makes it another one, and \w knows no marks
        yield Concept(names[(match.lastindex or 1) - 1], (match.span(),))


def _words(text: str) -> Iterator[Concept]:
    for match in _WORD.finditer("".join(map(_shape, text))):
        if "a" in match[0]:
            yield Concept(text[match.start() : match.end()], (match.span(),))


def _shape(character: str) -> str:
    """What the character is to a word: a letter, a mark on one, a digit, a hyphen, an apostrophe or its end."""
    if character in "-\u2010\u2011":
        return "-"
    if character in "'\u2019":
        return "'"
    if character in "\u200c\u200d\u00ad":  # joiners and the soft hyphen, within Persian and Indic words for example
        return "m"
    return {"L": "a", "M": "m", "N": "0"}.get(unicodedata.category(character)[0], " ")


def _identifiers(text: str) -> Iterator[Concept]:
    starts = [0, *accumulate(map(len, re.findall(r"[^\n]*\n|[^\n]+", text)))]
    try:
        for token in tokenize.generate_tokens(io.StringIO(text, newline="\n").readline):
            if token.type == tokenize.NAME and not keyword.iskeyword(token.string):
                start = starts[token.start[0] - 1] + token.start[1]
                yield Concept(token.string, ((start, start + len(token.string)),))
    except (tokenize.TokenError, SyntaxError, ValueError):
        return  # no Python from here on; ValueError: a character that its tokenizer does not take


def _groups(text: str) -> Iterator[Concept]:
    """RDKit's functional groups of the SMILES that is the first word of the text."""
    word = re.search(r"\S+", text)
    if word is None or molecule_of(word[0]) is None:
        return
    from rdkit import Chem
    from rdkit.Chem import Fragments

    parameters: Any = Chem.SmilesParserParams()
    parameters.removeHs = False
    molecule = Chem.MolFromSmiles(word[0], parameters)
    for atom in molecule.GetAtoms():
        atom.SetIntProp("written", atom.GetIdx())  # RDKit numbers atoms as they are written
    molecule = Chem.RemoveHs(molecule)
    written = [atom.GetIntProp("written") for atom in molecule.GetAtoms()]
    atoms, rings = _smiles_parts(word[0], word.start())
    for name, count in Fragments.fns:
        (pattern,) = count.__defaults__[1:]  # RDKit 2026.09 has it in the counting function only
        for match in molecule.GetSubstructMatches(pattern):
            yield Concept(name, _group_ranges({written[i] for i in match}, atoms, rings))


def _smiles_parts(smiles: str, start: int) -> tuple[list[range], list[tuple[set[int], range]]]:
    """The characters of each atom, and of each ring label with the two atoms that it bonds; `smiles` begins at `start`."""
    atoms: list[range] = []
    rings: list[tuple[set[int], range]] = []
    opened: dict[int, tuple[int, range]] = {}
    atom, stems = -1, [-1]  # the atom that a label belongs to, and those that open branches go off from
    for part in _SMILES_PART.finditer(smiles):
        place = range(start + part.start(), start + part.end())
        if part["atom"]:
            atom = len(atoms)
            atoms.append(place)
        elif part["branch"] == "(":
            stems.append(atom)
        elif part["branch"]:
            atom = stems.pop()
        elif (number := int(part["long"] or part["two"] or part["one"])) in opened:
            other, label = opened.pop(number)
            rings += [({other, atom}, label), ({other, atom}, place)]
        else:
            opened[number] = (atom, place)
    return atoms, rings


def _group_ranges(group: set[int], atoms: list[range], rings: list[tuple[set[int], range]]) -> Ranges:
    places = {place for atom in group for place in atoms[atom]}
    for atom in group & {following - 1 for following in group}:
        places.update(range(atoms[atom].stop, atoms[atom + 1].start))
    for bonded, label in rings:
        if bonded <= group:
            places.update(label)
    ordered = sorted(places)
    ends = [i for i, (one, next_one) in enumerate(pairwise(ordered), start=1) if next_one != one + 1]
    return tuple((ordered[i], ordered[j - 1] + 1) for i, j in pairwise([0, *ends, len(ordered)]))


def _places(ranges: Ranges) -> Iterator[int]:
    return (place for start, end in ranges for place in range(start, end))


_FINDERS: dict[str, Callable[[str], Iterator[Concept]]] = {"words": _words, "code": _identifiers, "smiles": _groups}
