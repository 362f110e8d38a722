"""Scores of molecules against RDKit called directly, and against BLEU, edit distance and F1 written out here."""

import json
import math
import random
import sys
from collections import Counter

import pytest

from caftune.errors import CaftuneError
from caftune.evals import molecules
from caftune.evals.molecules import MOLECULES, levenshtein, smiles_of
from caftune.evals.task import Example

Chem = pytest.importorskip("rdkit.Chem")

INVALID = ["", "C1CC", "CC(", "c1cccc1", "hello", "C=C=C=(", "[Xx]", "CC)O", "C(C)(C)(C)(C)C", "%%%"]
SIMILARITIES = ("morgan", "maccs", "rdk")


def scored(reference, completion):
    return MOLECULES.score(Example("0", "", reference), completion)


def combined(pairs):
    return MOLECULES.combine([scored(reference, completion) for reference, completion in pairs])


def quietly_parsed(smiles):
    from rdkit import rdBase

    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
    return molecule if smiles and molecule is not None else None


def corrupted(smiles, others, draw):
    kind = draw.choice(["same", "rewritten", "other", "mutated", "mutated", "invalid"])
    if kind == "rewritten":
        return Chem.MolToSmiles(Chem.MolFromSmiles(smiles), doRandom=True)
    if kind == "other":
        return draw.choice(others)
    if kind == "mutated":
        at = draw.randrange(len(smiles))
        return smiles[:at] + draw.choice(["", "C", "N", "O", "=O", "(", "c", "S"]) + smiles[at + draw.randrange(2) :]
    return draw.choice(INVALID) if kind == "invalid" else smiles


@pytest.fixture(scope="session")
def chebi(shared):
    lines = (shared / "data" / "chebi20" / "test.jsonl").read_text().splitlines()
    return [json.loads(line) for line in random.Random(1).sample(lines, 200)]


@pytest.fixture(scope="session")
def pairs(chebi):
    """200 references, each with an answer: itself, itself otherwise written, another's, a mutated one or an invalid one."""
    draw, everything = random.Random(2), [row["smiles"] for row in chebi]
    return [(smiles, corrupted(smiles, everything, draw)) for smiles in everything]


@pytest.fixture(scope="session")
def scores(pairs):
    return [scored(reference, answer) for reference, answer in pairs]


def test_the_corrupted_answers_are_of_every_sort(scores):
    counts = Counter((score["valid"], score["exact_match"]) for score in scores)
    assert min(counts[0.0, 0.0], counts[1.0, 0.0], counts[1.0, 1.0]) > 40


def test_fingerprint_similarities_are_those_of_direct_calls_for_valid_answers_and_missing_for_others(pairs, scores):
    from rdkit import DataStructs, rdBase
    from rdkit.Chem import AllChem, MACCSkeys

    for (reference, answer), score in zip(pairs, scores, strict=True):
        one, two = quietly_parsed(reference), quietly_parsed(answer)
        if two is None:
            assert not score.keys() & set(SIMILARITIES)
            continue
        with rdBase.BlockLogs():  # the call of MolT5's script is deprecated, and says so every time
            morgan = DataStructs.TanimotoSimilarity(*(AllChem.GetMorganFingerprint(each, 2) for each in (one, two)))
        maccs = DataStructs.FingerprintSimilarity(MACCSkeys.GenMACCSKeys(one), MACCSkeys.GenMACCSKeys(two))
        rdk = DataStructs.FingerprintSimilarity(Chem.RDKFingerprint(one), Chem.RDKFingerprint(two))
        assert [score[name] for name in SIMILARITIES] == [morgan, maccs, rdk], (reference, answer)


def test_exact_match_and_validity_are_those_of_direct_calls(pairs, scores):
    from rdkit import rdBase

    for (reference, answer), score in zip(pairs, scores, strict=True):
        one, two = quietly_parsed(reference), quietly_parsed(answer)
        assert score["valid"] == (two is not None)
        if two is None:
            assert score["exact_match"] == score["exact_match_inchi"] == 0.0
            continue
        with rdBase.BlockLogs():
            same_inchi = Chem.MolToInchi(one) == Chem.MolToInchi(two)
            has_inchi = bool(Chem.MolToInchi(one))
        same = Chem.MolToSmiles(one) == Chem.MolToSmiles(two)
        assert score["exact_match"] == same
        assert score["exact_match_inchi"] == (same_inchi if has_inchi else same)


def fragments_of(smiles):
    from rdkit.Chem import Fragments

    molecule = quietly_parsed(smiles)
    return {name for name, count in Fragments.fns if molecule is not None and count(molecule) > 0}


def test_functional_groups_are_those_of_direct_calls(pairs, scores):
    for (reference, answer), score in zip(pairs, scores, strict=True):
        expected, found = fragments_of(reference), fragments_of(answer)
        outcomes = {f"{name}_tp" for name in expected & found}
        outcomes |= {f"{name}_fp" for name in found - expected} | {f"{name}_fn" for name in expected - found}
        assert {name for name in score if name.startswith("fr_")} == outcomes
        assert all(score[name] == 1.0 for name in outcomes)


def test_micro_and_macro_f1_are_those_of_a_table_of_all_decisions(pairs, scores):
    from rdkit.Chem import Fragments

    table = [(fragments_of(reference), fragments_of(answer)) for reference, answer in pairs]
    f1s, totals = [], [0, 0]
    for name, _count in Fragments.fns:
        there, said = [name in expected for expected, _found in table], [name in found for _expected, found in table]
        both = sum(map(min, there, said))
        totals = [totals[0] + both, totals[1] + sum(there) + sum(said)]
        if any(there):
            f1s.append(2 * both / (sum(there) + sum(said)))
    found = MOLECULES.combine(scores)
    assert found["fragments_micro_f1"] == pytest.approx(2 * totals[0] / totals[1], abs=1e-12)
    assert found["fragments_macro_f1"] == pytest.approx(sum(f1s) / len(f1s), abs=1e-12)
    assert 50 < len(f1s) <= len(Fragments.fns) == 85


def table_distance(first, second):
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def test_levenshtein_is_that_of_the_table_of_distances(pairs, scores):
    for (reference, answer), score in list(zip(pairs, scores, strict=True))[:60]:
        assert score["levenshtein"] == table_distance(reference, answer)


def test_levenshtein_is_that_of_the_table_on_short_texts_of_few_letters():
    draw = random.Random(3)
    for _case in range(2000):
        one, two = ("".join(draw.choices("abc", k=draw.randrange(9))) for _text in range(2))
        assert levenshtein(one, two) == table_distance(one, two), (one, two)


def corpus_bleu(pairs):
    """Papineni et al. 2002 over characters; a sentence too short for an n-gram adds one to the denominator, as in NLTK."""
    logs = 0.0
    for n in (1, 2, 3, 4):
        clipped, made = 0, 0
        for reference, answer in pairs:
            said = [answer[at : at + n] for at in range(max(len(answer) - n + 1, 0))]
            there = [reference[at : at + n] for at in range(max(len(reference) - n + 1, 0))]
            clipped += sum(min(said.count(gram), there.count(gram)) for gram in set(said))
            made += len(said) or 1
        logs += math.log(clipped / made) / 4
    length, wanted = sum(len(answer) for _r, answer in pairs), sum(len(reference) for reference, _a in pairs)
    return math.exp(logs) * (1 if length > wanted else math.exp(1 - wanted / length))


@pytest.mark.parametrize("change", ["as drawn", "cut short", "too long"])
def test_bleu_is_that_of_the_corpus_and_not_a_mean(pairs, change):
    changed = {
        "as drawn": pairs,
        "cut short": [(reference, answer[: len(answer) // 2]) for reference, answer in pairs],
        "too long": [(reference, answer + "CCO") for reference, answer in pairs],
    }[change][:100]
    assert combined(changed)["bleu"] == pytest.approx(corpus_bleu(changed), abs=1e-12)


def test_perfect_answers_are_perfect_in_every_measure(chebi):
    large = [row for row in chebi if len(row["smiles"]) >= 4 and Chem.MolFromSmiles(row["smiles"]).GetNumBonds()]
    assert len(large) > 195
    examples = [MOLECULES.read(row, number) for number, row in enumerate(large)]
    found = MOLECULES.combine([MOLECULES.score(example, f" {example.reference}\n") for example in examples])
    assert found.pop("levenshtein") == 0.0
    assert len(found) == 18
    assert found == pytest.approx(dict.fromkeys(found, 1.0), abs=1e-12)


def test_the_smallest_molecules_are_scored_as_molt5_does_with_no_four_grams_and_no_paths():
    found = combined([("[Na+].[Cl-]", "[Na+].[Cl-]"), ("CCO", "CCO")])
    assert found["rdk"] == 0.5
    assert found["bleu"] == pytest.approx((8 / 9) ** 0.25, abs=1e-12)  # of nine 4-grams, eight: CCO counts as a miss
    assert found["exact_match"] == found["morgan"] == 1.0


def test_the_answers_of_other_rows_match_almost_never(chebi):
    references = [row["smiles"] for row in chebi]
    found = combined(list(zip(references, references[1:] + references[:1], strict=True)))
    assert max(found["exact_match"], found["exact_match_inchi"]) < 0.01
    assert found["valid"] == 1.0


GARBAGE = [
    *INVALID,
    " ",
    "\n\n",
    "```",
    "```\n```",
    "<SMILES></SMILES>",
    "Sorry, no idea.",
    "é",
    "\ud800",
    "\0",
    "(" * 999,
]


@pytest.mark.parametrize("completion", GARBAGE)
def test_garbage_scores_zero_without_a_crash(completion):
    score = scored("OC(=O)c1ccccc1", completion)
    assert score["valid"] == score["exact_match"] == score["exact_match_inchi"] == 0.0
    assert score["levenshtein"] > 0
    found = MOLECULES.combine([score])
    assert not found.keys() & set(SIMILARITIES)
    assert (
        found["benzene_f1"]
        == found["carboxylic_acid_f1"]
        == found["fragments_micro_f1"]
        == found["fragments_macro_f1"]
        == 0
    )


def test_an_answer_beyond_the_longest_is_invalid_and_one_at_it_is_scored():
    assert scored("CCO", "C" * (molecules.LONGEST + 1))["valid"] == 0.0
    assert scored("CCO", "C" * molecules.LONGEST)["valid"] == 1.0


def test_no_completions_have_no_measures():
    assert MOLECULES.combine([]) == {}


def test_precision_recall_and_f1_of_a_worked_example():
    found = combined(
        [
            ("OC(=O)c1ccccc1", "Cc1ccccc1"),  # benzene found, the acid missed
            ("Cc1ccccc1", "CCc1ccccc1"),  # benzene found
            ("CC(N)=O", "CC(=O)NC"),  # amide found
            ("CCO", "Oc1ccccc1"),  # benzene where there is none
            ("c1ccccc1", "c1ccccc1("),  # invalid: missed
            ("Clc1ccccc1", ""),  # empty: missed
        ]
    )
    assert [found[f"benzene_{name}"] for name in ("precision", "recall", "f1")] == pytest.approx([2 / 3, 2 / 4, 4 / 7])
    assert [found[f"amide_{name}"] for name in ("precision", "recall", "f1")] == [1.0, 1.0, 1.0]
    assert [found[f"carboxylic_acid_{name}"] for name in ("precision", "recall", "f1")] == [0.0, 0.0, 0.0]


def test_a_group_that_no_reference_has_is_left_out_and_counts_in_the_micro_f1_only():
    found = combined([("CCO", "CCO"), ("CCO", "OCc1ccccc1")])
    assert "benzene_f1" not in found
    assert found["fragments_macro_f1"] == 1.0  # both answers have the alcohols that ethanol has
    assert 0 < found["fragments_micro_f1"] < 1


def test_similarities_are_averaged_over_valid_answers_only():
    assert combined([("CCO", "CCO"), ("CCO", "C1CC")])["morgan"] == 1.0
    assert combined([("CCO", "CCO"), ("CCO", "C1CC")])["valid"] == 0.5


def test_a_tautomer_matches_by_inchi_only_and_a_mirror_image_by_neither():
    tautomer = scored("Oc1ccccn1", "O=c1cccc[nH]1")
    assert (tautomer["exact_match"], tautomer["exact_match_inchi"]) == (0.0, 1.0)
    mirrored = scored("C[C@H](N)C(=O)O", "C[C@@H](N)C(=O)O")
    assert (mirrored["exact_match"], mirrored["exact_match_inchi"]) == (0.0, 0.0)
    assert scored("CCO", "OCC")["exact_match"] == 1.0


def test_molecules_without_an_inchi_are_not_equal_for_that():
    assert scored("*CCO", "*CCN")["exact_match_inchi"] == 0.0
    assert scored("*CCO", "OCC*")["exact_match_inchi"] == 1.0
    assert scored("CCO", "*CCO")["exact_match_inchi"] == 0.0


@pytest.mark.parametrize(
    "completion",
    [
        " CCO", "CCO\nwhich is ethanol", "\n\nCCO", "CCO is it", "SMILES: CCO", "`CCO`", "```CCO```",
        "Sure!\n```\nCCO\n```\nAnything else?", "```smiles\nCCO\n```", "```\nCCO", "It is <SMILES>CCO</SMILES>.",
        "<smiles> CCO </smiles>", "<SMILES>CCO", "<SMILES>\n```\nCCO\n```\n</SMILES>",
    ],
)  # fmt: skip
def test_the_smiles_is_found_in(completion):
    assert smiles_of(completion) == "CCO"


def test_scoring_is_silent_and_leaves_rdkits_log_as_it_was(capfd):
    for completion in ("C1CC", "c1cccc1", "*CC", "C" * 1200, "[Xx]"):
        scored("*CCO", completion)
    assert capfd.readouterr() == ("", "")
    Chem.MolFromSmiles("C1CC")
    assert "unclosed ring" in capfd.readouterr().err


def test_own_rows_are_of_both_formats_and_perfect_answers_to_them_are_perfect():
    examples = [MOLECULES.read(row, number) for number, row in enumerate(MOLECULES.rows)]
    assert [sum(name in row for row in MOLECULES.rows) for name in ("description", "caption")] == [3, 3]
    found = MOLECULES.combine([MOLECULES.score(example, example.reference) for example in examples])
    assert found.pop("levenshtein") == 0.0
    assert found == pytest.approx(dict.fromkeys(found, 1.0), abs=1e-12)
    assert len(found) == 18
    assert MOLECULES.primary in found


def test_a_prompt_holds_the_description_and_the_next_question_does_not_count():
    example = MOLECULES.read({"caption": "It is sweet.", "molecule": "CCO"}, 7)
    assert example.id == "7"
    assert "It is sweet." in example.prompt
    assert example.prompt.endswith("SMILES:")
    assert MOLECULES.score(example, " CCO\n\nDescription: It is sour.\nSMILES: CCN")["exact_match"] == 1.0
    assert MOLECULES.score(example, "Sure.\nDescription: It is sweet.\nSMILES: CCO")["exact_match"] == 1.0


def test_a_row_with_a_prompt_of_its_own_is_asked_with_it_unchanged():
    example = MOLECULES.read({"prompt": "SMILES of ethanol? ", "completion": " OCC\n", "smiles": " OCC\n"}, 3)
    assert example == Example("3", "SMILES of ethanol? ", "OCC", "OCC")
    both = {"prompt": "Draw it:", "description": "An alcohol.", "molecule": "CCO"}
    assert MOLECULES.read(both, 0).prompt == "Draw it:"
    assert MOLECULES.score(example, "CCO")["exact_match"] == 1.0


def test_the_reference_is_the_perfect_answer():
    assert [MOLECULES.read(row, 0).answer for row in MOLECULES.rows[:2]] == ["CCCO", "OC(=O)c1ccccc1"]


def test_a_conversation_in_place_of_a_prompt_is_refused():
    with pytest.raises(CaftuneError, match="Row 4 .*: prompt or description or caption must be a text, got list"):
        MOLECULES.read({"prompt": [{"role": "user", "content": "?"}], "smiles": "CCO"}, 4)


def test_a_row_without_its_columns_or_with_a_bad_smiles_is_refused_with_a_sentence():
    with pytest.raises(CaftuneError, match="Row 4 .* must have a column smiles or molecule, got description"):
        MOLECULES.read({"description": "It is sweet."}, 4)
    with pytest.raises(CaftuneError, match=r"The SMILES of row 4 \(from 0\) must be one that RDKit reads, got 'C1CC'"):
        MOLECULES.read({"description": "It is sweet.", "smiles": "C1CC"}, 4)


def test_without_rdkit_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(CaftuneError, match=r"rdkit must be installed .* pip install 'caftune\[eval\]'"):
        MOLECULES.read(MOLECULES.rows[0], 0)
