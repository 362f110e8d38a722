"""Structures of proteins: what is taken from a folding model, and TM-scores; on a tiny ESMFold of random weights.

The weights of facebook/esmfold_v1 are not here: that its numbers are right is not tested, only that they are the model's own.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation
from transformers import EsmConfig, EsmForProteinFolding

from caftune.errors import CaftuneError
from caftune.pipeline import structures
from caftune.pipeline.structures import (
    LONGEST,
    Structure,
    check_structures,
    compare_structures,
    fold,
    structure_measures,
    tm_score,
)

SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQ", "GIGAVLKVLTTGLPALISWIKRKRQQ"]


def needs_tmtools():
    pytest.importorskip("tmtools", reason="tmtools is not installed (pip install caftune[structures])")


@pytest.fixture(scope="module")
def model():
    """Wide random weights, so that residues, atoms and sequences are told apart."""
    shape = {"sequence_dim": 16, "pairwise_dim": 8, "ipa_dim": 4, "resnet_dim": 8, "num_heads_ipa": 2}
    shape |= {"num_qk_points": 2, "num_v_points": 2, "num_blocks": 2, "num_resnet_blocks": 1}
    trunk = {"num_blocks": 1, "sequence_state_dim": 16, "pairwise_state_dim": 8, "sequence_head_width": 8}
    trunk |= {"pairwise_head_width": 4, "max_recycles": 1, "structure_module": shape}
    config = EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, position_embedding_type="rotary", token_dropout=True, is_folding_model=True,
        esmfold_config={"fp16_esm": False, "lddt_head_hid_dim": 8, "trunk": trunk},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = EsmForProteinFolding(config).eval()
        for name, parameter in model.named_parameters():
            if name.startswith("lddt_head"):
                parameter.data.normal_(0, 1)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("esmfold")
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def folded(folder):
    return fold(SEQUENCES, folder)


def alpha_carbons_of(pdb):
    """(letter-by-letter) name of the residue, place and B-factor of every alpha carbon, by the columns of the PDB format."""
    lines = [line for line in pdb.splitlines() if line.startswith("ATOM") and line[12:16].strip() == "CA"]
    places = [[float(line[start : start + 8]) for start in (30, 38, 46)] for line in lines]
    return [line[17:20] for line in lines], np.array(places), np.array([float(line[60:66]) for line in lines])


# Folding


def test_places_and_confidence_are_those_of_transformers_own_pdb(model, folded):
    for sequence, structure in zip(SEQUENCES, folded, strict=True):
        names, places, confidence = alpha_carbons_of(model.infer_pdb(sequence))
        assert len(names) == len(sequence) == len(structure.plddt)
        np.testing.assert_allclose(structure.alpha_carbons, places, atol=6e-4)  # a PDB has three decimals
        np.testing.assert_allclose(structure.plddt, 100 * confidence, atol=0.51)  # two, of confidence between 0 and 1


def test_confidence_is_the_models_own_for_the_alpha_carbon_times_100(model, folded):
    for sequence, structure in zip(SEQUENCES, folded, strict=True):
        output = model.infer(sequence)
        logits = output["lddt_head"][-1, 0].double()  # residues, atoms, 50 bins of 0.02
        expected = 100 * (logits.softmax(-1) * (torch.arange(50) * 0.02 + 0.01)).sum(-1)
        np.testing.assert_allclose(structure.plddt, expected[:, 1], atol=1e-4)
        assert expected.std(dim=1).min() > 1, "atoms of a residue are to be told apart"
        assert structure.plddt.min() > 0
        assert structure.plddt.max() < 100


def test_each_sequence_is_folded_once_and_results_keep_their_order(folder, folded, monkeypatch):
    asked = []
    original = structures._fold_one
    monkeypatch.setattr(structures, "_fold_one", lambda model, text: asked.append(text) or original(model, text))
    one, two = SEQUENCES
    found = fold([two, one, two], folder)
    assert asked == [two, one]
    assert [structure.sequence for structure in found] == [two, one, two]
    np.testing.assert_array_equal(found[1].alpha_carbons, folded[0].alpha_carbons)


def test_letters_that_are_none_of_the_twenty_are_folded_as_unknown_and_have_a_place(model, folder):
    (structure,) = fold(["MKUO?AxIB"], folder)
    assert structure.sequence == "MKXXXAXIX"
    names, places, _ = alpha_carbons_of(model.infer_pdb("MKXXXAXIX"))
    assert names == ["MET", "LYS", "ALA", "ILE"], "transformers' own leaves the others out"
    np.testing.assert_allclose(structure.alpha_carbons[[0, 1, 5, 7]], places, atol=6e-4)
    distances = np.linalg.norm(structure.alpha_carbons[:, None] - structure.alpha_carbons[None], axis=-1)
    assert distances[~np.eye(9, dtype=bool)].min() > 1e-3, "no two in one place"


@pytest.mark.parametrize("length", [0, LONGEST + 1])
def test_nothing_and_too_long_a_sequence_are_refused_before_the_model_is_loaded(length):
    with pytest.raises(ValueError, match=f"must have 1 to 1024 residues, got {length}"):
        fold(["MKT", "A" * length], "no/such-model")


def test_nothing_to_fold_needs_no_model():
    assert fold([], "no/such-model") == []


def test_what_is_no_folding_model_is_refused_at_once(folder, tmp_path):
    needs_tmtools()
    check_structures(folder)
    with pytest.raises(CaftuneError, match=r"eval\.structures must be a model of ESMFold's kind, got .*base, a llama"):
        check_structures(str(Path(structures.__file__).parent / "demo" / "base"))
    with pytest.raises(CaftuneError, match=r"eval\.structures must be a folder or hub id of an ESMFold, got .*nothing"):
        check_structures(str(tmp_path / "nothing"))


def test_without_tmtools_the_remedy_is_named(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "tmtools", None)
    with pytest.raises(CaftuneError, match=r"tmtools must be installed .* pip install 'caftune\[structures\]'"):
        check_structures(folder)


# TM-score


def chain(length, seed=0):
    """A chain like a protein's: steps of 3.8 Angstrom, in a helix that turns aside now and then."""
    draw, turn = np.random.default_rng(seed), np.eye(3)
    places = []
    for number in range(length):
        angle = np.deg2rad(100 * number)
        places.append(turn @ np.array([2.3 * np.cos(angle), 2.3 * np.sin(angle), 1.5 * number]))
        if number % 12 == 11:
            turn = Rotation.from_rotvec(draw.normal(size=3)).as_matrix() @ turn
            places = [place - places[-1] + turn @ np.array([2.3, 0, 1.5 * number]) for place in places]
    return np.array(places)


def structure(places, plddt=80.0):
    return Structure("A" * len(places), np.asarray(places, dtype=float), np.full(len(places), plddt))


def moved(places):
    return places @ Rotation.from_rotvec([1.0, -2.0, 0.5]).as_matrix().T + [30.0, -7.0, 12.0]


def terms(one, two, length):
    """1 / (1 + (d / d0)^2) of every residue with the residue of the same number, as the two lie."""
    d0 = max(1.24 * np.cbrt(length - 15) - 1.8, 0.5)
    return 1 / (1 + (np.linalg.norm(one - two, axis=1) / d0) ** 2)


def fitted_score(one, two):
    """The TM-score of two chains of one length, residue by residue, from its definition: the best of many superpositions."""

    def loss(motion, start):
        placed = start.apply(one - one.mean(0)) @ Rotation.from_rotvec(motion[:3]).as_matrix().T + motion[3:]
        return -terms(placed, two - two.mean(0), len(two)).mean()

    start, _ = Rotation.align_vectors(two - two.mean(0), one - one.mean(0))
    starts = [np.zeros(6), *np.random.default_rng(1).normal(0, 0.2, (4, 6))]
    return max(-minimize(loss, motion, args=(start,), method="BFGS").fun for motion in starts)


def test_a_structure_is_like_itself_wherever_it_lies():
    needs_tmtools()
    places = chain(60)
    assert tm_score(structure(places), structure(places)) == pytest.approx(1.0, abs=1e-9)
    assert tm_score(structure(moved(places)), structure(places)) == pytest.approx(1.0, abs=1e-9)


def test_a_mirror_image_is_not():
    needs_tmtools()
    places = chain(60)
    assert tm_score(structure(places * [1, 1, -1]), structure(places)) < 0.6


@pytest.mark.parametrize(("seed", "noise"), [(0, 0.5), (1, 1.0), (2, 1.5)])
def test_of_chains_aligned_residue_by_residue_the_score_is_that_of_its_definition(seed, noise):
    needs_tmtools()
    places = chain(80, seed)
    other = moved(places + np.random.default_rng(seed).normal(0, noise, places.shape))
    expected = fitted_score(other, places)
    assert 0.4 < expected < 0.98
    # TM-align searches, and may miss the best by a little
    assert tm_score(structure(other), structure(places)) == pytest.approx(expected, abs=5e-3)


def test_the_references_length_is_what_counts():
    needs_tmtools()
    places = chain(80)
    assert tm_score(structure(places[:40]), structure(places)) == pytest.approx(0.5, abs=1e-9)
    assert tm_score(structure(places), structure(places[:40])) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(("answer", "reference"), [(1, 30), (2, 30), (30, 2), (1, 1)])
def test_one_or_two_residues_have_no_fold(answer, reference):
    assert tm_score(structure(chain(answer)), structure(chain(reference))) == 0.0


# Measures


def test_measures_of_an_answer():
    needs_tmtools()
    reference = structure(chain(30), 10.0)
    answer = Structure("A" * 30, chain(30), np.array([60.0, 82.0] * 15))
    found = structure_measures(answer, reference)
    assert found == pytest.approx({"plddt": 71.0, "plddt_above_70": 1.0, "tm_score": 1.0}, abs=1e-9)
    assert structure_measures(structure(chain(30), 70.0), reference)["plddt_above_70"] == 0.0


def test_pairs_are_measured_in_their_order_with_the_answers_confidence(folder, folded):
    needs_tmtools()
    one, two = SEQUENCES
    found = compare_structures([(one, two), (two, two)], folder)
    assert [measures["plddt"] for measures in found] == [pytest.approx(s.plddt.mean(), abs=1e-9) for s in folded]
    assert found[0]["tm_score"] == tm_score(*folded) < found[1]["tm_score"] == pytest.approx(1.0, abs=1e-9)


def test_no_sequence_and_too_long_an_answer_have_zero_and_too_long_a_reference_is_left_out(folder):
    needs_tmtools()
    pairs = [("", "MKTAY"), ("A" * (LONGEST + 1), "MKTAY"), ("MKTAY", "A" * (LONGEST + 1))]
    nothing = {"plddt": 0.0, "plddt_above_70": 0.0, "tm_score": 0.0}
    assert compare_structures(pairs, folder) == [nothing, nothing, {}]
