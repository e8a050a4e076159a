"""Ranges, signs and operators between figures: `10-20`, `9-4 = 5`, `GPT-4`, `-40`, `3 * 4`, `x^2`."""

from __future__ import annotations

import re

from .characters import CURRENCY_SIGNS
from .rules import NUMBER

_MONEY_SIGN = f"[{re.escape(CURRENCY_SIGNS)}]"
_TIME_RANGE = re.compile(r"(?P<left>[0-9](?::[0-9]{2}(?: ?[AaPp]m)?| ?[AaPp]m)) ?- ?(?=[0-9])")
_RANGE = re.compile(
    rf"(?<![\w.,=*/+^-])(?<![=*/+-] )(?P<left>(?P<sign>{_MONEY_SIGN})?{NUMBER}[%kKMBT]?)-"
    rf"(?=(?P<right>{_MONEY_SIGN}?{NUMBER})(?! ?[=*/+^])(?![-]))"
)
_VARIABLE_MINUS = re.compile(r"(?<![A-Za-z0-9'-])(?P<name>[a-z])-(?=[0-9])")
_NAME_NUMBER = re.compile(r"(?<=[A-Za-z])-(?=[0-9])")
_NEGATIVE = re.compile(rf"(?<![\w.)-])(?<!{_MONEY_SIGN})-(?=\.?[0-9])")

_OPERATORS = {"*": "times", "/": "over", "+": "plus", "-": "minus"}
_MIXED_FRACTION = re.compile(r"(?<=[0-9]) (?=[0-9]{1,2}/[0-9]{1,3}(?![0-9/]))")
_OPERATOR = re.compile(rf"(?<=[0-9]) ?(?P<operator>[*/+-]) ?(?=-?{_MONEY_SIGN}?[0-9])")
_POWER = re.compile(r"(?<=[A-Za-z0-9)]) ?\^ ?(?P<minus>-)?(?=[A-Za-z0-9])(?P<small>[23](?!\.?[0-9]))?")
_POWERS = {"2": " squared ", "3": " cubed "}


def read_hyphens(text: str) -> str:
    """Hyphens before figures: "to" in a range, "minus" after a variable, nothing after a name.

    Beside an operator or an equals sign stands no range but a sum, which is left to `read_operators`.
    """
    text = _TIME_RANGE.sub(r"\g<left> to ", text)
    text = _RANGE.sub(_read_range, text)
    text = _VARIABLE_MINUS.sub(r"\g<name> minus ", text)
    return _NAME_NUMBER.sub(" ", text)


def read_operators(text: str) -> str:
    """Operators between figures by name, and the sign of negative numbers."""
    text = _MIXED_FRACTION.sub(" and ", text)
    text = _OPERATOR.sub(_read_operator, text)
    return _NEGATIVE.sub(" minus ", text)


def read_powers(text: str) -> str:
    """`x^2` → `x squared`; runs after the units, which may be squared too."""
    return _POWER.sub(_read_power, text)


def _read_range(match: re.Match[str]) -> str:
    sign = match["sign"] or ""  # `$5-10` is money on both sides
    return f"{match['left']} to {'' if match['right'].startswith(sign) else sign}"


def _read_operator(match: re.Match[str]) -> str:
    return f" {_OPERATORS[match['operator']]} "


def _read_power(match: re.Match[str]) -> str:
    if match["small"] and not match["minus"]:
        return _POWERS[match["small"]]
    return f" to the power of {'minus ' if match['minus'] else ''}{match['small'] or ''}"
