"""Names of days and months written short, ISO dates and dates in figures."""

from __future__ import annotations

import re

from .numbers import cardinal, ordinal, two_digits, year
from .rules import alternatives, replace, rules, say, words

_DAYS = {
    "Mon": "monday",
    "Tue": "tuesday",
    "Tues": "tuesday",
    "Wed": "wednesday",
    "Thu": "thursday",
    "Thur": "thursday",
    "Thurs": "thursday",
    "Fri": "friday",
    "Sat": "saturday",
    "Sun": "sunday",
}
_MONTHS = {
    "Jan": "january",
    "Feb": "february",
    "Mar": "march",
    "Apr": "april",
    "Jun": "june",
    "Jul": "july",
    "Aug": "august",
    "Sep": "september",
    "Sept": "september",
    "Oct": "october",
    "Nov": "november",
    "Dec": "december",
}
_NAMES = {**_DAYS, **_MONTHS}
_MONTH_BY_NUMBER = words("january february march april may june july august september october november december")

# Also words and first names: read as a day or a month only where the context is a date.
_ANY_CONTEXT = frozenset(_NAMES) - {"Mon", "Wed", "Sat", "Sun", "Jan", "Mar", "Jun"}
_BEFORE_PUNCTUATION = {"Mon": ".,;:!?", "Wed": ".,;:!?", "Sat": ".,;:!?", "Sun": ":"}

_WORD = alternatives({*_NAMES, *_NAMES.values(), "may"})
_NAME = re.compile(rf"\b({alternatives(_NAMES)})\b(\.?)")
_DATE_FOLLOWS = re.compile(rf"\.?,? ?(?:[0-9]|(?:and |or |to |& ?|[-/,] ?)?{_WORD}\b)", re.IGNORECASE)
_DATE_PRECEDES = re.compile(
    rf"(?:\b[0-9]{{1,4}}(?:st|nd|rd|th)?|\b{_WORD}\.?),?(?: and | or | to | & | of |[ /-])$", re.IGNORECASE
)
_PREPOSITION = re.compile(
    r"\b(?:on|in|by|of|until|till|since|from|before|after|every|each|next|last|this|during)(?: early| late| mid)? $",
    re.IGNORECASE,
)
_STOP_KEPT = re.compile(r"\n|$| [A-Z]")
_CONTEXT = 24  # characters looked at on either side of a name

_NOT_LONGER = r"(?![0-9/-])(?!\.[0-9])"
_ISO_DATE = re.compile(
    r"(?<![\w/.,-])(?P<year>[0-9]{4})(?P<separator>[-/])(?P<month>0?[1-9]|1[0-2])(?P=separator)"
    rf"(?P<day>0?[1-9]|[12][0-9]|3[01])(?:(?P<time>T(?=[0-9]{{2}}:))|{_NOT_LONGER})"
)
_ISO_MONTH = re.compile(rf"(?<![\w/.,-])(?P<year>[0-9]{{4}})-(?P<month>0[1-9]|1[0-2]){_NOT_LONGER}")
_FIGURES = re.compile(r"(?<![0-9/-])([0-9]{1,2})[/-]([0-9]{1,2})[/-]([0-9]{2}(?:[0-9]{2})?)(?![0-9/-])")


def _read_name(match: re.Match[str]) -> str:
    name, stop = match.groups()
    before = match.string[max(0, match.start() - _CONTEXT) : match.start()]
    after = match.string[match.end(1) : match.end(1) + _CONTEXT]
    if not _is_date_name(name, before, after):
        return match[0]
    keeps_stop = stop and _STOP_KEPT.match(after, 1)
    return _NAMES[name] + (stop if keeps_stop else "")


def _is_date_name(name: str, before: str, after: str) -> bool:
    if name in _ANY_CONTEXT or _DATE_FOLLOWS.match(after) or _DATE_PRECEDES.search(before):
        return True
    if after[:1] and after[0] in _BEFORE_PUNCTUATION.get(name, ""):
        return True
    ends = not after or not after[0].isspace() or after[0] == "\n"
    return bool(_PREPOSITION.search(before)) and (ends or (name != "Sun" and after[1:2].islower()))


def _month(match: re.Match[str]) -> str:
    return _MONTH_BY_NUMBER[int(match["month"]) - 1]


def _read_iso_date(match: re.Match[str]) -> str:
    return f"{_month(match)} {ordinal(match['day'])}, {year(match['year'])}" + (", " if match["time"] else "")


def _read_figures(match: re.Match[str]) -> str:
    """Day and month may stand in either order, so the figures are read as they stand."""
    first, second, last = match.groups()
    last = year(last) if len(last) == 4 else two_digits(int(last))
    return f"{cardinal(first)} dash {cardinal(second)} dash {last}"


DATES = rules(
    replace(_NAME, _read_name, names=_NAMES),
    say(_ISO_DATE, _read_iso_date, "0000-0 0000/0"),
    say(_ISO_MONTH, lambda match: f"{_month(match)} {year(match['year'])}", "0000-00"),
    say(_FIGURES, _read_figures, "0-0 0/0"),
)
"""Short names of days and months where they are meant as such, ISO dates, and dates in figures."""
