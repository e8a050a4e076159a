"""English words for digits: cardinals, ordinals, years, decimals and digits one by one.

Everything works on strings of digits, so that no number is too long: beyond decillions the digits are
read one by one.
"""

from __future__ import annotations

from .rules import words

_UNITS = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS = words("zero ten twenty thirty forty fifty sixty seventy eighty ninety")
_SCALES = words(
    "thousand million billion trillion quadrillion quintillion sextillion septillion octillion nonillion decillion"
)
_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
MAX_NAMED_DIGITS = 3 * (len(_SCALES) + 1)
_DIGITS_PER_GROUP = 3  # of a number too long to be named: a pause after every third digit


def spell_digits(digits: str) -> str:
    """`"407"` → `"four zero seven"`; long runs pause after every third digit."""
    if len(digits) <= MAX_NAMED_DIGITS:
        return " ".join(_UNITS[int(digit)] for digit in digits)
    groups = (digits[i : i + _DIGITS_PER_GROUP] for i in range(0, len(digits), _DIGITS_PER_GROUP))
    return ", ".join(spell_digits(group) for group in groups)


def cardinal(digits: str) -> str:
    """`"12345"` → `"twelve thousand, three hundred forty-five"`; leading zeros count for nothing."""
    digits = digits.lstrip("0") or "0"
    if len(digits) > MAX_NAMED_DIGITS:
        return spell_digits(digits)
    if len(digits) <= 3:
        return _below_thousand(int(digits))
    padded = digits.zfill(-(-len(digits) // 3) * 3)
    groups = [int(padded[i : i + 3]) for i in range(0, len(padded), 3)]
    named = [f"{_below_thousand(group)} {_SCALES[len(groups) - 2 - i]}" for i, group in enumerate(groups[:-1]) if group]
    said = ", ".join(named)
    if not groups[-1]:
        return said
    return f"{said}{',' if groups[-1] >= 100 else ''} {_below_thousand(groups[-1])}"


def ordinal(digits: str) -> str:
    """`"21"` → `"twenty-first"`."""
    said = cardinal(digits)
    cut = max(said.rfind(" "), said.rfind("-")) + 1
    head, last = said[:cut], said[cut:]
    if last.endswith("y"):
        return f"{head}{last[:-1]}ieth"
    return head + _ORDINALS.get(last, f"{last}th")


def year(digits: str) -> str:
    """Four digits from 1001 to 2999 as a year: `"1905"` → `"nineteen oh five"`; anything else as a cardinal."""
    if len(digits) != 4 or not 1000 < int(digits) < 3000:
        return cardinal(digits)
    century, rest = divmod(int(digits), 100)
    if century == 20 and rest < 10:
        return cardinal(digits)
    if not rest:
        return f"{_below_thousand(century)} hundred"
    return f"{_below_thousand(century)} {two_digits(rest)}"


def two_digits(value: int) -> str:
    """The second half of a year or a time: `5` → `"oh five"`, `30` → `"thirty"`."""
    return f"oh {_UNITS[value]}" if value < 10 else _below_thousand(value)


def bare(digits: str) -> str:
    """Digits without a context: leading zeros are read out, four digits sound like a year."""
    return spell_digits(digits) if len(digits) > 1 and digits[0] == "0" else year(digits)


def amount(number: str) -> str:
    """A quantity, commas and decimals allowed: `"1,234.5"` → `"one thousand, two hundred thirty-four point five"`."""
    whole, point, decimals = number.replace(",", "").partition(".")
    said = cardinal(whole or "0") if whole or not point else ""
    return f"{said} point {spell_digits(decimals)}".strip() if decimals else said


def fraction(numerator: int, denominator: int) -> str:
    """`(3, 8)` → `"three eighths"`."""
    name = {2: "half", 4: "quarter"}.get(denominator) or ordinal(str(denominator))
    return f"{_below_thousand(numerator)} {name if numerator == 1 else plural(name)}"


def plural(number: str) -> str:
    """The plural of the last word of a number: `"nineteen ninety"` → `"nineteen nineties"`."""
    if number.endswith("y"):
        return f"{number[:-1]}ies"
    return number + ("es" if number.endswith("x") else "s")


def _below_thousand(value: int) -> str:
    hundreds, rest = divmod(value, 100)
    small = _UNITS[rest] if rest < 20 else _TENS[rest // 10] + (f"-{_UNITS[rest % 10]}" if rest % 10 else "")
    if not hundreds:
        return small
    return f"{_UNITS[hundreds]} hundred {small}" if rest else f"{_UNITS[hundreds]} hundred"
