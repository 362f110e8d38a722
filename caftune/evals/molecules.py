"""The task `molecules`: a description in, a molecule out, as SMILES.

Rows: ChEBI-20 (columns `description`, `smiles`) and L+M-24 (`caption`, `molecule`), with a prompt of ours. A row with a column
`prompt` keeps that prompt unchanged: `prompt` and `completion` need no more than `eval.columns: {smiles: completion}`.

Source: MolT5 (arXiv 2204.11817) and its scripts (github.com/blender-nlp/MolT5, `evaluation`) for BLEU, exact match, Levenshtein
distance, validity and fingerprints. We differ: an empty answer is invalid (RDKit reads a molecule without atoms), and two
molecules without an InChI are not equal for that. L+M-24's scripts count the similarity of an invalid answer as 0: that is our
mean times `valid`.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from caftune.errors import CaftuneError
from caftune.evals.reading import TAG, code_blocks, plain
from caftune.evals.requirements import required
from caftune.evals.task import Example, Task, filled_text, means, text

LONGEST = 4000  # characters; a longer SMILES counts as invalid, so that no answer can hold up the evaluation
ORDERS = (1, 2, 3, 4)  # of BLEU's n-grams
NAMED = {"benzene": "fr_benzene", "amide": "fr_amide", "carboxylic_acid": "fr_COO"}
AVERAGED = ("exact_match", "exact_match_inchi", "valid", "levenshtein", "morgan", "maccs", "rdk")

_TAGS = re.compile(
    r"<SMILES>(.*?)(?:</SMILES>|\Z)|\[START_(?:I_)?SMILES\](.*?)(?:\[END_|\Z)", re.DOTALL | re.IGNORECASE
)
_TEX = re.compile(r"\\(?:boxed|text|texttt|mathrm)\{([^{}]*)\}")
# What is written as SMILES are written, valid or not. Letters alone must be atoms outside of rings: no aromatic ones.
_SMILES = re.compile(r"(?:\[[^\]\s]*\]|Br|Cl|[BCNOPSFIbcnops*]|[()\-=#$:/\\~.%@+\d])+(?:\[[^\]\s]*)?")
_BONDS = frozenset("-=#$:/\\~.%@+)0123456789")  # no SMILES begins with these
_CHAIN = re.compile(r"(?:Br|Cl|[BCNOPSFI])+")
_SIGN = r"(?:\s|\*\*|\*(?=\s)|__|[`\"'“‘(])*"  # white space and marks between a label and its value
_BULLET = r"[^\S\n]*(?:(?:[-+>•]|\*(?=\s)|\d+[.)])\s+)*"
# Places of a word that may be a SMILES.
_FIRST = re.compile(rf"\A\s*{_BULLET}(?P<word>\S+)")
_ON_A_LINE = re.compile(rf"^{_BULLET}(?P<word>\S+)", re.MULTILINE)
_IN_TICKS = re.compile(r"(`+)\s*(?:smiles\s+)?(?P<word>[^\s`]+)\s*\1", re.IGNORECASE)
_NAMED = re.compile(rf"(?:\b(?:is|be)|'s|[^:\n]:){_SIGN}(?=(?P<word>\S+))")
_ANYWHERE = re.compile(r"(?P<word>\S+)")
_LABEL = re.compile(r"(\bfinal\W{1,5}(?:canonical )?)?\bSMILES\b", re.IGNORECASE)
_AFTER_LABEL = re.compile(
    rf"(?:^SMILES|[:：|]|->|→|(?<=\s)=|(?<=^SMILES)=|\b(?:is|be|as)\b){_SIGN}(?=\S)", re.IGNORECASE
)
_PART = re.compile(
    r"\W*(?:\w+ )?(?:bonds?|groups?|moiet\w+|rings?|linkages?|stretch\w*|atoms?|units?|double|triple|single|containing)\b"
)
_OTHER = re.compile(r"SELFIES|InChI|formula|IUPAC|\bname|\bCAS\b|group|bond|moiety", re.IGNORECASE)
_LONG = 8  # characters; longer than any word that looks like a SMILES
_ENGLISH = frozenset(
    ["I", "NO", "SO", "ON", "IN", "IF", "OF", "BIO", "BIOS", "SOS", "ICON", "COIN", "COINS", "SPIN", "SIC"]
)


@dataclass(frozen=True)
class _Word:
    """A word of a text: as it is written, bare, the rest of its line before and after it, and all that follows."""

    written: str
    smiles: str
    before: str
    after: str
    rest: str


def smiles_of(completion: str) -> str:
    r"""The SMILES that a completion gives, valid or not, or "" where it gives none (prose, a refusal).

    The first of these that looks like a SMILES: what is within tags; the first word; a code block; what follows the word
    SMILES; code within a line; a separate line; a value ("Ethanol: CCO", "It is CCO."); a word of no language. Without any of
    them, a first line that is one word: BLEU and edit distance count what was written.

    >>> smiles_of(" CCO is ethanol.\nIt is an alcohol."), smiles_of("Sure:\n```smiles\nCCO\n```"), smiles_of("I don't know.")
    ('CCO', 'CCO', '')
    """
    text = plain(completion).strip()
    if tagged := _TAGS.search(text):
        return smiles_of(tagged[1] or tagged[2] or "")
    text = _TEX.sub(r"\1", _TEX.sub(r"\1", TAG.sub(" ", text)))
    return next(_candidates(text), "")


def _candidates(text: str) -> Iterator[str]:
    """What may be meant as the SMILES, the surest first."""
    yield from _words(text, _spans(_FIRST, text), _is_first)
    for block in code_blocks(text):
        code = f"{block.info.partition(' ')[2]}\n{block.text}"
        yield from _words(code, _spans(_FIRST, code), _is_first)
        yield from _words(code, _after_labels(code), _is_answer)
    yield from _words(text, _after_labels(text), _is_answer)
    yield from _words(text, _spans(_IN_TICKS, text), lambda word: not _PART.match(word.after))
    yield from _words(
        text, _spans(_ON_A_LINE, text), lambda word: not word.after.strip() and word.smiles not in _ENGLISH
    )
    yield from _words(text, _spans(_NAMED, text), _is_value)
    yield from _words(text, _spans(_ANYWHERE, text), _is_of_no_language)
    line, _, others = text.strip().partition("\n")
    word = _bare(line.strip())
    is_word = re.fullmatch(r"[A-Z][a-z']*|(?i:N/A)", word) or (word.isalpha() and others.strip())
    if len(word.split()) == 1 and not is_word:
        yield word


def _spans(places: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    return (found.span("word") for found in places.finditer(text))


def _after_labels(text: str) -> Iterator[tuple[int, int]]:
    """The words that follow the word SMILES: directly, or after a colon, an equals sign or a verb."""
    for label in sorted(_LABEL.finditer(text), key=lambda label: label[1] is None):  # the final one first
        start = label.end() - len("SMILES")
        for mark in _AFTER_LABEL.finditer(text[start : start + 200].partition("\n\n\n")[0]):
            end = start + mark.end()
            yield end, end + len(text[end:].split(maxsplit=1)[0])


def _words(text: str, spans: Iterable[tuple[int, int]], is_meant: Callable[[_Word], bool]) -> Iterator[str]:
    """The words at these places that look like a SMILES and are meant as one."""
    for start, end in spans:
        before, after = text[:start].rpartition("\n")[2], text[end:].partition("\n")[0]
        word = _Word(text[start:end], _bare(text[start:end], before), before, after, text[end:])
        if _is_smiles(word.smiles) and is_meant(word):
            yield word.smiles


def _is_first(word: _Word) -> bool:
    return _is_answer(word) and (word.smiles not in _ENGLISH or not word.rest.strip())


def _is_smiles(word: str) -> bool:
    is_chain = not word.isalpha() or bool(_CHAIN.fullmatch(word))
    return word[:1] not in _BONDS and is_chain and bool(_SMILES.fullmatch(word))


def _is_answer(word: _Word) -> bool:
    """Whether a word is meant as a SMILES, judged by the rest of its line."""
    smiles, rest = word.smiles, word.after.strip(" \t*_`.,;:!?\"'”’)")
    if not rest or re.match(r"\s*[(\[]", word.after):
        return True
    return not (smiles.isalpha() and "CC" not in smiles) and not (len(smiles) < 6 and _PART.match(word.after))


def _is_value(word: _Word) -> bool:
    """Whether a word that something "is" ends its sentence or line, and the sentence names no part or formula."""
    is_end = not word.after.strip() or word.after.lstrip()[0] in "([" or word.written[-1] in ".,;"
    sentence = re.split(r"[.!?]\s", word.before)[-1]
    return (
        is_end and not _OTHER.search(sentence) and word.smiles not in _ENGLISH and molecule_of(word.smiles) is not None
    )


def _is_of_no_language(word: _Word) -> bool:
    smiles, line = word.smiles, word.before + word.written + word.after
    is_long = len(smiles) >= _LONG and not smiles.isalpha()
    return is_long and not _OTHER.search(line) and molecule_of(smiles) is not None


def _bare(word: str, before: str = "") -> str:
    """The word without Markdown, quotation marks, the end of a sentence, and a bracket that was opened `before` it."""
    last = None
    while last != word:
        last = word
        word = word.strip("`\"'“”‘’{}|\u200b")
        for mark in ("**", "__"):
            word = word.removeprefix(mark).removesuffix(mark)
        word = word.rstrip(".,;:!?…")
        word = word.strip("$") if word[:1] == "$" else word
        if word.endswith(")") and word.count(")") > word.count("(") and before.count("(") > before.count(")"):
            word = word[:-1]
        if len(word) > 2 and word[0] == "(" and word[-1] == ")" and ")" not in word[:-1]:
            word = word[1:-1]
    return word


def molecule_of(smiles: str) -> Any:
    """RDKit's molecule, or None where the text is not a SMILES, has no atoms or is longer than LONGEST.

    Raises:
        CaftuneError: RDKit is not installed.
    """
    with required("rdkit", "the task molecules"):
        from rdkit import Chem, rdBase
    if not smiles.isascii() or len(smiles) > LONGEST:
        return None
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
    return molecule if molecule is not None and molecule.GetNumAtoms() else None


def read(row: Mapping[str, Any], number: int) -> Example:
    """A row of ChEBI-20 or L+M-24, or one with a column `prompt`, as an example; the reference is its SMILES.

    Raises:
        CaftuneError: a column is missing, or RDKit cannot read the SMILES.
    """
    _edits()  # fails before anything is generated
    prompt = text(row, number, "prompt", "description", "caption")
    if row.get("prompt") is None:
        described = filled_text(row, number, "description", "caption").strip()
        prompt = f"Write the SMILES of the molecule that is described.\n\nDescription: {described}\nSMILES:"
    smiles = text(row, number, "smiles", "molecule").strip()
    if molecule_of(smiles) is None:
        raise CaftuneError(
            f"The SMILES of row {number} (from 0) must be one that RDKit reads, got {smiles!r}. Remove the row."
        )
    return Example(str(number), prompt, smiles, smiles)


def score(example: Example, completion: str) -> dict[str, float]:
    """The measures of one completion.

    - `exact_match`: 1 for the same canonical SMILES, with stereochemistry; `exact_match_inchi`: for the same standard InChI,
      where tautomers are one molecule (or for the same canonical SMILES, if the reference has no InChI: wildcard atoms).
    - `valid`: 1 if RDKit reads the answer as a molecule.
    - `levenshtein`: edits from answer to reference, in characters of the SMILES as written.
    - `morgan`, `maccs`, `rdk`: Tanimoto similarity of fingerprints, for valid answers only.
    - `bleu_*`, `reference_length`, `answer_length`: counts for `combine`.
    - `fr_*_tp`, `fr_*_fp`, `fr_*_fn`: 1 for a functional group of both, of the answer only, of the reference only.
    """
    answer = smiles_of(completion)
    reference, found = molecule_of(example.reference), molecule_of(answer)
    measures = {"exact_match": 0.0, "exact_match_inchi": 0.0, "valid": float(found is not None)}
    measures["levenshtein"] = float(levenshtein(example.reference, answer))
    measures |= _bleu_counts(example.reference, answer)
    if found is not None:
        measures |= _identity(reference, found) | similarities(reference, found)
    there, said = groups(reference), groups(found) if found is not None else frozenset()
    outcomes = {"tp": there & said, "fp": said - there, "fn": there - said}
    return measures | {f"{name}_{outcome}": 1.0 for outcome, names in outcomes.items() for name in sorted(names)}


def _identity(reference: Any, answer: Any) -> dict[str, float]:
    from rdkit import Chem, rdBase

    same = Chem.MolToSmiles(reference) == Chem.MolToSmiles(answer)
    with rdBase.BlockLogs():
        expected, found = Chem.MolToInchi(reference), Chem.MolToInchi(answer)
    return {"exact_match": float(same), "exact_match_inchi": float(expected == found if expected else same)}


def similarities(reference: Any, answer: Any) -> dict[str, float]:
    """Tanimoto similarity of two molecules by three fingerprints, with the settings of MolT5's evaluation.

    Morgan: radius 2, unfolded counts. MACCS: 166 keys. RDK: paths of 1 to 7 bonds, 2,048 bits (0 for a molecule without bonds).
    """
    from rdkit.Chem import RDKFingerprint, rdFingerprintGenerator
    from rdkit.Chem.rdMolDescriptors import GetMACCSKeysFingerprint
    from rdkit.DataStructs import TanimotoSimilarity

    morgan = rdFingerprintGenerator.GetMorganGenerator(radius=2).GetSparseCountFingerprint
    kinds = {"morgan": morgan, "maccs": GetMACCSKeysFingerprint, "rdk": RDKFingerprint}
    return {
        name: TanimotoSimilarity(fingerprint(reference), fingerprint(answer)) for name, fingerprint in kinds.items()
    }


def groups(molecule: Any) -> frozenset[str]:
    """The functional groups that a molecule has at least once, by RDKit's names (all `fr_*` of rdkit.Chem.Fragments)."""
    from rdkit.Chem import Fragments

    return frozenset(name for name, count in vars(Fragments).items() if name.startswith("fr_") and count(molecule))


@cache
def _edits() -> Any:
    with required("biopython", "the task molecules"):
        from Bio.Align import PairwiseAligner
    return PairwiseAligner(match_score=0, mismatch_score=-1, gap_score=-1)


def levenshtein(first: str, second: str) -> int:
    """The least number of characters to insert, delete or replace that turns one text into the other.

    >>> levenshtein("CCO", "CCN"), levenshtein("c1ccccc1", "c1ccccc1O"), levenshtein("", "CC")
    (1, 1, 2)
    """
    if not (first and second):
        return len(first) + len(second)
    return -int(_edits().score(*(text.encode(errors="replace").decode() for text in (first, second))))


def _bleu_counts(reference: str, answer: str) -> dict[str, float]:
    counts = {"reference_length": float(len(reference)), "answer_length": float(len(answer))}
    for order in ORDERS:
        expected, found = (Counter(t[i : i + order] for i in range(len(t) - order + 1)) for t in (reference, answer))
        counts[f"bleu_matches_{order}"] = float((expected & found).total())
        # At least 1, as in NLTK: an answer too short for an n-gram counts as one n-gram missed.
        counts[f"bleu_total_{order}"] = float(max(found.total(), 1))
    return counts


def _bleu(sums: Mapping[str, float]) -> float:
    matches = [sums[f"bleu_matches_{order}"] for order in ORDERS]
    if not all(matches):
        return 0.0
    logs = [math.log(match / sums[f"bleu_total_{order}"]) for order, match in zip(ORDERS, matches, strict=True)]
    penalty = min(0.0, 1 - sums["reference_length"] / sums["answer_length"])
    return math.exp(penalty + math.fsum(logs) / len(ORDERS))


def _f1(sums: Mapping[str, float], names: Sequence[str]) -> tuple[float, float, float]:
    """Precision, recall and F1 of these groups taken together; 0 where nothing is found or nothing is there."""
    hits, false, missed = (math.fsum(sums.get(f"{name}_{kind}", 0) for name in names) for kind in ("tp", "fp", "fn"))
    return hits / max(hits + false, 1), hits / max(hits + missed, 1), 2 * hits / max(2 * hits + false + missed, 1)


def combine(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The measures of all completions.

    - The mean of `exact_match`, `exact_match_inchi`, `valid` and `levenshtein`; that of `morgan`, `maccs` and `rdk` over the
      valid answers, as MolT5 does.
    - `bleu`: corpus BLEU-4 over characters, one reference, equal weights, no smoothing, invalid answers included. NLTK's
      `corpus_bleu`, but 0 below 1e-70. An answer of fewer than four characters lowers it even if it is right.
    - `benzene_*`, `amide_*`, `carboxylic_acid_*`: `precision`, `recall` and `f1` of RDKit's fr_benzene, fr_amide (any N-C=O)
      and fr_COO (acid or carboxylate on carbon), if a reference has the group.
    - `fragments_micro_f1`: F1 of all decisions on all of RDKit's fragments; `fragments_macro_f1`: the mean F1 of the fragments
      that at least one reference has.
    """
    sums: Counter[str] = Counter()
    for measures in scores:
        sums.update(measures)
    combined = means([{name: measures[name] for name in AVERAGED if name in measures} for measures in scores])
    if scores:
        combined["bleu"] = _bleu(sums)
    found = sorted({name[:-3] for name in sums if name.startswith("fr_")})
    expected = [name for name in found if f"{name}_tp" in sums or f"{name}_fn" in sums]
    for label, name in NAMED.items():
        if name in expected:
            combined |= zip((f"{label}_precision", f"{label}_recall", f"{label}_f1"), _f1(sums, [name]), strict=True)
    if expected:
        combined["fragments_micro_f1"] = _f1(sums, found)[2]
        combined["fragments_macro_f1"] = math.fsum(_f1(sums, [name])[2] for name in expected) / len(expected)
    return combined


MOLECULES = Task(
    name="molecules",
    primary="exact_match",
    read=read,
    score=score,
    combine=combine,
    max_new_tokens=512,
    columns=("prompt", "description", "caption", "smiles", "molecule"),
    past=("\nDescription:",),
    lower_is_better=frozenset({"levenshtein"}),
)
