"""Ranges, signs and operators between figures: `10-20`, `9-4 = 5`, `GPT-4`, `-40`, `3 * 4`, `x^2`."""

from __future__ import annotations

import re

from .rules import CURRENCY_SIGNS, NUMBER, replace, rules

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


def _read_range(match: re.Match[str]) -> str:
    sign = match["sign"] or ""  # `$5-10` is money on both sides
    return f"{match['left']} to {'' if match['right'].startswith(sign) else sign}"


def _read_operator(match: re.Match[str]) -> str:
    return f" {_OPERATORS[match['operator']]} "


def _read_power(match: re.Match[str]) -> str:
    if match["small"] and not match["minus"]:
        return _POWERS[match["small"]]
    return f" to the power of {'minus ' if match['minus'] else ''}{match['small'] or ''}"


HYPHENS = rules(
    replace(_TIME_RANGE, r"\g<left> to ", ("-0", "- 0")),
    replace(_RANGE, _read_range, "-0 -. -$"),
    replace(_VARIABLE_MINUS, r"\g<name> minus ", "a-0"),
    replace(_NAME_NUMBER, " ", "a-0 A-0"),
    marks="-",
)
"""Hyphens before figures: "to" in a range, "minus" after a variable, nothing after a name.

Beside an operator or an equals sign stands no range but a sum, which is left to `OPERATORS`.
"""

OPERATORS = rules(
    replace(_MIXED_FRACTION, " and ", ["0 0"]),
    replace(_OPERATOR, _read_operator, ("0*", "0 *", "0/", "0 /", "0+", "0 +", "0-", "0 -")),
    replace(_NEGATIVE, " minus ", "-0 -."),
    marks="0",
)
"""Operators between figures by name, and the sign of negative numbers."""

POWERS = rules(replace(_POWER, _read_power, "^"))
"""`x^2` → `x squared`; read after the units, which may be squared too."""
