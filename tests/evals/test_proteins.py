"""Scores of proteins against Biopython called directly, and against a table of alignments written out here."""

import json
import math
import random
import sys
import time

import pytest

from caftune.errors import CaftuneError
from caftune.evals import proteins
from caftune.evals.proteins import PROTEINS, align, sequence_of, valid_residues
from caftune.evals.task import Example

Align = pytest.importorskip("Bio.Align")

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def scored(reference, completion):
    return PROTEINS.score(Example("0", "", reference), completion)


def mutated(sequence, draw):
    """Four edits in ten letters: about half of them replaced, the rest left out or put in."""
    letters = []
    for letter in sequence:
        edit = draw.choice(["keep"] * 6 + ["replace", "replace", "insert", "delete"])
        letters += {"keep": [letter], "delete": [], "insert": [letter, draw.choice(LETTERS)]}.get(
            edit, [draw.choice(LETTERS)]
        )
    return "".join(letters)


@pytest.fixture(scope="session")
def rows(shared):
    lines = (shared / "data" / "protein_go" / "pairs.jsonl").read_text().splitlines()
    return [json.loads(line) for line in random.Random(1).sample(lines, 200)]


@pytest.fixture(scope="session")
def pairs(rows):
    """50 references, each with a mutated copy, the protein of another row or a part of itself as the answer."""
    draw, sequences = random.Random(2), [row["sequence"] for row in rows]
    answers = [mutated, lambda _own, draw: draw.choice(sequences), lambda own, _draw: own[len(own) // 3 :]]
    return [(own, answers[number % 3](own, draw)) for number, own in enumerate(sequences[:50])]


@pytest.fixture(scope="session")
def aligner():
    matrix = Align.substitution_matrices.load("BLOSUM62")
    return Align.PairwiseAligner(mode="global", substitution_matrix=matrix, open_gap_score=-10, extend_gap_score=-0.5)


def test_identity_and_score_are_those_of_biopython_called_directly(pairs, aligner):
    for reference, answer in pairs:
        best = aligner.align(reference, answer)[0]
        columns = list(zip(best[0], best[1], strict=True))
        found = scored(reference, answer)
        assert found["identity"] == sum(one == two for one, two in columns) / len(columns)
        assert found["alignment_score"] == best.score
        assert found["valid_residues"] == 1.0


def table_score(one, two):
    """Gotoh's three tables: the best score that ends in a pair, in a gap in `two`, in a gap in `one`."""
    matrix = Align.substitution_matrices.load("BLOSUM62")
    above = [(0.0, -math.inf, -math.inf)]
    above += [(-math.inf, -math.inf, -10 - 0.5 * (j - 1)) for j in range(1, len(two) + 1)]
    for i, a in enumerate(one, 1):
        row = [(-math.inf, -10 - 0.5 * (i - 1), -math.inf)]
        for j, b in enumerate(two, 1):
            up, left = above[j], row[-1]
            pair = max(above[j - 1]) + matrix[a][b]
            down = max(up[0] - 10, up[1] - 0.5, up[2] - 10)
            right = max(left[0] - 10, left[1] - 10, left[2] - 0.5)
            row.append((pair, down, right))
        above = row
    return max(above[-1])


def test_the_score_is_that_of_the_table_of_alignments(rows):
    draw = random.Random(4)
    for number in range(12):
        one, two = (row["sequence"][:60] for row in draw.sample(rows, 2))
        answer = mutated(one, draw) if number % 2 else two[: 20 + 3 * number]
        assert align(one, answer)[1] == pytest.approx(table_score(one, answer), abs=1e-9)


def test_gaps_at_the_ends_cost_and_count_as_columns():
    identity, score = align("MKTAYIAK", "AYIAK")
    assert identity == 5 / 8
    assert score == (4 + 7 + 4 + 4 + 5) - 10 - 0.5 * 2


def test_perfect_answers_are_perfect_in_every_measure(rows):
    examples = [PROTEINS.read(row, number) for number, row in enumerate(rows)]
    found = PROTEINS.combine([PROTEINS.score(example, f" {example.reference}\n") for example in examples])
    assert found["identity"] == found["valid_residues"] == 1.0
    matrix = Align.substitution_matrices.load("BLOSUM62")
    best = [sum(matrix[letter][letter] for letter in row["sequence"]) for row in rows]
    assert found["alignment_score"] == pytest.approx(sum(best) / len(best), abs=1e-9)


def test_the_proteins_of_other_rows_are_never_the_same_and_little_alike(rows):
    references = [row["sequence"] for row in rows]
    found = [scored(own, other) for own, other in zip(references, references[1:] + references[:1], strict=True)]
    assert all(score["identity"] < 0.9 for score in found)
    assert 0.05 < PROTEINS.combine(found)["identity"] < 0.25


GARBAGE = [
    "",
    " ",
    "\n\n",
    "```",
    "```\n```",
    "I cannot design a protein.",
    "mktayiak",
    "12345",
    "é\ud800\0",
    ">only a header",
]


@pytest.mark.parametrize("completion", GARBAGE)
def test_a_completion_without_a_sequence_has_the_lowest_score_without_a_crash(completion):
    found = scored("MKTAYIAKQR", completion)
    assert found == {"identity": 0.0, "alignment_score": -10 - 0.5 * 9, "valid_residues": 0.0}


def test_letters_that_are_no_amino_acid_never_match_and_lower_the_share_of_valid_ones():
    found = scored("MKXAY", "MK?AY")
    assert found["identity"] == 4 / 5
    assert found["valid_residues"] == 4 / 5
    assert found["alignment_score"] == 5 + 5 - 1 + 4 + 7  # aligned as X, and X with X is -1
    assert scored("MKXAY", "MKXAY")["identity"] == 1.0
    assert scored("MKUAY", "MKUAY") == pytest.approx({"identity": 1.0, "alignment_score": 20.0, "valid_residues": 1.0})
    assert (valid_residues("MKBJZ*-"), valid_residues("")) == (2 / 7, 0.0)


def test_of_a_long_answer_four_times_the_references_length_is_aligned_and_all_of_it_counted():
    assert align("MKT", "MKT" + "A" * 9997)[0] == 3 / 10000
    assert align("MKT", "MKT" + "A" * 9997)[1] == align("MKT", "MKT" + "A" * 9)[1]
    assert align("MKT", "A" * 9 + "MKT") != align("MKT", "A" * 12)
    assert proteins.COMPARED == 4


def test_ten_thousand_letters_take_seconds_at_most():
    draw = random.Random(5)
    reference, answer = ("".join(draw.choices(LETTERS, k=length)) for length in (2500, 10000))
    start = time.perf_counter()
    scored(reference, answer)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    "completion",
    [
        " MKTAYIAK", "MKTAYIAK\n", "MKTA\nYIAK\n\nMore text.", "MKTA YIAK", "Sequence: MKTAYIAK", "```MKTAYIAK```",
        "OK, here it is:\n```\nMKTAYIAK\n```\nGood luck.", "OK\n```fasta\n>designed\nMKTA\nYIAK\n```", "MKTAYIAK\n```\nDone.",
        "```\nMKTAYIAK", ">designed\nMKTAYIAK\n>another\nGGGG", ">ABCDEF\nMKTAYIAK\n>GHIKLM\nGGGG",
        "Here is one.\n\nMKTAYIAK\nIt should fold.",
    ],
)  # fmt: skip
def test_the_sequence_is_found_in(completion):
    assert sequence_of(completion) == "MKTAYIAK"


def test_own_rows_are_of_both_formats_and_perfect_answers_to_them_are_perfect():
    examples = [PROTEINS.read(row, number) for number, row in enumerate(PROTEINS.rows)]
    assert [sum(name in row for row in PROTEINS.rows) for name in ("functions", "instruction")] == [3, 3]
    found = PROTEINS.combine([PROTEINS.score(example, example.reference) for example in examples])
    assert found["identity"] == found["valid_residues"] == 1.0
    assert PROTEINS.primary in found


def test_mol_instructions_rows_keep_their_words_and_their_answer_scores_as_published():
    row = PROTEINS.rows[3]
    example = PROTEINS.read(row, 7)
    assert (example.id, example.reference) == ("7", "GIGKFLHSAKKFGKAFVGEIMNS")
    assert example.answer == example.reference
    assert example.prompt == f"{row['instruction']}\n{row['input']}"
    assert PROTEINS.score(example, row["output"])["identity"] == 1.0
    assert PROTEINS.read(PROTEINS.rows[5], 0).prompt == PROTEINS.rows[5]["instruction"]


def test_a_prompt_lists_every_function_and_the_next_question_does_not_count():
    example = PROTEINS.read({"functions": ["calcium ion binding", "toxin activity"], "sequence": "MKT"}, 0)
    assert "- calcium ion binding\n- toxin activity\nSequence:" in example.prompt
    assert sequence_of("MKT\n\nFunctions:\n- toxin activity\nSequence: GIGAVLKVLT") == "MKT"
    assert sequence_of("Sure.\nFunctions:\n- toxin activity\nSequence: GIGAVLKVLT") == "GIGAVLKVLT"


def test_a_row_without_its_columns_or_without_a_sequence_is_refused_with_a_sentence():
    with pytest.raises(CaftuneError, match="Row 4 .* must have a column functions or instruction, got sequence"):
        PROTEINS.read({"sequence": "MKT"}, 4)
    with pytest.raises(CaftuneError, match="Row 4 .* must have a column output, got instruction"):
        PROTEINS.read({"instruction": "Write one."}, 4)
    with pytest.raises(CaftuneError, match=r"Row 4 \(from 0\) must have a sequence of amino acids .*, got 'mkt'"):
        PROTEINS.read({"functions": ["toxin activity"], "sequence": "mkt"}, 4)


def test_without_biopython_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "Bio.Align", None)
    proteins._aligner.cache_clear()
    with pytest.raises(CaftuneError, match=r"biopython must be installed .* pip install 'caftune\[eval\]'"):
        PROTEINS.read(PROTEINS.rows[0], 0)


def test_functions_of_a_csv_are_one_text():
    (one, listed) = (
        PROTEINS.read({"functions": f, "sequence": "MKT"}, 0) for f in ("toxin activity", ["toxin activity"])
    )
    assert one.prompt == listed.prompt
