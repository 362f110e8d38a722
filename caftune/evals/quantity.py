r"""Numbers as people write them: 1,200 and 1 200, $18k, 2.5e3, 1 1/2, ½, 5 million, 72 cm^2.

What follows decides whether it is the number that is meant: words do not change it ("72 clips", "72, in total", "72 (6 boxes of
12)"), while "72 or 73", "72-74", "72, 73", "72:30" and "72 plus 3" are no single number, and "72 + 3" or "72x" are expressions,
which are returned unchanged. Of an equation the last side that is a number counts ("6*12 = 72", "72 = 6*12").
"""

import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction

UNCLEAR = "?"  # a text with several numbers, none of them the answer
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_LETTERS = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}
_VULGAR = "".join(
    chr(code) for code in range(0xBC, 0x2190) if unicodedata.decomposition(chr(code)).startswith("<fraction>")
)
_VULGAR = "".join(sign for sign in _VULGAR if unicodedata.numeric(sign, None) not in (None, 1.0))
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
_WORDS = {"half": Fraction(1, 2), "quarter": Fraction(1, 4), "third": Fraction(1, 3), "quarters": Fraction(3, 4)}

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
_EQUALS = re.compile(r"(?<![<>!=])=(?!=)|≈|\\approx")
_EQUATION = re.compile(r"\s*(?:[A-Za-z$%*)°]+\s*){0,3}(?<![<>!])(?:=|≈|\\approx)")
_EXPRESSION = re.compile(
    r"\s*(?:[-+*/×÷·^<>≤≥±]|\*\*|x(?=\s?\d)|\\times|\\cdot|\\div|\\pm)\s*\(*\$?[\d(]|[²³]|\("
    r"|\s*[πτ√]|\s?(?![mgshlLCFWVJN]\b)[a-zA-Z](?=\s*(?:[-+.,;)$*/^]|\Z))"
    r"|\s*\\(?!text|mathrm|mbox|textbf|mathbf|quad|[,;!: ()\[\]%$\\]|[Cc]irc)"
)
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
_CLAUSE = re.compile(r".*?(?=[.!?](?:\s|\Z)|[\n;]|\Z)", re.DOTALL)


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
    shown = numeral if numeral is not None else _plain(value)
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
    """The part of a mixed number behind its whole."""
    if found["top"]:
        return Fraction(int(found["top"]), int(found["bottom"]))
    if found["words"]:
        return _WORDS[found["words"].split()[1]]
    signs = (found["vulgar"] or "") + (found["alone"] or "")
    return Fraction(unicodedata.numeric(signs)).limit_denominator(100) if signs else Fraction(0)


def _plain(value: Fraction) -> str:
    return str(value)


def stated_number(text: str, units: Collection[str] = (), *, is_loose: bool = True) -> str | None:
    """The number that a statement gives ("about 72 clips, since ..."): a numeral, an expression, UNCLEAR, or None for none.

    Args:
        is_loose: the number may follow any words, if it is the only one in its sentence.
    """
    start = _NEUTRAL.match(text)
    place = start.end() if start else 0
    found = quantity_at(text, place, units) or quantity_at(text, max(0, place - 1), units)
    if found is not None:
        return _settled(text, found, units)
    clause = _clause(text, place)
    return _among_words(clause, units) if is_loose else None


def _clause(text: str, place: int) -> str:
    found = _CLAUSE.match(text, place)
    return found.group() if found else ""


def _settled(text: str, found: Quantity, units: Collection[str]) -> str:
    """A number that a statement begins with, unless what follows makes it an expression or one of several."""
    if _EQUATION.match(text, found.end):
        return _side(_clause(text, found.start), units) or found.text
    if _EXPRESSION.match(text, found.end):
        clause = _clause(text, found.start)
        return (_side(clause, units) if _EQUALS.search(clause) else None) or _FURTHER.split(clause)[0].rstrip("* \t$")
    return UNCLEAR if _LISTED.match(text, found.end) else found.text


def _side(clause: str, units: Collection[str]) -> str | None:
    """The last side of an equation, where it is a number."""
    last = _EQUALS.split(clause)[-1]
    start = _NEUTRAL.match(last)
    found = quantity_at(last, start.end() if start else 0, units)
    if found is None or _EXPRESSION.match(last, found.end):
        return None
    return UNCLEAR if _LISTED.match(last, found.end) else found.text


def _among_words(clause: str, units: Collection[str]) -> str | None:
    """The number of a sentence that begins with words: the one behind the last equals sign, or the only one."""
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
    value = _spelt(re.findall("[a-z]+", found["number"].lower())) + _WORDS.get(
        (found["part"] or "").lower(), Fraction(0)
    )
    return _plain(-value if found["sign"] else value)


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
