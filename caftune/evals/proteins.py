"""The task `proteins`: functions in, a protein out, as a sequence of amino acids.

Rows: Gene Ontology functions with a sequence (columns `functions`, `sequence`), or protein design as Mol-Instructions
publishes it (`instruction`, `input` and `output`, the sequence within a fence).

Source: Mol-Instructions (arXiv 2306.08018); InstructProtein (arXiv 2310.03269) for the pairs of functions and sequences.
Identity as EMBOSS's needle counts it, with its matrix and gap costs; unlike needle's default, gaps at the ends cost what
others do.

Structures (confidence, TM-score) need a folding model: `eval.structures` names one, and caftune.structures measures them.
"""

from collections.abc import Mapping
from functools import cache
from itertools import dropwhile, takewhile
from operator import not_
from typing import Any

from caftune.errors import CaftuneError
from caftune.evals.task import Example, Task, column, means

RESIDUES = frozenset("ACDEFGHIKLMNPQRSTVWYUOX")  # the 22 amino acids of the genetic code, and X for an unknown one
ALIGNABLE = frozenset("ACDEFGHIKLMNPQRSTVWYBZX")  # BLOSUM62's letters; every other is aligned as X
GAP_OPEN, GAP_EXTEND = -10.0, -0.5
COMPARED = 4  # times the reference's length: the part of an answer that is aligned


def sequence_of(completion: str) -> str:
    r"""The sequence in a completion: the first line that is one, with the lines that carry it on; "" if there is none.

    A line is one if at least half of its characters, white space left out, are residues in capital letters. FASTA headers
    and prose are passed over; where there is a fence, what stands in it comes first.

    >>> sequence_of("Here it is:\n```\n>designed\nMKTAYIAK\nQRQISF\n```"), sequence_of("I cannot design one.")
    ('MKTAYIAKQRQISF', '')
    """
    return _first_sequence(completion.partition("```")[2]) or _first_sequence(completion)


def _first_sequence(text: str) -> str:
    lines = dropwhile(not_, map(_residue_line, text.splitlines()))
    return "".join(takewhile(bool, lines))


def _residue_line(line: str) -> str:
    """The line without white space and fence, or "" where it is no part of a sequence."""
    text = "".join(line.split()).strip("`").removeprefix("Sequence:")
    return "" if text.startswith(">") or valid_residues(text) < 0.5 else text


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
        named = [row["functions"]] if isinstance(row["functions"], str) else row["functions"]  # a CSV holds one text
        functions = "".join(f"- {function}\n" for function in named)
        prompt = f"Design a protein that has these molecular functions.\n\nFunctions:\n{functions}Sequence:"
        source = column(row, number, "sequence")
    else:
        prompt = f"{column(row, number, 'functions', 'instruction')}\n{row.get('input') or ''}".strip()
        source = column(row, number, "output")
    sequence = sequence_of(source)
    if not sequence:
        raise CaftuneError(
            f"Row {number} (from 0) must have a sequence of amino acids in capital letters, got {source!r}. Remove the row."
        )
    return Example(str(number), prompt, sequence, sequence)


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

    Of equally good alignments Biopython's first is taken. Of an answer longer than COMPARED times the reference only that
    much is aligned, so that time and memory stay within bounds; the rest counts as columns of gap in the identity, and
    not in the score.

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
    try:
        from Bio.Align import PairwiseAligner, substitution_matrices
    except ImportError as absent:
        raise CaftuneError(
            "biopython must be installed for the task proteins. Run pip install caftune[eval]."
        ) from absent
    aligner = PairwiseAligner()
    aligner.mode = "global"
    aligner.substitution_matrix = substitution_matrices.load("BLOSUM62")
    aligner.open_gap_score, aligner.extend_gap_score = GAP_OPEN, GAP_EXTEND
    return aligner


# The sequences are short and well known: human oxytocin and vasopressin, melittin, magainin 2, thymosin beta 4, bradykinin.
ROWS = (
    {"functions": ["neurohypophyseal hormone activity", "oxytocin receptor binding"], "sequence": "CYIQNCPLG"},
    {"functions": ["neurohypophyseal hormone activity", "V1A vasopressin receptor binding"], "sequence": "CYFQNCPRG"},
    {"functions": ["toxin activity", "channel regulator activity"], "sequence": "GIGAVLKVLTTGLPALISWIKRKRQQ"},
    {
        "instruction": "Write a protein that does what is listed.",
        "input": "1. It tears holes in the membranes of bacteria.\n2. It is found in the skin of frogs.",
        "output": "One such protein:\n```\nGIGKFLHSAKKFGKAFVGEIMNS\n```",
    },
    {
        "instruction": "Write a protein that does what is listed.",
        "input": "1. It holds actin monomers, so that they do not form filaments.",
        "output": "One such protein:\n```\nSDKPDMAEIEKFDKSKLKKTETQEKNPLPSKETIEQEKQAGES\n```",
    },
    {
        "instruction": "Write a peptide that widens blood vessels.",
        "input": "",
        "output": "One such peptide:\n```\nRPPGFSPFR\n```",
    },
)

PROTEINS = Task(
    name="proteins",
    primary="identity",
    read=read,
    score=score,
    combine=means,
    max_new_tokens=1024,
    rows=ROWS,
    stop=("\nFunctions:",),
)
