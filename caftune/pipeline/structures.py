"""Structures of proteins: answers and references folded by ESMFold, its confidence in them, and how similar they are.

Everything here is a prediction, of the references too: a TM-score of 1 says that the model folds both alike.
TM-align comes from tmtools, which is under the GPL 3 and therefore in a separate extra: `pip install 'caftune[structures]'`.

Source: ESMFold, Lin et al., Science 379 (2023), in transformers' port; TM-score, Zhang and Skolnick, Proteins 57 (2004);
TM-align, Zhang and Skolnick, Nucleic Acids Research 33 (2005).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from caftune.errors import CaftuneError

STANDARD = frozenset("ACDEFGHIKLMNPQRSTVWY")
LONGEST = 1024  # residues; memory grows with the square of the length
CONFIDENT = 70.0  # of pLDDT; from there on a backbone is usually right
_ALPHA_CARBON = 1  # its place among the atoms of a residue: N, CA, C, ...
_SHORTEST_CHAIN = 3  # residues; TM-align refuses shorter ones


@dataclass(frozen=True)
class Structure:
    """A predicted structure of one chain."""

    sequence: str  # as it was folded: a letter that is none of the 20 amino acids is X
    alpha_carbons: "np.ndarray[Any, np.dtype[np.float64]]"  # [residues, 3], in Angstrom
    plddt: "np.ndarray[Any, np.dtype[np.float64]]"  # [residues], expected lDDT of each alpha carbon, from 0 to 100


def check_structures(model_name: str) -> None:
    """Raise CaftuneError for a missing package or model before a model is queried or folds; no weights are loaded.

    Raises:
        CaftuneError: tmtools is not installed, or the model does not exist or is not a folding model.
    """
    _tm_align()
    try:
        config = AutoConfig.from_pretrained(model_name)
    except OSError as error:
        raise CaftuneError(
            f"eval.structures must be a folder or hub id of an ESMFold, got {model_name}, which cannot be "
            f"opened ({error}). Check the name."
        ) from error
    if not getattr(config, "is_folding_model", False):
        raise CaftuneError(
            f"eval.structures must be a model of ESMFold's kind, got {model_name}, a {config.model_type}. "
            "Use facebook/esmfold_v1."
        )


def fold(sequences: Sequence[str], model_name: str) -> list[Structure]:
    """The structures of these sequences, in their order, each folded once however often it comes.

    They are folded one by one, so that a structure does not depend on what else is folded. On a GPU the language model within
    ESMFold computes in half precision, all else in single precision.
    A letter that is none of the 20 amino acids is folded as X, an unknown residue, as the authors' code does with U, O and B.

    Raises:
        CaftuneError: a sequence is empty or has more than LONGEST residues. None is cut.
        OSError: the model does not exist.
    """
    for sequence in sequences:
        if not 0 < len(sequence) <= LONGEST:
            raise CaftuneError(
                f"A sequence to fold must have 1 to {LONGEST} residues, got {len(sequence)}. Leave it out."
            )
    written = ["".join(letter if letter in STANDARD else "X" for letter in sequence) for sequence in sequences]
    if not written:
        return []
    model = _load(model_name)
    found = {sequence: _fold_one(model, sequence) for sequence in dict.fromkeys(written)}
    return [found[sequence] for sequence in written]


def _load(model_name: str) -> Any:
    from transformers import EsmForProteinFolding  # slow to import

    on_gpu = torch.cuda.is_available()
    model: Any = EsmForProteinFolding.from_pretrained(model_name, dtype=torch.float32)
    model = model.to("cuda" if on_gpu else "cpu").eval()
    model.esm.to(torch.float16 if on_gpu else torch.float32)  # half precision, as esmfold_v1 has it, is slow on a CPU
    return model


def _fold_one(model: Any, sequence: str) -> Structure:
    output = model.infer([sequence])
    # A residue's frame, a quaternion and an origin, has its origin in the alpha carbon. Of X there is nothing but the frame:
    # its atoms are not known, and all at 0 in `positions`.
    places = output["frames"][-1, 0, :, 4:]  # [layers, batch, residues, 7]
    confidence = 100 * output["plddt"][0, :, _ALPHA_CARBON]  # [batch, residues, atoms], of 1
    return Structure(sequence, *(values.double().cpu().numpy() for values in (places, confidence)))


def structure_measures(answer: Structure | None, reference: Structure) -> dict[str, float]:
    """The measures of one answer against the structure of its reference. An answer without a structure has 0 in all.

    - `plddt`: the mean over the answer's residues, from 0 to 100.
    - `plddt_above_70`: 1 where that mean is above 70, else 0.
    - `tm_score`: of TM-align's best alignment, normalised by the reference's length: 1 for the same fold, about 0.2 for chance.
    """
    if answer is None:
        return {"plddt": 0.0, "plddt_above_70": 0.0, "tm_score": 0.0}
    plddt = float(answer.plddt.mean())
    return {"plddt": plddt, "plddt_above_70": float(plddt > CONFIDENT), "tm_score": tm_score(answer, reference)}


def tm_score(answer: Structure, reference: Structure) -> float:
    """1/L sum of 1 / (1 + (d / d0)^2) over the aligned pairs: L the reference's length, d0 = 1.24 cbrt(L - 15) - 1.8 Å."""
    if min(len(answer.sequence), len(reference.sequence)) < _SHORTEST_CHAIN:
        return 0.0
    chains = (answer.alpha_carbons, reference.alpha_carbons, answer.sequence, reference.sequence)
    return float(_tm_align()(*chains).tm_norm_chain2)


def _tm_align() -> Callable[..., Any]:
    try:
        from tmtools import tm_align
    except ImportError as absent:
        raise CaftuneError(
            "tmtools must be installed for the TM-score of structures. Run pip install 'caftune[structures]'."
        ) from absent
    return tm_align


def compare_structures(pairs: Sequence[tuple[str, str]], model_name: str) -> list[dict[str, float]]:
    """Measures of the structures of (answer, reference), sequences both, in their order; see `structure_measures`.

    An answer that is empty or longer than LONGEST has no structure, and 0 in all. A pair whose reference is longer than LONGEST
    has no measures: it is left out of the means.

    Raises:
        CaftuneError: tmtools is not installed.
        OSError: the model does not exist.
    """
    to_fold = [pair for pair in pairs if len(pair[1]) <= LONGEST]
    sequences = list(dict.fromkeys(text for pair in to_fold for text in pair if 0 < len(text) <= LONGEST))
    structures = dict(zip(sequences, fold(sequences, model_name), strict=True))
    return [
        structure_measures(structures.get(answer), structures[reference]) if len(reference) <= LONGEST else {}
        for answer, reference in pairs
    ]
