"""Clinical text: a note's section from a conversation (MTS-Dialog), a hospital course from a discharge note (MIMIC-IV-BHC).

Measures: ROUGE-1, ROUGE-2 and ROUGE-L, F1 between 0 and 1 of each completion against its reference, by rouge-score. Words are
not stemmed, as in the checkers of both data sets; numbers of papers that stem are higher. Prompts hold the whole conversation
or note (up to 2,000 tokens and more), nothing is cut.

Source: ROUGE by Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", ACL 2004.
"""

import unicodedata
from collections.abc import Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

from caftune.errors import CaftuneError
from caftune.evals.requirements import required
from caftune.evals.task import Example, Task, filled_text, identity, text

_MEASURES = ("rouge1", "rouge2", "rougeL")

_SECTIONS = {
    "ALLERGY": "Allergies",
    "ASSESSMENT": "Assessment",
    "CC": "Chief complaint",
    "DIAGNOSIS": "Diagnosis",
    "DISPOSITION": "Disposition",
    "EDCOURSE": "Emergency department course",
    "EXAM": "Examination",
    "FAM/SOCHX": "Family and social history",
    "GENHX": "History of present illness",
    "GYNHX": "Gynecologic history",
    "IMAGING": "Imaging",
    "IMMUNIZATIONS": "Immunizations",
    "LABS": "Laboratory results",
    "MEDICATIONS": "Medications",
    "OTHER_HISTORY": "Other history",
    "PASTMEDICALHX": "Past medical history",
    "PASTSURGICAL": "Past surgical history",
    "PLAN": "Plan",
    "PROCEDURES": "Procedures",
    "ROS": "Review of systems",
}


# Scripts without spaces between words: each letter counts as a word, as is usual for ROUGE of Chinese.
_UNSPACED = (
    "CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "YI", "BOPOMOFO",
)  # fmt: skip
_SIGNS = frozenset("ªºµ")  # letters for Unicode, signs in clinical text (37 ºC, 5 µg): left out, as rouge-score does


def words(text: str) -> list[str]:
    """The words of a text in small letters: runs of letters, marks and digits, or single letters of Chinese and the like.

    ASCII is split exactly as rouge-score splits it; other letters, which rouge-score drops, belong to words here.

    >>> words("BP 120/80, naïve; болит голова"), words("头痛3天")
    (['bp', '120', '80', 'naïve', 'болит', 'голова'], ['头', '痛', '3', '天'])
    """
    found, last = list[str](), ""
    for character in unicodedata.normalize("NFC", text).lower():
        kind = _kind(character)
        if last and (kind == "mark" or kind == last == "letter"):
            found[-1] += character
            continue
        last = "letter" if kind == "mark" else kind
        if last:
            found.append(character)
    return found


@cache
def _kind(character: str) -> str:
    """What the character is to a word: a letter (or digit), a whole word ("alone"), a mark on one, or "", its end."""
    category = unicodedata.category(character)
    if not (category[0] in "LM" or category == "Nd") or character in _SIGNS:
        return ""
    if category[0] == "M" or (category == "Lm" and unicodedata.name(character, "").startswith(_UNSPACED)):
        return "mark"
    return "alone" if category == "Lo" and unicodedata.name(character, "").startswith(_UNSPACED) else "letter"


@cache
def _scorer() -> Any:
    with required("rouge-score", "clinical text"):
        from rouge_score.rouge_scorer import RougeScorer
    return RougeScorer(list(_MEASURES), tokenizer=SimpleNamespace(tokenize=words))


def rouge(reference: str, text: str) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of `text` against `reference`: F1, 0 where either has no words (ROUGE-2: no pairs).

    Raises:
        CaftuneError: rouge-score is not installed.

    >>> rouge("No known drug allergies.", "No drug allergies.")["rouge1"]
    0.8571428571428571
    """
    scores = _scorer().score(reference, text)
    return {measure: float(scores[measure].fmeasure) for measure in _MEASURES}


def _reference(row: Mapping[str, Any], number: int, name: str) -> str:
    """The reference text, which must have a word: without one, ROUGE is 0 for every answer."""
    reference = text(row, number, name)
    if not words(reference):
        raise CaftuneError(f"Row {number} (from 0): {name} must have a word, got {reference!r}. Remove the row.")
    return reference


def _score(example: Example, completion: str) -> dict[str, float]:
    return rouge(example.reference, completion)


def _read_dialogue(row: Mapping[str, Any], number: int) -> Example:
    """A conversation and the name of a section (written out if the data set's README explains it) -> that section's text."""
    _scorer()  # fails before anything is generated
    header = text(row, number, "section_header").strip()
    section = _SECTIONS.get(header.upper(), header)
    prompt = (
        f'Write the section "{section}" of the clinical note that belongs to this conversation.\n\n'
        f"Conversation:\n{filled_text(row, number, 'dialogue').strip()}\n\n{section}:\n"
    )
    reference = _reference(row, number, "section_text")
    return Example(identity(row, number, "ID"), prompt, reference, reference)


def _read_note(row: Mapping[str, Any], number: int) -> Example:
    _scorer()
    prompt = (
        "Write the brief hospital course that belongs to this discharge note.\n\n"
        f"Clinical note:\n{filled_text(row, number, 'input').strip()}\n\nBrief hospital course:\n"
    )
    reference = _reference(row, number, "target")
    return Example(identity(row, number, "note_id"), prompt, reference, reference)


MTS_DIALOG = Task(
    name="mts_dialog",
    primary="rouge1",
    read=_read_dialogue,
    score=_score,
    max_new_tokens=768,  # the longest reference of the two test files has 565 words
    columns=("section_header", "dialogue", "section_text", "ID"),
    stop=("\nConversation:", "\nDoctor:", "\nPatient:"),
)
"""Test sets 1 (MEDIQA-Chat 2023, task A) and 2 (MEDIQA-Sum 2023); an ID is unique within its file only.

Source: Ben Abacha et al., EACL 2023; data github.com/abachaa/MTS-Dialog (CC BY 4.0); checker
github.com/abachaa/MEDIQA-Chat-2023, scripts/evaluate_summarization.py. The prompt is ours. The section is given; predicting its
name, BERTScore and BLEURT are left out.
"""

MIMIC_BHC = Task(
    name="mimic_bhc",
    primary="rouge1",
    read=_read_note,
    score=_score,
    max_new_tokens=1024,
    columns=("input", "target", "note_id"),
    stop=("\nClinical note:",),
)
"""The data need credentials at PhysioNet: the rows are invented, in the format of the published mimic-iv-bhc.csv.

Source: Aali et al., JAMIA 2024 (arXiv 2403.05720); data physionet.org/content/labelled-notes-hospital-course; checker
github.com/StanfordMIMI/clin-bhc-summ, src/calc_metrics.py, which rounds each ROUGE-L to four digits before the mean and stops
at 200 tokens, where we allow 1,024. BLEU and BERTScore are left out. The prompt has their layout (task, note, heading).
"""
