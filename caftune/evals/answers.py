r"""The final answer in a completion in maths, and numbers as people write them.

The final answer is the first of these that a completion has and that can be an answer:

1. the last \boxed{...} (the innermost; boxes joined by "and", "or", a comma are one answer);
2. the number on the first line after ####, as GSM8K's solutions end; before the box, if it comes after it. Numbered headings
   (#### 1 ..., #### 2 ..., #### 3. Add) do not count;
3. the contents of <answer>; the text after "answer is" or "final answer:", the last one first; then a line that begins with
   "Answer:";
4. the last formula or number; if its line has one in bold type, that.

If the model takes back what it said ("I made a mistake", "that is wrong"), only what follows counts, if it has a number. An
unclosed box is a broken answer: neither it nor what follows counts. If a number is wanted, other text is skipped, and
several numbers are UNCLEAR. Otherwise words around an answer ("18 dollars", "18 in total") and spacing are removed.

What follows a number decides what it is: "72 clips", "72, in total", "72 (6 boxes of 12)" are 72; "72 or 73", "72-74", "72:30"
and "72 plus 3" are UNCLEAR; "72 + 3" and "72x" are expressions, returned unchanged; of "72 = 6*12", 72.
"""

import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

UNCLEAR = "?"  # a text with several numbers, none of them the answer
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_LETTERS = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}
_VULGAR = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞↉"
_THIN = "\u00a0\u2007\u2008\u2009\u202f"
_GROUP = rf"(?:\{{,\}}|,\\!\s?|\\[,!; ]|[,'’ {_THIN}])"
_WHOLE = rf"\d{{1,3}}(?:{_GROUP}\d{{3}})+(?!\d)|\d{{1,2}}(?:,\d\d)+,\d{{3}}(?!\d)|\d+"
_CURRENCY = r"(?:(?:US|A|C|NZ)?\\?\$|USD\b|EUR\b|GBP\b|Rs\.?|[€£¥₹])"
_TEN = r"\s?(?:x|×|\*|\\times|\\cdot)\s?10\s?(?:\^|\*\*)\s?\{?(?P<power>-?\d+)\}?"
NUMBER = re.compile(
    rf"(?P<sign>[-+]\s?|–|(?:negative|minus)\s)?{_CURRENCY}?\s?(?P<inner>-)?"
    rf"(?:(?P<whole>{_WHOLE})(?P<part>\.\d+|,\d{{1,2}}(?![\d,]))?|(?P<bare>\.\d+)|(?P<alone>[{_VULGAR}]))"
    rf"(?:\s?/\s?(?P<below>\d+)(?![\d.]*\s*/)|(?:\s|\sand\s)(?P<top>\d+)/(?P<bottom>\d+)|\s?(?P<vulgar>[{_VULGAR}])|"
    rf"\sand\s(?P<words>(?:a|one)\s(?:half|quarter|third)|three\squarters)\b|"
    rf"[eE](?P<exponent>[-+]?\d+)(?![\d.])|{_TEN})?(?![\d]|,\d|\.\d)"
)
_SCALE = re.compile(
    rf"\s?\\?(?:text\{{\s*)?(?P<word>{'|'.join(SCALES)})s?\b\}}?|\s?(?P<letter>[kKMB])(?![A-Za-z'])", re.ASCII
)
_PERCENT = re.compile(r"\s?(?:\\?%|per\s?cent\b)", re.IGNORECASE)
_PARTS = {"half": Fraction(1, 2), "quarter": Fraction(1, 4), "third": Fraction(1, 3), "quarters": Fraction(3, 4)}

# What follows a number and makes it one of several: "72 or 73", "72, 73", "72:30", "70 to 72", "72-74", "72 plus 3".
_MONEY = rf"{_CURRENCY}?\s?-?\d"
_MEASURE = (
    r"(?:hours?|hrs?|minutes?|mins?|seconds?|days?|weeks?|months?|years?|feet|foot|ft|dollars?|pounds?|lbs?|kg|km|m)"
)
_LISTED = re.compile(
    rf"\s*(?:[A-Za-z%$°]+\s+){{0,2}}(?:or|and)\s+(?:(?:about|maybe|perhaps|possibly)\s+)?{_MONEY}|\s*,\s*(?:or\s+)?(?:(?:maybe|perhaps|possibly)\s+)?{_MONEY}|:\d|"
    rf"\s*(?:[;:]|,\s*and\b)\s*{_MONEY}[\d.,]*\s*(?:[.;]|\Z)|\s+{_MEASURE}\s+\d|"
    rf"\s*(?:(?!due|up|compared|added|close|equal|next|thanks|according)[A-Za-z%$]+\s+)?(?:to|through|versus|vs\.?)\s+{_MONEY}|"
    rf"[–-]{_MONEY}|\s–\s?{_MONEY}[\d.,]*\s*\Z|"
    rf"\s*(?:times|plus|minus|multiplied by|divided by|over|(?<=[%t]\s)of)\s+(?:the\s+)?{_MONEY}"
)
# What makes a number a side of an equation ("72 clips = 6 dozen") or a part of an expression ("72x").
_EQUALS = re.compile(r"(?<![<>!=])=(?!=)|≈|\\approx")
_THEN_EQUALS = re.compile(r"\s*(?:[A-Za-z$%*)°]+\s*){0,3}(?<![<>!])(?:=|≈|\\approx)")
_EXPRESSION = re.compile(
    r"\s*(?:[-+*/×÷·^<>≤≥±]|\*\*|x(?=\s?\d)|\\times|\\cdot|\\div|\\pm)\s*\(*\$?[\d(]|\s?\^\s?\{|[²³]|\("
    r"|\s*[πτ√]|\s?(?![mgshlLCFWVJN]\b)[a-zA-Z](?=\s*(?:[-+.,;)$*/^]|\Z))"
    r"|\s*\\(?!text|mathrm|mbox|textbf|mathbf|quad|[,;!: ()\[\]%$\\]|[Cc]irc)"
)
# A formula without dollar signs: its first number is a part of it.
_COMMAND = re.compile(r"-?\s?\\(?:[dtc]?frac|sqrt|d?binom|pi|log|ln)(?![A-Za-z])")
_ANOTHER = re.compile(r"\s(?:or|and)\s+[-$]*[\\\d]")
# What may stand before the number of a statement ("it is about 72"), and what makes it another one ("more than 72").
_NEUTRAL = re.compile(
    r"(?:[\s:*_=>≈~(\[{]|\\[(\[]|\\(?:approx|text|mathbf|textbf|left|displaystyle)\b|\$(?=\s*\\?[\w({-])|[a-zA-Z]\w?\s*=(?!=)"
    r"|(?:is|are|was|it|will|would|be|going|to|the|a|an|just|simply|only|exactly|about|"
    r"approximately|around|roughly|precisely|therefore|thus|hence|then|so|indeed|clearly|now|still|also|again|equals?|total|of|at|"
    r"least|most|number|amount|sum|final|answer|correct|equal|as|follows)\b[,:]?)*",
    re.IGNORECASE,
)
_DENIED = re.compile(r"\b(?:not|never)\b|n't\b", re.IGNORECASE)
_COMPARED = re.compile(
    rf"\b(?:between|from|(?:more|less|fewer|greater|higher|lower) than|up to|over|under|below|above|nearly|almost)\s+{_MONEY}",
    re.IGNORECASE,
)
_MULTIPLIED = re.compile(rf"\b(?:half of|twice|double|triple)\s+{_MONEY}", re.IGNORECASE)
_MEANWHILE = re.compile(rf"\b(?:in|over|during|within|after|per|every|for)\s+\d+\s+{_MEASURE}\b")
_FURTHER = re.compile(r",?\s+(?:which|or|because|since|as)\b|,\s(?=[A-Za-z])")
_CLAUSE_END = re.compile(r"[.!?](?=\s|\Z)|[\n;]")


@dataclass(frozen=True)
class Quantity:
    """A number at a place of a text: `text` is a plain numeral (a decimal, a fraction, or one of these with %)."""

    text: str
    start: int
    end: int


def value_of(numeral: str) -> Fraction | None:
    """The value of a plain numeral, its % left aside; None for any other text."""
    try:
        return Fraction(numeral.strip().removesuffix("%").rstrip("\\ ")) if len(numeral) < 100 else None
    except (ValueError, ZeroDivisionError):
        return None


def quantity_at(text: str, place: int = 0, units: Collection[str] = ()) -> Quantity | None:
    """The number that begins at `place`; words of `units` ("dozen") are units and do not multiply it."""
    found = NUMBER.match(text, place)
    if found is None or len(found.group()) > 60:
        return None
    try:
        value, numeral = _value(found)
    except ZeroDivisionError:
        return None
    end = found.end()
    while (scale := _SCALE.match(text, end)) and (scale["word"] or found.end() == end):
        if scale["word"] not in units:
            value *= SCALES[scale["word"]] if scale["word"] else _LETTERS[scale["letter"]]
            numeral = None
        end = scale.end()
    if percent := _PERCENT.match(text, end):
        end = percent.end()
    shown = numeral if numeral is not None else str(value)
    return Quantity(shown + "%" * bool(percent), found.start(), end)


def _value(found: re.Match[str]) -> tuple[Fraction, str | None]:
    """The value, and where it is a plain decimal its own digits. Raises ZeroDivisionError."""
    part = (found["part"] or found["bare"] or "").replace(",", ".")
    digits = re.sub(r"\D", "", found["whole"] or "") + part
    value = (Fraction(digits or "0") + _further(found)) / int(found["below"] or 1)
    power = int(found["exponent"] or found["power"] or 0)
    is_negative = (found["sign"] or "+")[0] in "-–nm" or bool(found["inner"])
    is_plain = found.end() == max(found.end("whole"), found.end("part"), found.end("bare"))
    value *= (-1 if is_negative else 1) * Fraction(10) ** max(-40, min(power, 40))
    return value, "-" * is_negative + digits if is_plain else None


def _further(found: re.Match[str]) -> Fraction:
    """The fraction of a mixed number."""
    if found["top"]:
        return Fraction(int(found["top"]), int(found["bottom"]))
    if found["words"]:
        return _PARTS[found["words"].split()[1]]
    signs = (found["vulgar"] or "") + (found["alone"] or "")
    return Fraction(unicodedata.numeric(signs)).limit_denominator(100) if signs else Fraction(0)


def stated_number(text: str, units: Collection[str] = (), *, is_loose: bool = True) -> str | None:
    """The number that a statement gives ("about 72 clips, since ..."): a numeral, an expression, UNCLEAR, or None for none.

    Args:
        is_loose: the number may follow any words, if it is the only one in its sentence.
    """
    place = _end_of(_NEUTRAL, text)
    if _COMMAND.match(text, place) and not re.search(r"\$|\\[(\[]", text[:place]):
        return UNCLEAR if _ANOTHER.search(_clause(text, place)) else _expression(text, place, units)
    found = quantity_at(text, place, units) or quantity_at(text, max(0, place - 1), units)
    if found is not None:
        return _settled(text, found, units)
    clause = _clause(text, place)
    return _among_words(clause, units) if is_loose else None


def _end_of(pattern: re.Pattern[str], text: str) -> int:
    """Where the pattern ends that the text begins with."""
    found = pattern.match(text)
    return found.end() if found else 0


def _clause(text: str, place: int) -> str:
    return _CLAUSE_END.split(text[place:], maxsplit=1)[0]


def _settled(text: str, found: Quantity, units: Collection[str]) -> str:
    """A number that a statement begins with, unless what follows makes it an expression or one of several."""
    if _THEN_EQUALS.match(text, found.end):
        return _side(_clause(text, found.start), units) or found.text
    if _EXPRESSION.match(text, found.end):
        return _expression(text, found.start, units)
    return UNCLEAR if _LISTED.match(text, found.end) else found.text


def _expression(text: str, place: int, units: Collection[str]) -> str:
    """The expression that begins at `place`, or what it equals where that is a number."""
    clause = _clause(text, place)
    return (_side(clause, units) if _EQUALS.search(clause) else None) or _FURTHER.split(clause)[0].rstrip("* \t$")


def _side(clause: str, units: Collection[str]) -> str | None:
    """The last side of an equation, where it is a number."""
    last = _EQUALS.split(clause)[-1]
    found = quantity_at(last, _end_of(_NEUTRAL, last), units)
    if found is None or _EXPRESSION.match(last, found.end):
        return None
    return UNCLEAR if _LISTED.match(last, found.end) else found.text


def _among_words(clause: str, units: Collection[str]) -> str | None:
    """The number of a sentence that begins with words: the one after the last equals sign, or the only one."""
    if _COMPARED.search(clause):
        return UNCLEAR if quantities(clause) else None
    if _DENIED.search(clause):
        return None
    if _EQUALS.search(clause) and (side := _side(clause, units)):
        return side
    every = quantities(_MEANWHILE.sub("", clause), units) or quantities(clause, units)
    if len({each.text for each in every}) == 1:
        if _MULTIPLIED.search(clause):
            return UNCLEAR
        return every[-1].text if not _EXPRESSION.match(clause, every[-1].end) else None
    return None if every else in_words(clause, is_first=True)


def quantities(text: str, units: Collection[str] = ()) -> list[Quantity]:
    """All separate numbers of a text: not those within words (B12) or after other digits (3:45)."""
    every, place = [], 0
    while found := _BEGINS.search(text, place):
        quantity = quantity_at(text, found.start(), units)
        if quantity is not None:
            every.append(quantity)
        place = quantity.end if quantity is not None else found.end()
    return every


_BEGINS = re.compile(
    rf"(?<![A-Za-z0-9_.,:/^])(?:[-–](?=[\d.$])|(?:negative|minus)\s(?=\d))?{_CURRENCY}?\s?-?(?:\.?\d|[{_VULGAR}])[\d]*"
)

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_SPELT = {word: value for value, word in enumerate(_ONES.split(" "))}
_SPELT |= {word: 10 * value for value, word in enumerate(_TENS.split(" "), start=2)}
_ONE_WORD = rf"(?:{'|'.join(sorted(_SPELT, key=len, reverse=True))})\b"
_SPELT_OUT = re.compile(
    rf"\b(?P<sign>(?:negative|minus)\s)?(?P<number>{_ONE_WORD}(?:[\s-](?:and\s(?={_ONE_WORD}))?(?:{_ONE_WORD}|(?:{'|'.join(SCALES)})\b))*)"
    r"(?:\sand\s(?:a|one|three)\s(?P<part>half|third|quarters?)\b)?",
    re.IGNORECASE,
)


def in_words(text: str, *, is_first: bool = False) -> str | None:
    """The last number that a text spells out ("seventy-two"), "one" alone aside; or the one it begins with.

    >>> in_words("She has one hundred and seventy-two clips.")
    '172'
    """
    every = [found for found in _SPELT_OUT.finditer(text) if found.group().lower() != "one"]
    if not every or (is_first and text[: every[0].start()].strip(" \t:*") != ""):
        return None
    found = every[0] if is_first else every[-1]
    value = _spelt(re.findall("[a-z]+", found["number"].lower())) + _PARTS.get((found["part"] or "").lower(), 0)
    return str(-value if found["sign"] else value)


def _spelt(words: Sequence[str]) -> Fraction:
    whole, part = 0, 0
    for word in words:
        if word in _SPELT:
            part += _SPELT[word]
        elif word in ("hundred", "dozen"):
            part *= SCALES[word]
        elif word in SCALES:
            whole, part = whole + part * SCALES[word], 0
    return Fraction(whole + part)


# Final answers

LONGEST_ANSWER = 1000
_MINUS = "\u2010\u2011\u2212\ufe63\uff0d"  # hyphens and minus signs that are not ASCII's
_PLAIN_SIGNS = str.maketrans(_MINUS + "０１２３４５６７８９．％＄＋", "-" * len(_MINUS) + "0123456789.%$+")
TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")

# Marks of an answer: a box, #### (and the headings that use it too), "the answer is", "Answer:".
_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox|framebox)\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_BETWEEN_BOXES = re.compile(r"[\s$]*(?:\\\))?\s*(?:,|,?\s*(?:\\text\{\s*)?(?:and|or)\s*\}?)\s*(?:\\\()?[\s$]*")
_HASH = re.compile(r"(?:^|(?<=\s))####(?!#)[ \t]*+(.*)$", re.MULTILINE)
_TITLED = re.compile(r"[*_ ]*\d{1,2}[.):][*_ ]+[A-Za-z(]")
_NUMBERED = re.compile(r"\d{1,2}(?![\d,./])")
_ANNOUNCED = re.compile(
    r"\b(?:answers?\**(?: (?:to|of|for) [^.\n]{1,80}?)?\**(?:,? (?:therefore|then|thus|indeed),?)?"
    r"\s+(?:(?:is|are|would be|should be|will be|comes to|equals)\b|=)|"
    r"final answer\**\s*:)[\s:*]*",
    re.IGNORECASE,
)
_LABELLED = re.compile(
    r"^[^A-Za-z0-9\n]{0,12}(?:final )?answer[*_ ]*:?[*_]*[ \t]*(?:\n\s*)?", re.IGNORECASE | re.MULTILINE
)
# What takes an answer back; what doubts it, if another is given then; what says before "the answer is" that it is not.
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
# Formulas, what joins two of them ("$3$ or $5$"), and sentences: where they end, where their reasons begin.
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
# Words, spacing and commas that are not part of an answer.
_LONG_WORD = re.compile(r"[A-Za-z][A-Za-z']{2,}[,;:]?")
_WORD = re.compile(rf"{_LONG_WORD.pattern}|(?:an?|as|at|by|in|is|it|of|on|or|so|to)[,;:]?", re.IGNORECASE)
_SPACING = re.compile(r"(?<!\\)\\[!,;: ]|\\(?:left|right|displaystyle)(?![A-Za-z])|\\?\$|~")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?%?")
_PLAIN = re.compile(r"(?:(?<![\w)])-)?\$?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:/\d+)?(?:\s?\\?%)?")
_MEANT = {"sqrt", "percent", "infinity", *SCALES}  # words that change a number
_EQUATION = re.compile(r"(?<![<>!\\])=")
# In a text without a mark: which numbers are not meant ("not 72", "2. Then", "(6 boxes)").
_ABOUT = re.compile(r"\A\s*(?:\\approx|≈)")
_ONLY_WORDS = re.compile(r"[A-Za-z ,-]*")
_ASIDE = re.compile(r"\([^()\n]{1,80}\)")
_NOT_MEANT = re.compile(
    r"(?:\bnot|n't|\bcannot|\bnever|\binstead of|\brather than|\bthan)\s+"
    r"(?:(?:be|equal|think|believe|that|the answer|it|is|a|an)\s+)*\Z",
    re.IGNORECASE,
)
_MARKER = re.compile(r"^[ \t>*_-]*(?:step\s+)?(\d{1,2})[.):](?=[*_\s]*[A-Za-z])", re.IGNORECASE | re.MULTILINE)
_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*")
_NEAR = 2 * LONGEST_ANSWER  # characters in which a formula is looked for
_PLACES = 20  # places where an answer is announced: the last ones


def final_answer(completion: str, *, is_number: bool = False, units: Collection[str] = ()) -> str | None:
    r"""The final answer of a completion, or None.

    Args:
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
    text = _not_taken_back(_with_plain_signs(completion))
    box, begin, text = _last_box(text)
    for found, kind in _candidates(text, box, begin):
        answer = _as_number(found, kind, units) if is_number else _as_anything(found, kind)
        if answer:
            return answer
    return (_last_number(text, units) if is_number else _last_of_all(text)) or None


def hash_answer(solution: str, units: Collection[str] = ()) -> str:
    """The number after ####, as at the end of GSM8K's solutions, or an empty text."""
    found = (_as_number(line[1], "hash", units) for line in _hash_lines(_with_plain_signs(solution)))
    return next(filter(None, found), "")


def _with_plain_signs(text: str) -> str:
    r"""The text with \n as line end, the minus sign as a hyphen, and digits and signs of full width as those of ASCII."""
    return "\n".join(text.translate(_PLAIN_SIGNS).splitlines())


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
    """The texts after ####, without headings: titles after "1." or "1)", and lines numbered 1, 2, ... in order."""
    lines, count = list(_HASH.finditer(text)), 0
    while count < len(lines) and (number := _NUMBERED.match(lines[count][1])) and number[0] == str(count + 1):
        count += 1
    if count == 1:  # "#### 1 clip" is an answer, unless there is another
        is_other = "\\boxed" in text or _ANNOUNCED.search(text)
        count = int(bool(is_other and re.search("[A-Za-z]", lines[0][1])))
    return [line for line in lines[count:] if not _TITLED.match(line[1])]


def _as_number(text: str, kind: str, units: Collection[str]) -> str:
    """The number that a marked text gives; empty where it gives none."""
    if kind == "box":
        return _number_in_formula(text, units) if len(text) <= LONGEST_ANSWER else text
    if (kind == "label" and not _is_short(text)) or _SAYS_NOTHING.match(text):
        return ""
    formula = _FORMULA.match(text, _end_of(_BEFORE_FORMULA, text))
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
    return found.text if found and re.fullmatch(r"( [A-Za-z]{3,}| per| of| a| in)*", bare[found.end :]) else ""


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
    place = begin = _end_of(_BEFORE_FORMULA, text)
    found: list[str] = []
    while (formula := _FORMULA.match(text, place)) and _is_formula(_content(formula)):
        found.append(_content(formula))
        end = place = formula.end()
        if joint := _JOINT.match(text, place):
            place = joint.end()
    return text[begin:end] if len(found) > 1 else "".join(found)


def _sentence(text: str) -> str:
    """The first sentence of a statement, up to where it gives reasons."""
    sentence = text[: _end_of(_SENTENCE, text)]
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
    kept = {line.start() for line in _hash_lines(text)}
    text = _HASH.sub(lambda line: line.group() if line.start() in kept else "", text)[-2 * _NEAR :]
    if _GIVES_UP.search(text, max(0, len(text) - 200)):
        return ""
    formulas = _last_formulas(text)
    every = _meant(text, units)
    if formulas and (not every or formulas[-1].end() >= every[-1].end):
        return _number_in_formula(_content(formulas[-1]), units)
    if not every:
        return "" if re.search(r"\d", text) else in_words(text[-_NEAR:]) or ""
    line = text[text.rfind("\n", 0, every[-1].start) + 1 :].partition("\n")[0]
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


def _last_of_all(text: str) -> str:
    """The last formula, if only words follow it, or else the last number."""
    numbers = [found for found in _PLAIN.finditer(text) if not _is_ruled_out(text, found.start())]
    formulas = _last_formulas(text)
    if formulas and (not numbers or formulas[-1].end() >= numbers[-1].end()):
        return tidy(_content(formulas[-1]).rpartition("=")[2])
    return tidy(numbers[-1].group()) if numbers else ""
