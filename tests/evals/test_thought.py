"""What is thought and what is answer, in the marks of many models, and where a text only speaks of the marks."""

import time

import pytest

from caftune.evals.task import until_stop
from caftune.evals.tasks import TASKS
from caftune.evals.thought import split_thought, without_thought

HARMONY = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("<think>\nOne.\n\nTwo.\n</think>\n\n    return x\n", "    return x\n"),
        ("\n<think></think>15", "15"),
        ("<think>\r\nOne.\r\n</think>\r\n\r\n15", "15"),
        ("One.\n</think>\n\n15", "15"),
        ("<think>a</think>b</think>c", "c"),
        ("<think>a</think>14?<think>b</think>15", "15"),
        ("Let me see. <think>no: 14</think> 15", " 15"),
        ("15 <think>no</think>", ""),
        ("<THINK>a</Think>15", "15"),
        ("<thinking>a</thinking>15", "15"),
        ("<thought>a</thought>15", "15"),
        ("<reasoning>a</reasoning>15", "15"),
        ("<seed:think>a</seed:think>15", "15"),
        ("[THINK]a[/THINK]15", "15"),
        ("◁think▷a◁/think▷15", "15"),
        ("<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>15<|END_RESPONSE|>", "15"),
        ("<|begin_of_thought|>a<|end_of_thought|>\n\n<|begin_of_solution|>15<|end_of_solution|>", "15"),
        ("<|channel>thought\na\n<channel|>15", "15"),
        (HARMONY.format("a") + "15", "15"),
        (HARMONY.format("a") + "15<|return|>", "15"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant" + HARMONY.format("b") + "15", "15"),
        (
            "<|channel|>commentary to=functions.add <|constrain|>json<|message|>{}<|call|>"
            + HARMONY.format("a")
            + "15",
            "15",
        ),
        ("analysisWe add 7 and 8.assistantfinal15", "15"),
        ("analysisWe add.assistantanalysisAgain.assistantfinal15", "15"),
        ("15", "15"),
        (" \n", " \n"),
        ("analysis of both numbers gives 15", "analysis of both numbers gives 15"),
    ],
)
def test_everything_up_to_the_last_closing_mark_is_thought(said, answer):
    assert split_thought(said) == (answer, False)
    assert without_thought(said) == answer


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("<think>It is 15", ""),
        ("\n[THINK]It is 15", ""),
        ("<|channel|>analysis<|message|>It is 15", ""),
        ("<|channel|>analysis<|message|>It is 15<|end|><|start|>assistant", ""),
        ("analysisWe need 15", ""),
        ("<think>a</think><think>It is 14", ""),
        ("It is 15.\n<think>Is it 14?", "It is 15.\n"),
    ],
)
def test_a_thought_that_is_not_closed_reaches_to_the_end(said, answer):
    assert split_thought(said) == (answer, True)


@pytest.mark.parametrize(
    ("prompt", "said", "found"),
    [
        ("<ask>Q<say><think>\n", "It is 14.\n</think>\n\n15", ("15", False)),
        ("<ask>Q<say><think>\n", "It is 15", ("", True)),
        ("<ask>Q<say><think>\n", "<think>It is 14.</think>15", ("15", False)),
        ("<ask>Q<say><think>\nWell,", " it is 15", ("", True)),
        ("<ask>Q<say><think>\n\n</think>\n\n", "15", ("15", False)),
        ("<ask>Q<say></think>", "15", ("15", False)),
        ("<think>old</think><ask>Q<say>[THINK]", "It is 14[/THINK]15", ("15", False)),
        ("<ask>Q<say>[THINK]", "It is 15", ("", True)),
        ("<ask>Q<say><|channel>thought\n<channel|>", "15", ("15", False)),
        ("<ask>Q<say><|start|>assistant", "final15", ("15", False)),
        ("<ask>Q<say><|start|>assistant", "analysis: it is 15", ("", True)),
        ("<ask>Q<say><|start|>assistant<|channel|>analysis<|message|>", "It is 15", ("", True)),
        (
            "<ask>Q<say><|start|>assistant<|channel|>analysis<|message|>",
            "No.<|end|><|start|>assistant<|channel|>final<|message|>15",
            ("15", False),
        ),
        ("<ask>Q<say><|start|>assistant<|channel|>final<|message|>", "15", ("15", False)),
    ],
)
def test_a_thought_that_the_prompt_opened_is_open(prompt, said, found):
    assert split_thought(said, prompt, "Q") == found


def test_a_question_that_speaks_of_marks_opens_nothing_unless_it_ends_with_one():
    question = "Think within <think> and answer."
    assert (
        split_thought("15", f"<ask>{question}<say>", question)
        == split_thought("15", question, question)
        == ("15", False)
    )
    assert split_thought("15", "7 + 8? <think>\n", "7 + 8? <think>\n") == ("", True)


SPOKEN_OF = {
    "split": "    return text.split('</think>')[-1]\n",
    "raw": '    return re.sub(r"<think>.*?</think>", "", text)\n',
    "comment": "    # what follows </think> is kept\n    return text\n",
    "docstring": 'def f(text):\n    """Drop thoughts.\n\n    >>> f("<think>a</think>b")\n    """\n    return text\n',
    "many lines": "```python\nMARKS = '''\n<think>\n</think>\n'''\n```\nThat is it.",
    "fence": "It reads:\n```\n<think>a</think>b\n```\n",
    "prose": 'A thought stands between "<think>" and "</think>".',
    "code in prose": "A thought ends with `</think>`, say `[/THINK]`.",
    "harmony": 'MARK = "<|channel|>final<|message|>"\n',
}


@pytest.mark.parametrize("kind", SPOKEN_OF)
def test_a_mark_that_is_spoken_of_does_not_count(kind):
    assert split_thought(SPOKEN_OF[kind]) == (SPOKEN_OF[kind], False)
    assert split_thought(f"<think>\nIt isn't hard, so:\n</think>\n\n{SPOKEN_OF[kind]}") == (SPOKEN_OF[kind], False)


@pytest.mark.parametrize(
    "thought",
    [
        "First I close it with `</think>`.",
        "```python\ndef f():",
        "I don't know",
        "He said 'no', didn't he",
        '"""',
        "# Step 1",
    ],
)
def test_what_is_open_within_a_thought_does_not_hide_its_end(thought):
    answer = "```python\nsay('it\\'s')\n```"
    assert split_thought(f"<think>{thought}\n</think>\n{answer}") == (answer, False)
    assert split_thought(f"{thought}\n</think>\n{answer}", "<say><think>\n", "Q") == (answer, False)


def test_a_stop_text_within_a_thought_ends_nothing():
    task = TASKS["gsm8k"]
    said = without_thought("<think>\nQuestion: how many?\n#### 14\n</think>\n6 + 9\n#### 15\nQuestion: more?\n#### 3")
    assert until_stop(said, task.stop) == "6 + 9\n#### 15"


@pytest.mark.parametrize(
    "piece", ["<think>", "</think>", "`", '"', "'", '"""', "```\n", "<|channel|>", " ", "\n", "# ", "x"]
)
def test_whatever_is_written_is_read_at_once(piece):
    began = time.monotonic()
    split_thought(piece * 20_000, piece * 2_000, piece * 20)
    split_thought("<think>" + piece * 20_000 + "</think>" + piece * 20_000)
    assert time.monotonic() - began < 2
