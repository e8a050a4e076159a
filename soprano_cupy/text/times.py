"""Times of day, durations and ratios: numbers joined by colons."""

from __future__ import annotations

import re

from .numbers import amount, cardinal, spell_digits, two_digits
from .rules import rules, say

_TIME = re.compile(
    r"(?=[0-9])(?<![0-9:])(?<![0-9][.,])(?P<hours>[0-9]{1,3}):(?P<minutes>[0-5][0-9])"
    r"(?::(?P<seconds>[0-5][0-9]))?(?P<decimals>\.[0-9]{1,9})?(?![0-9:])"
)
_RATIO = re.compile(r"(?=[0-9])(?<![0-9:])(?<![0-9][.,])([0-9]{1,9}):([0-9]{1,9})(?![0-9:])")


def _read_time(match: re.Match[str]) -> str:
    hours, minutes, seconds, decimals = match.group("hours", "minutes", "seconds", "decimals")
    if seconds:
        return _duration(hours, minutes, seconds + (decimals or ""))
    if decimals:  # a lap time: minutes, seconds and their decimals
        return f"{cardinal(hours)} {two_digits(int(minutes))} point {spell_digits(decimals[1:])}"
    if minutes != "00":
        return f"{cardinal(hours)} {two_digits(int(minutes))}"
    if 1 <= int(hours) <= 12:
        return f"{cardinal(hours)} o'clock"
    if int(hours) <= 24:
        return f"{cardinal(hours)} hundred"
    return f"{cardinal(hours)} minutes"  # no clock shows it: minutes and seconds of a stopwatch


def _duration(hours: str, minutes: str, seconds: str) -> str:
    parts = ((hours, "hour"), (minutes, "minute"), (seconds, "second"))
    said = [f"{amount(value)} {unit}{'' if amount(value) == 'one' else 's'}" for value, unit in parts if float(value)]
    return ", ".join(said) or "zero seconds"


TIMES = rules(
    say(_TIME, _read_time, "0:00"),
    say(_RATIO, lambda match: f"{cardinal(match[1])} to {cardinal(match[2])}", "0:0"),
    marks=":",
)
"""`8:05` (eight oh five), `13:00` (thirteen hundred), `1:30:00` (one hour, thirty minutes), `16:9` (to).

Minutes and seconds run to 59; colons between other numbers make a ratio.
"""
