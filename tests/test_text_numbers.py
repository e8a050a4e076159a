"""Number words, read back by an independent evaluator."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soprano_cupy.text.numbers import (
    MAX_NAMED_DIGITS,
    amount,
    bare,
    cardinal,
    fraction,
    ordinal,
    plural,
    spell_digits,
    year,
)


def cut(text: str) -> list[str]:
    return text.split()


SMALL = dict(
    zip(
        cut(
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
            "seventeen eighteen nineteen oh"
        ),
        [*range(20), 0],
        strict=True,
    )
)
TENS = {name: 10 * (i + 2) for i, name in enumerate(cut("twenty thirty forty fifty sixty seventy eighty ninety"))}
SCALES = {
    name: 1000**power
    for power, name in enumerate(
        cut(
            "thousand million billion trillion quadrillion quintillion sextillion septillion octillion nonillion "
            "decillion"
        ),
        start=1,
    )
}


def evaluate(said: str) -> int:
    """The value of a cardinal in words."""
    total = group = 0
    for word in said.replace(",", "").replace("-", " ").split(" "):
        if word in SCALES:
            total, group = total + group * SCALES[word], 0
        elif word == "hundred":
            group *= 100
        else:
            group += SMALL[word] if word in SMALL else TENS[word]
    return total + group


def test_every_cardinal_to_ten_thousand() -> None:
    for value in range(10_001):
        assert evaluate(cardinal(str(value))) == value


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(st.integers(0, 10**MAX_NAMED_DIGITS - 1))
def test_long_cardinals(value: int) -> None:
    said = cardinal(f"{value:036d}")
    assert evaluate(said) == value
    assert said == cardinal(str(value))


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(st.text("0123456789", min_size=1, max_size=5000))
def test_digits_of_any_length_are_spelled(digits: str) -> None:
    said = spell_digits(digits)
    assert "".join(str(SMALL[word.strip(",")]) for word in said.split(" ")) == digits


def test_cardinals_beyond_the_names_are_spelled() -> None:
    assert MAX_NAMED_DIGITS == 36
    assert cardinal("9" * 36).startswith("nine hundred ninety-nine decillion, ")
    assert cardinal("9" * 37) == "nine nine nine, " * 12 + "nine"
    assert cardinal("0" * 40 + "7") == "seven"
    assert len(cardinal("1" * 10_000)) == 10_000 * 4 - 1 + 3333


def test_every_year_reads_in_pairs() -> None:
    for value in range(1001, 3000):
        said = year(str(value))
        if value == 2000 or 2000 < value < 2010:
            assert said == cardinal(str(value))
        elif value % 100 == 0:
            assert said == f"{cardinal(str(value // 100))} hundred"
        else:
            first = cardinal(str(value // 100))
            assert said.startswith(f"{first} ")
            assert evaluate(said[len(first) + 1 :]) == value % 100
    assert year("1000") == "one thousand"
    assert year("3000") == "three thousand"
    assert year("02000") == "two thousand"


@pytest.mark.parametrize(
    ("digits", "said"),
    [
        ("1", "first"),
        ("2", "second"),
        ("3", "third"),
        ("5", "fifth"),
        ("8", "eighth"),
        ("9", "ninth"),
        ("12", "twelfth"),
        ("20", "twentieth"),
        ("21", "twenty-first"),
        ("112", "one hundred twelfth"),
        ("1000", "one thousandth"),
        ("123456789", "one hundred twenty-three million, four hundred fifty-six thousand, seven hundred eighty-ninth"),
    ],
)
def test_ordinals(digits: str, said: str) -> None:
    assert ordinal(digits) == said


def test_the_other_readings() -> None:
    assert bare("007") == "zero zero seven"
    assert bare("0") == "zero"
    assert bare("1999") == "nineteen ninety-nine"
    assert amount("1,234.50") == "one thousand, two hundred thirty-four point five zero"
    assert amount(".5") == "point five"
    assert amount("1999") == "one thousand, nine hundred ninety-nine"
    assert [fraction(1, 2), fraction(3, 4), fraction(5, 8)] == ["one half", "three quarters", "five eighths"]
    assert [plural("twenty"), plural("six"), plural("seven")] == ["twenties", "sixes", "sevens"]
