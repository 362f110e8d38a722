r"""Finding the final answer in a completion in maths.

The final answer is the first of these that a completion has and that can be an answer:

1. what the last \boxed{...} holds (of boxes within boxes, the innermost; boxes joined by "and", "or", a comma are one answer);
2. the number on the first line after ####, as GSM8K's own solutions end; before the box, where it comes after it. Numbered
   headings (#### 1 ..., #### 2 ..., #### 3. Add) are none;
3. the contents of <answer>; the text after "answer is" or "final answer:", the last one first; then a line that begins with
   "Answer:";
4. the last formula or number; where the last line with numbers has one in bold type, that.

Where the model takes back what it said ("I made a mistake", "that is wrong"), only what follows counts, if it has a number. A
box that is not closed is an answer that broke off: neither it nor what follows counts.

Where a number is wanted, what cannot be one is passed over, and an answer of several numbers is none of them. Otherwise words
around an answer ("18 dollars", "18 in total") and marks of type and spacing are taken off, and the rest is left to the judge.
"""

import re
from collections.abc import Collection, Iterator

from caftune.evals.quantity import UNCLEAR, Quantity, in_words, quantities, quantity_at, stated_number

LONGEST_ANSWER = 1000
TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")

_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox|framebox)\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_BETWEEN_BOXES = re.compile(r"[\s$]*(?:\\\))?\s*(?:,|,?\s*(?:\\text\{\s*)?(?:and|or)\s*\}?)\s*(?:\\\()?[\s$]*")
_HASH = re.compile(r"(?:^|(?<=\s))####(?!#)[ \t]*+(.*)$", re.MULTILINE)
_TITLED = re.compile(r"[*_ ]*\d{1,2}[.):][*_ ]+[A-Za-z(]")
_NUMBERED = re.compile(r"(?<=[*_ ])?\d{1,2}(?![\d,./])|(?=[*_ ]+\d)")
_ANNOUNCED = re.compile(
    r"\b(?:answers?\**(?: (?:to|of|for) [^.\n]{1,80}?)?\**(?:,? (?:therefore|then|thus|indeed),?)?"
    r"\s+(?:(?:is|are|would be|should be|will be|comes to|equals)\b|=)|"
    r"final answer\**\s*:)[\s:*]*",
    re.IGNORECASE,
)
_LABELLED = re.compile(
    r"^[^A-Za-z0-9\n]{0,12}(?:final )?answer[*_ ]*:?[*_]*[ \t]*(?:\n\s*)?", re.IGNORECASE | re.MULTILINE
)
_TAKEN_BACK = re.compile(
    r"\bI (?:made|see) (?:a|an|my) (?:\w+ )?(?:mistake|error)|"
    r"\bI (?:forgot|was wrong|miscounted|misread|miscalculated|misunderstood)|"
    r"\b(?:that|this|it)(?:'s| is| was) (?:wrong|incorrect|not (?:right|correct))\b|\bscratch that\b|\bcorrection\s*:",
    re.IGNORECASE,
)
_DIGIT = re.compile(r"\d")
_DOUBT = re.compile(
    r"\b(?:wait|actually|hmm+|hold on|sorry|oops|correction|no)\b(?=[,.:;!?*\s-])(?!\s+(?:more|less|one|matter|need))",
    re.IGNORECASE,
)
_GIVEN = re.compile(
    r"\\boxed\s*\{|####\s*\S|\banswer\**\s*(?:is|should be|:)[^\n]{0,20}\d|"
    r"\b(?:it|that|this|total|result)(?:'s| is| should be| must be| would be)\s+(?:actually\s+)?[$*]*-?\d|"
    r"(?<=\bno[,:] )[$*]*-?\d",
    re.IGNORECASE,
)
_UNBELIEVED = re.compile(
    r"(?:(?:not|n't|cannot|never)\s+(?:think|believe|say|mean|see how)?|"
    r"\b(?:if|suppose|assum(?:e|ing)|doubt|(?:might|may|could) (?:think|say|guess|expect)|"
    r"(?:many|some|people|students|others) (?:may |might |would )?(?:think|say|believe)))"
    r"\s*(?:that\s+)?(?:the|this|that|an|my)?\s*\Z|\b(?:wrong|incorrect|naive|previous)\s+\Z",
    re.IGNORECASE,
)
_GIVES_UP = re.compile(
    r"\b(?:not enough|insufficient|missing) information\b|\b(?:cannot|can't|can not) be (?:determined|answered|known)\b",
    re.IGNORECASE,
)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$((?:\\.|[^$\n\\])+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_JOINT = re.compile(r"\s*(?:,\s*)?(?:(?:and|or)\s+)?(?=\$|\\\(|\\\[|-?\d)")
_BEFORE_FORMULA = re.compile(
    r"(?:[\s:*]|(?:is|are|just|simply|therefore|thus|hence|then|equal|to|given|by|about|approximately)\b)*"
)
_SENTENCE = re.compile(r".*?(?=\.\s|[.!]*$)", re.MULTILINE)
_REASON = re.compile(r",? (?:because|since|which|where|so that|as (?:the|we|it|there|this|that|they|[a-z] is))\b")
_SAYS_NOTHING = re.compile(
    r"(?:indeed |therefore |clearly |also )*"
    r"(?:correct|right|wrong|incorrect|reasonable|verified|confirmed|consistent|valid|not)\b"
)
_LONG_WORD = re.compile(r"[A-Za-z][A-Za-z']{2,}[,;:]?")
_WORD = re.compile(rf"{_LONG_WORD.pattern}|(?:an?|as|at|by|in|is|it|of|on|or|so|to)[,;:]?", re.IGNORECASE)
_SPACING = re.compile(r"(?<!\\)\\[!,;: ]|\\(?:left|right|displaystyle)(?![A-Za-z])|\\?\$|~")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?%?")
_PLAIN = re.compile(r"(?:(?<![\w)])-)?\$?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:/\d+)?(?:\s?\\?%)?")
_MEANT = {"sqrt", "percent", "infinity", "dozen", "hundred", "thousand", "million", "billion", "trillion"}
_EQUATION = re.compile(r"(?<![<>!\\])=")
_ABOUT = re.compile(r"\A\s*(?:\\approx|≈)")
_ONLY_WORDS = re.compile(r"[A-Za-z ,-]*")
_ASIDE = re.compile(r"\([^()\n]{1,80}\)")
_NOT_MEANT = re.compile(
    r"(?:\bnot|n't|\bcannot|\bnever|\binstead of|\brather than|\bthan)\s+"
    r"(?:(?:be|equal|think|believe|that|the answer|it|is|a|an)\s+)*\Z",
    re.IGNORECASE,
)
_MARKER = re.compile(
    r"^[ \t>*_-]*(?:step\s+)?(\d{1,2})[.):](?=[*_\s]*[A-Za-z])", re.IGNORECASE | re.MULTILINE
)  # of a list
_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*")
_NEAR = 2 * LONGEST_ANSWER  # characters in which a formula is looked for
_PLACES = 20  # places where an answer is announced: the last ones


def final_answer(completion: str, *, is_number: bool = False, units: Collection[str] = ()) -> str | None:
    r"""The final answer of a completion, or None where there is none.

    Args:
        completion: what the model wrote.
        is_number: a number is wanted. An answer of several numbers is then UNCLEAR.
        units: units that the question asks for, such as "dozen", which then do not multiply a number.

    >>> final_answer(r"Half of it, so $\boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    >>> final_answer("2 + 3 = 5 apples\n#### 5\n\nTom has 7 pears.")
    '5'
    >>> final_answer("The answer is $x = 3$. I hope it is correct.")
    'x = 3'
    >>> final_answer("The answer is 72. As 6*12 = 72, the answer is correct.", is_number=True)
    '72'
    """
    text = _not_taken_back("\n".join(completion.replace("−", "-").splitlines()))
    box, begin, text = _last_box(text)
    for found, kind in _candidates(text, box, begin):
        answer = _as_number(found, kind, units) if is_number else _as_anything(found, kind)
        if answer:
            return answer
    return (_last_number(text, units) if is_number else _last_of_all(text)) or None


def hash_answer(solution: str, units: Collection[str] = ()) -> str:
    """The number after ####, as at the end of GSM8K's solutions; empty where there is none."""
    found = (_as_number(line[1], "hash", units) for line in _hash_lines("\n".join(solution.splitlines())))
    return next(filter(None, found), "")


def tidy(answer: str) -> str:
    """The answer without marks of spacing, dollar signs, commas between thousands, and words around a number."""
    answer = _SPACING.sub("", re.sub(r",\\!\s*", ",", answer)).lstrip(" \t\n*:").rstrip(" \t\n*:.,;")
    if len(answer) > LONGEST_ANSWER:
        return answer
    words = answer.split()
    is_word = (_WORD if len(words) > 2 else _LONG_WORD).fullmatch  # "5 a" is a product
    others = [word for word in words if not is_word(word) or word.lower() in _MEANT]
    if len(others) == 1 and _PLAIN.fullmatch(others[0]):
        answer = others[0]
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer


def _not_taken_back(text: str) -> str:
    """The text after the last retraction ("I made a mistake"), or after a doubt that another answer follows."""
    for doubt, answer in ((_TAKEN_BACK, _DIGIT), (_DOUBT, _GIVEN)):
        places = [match.end() for match in doubt.finditer(text)]
        if places and answer.search(text, places[-1]):
            text = text[places[-1] :]
    return text


def _candidates(text: str, box: str, begin: int) -> Iterator[tuple[str, str]]:
    """Candidates: texts that may hold the final answer, and the kind of mark before each, the most reliable first."""
    hashes = _hash_lines(text)
    yield from ((line[1][:_NEAR], "hash") for line in hashes[:_PLACES] if box and line.start() > begin)
    yield box, "box"
    yield from ((line[1][:_NEAR], "hash") for line in hashes[:_PLACES])
    yield from ((tag[1].strip(), "announced") for tag in reversed(list(_TAGGED.finditer(text))[-_PLACES:]))
    for announced in reversed(list(_ANNOUNCED.finditer(text))[-_PLACES:]):
        if not _UNBELIEVED.search(text, max(0, announced.start() - 60), announced.start()):
            yield text[announced.end() : announced.end() + _NEAR], "announced"
    for label in reversed(list(_LABELLED.finditer(text))[-_PLACES:]):
        yield text[label.end() : label.end() + _NEAR], "label"


def _last_box(text: str) -> tuple[str, int, str]:
    """The contents of the last closed box, where it begins, and the text up to the first unclosed box."""
    boxes: list[tuple[int, int, int]] = []  # begin, begin of what it holds, end of that
    opened: list[re.Match[str]] = []
    for brace in _BRACE.finditer(text):
        if brace["box"] or brace["open"]:
            opened.append(brace)
        elif brace["close"] and opened:
            start = opened.pop()
            if start["box"]:
                boxes.append((start.start(), start.end(), brace.start()))
    broken = min((start.start() for start in opened if start["box"]), default=len(text))
    if not boxes:
        return "", -1, text[:broken]
    boxes.sort()
    parts = [boxes[-1]]
    for before in reversed(boxes[:-1]):
        if parts[0][0] - before[2] > 40 or not _BETWEEN_BOXES.fullmatch(text, before[2] + 1, parts[0][0]):
            break
        parts.insert(0, before)
    return ", ".join(text[start:end] for _, start, end in parts), parts[-1][0], text[:broken]


def _hash_lines(text: str) -> list[re.Match[str]]:
    """Lines after ####, without headings: titles after "1." or "1)", and lines numbered 1, 2, ... in order."""
    lines = [line for line in _HASH.finditer(text) if not _TITLED.match(line[1])]
    numbers = [(_NUMBERED.match(line[1]) or [""])[0] for line in _HASH.finditer(text)]
    turns = [str(number) for number in range(1, len(numbers) + 1)]
    count = next((i for i, (number, turn) in enumerate(zip(numbers, turns, strict=True)) if number != turn), len(turns))
    is_numbering = count > 1 or (
        count == 1 and re.search(r"[A-Za-z]", next(_HASH.finditer(text))[1]) and _is_announced(text)
    )
    headings = {line.start() for line in list(_HASH.finditer(text))[:count]} if is_numbering else set()
    return [line for line in lines if line.start() not in headings]


def _is_announced(text: str) -> bool:
    return _ANNOUNCED.search(text) is not None or "\\boxed" in text


def _as_number(text: str, kind: str, units: Collection[str]) -> str:
    """The number that a marked text gives; empty where it gives none."""
    if kind == "box":
        return _number_in_formula(text, units) if len(text) <= LONGEST_ANSWER else text
    if (kind == "label" and not _is_short(text)) or _SAYS_NOTHING.match(text):
        return ""
    start = _BEFORE_FORMULA.match(text)
    formula = _FORMULA.match(text, start.end() if start else 0)
    if formula and _is_formula(_content(formula)):
        answer = _number_in_formula(_content(formula), units)
        return UNCLEAR if answer and _JOINT.match(text, formula.end()) else answer
    return stated_number(text, units, is_loose=kind != "hash") or ""


def _is_short(text: str) -> bool:
    """Whether the text after a label is an answer, not the start of a solution: its line has one number, or is the last."""
    line, _, rest = text.strip().partition("\n")
    return len(quantities(_ASIDE.sub("", line))) == 1 or not re.search(r"\d", rest)


def _number_in_formula(formula: str, units: Collection[str]) -> str:
    """A formula that is a number, or an equation of one, as a plain numeral; another as it is; empty for one without digits."""
    bare = re.sub(r"\s+", " ", TEXT.sub(r" \1 ", formula)) if TEXT.search(formula) else formula
    bare = _ABOUT.sub("", bare).strip(" $*\n").rstrip(".")
    if only := _only_number(bare, units):
        return only
    if not _DIGIT.search(bare):
        return (in_words(bare) or "") if _ONLY_WORDS.fullmatch(bare) else formula if "\\" in bare else ""
    if _EQUATION.search(bare):
        return _side_of(bare, units) or formula
    is_prose = TEXT.search(formula) and not re.search(r"[\\^_]", bare)
    return (stated_number(bare, units) if is_prose else None) or formula


def _only_number(bare: str, units: Collection[str]) -> str:
    """The number in a formula that is one number, with or without words for its unit; else empty."""
    found = quantity_at(bare, 0, units)
    is_whole = found and (
        found.end == len(bare) or re.fullmatch(r"( [A-Za-z]{3,}| per| of| a| in)+", bare[found.end :])
    )
    return found.text if found and is_whole else ""


def _side_of(equation: str, units: Collection[str]) -> str:
    """The last side of an equation, or else the first, where it is a number."""
    sides = [side.strip() for side in _EQUATION.split(equation)]
    return next((found for side in (sides[-1], sides[0]) if (found := _only_number(side, units))), "")


def _as_anything(text: str, kind: str) -> str:
    """The answer that a marked text gives where it need not be a number; empty where it gives none."""
    if kind == "hash":
        return stated_number(text, is_loose=False) or _formulas(text)
    if kind == "label":
        text = text.strip().partition("\n")[0]
    if kind != "box" and re.match(r"\s*not\b", text):
        return ""
    answer = text if kind == "box" else _formulas(text) or _sentence(text)
    return "" if _SAYS_NOTHING.match(answer.lstrip()) else tidy(answer)


def _formulas(text: str) -> str:
    """The formula that a statement begins with, or several, joined as they are; empty where it begins otherwise."""
    start = _BEFORE_FORMULA.match(text)
    place = begin = start.end() if start else 0
    found: list[str] = []
    while (formula := _FORMULA.match(text, place)) and _is_formula(_content(formula)):
        found.append(_content(formula))
        end = place = formula.end()
        if joint := _JOINT.match(text, place):
            place = joint.end()
    if len(found) < 2:
        return "".join(found)
    return text[begin:end]


def _sentence(text: str) -> str:
    """The first sentence of a statement, up to where it gives reasons."""
    found = _SENTENCE.match(text)
    sentence = found.group() if found else ""
    formulas = list(_FORMULA.finditer(sentence))
    if len(formulas) == 1 and _is_formula(_content(formulas[0])):
        return _content(formulas[0])
    return _REASON.split(sentence)[0]


def _content(formula: re.Match[str]) -> str:
    return next(filter(None, formula.groups()))


def _is_formula(content: str) -> bool:
    """Whether dollar signs enclose a formula, or are those of two sums of money."""
    bare = re.sub(r"\\[A-Za-z]+", "", TEXT.sub("", content)).strip()
    return not re.search(r"(?<![A-Za-z])[A-Za-z]{2,} [A-Za-z]|[A-Za-z]{5,}|[-+*/=(,]\Z", bare)


def _last_number(text: str, units: Collection[str]) -> str:
    """The last number near the end of a text, or its last formula if that is later; a bold one of its line first."""
    text = _without_headings(text)[-2 * _NEAR :]
    if _GIVES_UP.search(text, max(0, len(text) - 200)):
        return ""
    formulas = _last_formulas(text)
    every = _meant(text, units)
    if formulas and (not every or formulas[-1].end() >= every[-1].end):
        return _number_in_formula(_content(formulas[-1]), units)
    if not every:
        return "" if re.search(r"\d", text) else in_words(text[-_NEAR:]) or ""
    start, end = text.rfind("\n", 0, every[-1].start) + 1, text.find("\n", every[-1].end)
    line = text[start : end if end >= 0 else len(text)]
    bold = [found for mark in _BOLD.findall(line) if (found := quantities(mark, units))]
    if len(bold) == 1 and len(bold[0]) == 1:
        return bold[0][0].text
    return (_meant(_ASIDE.sub("", line), units) or every)[-1].text


def _meant(text: str, units: Collection[str]) -> list[Quantity]:
    """The numbers of a text without those that it rules out ("not 72")."""
    markers = {marker.start(1) for marker in _MARKER.finditer(text)}
    every = [found for found in quantities(text, units) if found.start not in markers]
    return [found for found in every if not _is_ruled_out(text, found.start)]


def _last_formulas(text: str) -> list[re.Match[str]]:
    """The formulas near the end of a text without those that it rules out."""
    found = _FORMULA.finditer(text, max(0, len(text) - _NEAR))
    return [each for each in found if _is_formula(_content(each)) and not _is_ruled_out(text, each.start())]


def _is_ruled_out(text: str, place: int) -> bool:
    return _NOT_MEANT.search(text, max(0, place - 60), place) is not None


def _without_headings(text: str) -> str:
    kept = {line.start() for line in _hash_lines(text)}
    return _HASH.sub(lambda line: line.group() if line.start() in kept else "", text)


def _last_of_all(text: str) -> str:
    """The last formula, where nothing but words follows it, or else the last number."""
    numbers = [found for found in _PLAIN.finditer(text) if not _is_ruled_out(text, found.start())]
    formulas = _last_formulas(text)
    if formulas and (not numbers or formulas[-1].end() >= numbers[-1].end()):
        return tidy(_content(formulas[-1]).rpartition("=")[2])
    return tidy(numbers[-1].group()) if numbers else ""
