"""Clinical text: ROUGE against rouge-score itself and against a computation written here, prompts that hold everything."""

import csv
import random
import re
import sys
from collections import Counter

import pytest

from caftune.errors import CaftuneError
from caftune.evals import clinical
from caftune.evals.clinical import MIMIC_BHC, MTS_DIALOG, rouge
from caftune.evals.task import until_stop

TASKS = [MTS_DIALOG, MIMIC_BHC]
FILES = {
    "MTS-Dialog-TrainingSet.csv": 1201,
    "MTS-Dialog-ValidationSet.csv": 100,
    "MTS-Dialog-TestSet-1-MEDIQA-Chat-2023.csv": 200,
    "MTS-Dialog-TestSet-2-MEDIQA-Sum-2023.csv": 200,
}


@pytest.fixture(scope="module")
def dialogues(shared):
    def rows(name):
        with (shared / "data/mts_dialog" / name).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    return {name: rows(name) for name in FILES}


# The reference: ROUGE from its definition, n-grams as multisets, the longest common subsequence row by row.


def f1(common, reference, text):
    return 2 * common / (reference + text) if common else 0.0


def words(text):
    return re.findall("[a-z0-9]+", text.lower())


def rouge_n(reference, text, n):
    first, second = (
        Counter(zip(*(words(each)[start:] for start in range(n)), strict=False)) for each in (reference, text)
    )
    return f1((first & second).total(), first.total(), second.total())


def rouge_l(reference, text):
    first, second = words(reference), words(text)
    longest = [0] * (len(second) + 1)
    for word in first:
        before = longest[:]
        for place, other in enumerate(second, 1):
            longest[place] = before[place - 1] + 1 if word == other else max(before[place], longest[place - 1])
    return f1(longest[-1], len(first), len(second))


@pytest.mark.parametrize(
    ("reference", "text", "rouge1", "rouge2", "rouge_longest"),
    [
        # 4 and 3 words, 3 in common, in order; the pairs: no-known known-drug drug-allergies / no-drug drug-allergies
        ("No known drug allergies.", "No drug allergies.", 2 * 3 / 7, 2 * 1 / 5, 2 * 3 / 7),
        # the same words, the other way round: no pair, and one word as longest common subsequence
        ("pain in chest", "chest in pain", 1.0, 0.0, 2 * 1 / 6),
        # a word counts as often as both have it
        ("pain", "pain pain pain", 2 * 1 / 4, 0.0, 2 * 1 / 4),
        # case and marks do not count, numbers do; "2-1/2" is three words
        ("BP: 120/80", "bp 120 80 today", 2 * 3 / 7, 2 * 2 / 5, 2 * 3 / 7),
        ("2-1/2-year-old", "2 1 2 year old", 1.0, 1.0, 1.0),
    ],
)
def test_rouge_of_examples_worked_out_by_hand(reference, text, rouge1, rouge2, rouge_longest):
    expected = {"rouge1": rouge1, "rouge2": rouge2, "rougeL": rouge_longest}
    assert rouge(reference, text) == pytest.approx(expected, abs=1e-12)


def test_words_are_not_stemmed():
    assert rouge("she runs daily", "she is running") == pytest.approx({"rouge1": 1 / 3, "rouge2": 0.0, "rougeL": 1 / 3})


def test_rouge_is_rouge_scores_own_on_200_pairs(dialogues):
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names)
    for row in dialogues["MTS-Dialog-TestSet-1-MEDIQA-Chat-2023.csv"]:
        found = MTS_DIALOG.score(MTS_DIALOG.read(row, 0), row["dialogue"])
        direct = scorer.score(row["section_text"], row["dialogue"])
        assert found == {name: direct[name].fmeasure for name in names}


def test_rouge_is_what_its_definition_gives_on_200_pairs(dialogues):
    rows = dialogues["MTS-Dialog-TestSet-2-MEDIQA-Sum-2023.csv"]
    texts = [row["section_text"] for row in rows]
    spread = set()
    for row, other in zip(rows, texts[1:] + texts[:1], strict=True):
        text = row["section_text"][: len(row["section_text"]) // 2] + other
        found = MTS_DIALOG.score(MTS_DIALOG.read(row, 0), text)
        reference = row["section_text"]
        expected = [rouge_n(reference, text, 1), rouge_n(reference, text, 2), rouge_l(reference, text)]
        assert list(found.values()) == pytest.approx(expected, abs=1e-12)
        spread.add(round(found["rougeL"], 2))
    assert len(spread) > 20


@pytest.mark.parametrize("file", FILES)
def test_every_reference_of_mts_dialog_scores_one_and_no_prompt_is_cut(dialogues, file):
    assert len(dialogues[file]) == FILES[file]
    for number, row in enumerate(dialogues[file]):
        example = MTS_DIALOG.read(row, number)
        assert example.id == row["ID"]
        assert row["dialogue"].strip() in example.prompt
        if number >= 200:
            continue  # read, and not scored
        scores = MTS_DIALOG.score(example, until_stop(row["section_text"], MTS_DIALOG.stop))
        assert scores["rouge1"] == scores["rougeL"] == 1.0


def test_every_section_of_mts_dialog_has_a_written_out_name(dialogues):
    headers = {row["section_header"] for rows in dialogues.values() for row in rows}
    assert headers == set(clinical._SECTIONS)


def test_shuffled_references_score_low(dialogues):
    rows = dialogues["MTS-Dialog-TestSet-1-MEDIQA-Chat-2023.csv"]
    examples = [MTS_DIALOG.read(row, 0) for row in rows]
    texts = [row["section_text"] for row in rows]
    scores = [MTS_DIALOG.score(*pair) for pair in zip(examples, texts[7:] + texts[:7], strict=True)]
    whole = MTS_DIALOG.combine(scores)
    assert 0 < whole["rouge2"] < 0.05
    assert 0 < whole["rouge1"] < 0.15


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_our_own_rows_score_one_with_their_reference_and_less_with_another(task):
    assert len(task.rows) >= 3
    examples = [task.read(row, number) for number, row in enumerate(task.rows)]
    assert len({example.id for example in examples}) == len(examples)
    for example, other in zip(examples, examples[1:] + examples[:1], strict=True):
        assert task.score(example, example.reference) == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
        assert task.score(example, other.reference)[task.primary] < 0.5


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("text", ["", "  \n", "…!?", "痛い", "\x00\ud800", "zq " * 30_000], ids=range(6))
def test_a_senseless_completion_has_zero(task, text):
    example = task.read(task.rows[0], 0)
    assert task.score(example, text) == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}


def test_a_prompt_asks_for_the_section_and_ends_where_it_begins():
    row = {"section_header": "fam/sochx", "section_text": "x", "dialogue": "Doctor: Hi.\nPatient: Hi.\n"}
    example = MTS_DIALOG.read(row, 4)
    assert example.prompt == (
        'Write the section "Family and social history" of the clinical note that belongs to this conversation.\n\n'
        "Conversation:\nDoctor: Hi.\nPatient: Hi.\n\nFamily and social history:\n"
    )
    assert (example.id, example.reference, example.answer) == ("4", "x", "x")


def test_a_section_of_another_data_set_keeps_its_name():
    row = {"section_header": "Diet", "section_text": "x", "dialogue": "Doctor: Hi."}
    assert MTS_DIALOG.read(row, 0).prompt.endswith("\n\nDiet:\n")


def test_a_long_note_stands_whole_in_the_prompt():
    note = "<SEX> F " + "word " * 20_000 + "end"
    example = MIMIC_BHC.read({"note_id": "a-1", "input": note, "target": "short"}, 0)
    assert f"Clinical note:\n{note}\n\nBrief hospital course:\n" in example.prompt
    assert (example.id, example.reference, example.answer) == ("a-1", "short", "short")


@pytest.mark.parametrize(
    ("task", "continued"),
    [
        (MTS_DIALOG, "No allergies.\nDoctor: Next question.\nPatient: Yes."),
        (MTS_DIALOG, "No allergies.\nConversation:\nDoctor: Hello."),
        (MIMIC_BHC, "No allergies.\nClinical note:\n<SEX> F"),
    ],
)
def test_a_model_that_goes_on_with_the_next_text_is_cut(task, continued):
    assert until_stop(continued, task.stop) == "No allergies."


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_missing_column_is_named(task):
    for name in ("section_text", "dialogue", "section_header") if task is MTS_DIALOG else ("input", "target"):
        row = {key: value for key, value in task.rows[0].items() if key != name}
        with pytest.raises(CaftuneError, match=f"Row 3 .*column {name},"):
            task.read(row, 3)


def test_the_whole_is_the_mean():
    scores = [{"rouge1": 1.0, "rouge2": 0.5, "rougeL": 0.5}, {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.25}]
    assert MTS_DIALOG.combine(scores) == {"rouge1": 0.5, "rouge2": 0.25, "rougeL": 0.375}


def test_without_rouge_score_the_remedy_is_told_when_a_row_is_read(monkeypatch):
    clinical._scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    for task in TASKS:
        with pytest.raises(CaftuneError, match=r"rouge-score must be installed .* pip install 'caftune\[eval\]'"):
            task.read(task.rows[0], 0)


# Other scripts

TEXTS = [
    "患者三天前开始咳嗽。", "Больной жалуется на боль в груди.", "Ο ασθενής έχει πυρετό.",
    "المريض يعاني من الحمى", "מטופל עם חום", "मरीज को बुखार है।", "환자는 열이 있습니다.",
    "患者は熱があります。コーヒー", "ผู้ป่วยมีไข้", "რკინა დაბალია", "Größe und Übelkeit", "naïve café",
    "Übelkeit", "١٢٣ ملغ", "头痛3天 CT", "é",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_of_any_script_scores_one_with_itself_and_less_without_its_end(text):
    alone = rouge(text, text)
    assert alone["rouge1"] == alone["rougeL"] == 1.0
    assert alone["rouge2"] == (1.0 if len(clinical.words(text)) > 1 else 0.0)
    assert rouge(text, text[: len(text) // 2])["rouge1"] < 1.0
    assert rouge(text, "No known drug allergies.") == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    assert MTS_DIALOG.score(MTS_DIALOG.read({**MTS_DIALOG.rows[0], "section_text": text}, 0), text)["rouge1"] == 1.0


def test_words_of_examples_worked_out_by_hand():
    assert clinical.words("头痛3天, CT") == ["头", "痛", "3", "天", "ct"]
    assert clinical.words("Боль в груди") == ["боль", "в", "груди"]
    assert clinical.words("मरीज को") == ["मरीज", "को"]
    assert clinical.words("コーヒー") == ["コー", "ヒー"]
    assert clinical.words("ไข้") == ["ไ", "ข้"]
    assert rouge("患者咳嗽", "患者发热")["rouge1"] == 2 * 2 / 8
    assert rouge("groß", "grün")["rouge1"] == 0.0


def test_a_letter_composed_in_two_ways_is_one_letter():
    assert rouge("caf\u00e9", "cafe\u0301")["rouge1"] == 1.0


def test_texts_in_ascii_are_split_as_rouge_score_splits_them():
    from rouge_score.tokenizers import DefaultTokenizer

    own, draw = DefaultTokenizer(False).tokenize, random.Random(1)
    signs = [chr(code) for code in range(1, 128)] + list("–—…“”‚°±²³½×µº™•€")
    for _case in range(300):
        text = "".join(draw.choices(signs + list("abc XYZ 019 ") * 8, k=60))
        assert clinical.words(text) == own(text), text


@pytest.mark.parametrize("text", ["...", "- -", "\u2026", "\U0001f44d", "½"])
@pytest.mark.parametrize(("task", "name"), [(MTS_DIALOG, "section_text"), (MIMIC_BHC, "target")], ids=["mts", "mimic"])
def test_a_reference_without_a_word_is_refused_with_its_row(task, name, text):
    with pytest.raises(CaftuneError, match=rf"Row 7 \(from 0\): {name} must have a word, got"):
        task.read({**task.rows[0], name: text}, 7)
