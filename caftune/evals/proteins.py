"""The task `proteins`: functions in, a protein out, as a sequence of amino acids.

Rows: Gene Ontology functions with a sequence (columns `functions`, `sequence`), or protein design as Mol-Instructions
publishes it (`instruction`, `input` and `output`, the sequence within a fence).

Source: Mol-Instructions (arXiv 2306.08018); InstructProtein (arXiv 2310.03269) for the pairs of functions and sequences.
Identity as EMBOSS's needle counts it, with its matrix and gap costs; gaps at the ends cost what others do.
Structures (confidence, TM-score) need a folding model, named by `eval.structures`: see caftune.pipeline.structures.
"""

import re
import string
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from caftune.errors import CaftuneError
from caftune.evals.reading import TAG, code_blocks, plain
from caftune.evals.requirements import required
from caftune.evals.task import Example, Task, filled_text, text

RESIDUES = frozenset("ACDEFGHIKLMNPQRSTVWYUOX")  # the 22 amino acids of the genetic code, and X for an unknown one
ALIGNABLE = frozenset("ACDEFGHIKLMNPQRSTVWYBZX")  # BLOSUM62's letters; every other is aligned as X
GAP_OPEN, GAP_EXTEND = -10.0, -0.5
COMPARED = 4  # times the reference's length: the part of an answer that is aligned


_LABEL = re.compile(
    r"(?:[^:\n]{0,60}\b)?(?:seq|sequence|protein|peptide|answer)\b[^:：\n]{0,60}?(?:[:：]|\bis\b)[\s*_]*(.*)",
    re.IGNORECASE,
)
_BULLET = re.compile(r"\s*(?:(?:[-+•]|\*(?=\s)|\d+[.)])\s+)?")
_CAPITAL_LETTERS = frozenset(string.ascii_uppercase + "?-~.*")
_LONG = 25  # more letters than a word has; _LABELLED are enough after a label
_LABELLED = 10
_IN_SENTENCE = 12
# Words without O, which few sequences have.
_CAPITALS = frozenset({
    "I", "NA", "NULL", "NIL", "EMPTY", "INVALID", "FAIL", "FAILED", "HELP", "PLEASE", "WAIT", "YES", "END",
    "PENDING", "MISSING", "UNAVAILABLE", "REFUSED", "DECLINED", "DENIED", "WITHHELD", "REDACTED", "CLASSIFIED",
    "RESTRICTED", "RESULT", "ANSWER", "SEQUENCE", "PEPTIDE", "SMILES", "FASTA", "DNA", "RNA", "ATP", "GTP", "PDB",
    "GFP", "EGFP", "ATPASE", "GTPASE", "KINASE", "LIGASE", "LIPASE", "ENZYME", "INSULIN", "TRYPSIN", "LYSINE",
    "ALANINE", "GLYCINE", "SERINE", "VALINE", "CYSTEINE", "HISTIDINE",
})  # fmt: skip


def sequence_of(completion: str) -> str:
    r"""The sequence in a completion: the first line that is one, with the lines that continue it; "" if there is none.

    Such a line is one word of capital letters (at least three in four of them residues), or blocks of one length (of ten, say)
    with numbers at either end or without. Small letters count where they are too many for a word, or stand in FASTA, a code
    block, numbered blocks or after a label ("Sequence: ..."). A long word of residues in capitals within a sentence is one.
    FASTA headers, rulers, prose (also in capitals) and a stop mark (*) at the end are left out. Code blocks come first.

    >>> sequence_of("Here it is:\n```\n>designed\nMKTAYIAK\nQRQISF*\n```"), sequence_of("I cannot design one.")
    ('MKTAYIAKQRQISF', '')
    """
    text = TAG.sub(" ", plain(completion))
    found = (_first_sequence(block.text, is_marked=True) for block in code_blocks(text))
    return next(filter(None, found), "") or _first_sequence(text, is_marked=False)


def _first_sequence(text: str, *, is_marked: bool) -> str:
    sequence, sizes = "", list[int]()  # of the lines so far; that of a label may be shorter
    for line in text.split("\n"):
        if re.fullmatch(r"[\s\d]*\d[\s\d]*", line):  # a ruler of positions
            continue
        is_header = line.lstrip().startswith(">")
        is_marked |= is_header
        residues = "" if is_header else _residues(line, is_marked=is_marked, is_begun=bool(sequence))
        is_last = sequence.endswith("*") or len(set(sizes)) > 1 or bool(_LABEL.match(line))
        if sequence and (not residues or is_last or len(residues) > max(sizes, default=len(residues))):
            break
        sequence += residues
        sizes += [len(residues)] if residues and not _LABEL.match(line) else []
    return sequence.rstrip("*")


def _residues(line: str, *, is_marked: bool, is_begun: bool) -> str:
    """The residues of a line in capital letters, or "" where it is not part of a sequence (of the begun one, if `is_begun`)."""
    label = _LABEL.match(line)
    text = label[1] if label else line[len((_BULLET.match(line) or [""])[0]) :] or line
    groups = _bare(text).split()
    blocks = [group for group in groups if not group.isdigit()]
    if label and line.isupper() and not re.search("[:：]", line) and len("".join(blocks)) < _IN_SENTENCE:
        return ""  # THE SEQUENCE IS LACKING
    if _are_blocks(blocks):
        is_marked |= label is not None or len(blocks) > 1
        return _in_capitals("".join(blocks), is_marked=is_marked, is_begun=is_begun)
    if label and blocks and _is_sequence(_bare(blocks[0]), _LABELLED // 2):
        return _bare(blocks[0])
    words = (_bare(word) for word in groups) if re.search(r"[a-z]", line) and not is_begun else ()
    return next((word for word in words if _is_sequence(word, _IN_SENTENCE)), "")


def _bare(text: str) -> str:
    """The text without Markdown, quotation marks and the end of a sentence, and with one stop mark at most."""
    text = re.sub(r"\*\*|__", "", text).strip("`\"'“”‘’(){}| \t").rstrip(".,;:…`\"'”’){}| \t")
    return re.sub(r"\s*\*+$", "*", text)


def _are_blocks(groups: Sequence[str]) -> bool:
    """Whether this is one word, or blocks of one length, of which the last may be shorter.

    Blocks have four letters at least, or are eight of one letter; of ten, where letters are small.
    """
    if len(groups) < 2:
        return len(groups) == 1
    size = len(groups[0])
    is_even = all(len(group) == size for group in groups[:-1]) and len(groups[-1].rstrip("*")) <= size
    letters = "".join(groups).rstrip("*")
    is_size = size >= 4 or (size == 1 and len(groups) >= 8)
    return is_even and RESIDUES.issuperset(letters.upper()) and (is_size if letters.isupper() else size == 10)


def _is_word(letters: str) -> bool:
    """Whether letters are a word of a language: a frequent one, or one with O, which residues are once in a million."""
    return letters in _CAPITALS or ("O" in letters and len(letters) < _LONG)


def _is_sequence(word: str, least: int) -> bool:
    letters = word.rstrip("*")
    return len(letters) >= least and RESIDUES.issuperset(letters) and not _is_word(letters)


def _in_capitals(word: str, *, is_marked: bool, is_begun: bool) -> str:
    """The residues that a single word or blocks stand for, or "" where it is a word of a language."""
    letters = word.rstrip("*")
    if is_begun and not letters:
        return word  # a stop mark
    if letters == letters.upper():
        is_long = len(letters) >= (1 if is_begun else 3)
        is_some = is_long and _CAPITAL_LETTERS.issuperset(letters) and valid_residues(letters) >= 0.75
        return word if is_some and not _is_word(letters) else ""
    is_long = is_begun or len(letters) >= (_LABELLED if is_marked else _LONG)
    return word.upper() if is_long and (RESIDUES - {"O", "U"}).issuperset(letters.upper()) else ""


def valid_residues(sequence: str) -> float:
    """The share of the characters that stand for an amino acid, X for an unknown one included; 0 for an empty text."""
    return sum(letter in RESIDUES for letter in sequence) / max(len(sequence), 1)


def read(row: Mapping[str, Any], number: int) -> Example:
    """A row as an example; the reference is its sequence.

    Raises:
        CaftuneError: a column is missing or holds no sequence, or Biopython is not installed.
    """
    _aligner()
    if row.get("functions") is not None:
        functions = "".join(f"- {function}\n" for function in _functions(row["functions"], number))
        prompt = f"Design a protein that has these molecular functions.\n\nFunctions:\n{functions}Sequence:"
        source = text(row, number, "sequence")
    else:
        more = text(row, number, "input") if row.get("input") is not None else ""
        prompt = f"{filled_text(row, number, 'functions', 'instruction')}\n{more}".strip()
        source = text(row, number, "output")
    sequence = sequence_of(source)
    if not sequence:
        raise CaftuneError(
            f"Row {number} (from 0) must have a sequence of amino acids in capital letters, got {source!r}. Remove the row."
        )
    return Example(str(number), prompt, sequence, sequence)


def _functions(given: Any, number: int) -> list[str]:
    """The functions of a row: a list of texts, or in a CSV one text."""
    functions = [given] if isinstance(given, str) else given
    if isinstance(functions, list) and functions and all(isinstance(each, str) and each.strip() for each in functions):
        return functions
    raise CaftuneError(
        f"Row {number} (from 0): functions must be a list of texts, got {given!r}. Fix or remove the row."
    )


def score(example: Example, completion: str) -> dict[str, float]:
    """The measures of one completion.

    - `identity`: share of the columns of the alignment, gaps included, in which answer and reference have the same letter.
    - `alignment_score`: of that alignment, in half bits.
    - `valid_residues`: share of the answer's characters that stand for an amino acid.

    A completion without a sequence has identity 0, no valid residues, and the score of an answer that is all gap.
    """
    answer = sequence_of(completion)
    identity, alignment_score = align(example.reference, answer)
    return {"identity": identity, "alignment_score": alignment_score, "valid_residues": valid_residues(answer)}


def align(reference: str, answer: str) -> tuple[float, float]:
    """Identity and score of the best global alignment (Needleman-Wunsch, BLOSUM62, a gap of n letters -10 - 0.5 (n - 1)).

    Biopython's first of equally good ones. Only COMPARED times the reference's length of an answer is aligned, to bound
    time and memory; the rest counts as gap in the identity only.

    Raises:
        CaftuneError: Biopython is not installed.
    """
    if not answer:
        return 0.0, GAP_OPEN + GAP_EXTEND * (len(reference) - 1)
    compared = answer[: COMPARED * len(reference)]
    alignment = _aligner().align(_alignable(reference), _alignable(compared))[0]
    blocks = zip(*alignment.aligned, strict=True)
    same = sum(
        expected == found
        for (start, end), (first, last) in blocks
        for expected, found in zip(reference[start:end], compared[first:last], strict=True)
    )
    return same / (alignment.length + len(answer) - len(compared)), float(alignment.score)


def _alignable(sequence: str) -> str:
    return "".join(letter if letter in ALIGNABLE else "X" for letter in sequence)


@cache
def _aligner() -> Any:
    with required("biopython", "the task proteins"):
        from Bio.Align import PairwiseAligner, substitution_matrices
    aligner = PairwiseAligner()
    aligner.mode = "global"
    aligner.substitution_matrix = substitution_matrices.load("BLOSUM62")
    aligner.open_gap_score, aligner.extend_gap_score = GAP_OPEN, GAP_EXTEND
    return aligner


PROTEINS = Task(
    name="proteins",
    primary="identity",
    read=read,
    score=score,
    max_new_tokens=1024,
    columns=("functions", "sequence", "instruction", "input", "output"),
    past=("\nFunctions:",),
)
