"""The task for anybody's own prompts and completions: right to the letter, or wrong."""

import pytest

from caftune.errors import CaftuneError
from caftune.evals.exact import EXACT_MATCH
from caftune.evals.task import Example
from caftune.evals.tasks import TASKS


def scored(reference, completion):
    return EXACT_MATCH.score(Example("0", "", reference), completion)["exact_match"]


def test_a_prompt_is_asked_as_it_is_and_the_completion_is_the_reference():
    example = EXACT_MATCH.read({"prompt": " 7 + 8 =", "completion": " 15\n"}, 3)
    assert example == Example("3", " 7 + 8 =", "15", "15")


@pytest.mark.parametrize(("own", "found"), [("sum", "sum"), (12, "12"), (0, "0"), (None, "3")])
def test_an_example_has_the_id_of_its_row_or_its_number(own, found):
    assert EXACT_MATCH.read({"id": own, "prompt": "a", "completion": "b"}, 3).id == found


@pytest.mark.parametrize("completion", ["to be", " to be", "to be\n\n", "\tto be "])
def test_white_space_at_both_ends_does_not_count(completion):
    assert scored("to be", completion) == 1.0


@pytest.mark.parametrize(
    ("reference", "completion"),
    [
        ("caf\u00e9", "cafe\u0301"),
        ("cafe\u0301", "caf\u00e9"),
        ("\ud55c", "\u1112\u1161\u11ab"),
        ("one\ntwo", "one\r\ntwo\r\n"),
        ("one\r\ntwo", "one\ntwo"),
        ("one\rtwo", "one\ntwo"),
        ("one", "\ufeffone"),
    ],
)
def test_what_no_reader_sees_does_not_count(reference, completion):
    assert scored(reference, completion) == 1.0


@pytest.mark.parametrize(
    ("reference", "completion"), [("x2", "x\u00b2"), ("caf\u00e9", "cafe"), ("fi", "\ufb01"), ("a\nb", "a\n\nb")]
)
def test_what_a_reader_sees_counts(reference, completion):
    assert scored(reference, completion) == 0.0


@pytest.mark.parametrize(
    "completion", ["", " ", "To be", "to  be", "to be.", "to be or not", "be", "to\nbe", "\ud800\0"]
)
def test_everything_else_does(completion):
    assert scored("to be", completion) == 0.0


def test_the_whole_is_the_share_that_is_right():
    assert EXACT_MATCH.combine([{"exact_match": 1.0}, {"exact_match": 0.0}]) == {"exact_match": 0.5}


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("7 + 8 =", "<think>\n8 + 7\n</think>\n\n15"),
        ("7 + 8 = <think>", "8 + 7</think> 15"),
        ("7 + 8 =", "[THINK]8[/THINK]15"),
    ],
)
def test_a_thought_before_a_completion_is_no_part_of_the_reference(prompt, completion):
    example = EXACT_MATCH.read({"prompt": prompt, "completion": completion}, 0)
    assert (example.reference, example.answer) == ("15", completion)


def test_our_own_rows_are_right_with_their_completion_and_wrong_with_another():
    rows = EXACT_MATCH.rows
    examples = [EXACT_MATCH.read(row, number) for number, row in enumerate(rows)]
    for example, row, other in zip(examples, rows, (*rows[1:], rows[0]), strict=True):
        found = [EXACT_MATCH.score(example, each["completion"]) for each in (row, other)]
        assert found == [{"exact_match": 1.0}, {"exact_match": 0.0}]


def test_the_task_is_found_by_its_name():
    assert TASKS["exact_match"] is EXACT_MATCH
    assert EXACT_MATCH.primary == "exact_match"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "Row 4 .* must have a column completion, got prompt"),
        ({"text": "a", "completion": "b"}, "Row 4 .* must have a column prompt, got text, completion"),
        ({"prompt": [{"role": "user"}], "completion": "b"}, "Row 4 .*: prompt must be a text, got list"),
        ({"prompt": "a", "completion": " \n"}, "Row 4 .*: completion must not be empty, got white space"),
        (
            {"prompt": "a", "completion": "<think>b</think>\n"},
            "Row 4 .*: completion must not be empty, got a thought alone",
        ),
    ],
)
def test_a_row_that_cannot_be_asked_or_scored_is_refused_with_a_sentence(row, message):
    with pytest.raises(CaftuneError, match=message):
        EXACT_MATCH.read(row, 4)
