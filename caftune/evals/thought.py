r"""Removing a model's thoughts (reasoning) from its completion, since only the answer is scored.

Everything up to the last closing mark is thought: some chat templates write the opening mark themselves. A thought that is not
closed reaches to the end: an answer that begins in one, or whose prompt opened it, has nothing to score. Marks do not count
within quotes or backticks, and (outside a thought) within a code block, a string of several lines or a comment of a program.

Source of the marks: chat templates of DeepSeek-R1, Qwen3, Seed-OSS, Magistral, Command A Reasoning, Kimi, OpenThinker, Gemma 4;
for gpt-oss the format "harmony" (github.com/openai/harmony), with and without its special tokens.
"""

import re

_TAG = "(?:[a-z]+:)?(?:think|thinking|thought|thoughts|reasoning)"
_OPENING = rf"<{_TAG}>|\[THINK\]|◁think▷|<\|START_THINKING\|>|<\|begin_of_thought\|>|<\|channel>thought\b"
_CLOSING = (
    rf"</{_TAG}>|\[/THINK\]|◁/think▷|<\|END_THINKING\|>(?:\s*<\|START_RESPONSE\|>)?|"
    r"<\|end_of_thought\|>(?:\s*<\|begin_of_solution\|>)?|<channel\|>|"
    r"<\|start\|>assistant<\|channel\|>final<\|message\|>"
)
_ENDS_OF_ANSWER = ("<|END_RESPONSE|>", "<|end_of_solution|>", "<|return|>")
_QUOTED = r"""(?<![\w"])[rbfu]{0,2}"[^"\n]*"|(?<!\w)[rbfu]{0,2}'[^'\n]*'(?!\w)|`[^`\n]+`"""
_CODE = r'''^[ \t]*(?P<fence>```|~~~).*?^[ \t]*(?P=fence)|(?P<quotes>"""|\'\'\').*?(?P=quotes)|(?:^|(?<=\s))\# [^\n]*'''
_MARKS = rf"(?P<opening>{_OPENING})|(?P<closing>{_CLOSING})"
_HOW = re.DOTALL | re.MULTILINE | re.IGNORECASE
_WITHIN = re.compile(rf"{_QUOTED}|{_MARKS}", _HOW)
_OUTSIDE = re.compile(rf"{_CODE}|{_QUOTED}|{_MARKS}", _HOW)
_OPENS_AT_ITS_END = re.compile(rf"(?:{_OPENING})\s*\Z", re.IGNORECASE)

# Harmony: <|start|>assistant<|channel|>NAME ...<|message|>TEXT<|end|>, where the prompt has the first <|start|>assistant.
_HEADER = re.compile(
    r"(?:<\|start\|>assistant)?<\|channel\|>\s*(\w+)(?:(?!<\|(?:message|channel)\|>).)*<\|message\|>", re.DOTALL
)
_HEADER_AT_ITS_END = re.compile(rf"{_HEADER.pattern}\s*\Z", re.DOTALL)
_TURN_OF_HARMONY = re.compile(r"<\|start\|>assistant\s*\Z")
_END_OF_MESSAGE = re.compile(r"<\|(?:end|return|call|start|channel)\|>")
_BARE_THOUGHT = re.compile(r"\s*(?:analysis|commentary)(?=\S)")  # "analysisWe need ...assistantfinal15"
_BARE_FINAL = "assistantfinal"


def without_thought(completion: str, prompt: str = "", question: str = "") -> str:
    r"""The completion without its thoughts; empty where it ends within one.

    Args:
        prompt: the prompt as the model read it. A thought that it opened is open.
        question: the part of the prompt that is not the chat template's. Marks in it open nothing, except at the prompt's end.

    >>> without_thought("<think>\n3 * 5, that is 15.\n</think>\n\n15")
    '15'
    >>> without_thought("3 * 5, that is 15.\n</think>\n\n15", prompt="<|im_start|>assistant\n<think>\n")
    '15'
    """
    return split_thought(completion, prompt, question)[0]


def split_thought(completion: str, prompt: str = "", question: str = "") -> tuple[str, bool]:
    """What `without_thought` returns, and whether the completion ends within a thought."""
    in_harmony = _harmony(completion, prompt)
    if in_harmony is not None:
        return in_harmony
    answer, is_open = _after_marks(completion, is_open=_opens(prompt, question))
    ending = next((ending for ending in _ENDS_OF_ANSWER if answer.rstrip().endswith(ending)), "")
    return answer.rstrip().removesuffix(ending) if ending else answer, is_open


def _opens(prompt: str, question: str) -> bool:
    """Whether a prompt leaves a thought open: at its very end, or in what a chat template wrote after the question."""
    if _OPENS_AT_ITS_END.search(prompt):
        return True
    _, found, after = prompt.rpartition(question.strip()) if question.strip() else ("", "", "")
    return bool(found) and _after_marks(after, is_open=False)[1]


def _after_marks(text: str, *, is_open: bool) -> tuple[str, bool]:
    """The text after the last closing mark (up to an open thought), and whether a thought is open at the end."""
    start, end, place = 0, 0 if is_open else len(text), 0
    while mark := (_WITHIN if is_open else _OUTSIDE).search(text, place):
        place = mark.end()
        if mark["closing"]:
            is_open, start, end = False, place, len(text)
        elif mark["opening"] and not is_open:
            is_open, end = True, mark.start()
    answer = text[start:end]
    if is_open and not answer.strip():
        return "", True
    return answer.lstrip("\r\n") if start else answer, is_open


def _harmony(completion: str, prompt: str) -> tuple[str, bool] | None:
    """The message of the channel `final`, and whether there is none; None for a completion of another format."""
    opened = _HEADER_AT_ITS_END.search(prompt)
    text = (opened.group() if opened else "") + completion.lstrip()
    if _HEADER.match(text):
        headers = list(_HEADER.finditer(text))
        final = [header for header in headers if header[1] == "final"]
        return (_END_OF_MESSAGE.split(text[final[-1].end() :])[0], False) if final else ("", True)
    return _bare_harmony(completion, is_sure=bool(_TURN_OF_HARMONY.search(prompt)))


def _bare_harmony(completion: str, *, is_sure: bool) -> tuple[str, bool] | None:
    """The same where the special tokens are gone: the names of channel and role run into the text."""
    if is_sure and completion.startswith("final"):
        return completion.removeprefix("final"), False
    if not _BARE_THOUGHT.match(completion):
        return None
    _, found, answer = completion.rpartition(_BARE_FINAL)
    if found:
        return answer, False
    return ("", True) if is_sure or re.match(r"\s*analysis[A-Z]", completion) else None
