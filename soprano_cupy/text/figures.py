"""What is left of the figures: ordinals, decades, magnitudes, decimals, grouped and bare numbers."""

from __future__ import annotations

import re

from .numbers import MAX_NAMED_DIGITS, amount, bare, cardinal, ordinal, plural, spell_digits, two_digits, year
from .rules import DIGITS, NOT_INSIDE, NUMBER, WHOLE, replace, rules, say

_TOO_LONG = rf"[0-9]{{{MAX_NAMED_DIGITS + 1},}}"
_LONG = re.compile(rf"(?<=[0-9])\.(?P<decimals>{_TOO_LONG})|(?<![0-9]){_TOO_LONG}")
_SHARP = re.compile(r"(?<![A-Za-z0-9])([A-G])#(?![A-Za-z0-9#])")
_NUMBER_SIGN = re.compile(r"(?<![A-Za-z0-9#])# ?(?=[0-9])")
_ORDINAL = re.compile(rf"{NOT_INSIDE}({WHOLE})(?:st|nd|rd|th)(?![A-Za-z0-9])", re.IGNORECASE)
_DECADE = re.compile(r"(?<![\w.,])'?([0-9]{2,4})'?s(?![A-Za-z0-9])")
_SHORT_YEAR = re.compile(r"(?<![A-Za-z0-9])'([0-9]{2})(?![A-Za-z0-9])")
_MAGNITUDE = re.compile(rf"{NOT_INSIDE}({NUMBER})([kKMBT])(?![A-Za-z0-9])")
_MAGNITUDES = {"k": "thousand", "K": "thousand", "M": "million", "B": "billion", "T": "trillion"}
_GROUPED = re.compile(rf"{NOT_INSIDE}(?=[0-9]{{1,3}},)({WHOLE})(?P<decimals>\.{DIGITS}(?![0-9]))?")
_DECIMALS = rf"(?:\.{DIGITS}(?![0-9])){{1,16}}"
_DECIMAL = re.compile(rf"(?<![\w.])(?:{DIGITS})?{_DECIMALS}|(?<=[A-Za-z]){DIGITS}{_DECIMALS}")
_BARE = re.compile(DIGITS)


def _read_long(match: re.Match[str]) -> str:
    return f" point {spell_digits(match['decimals'])}" if match["decimals"] else spell_digits(match[0])


def _read_decade(match: re.Match[str]) -> str:
    digits = match[1]
    return plural(year(digits) if len(digits) == 4 else cardinal(digits))


def _read_decimal(match: re.Match[str]) -> str:
    whole, *parts = match[0].split(".")
    return " point ".join([cardinal(whole) if whole else "", *map(spell_digits, parts)]).strip()


LONG_FIGURES = rules(say(_LONG, _read_long, "0" * (MAX_NAMED_DIGITS + 1)))
"""Runs of digits too long to be named, spelled out, so that later passes meet only short ones."""

FIGURES = rules(
    replace(_SHARP, r"\1 sharp", "A#"),
    replace(_NUMBER_SIGN, "number ", ("#0", "# 0")),
    say(_ORDINAL, lambda match: ordinal(match[1].replace(",", "")), "0a 0A"),
    say(_DECADE, _read_decade, "0a 0'a"),
    say(_SHORT_YEAR, lambda match: two_digits(int(match[1])), "'00"),
    say(_MAGNITUDE, lambda match: f"{amount(match[1])} {_MAGNITUDES[match[2]]}", "0a 0A"),
    say(_GROUPED, lambda match: amount(match[0]), "0,"),
    say(_DECIMAL, _read_decimal, ".0"),
    say(_BARE, lambda match: bare(match[0]), "0"),
    marks="0#",
)
"""Every digit left in words; `#5` is a number and `C#` is a note."""
