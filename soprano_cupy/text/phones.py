"""Telephone numbers and other groups of digits that are read digit by digit."""

from __future__ import annotations

import re

from .numbers import spell_digits
from .rules import rules, say

_INTERNATIONAL = re.compile(r"(?<![\w+])\+[0-9][0-9 .()-]{6,22}[0-9](?![0-9])")
_AMERICAN = re.compile(
    r"(?<![\w+])(?<![0-9][.,-])(?:\+?[01][-. ])?(?:\([0-9]{3}\)[-. ]?|[0-9]{3}[-. ])"
    r"[0-9]{3}[-. ]?[0-9]{4}(?![0-9])(?![.,-][0-9])"
)
_LOCAL = re.compile(r"(?<![\w+/-])(?<![0-9][.,])[0-9]{3}(?:[0-9]{2})?-[0-9]{4}(?![\w/-])(?![.,][0-9])")  # or a ZIP code
_HYPHENATED = re.compile(r"(?<![\w/-])(?<![0-9][.,])[0-9]{1,12}(?:-[0-9]{1,12}){2,8}(?![\w-])(?! ?[=*/+])")
_GROUP = re.compile(r"[0-9]{1,36}")
_WIDE_GAP = re.compile(r"[ .-]{2}|[ .(-]\)|\)\(")


def _read_international(match: re.Match[str]) -> str | None:
    digits = sum(char.isdigit() for char in match[0])
    if not 8 <= digits <= 15 or _WIDE_GAP.search(match[0].replace(") ", " ").replace(" (", " ")):
        return None
    return f"plus {_spell_groups(match[0])}"


def _spell_groups(number: str) -> str:
    return ", ".join(spell_digits(group) for group in _GROUP.findall(number))


PHONES = rules(
    say(_INTERNATIONAL, _read_international, "+0"),
    say(_AMERICAN, lambda match: _spell_groups(match[0]), ("000-0000", "000 0000", "000.0000", "0000000")),
    say(_LOCAL, lambda match: _spell_groups(match[0]), "000-0000"),
    say(_HYPHENATED, lambda match: _spell_groups(match[0]), "0-0"),
    marks="0",
)
"""`(555) 123-4567` → `five five five, one two three, four five six seven`, a pause between groups."""
