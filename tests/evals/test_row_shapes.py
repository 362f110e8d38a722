"""Rows of evaluations with other types than their tasks read: refused with their number, never asked as Python writes them."""

import pytest

from caftune.errors import CaftuneError
from caftune.evals.tasks import TASKS

ROWS = {
    "gsm8k": {"question": "How many?", "answer": "Two.\n#### 2"},
    "math500": {"problem": "What is it?", "answer": "2"},
    "mts_dialog": {"section_header": "CC", "dialogue": "Doctor: Hello.", "section_text": "None."},
    "mimic_bhc": {"input": "A note.", "target": "A course."},
    "molecules": {"description": "Ethanol.", "smiles": "CCO"},
    "proteins": {"functions": ["binding"], "sequence": "MKTAYIAKQR"},
}
IDS = {"math500": "unique_id", "mts_dialog": "ID", "mimic_bhc": "note_id"}
NAN = float("nan")


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("gsm8k", {"question": ["a", "b"]}, "question must be a text, got list"),
        ("gsm8k", {"question": NAN}, "question must be a text, got float"),
        ("gsm8k", {"question": " "}, "question must not be empty"),
        ("gsm8k", {"answer": ["#### 2"]}, "answer must be a text, got list"),
        ("math500", {"problem": {"text": "a"}}, "problem must be a text, got dict"),
        ("math500", {"answer": ["2"]}, "answer must be a text, got list"),
        ("math500", {"answer": NAN}, "answer must be a text, got float"),
        ("math500", {"answer": True}, "answer must be a text, got bool"),
        ("math500", {"answer": ""}, "answer must not be empty"),
        ("mts_dialog", {"dialogue": ["Doctor: Hello."]}, "dialogue must be a text, got list"),
        ("mts_dialog", {"section_text": ["None."]}, "section_text must be a text, got list"),
        ("mimic_bhc", {"input": NAN}, "input must be a text, got float"),
        ("mimic_bhc", {"target": NAN}, "target must be a text, got float"),
        ("molecules", {"description": ""}, "description or caption must not be empty"),
        ("proteins", {"functions": [{"name": "binding"}]}, "functions must be a list of texts, got .*binding"),
        ("proteins", {"functions": []}, "functions must be a list of texts"),
        ("proteins", {"functions": NAN}, "functions must be a list of texts, got nan"),
        ("proteins", {"sequence": ["MKTAYIAKQR"]}, "sequence must be a text, got list"),
        ("proteins", {"functions": None, "instruction": "Design.", "input": NAN}, "input must be a text, got float"),
    ],
)
def test_a_value_that_is_no_text_is_refused_by_its_row(task, change, message):
    with pytest.raises(CaftuneError, match=rf"Row 3 \(from 0\): {message}"):
        TASKS[task].read(ROWS[task] | change, 3)


@pytest.mark.parametrize("task", IDS)
def test_a_row_whose_id_is_null_goes_by_its_number(task):
    assert TASKS[task].read(ROWS[task] | {IDS[task]: None}, 3).id == "3"
    assert TASKS[task].read(ROWS[task] | {IDS[task]: "own"}, 3).id == "own"


@pytest.mark.parametrize(("answer", "reference"), [(2, "2"), (0.5, "0.5")])
def test_the_answer_to_a_problem_may_be_a_number(answer, reference):
    assert TASKS["math500"].read(ROWS["math500"] | {"answer": answer}, 0).reference == reference
