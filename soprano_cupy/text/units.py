"""Numbers with a unit of measurement: `5 km/h`, `20°C`, `3 m^2`, `6'2"`."""

from __future__ import annotations

import re

from .numbers import amount, cardinal
from .rules import DEGREE, NOT_INSIDE, NUMBER, alternatives, rules, say

_METRIC = {"m": "meter", "g": "gram", "L": "liter", "l": "liter", "W": "watt", "Wh": "watt hour", "V": "volt"}
_PREFIXES = {"k": "kilo", "c": "centi", "m": "milli", "micro": "micro", "n": "nano", "": ""}
_PLURAL_AS_SINGULAR = {  # as the reference reads them: `10KB` is "ten kilobyte"
    "Hz": "hertz",
    "kHz": "kilohertz",
    "MHz": "megahertz",
    "GHz": "gigahertz",
    "THz": "terahertz",
    "KB": "kilobyte",
    "kB": "kilobyte",
    "MB": "megabyte",
    "GB": "gigabyte",
    "TB": "terabyte",
    "px": "pixels",
    "dB": "decibels",
    "fps": "frames per second",
    "rpm": "revolutions per minute",
    "mph": "miles per hour",
    "kph": "kilometers per hour",
    "kmh": "kilometers per hour",
    "bpm": "beats per minute",
    "dpi": "dots per inch",
    "ppm": "parts per million",
    "psi": "p s i",
    f"{DEGREE}C": "degrees celsius",
    f"{DEGREE}F": "degrees fahrenheit",
    f"{DEGREE}K": "kelvin",
}
_UNITS = {
    **{prefix + unit: stem + name for prefix, stem in _PREFIXES.items() for unit, name in _METRIC.items()},
    "MW": "megawatt",
    "GW": "gigawatt",
    "mAh": "milliampere hour",
    "ms": "millisecond",
    "micros": "microsecond",
    "ns": "nanosecond",
    "s": "second",
    "sec": "second",
    "secs": "second",
    "min": "minute",
    "mins": "minute",
    "h": "hour",
    "hr": "hour",
    "hrs": "hour",
    "mi": "mile",
    "yd": "yard",
    "yds": "yard",
    "lb": "pound",
    "lbs": "pound",
    "kbps": "kilobit per second",
    "Mbps": "megabit per second",
    "Gbps": "gigabit per second",
    "acre": "acre",
    DEGREE: "degree",
}
_IRREGULAR = {"ft": ("foot", "feet"), "oz": ("ounce", "ounces")}
_DOTTED = ("ft", "oz", "lb", "lbs", "yd", "yds", "mi", "hr", "hrs", "min", "mins", "sec", "secs")
_SPACED_ONLY = frozenset(("s",))  # "5s" is more often a model's name than five seconds
_PER = {
    "s": "second",
    "sec": "second",
    "min": "minute",
    "h": "hour",
    "hr": "hour",
    "d": "day",
    "wk": "week",
    "mo": "month",
    "yr": "year",
}

_SYMBOLS = (*_PLURAL_AS_SINGULAR, *_UNITS, *_IRREGULAR)
_MEASURE = re.compile(
    rf"{NOT_INSIDE}(?P<number>{NUMBER})(?P<space> ?)(?P<unit>{alternatives(_SYMBOLS)})"
    rf"(?:\^(?P<power>[23]))?(?![A-Za-z0-9^])"
    rf"(?P<dot>\.(?= [a-z0-9]|,))?(?:/(?P<per>[A-Za-z]{{1,12}})(?![A-Za-z0-9]))?"
)
_HEIGHT = re.compile(r"(?<![\w.'])([0-9]{1,2})' ?([0-9]{1,2})(?:\"|'')")


def _read_height(match: re.Match[str]) -> str:
    feet, inches = map(cardinal, match.groups())
    return f"{feet} {'foot' if feet == 'one' else 'feet'} {inches} {'inch' if inches == 'one' else 'inches'}"


def _read_measure(match: re.Match[str]) -> str | None:
    unit, dot = match["unit"], match["dot"] or ""
    if unit in _SPACED_ONLY and not match["space"]:
        return None
    power = {"2": "square ", "3": "cubic "}.get(match["power"] or "", "")
    per = f" per {_PER.get(match['per'], match['per'])}" if match["per"] else ""
    number = amount(match["number"])
    return f"{number} {power}{_name(unit, one=number == 'one')}{per}{dot if unit not in _DOTTED else ''}"


def _name(unit: str, *, one: bool) -> str:
    if unit in _PLURAL_AS_SINGULAR:
        return _PLURAL_AS_SINGULAR[unit].replace("degrees", "degree") if one else _PLURAL_AS_SINGULAR[unit]
    if unit in _IRREGULAR:
        return _IRREGULAR[unit][0 if one else 1]
    head, per, tail = _UNITS[unit].partition(" per ")
    return f"{head}{'' if one else 's'}{per}{tail}"


UNITS = rules(
    say(_HEIGHT, _read_height, ("0'0", "0' 0")),
    say(_MEASURE, _read_measure, (f"0{DEGREE}", f"0 {DEGREE}"), names=_SYMBOLS),  # `°C` is no word
    marks="0",
)
"""Amounts with their units in words; the text may hold `DEGREE` signs and powers written with `^`."""
