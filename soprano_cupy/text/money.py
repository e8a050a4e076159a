"""Amounts of money: sign or code on either side, decimals as cents, magnitudes (`$1.5 million`)."""

from __future__ import annotations

import re
from typing import NamedTuple

from .numbers import amount, cardinal
from .rules import CURRENCY_SIGNS, DIGITS, NOT_INSIDE, WHOLE, alternatives, rules, say


class Currency(NamedTuple):
    """Names of a currency and of its hundredth; no hundredth where none is in use."""

    one: str
    many: str
    cent: str = ""
    cents: str = ""


def _dollar(land: str = "") -> Currency:
    return Currency(f"{land} dollar".strip(), f"{land} dollars".strip(), "cent", "cents")


SIGNS = {
    "$": _dollar(),
    "£": Currency("pound", "pounds", "penny", "pence"),
    "€": Currency("euro", "euros", "cent", "cents"),
    "¥": Currency("yen", "yen"),
    "₩": Currency("won", "won"),
    "₪": Currency("shekel", "shekels"),
    "₫": Currency("dong", "dong"),
    "₱": Currency("peso", "pesos", "centavo", "centavos"),
    "₴": Currency("hryvnia", "hryvnias"),
    "₦": Currency("naira", "naira", "kobo", "kobo"),
    "₹": Currency("rupee", "rupees", "paisa", "paise"),
    "₺": Currency("lira", "lira"),
    "₽": Currency("ruble", "rubles", "kopeck", "kopecks"),
    "₿": Currency("bitcoin", "bitcoins"),
    "฿": Currency("baht", "baht"),
    "¢": Currency("cent", "cents"),
}
_DOLLARS = {"US": "u s", "CA": "canadian", "C": "canadian", "AU": "australian", "A": "australian", "NZ": "new zealand"}
_CODES = {
    "USD": _dollar("u s"),
    "EUR": SIGNS["€"],
    "GBP": SIGNS["£"],
    "JPY": SIGNS["¥"],
    "CHF": Currency("swiss franc", "swiss francs"),
    "CAD": _dollar("canadian"),
    "AUD": _dollar("australian"),
    "INR": SIGNS["₹"],
}
_ALL = {
    **SIGNS,
    **_CODES,
    **{f"{prefix}$": _dollar(land) for prefix, land in _DOLLARS.items()},
}
_MAGNITUDES = {
    **{name: name for name in ("hundred", "thousand", "million", "billion", "trillion")},
    **dict.fromkeys(("k", "K"), "thousand"),
    **dict.fromkeys(("m", "M", "mn", "mm"), "million"),
    **dict.fromkeys(("b", "B", "bn"), "billion"),
    **dict.fromkeys(("t", "T", "tn"), "trillion"),
}
_AMOUNT = (
    rf"(?:(?P<continental>[0-9]{{1,3}}(?:\.[0-9]{{3}}){{1,11}},[0-9]{{2}}(?![0-9])|{DIGITS},[0-9]{{2}}(?!,?[0-9]))"
    rf"|(?P<number>{WHOLE}(?:\.{DIGITS})?|\.{DIGITS}))(?!\.?[0-9])"
)
_MAGNITUDE = rf"(?: ?(?P<magnitude>{alternatives(_MAGNITUDES)})(?![A-Za-z0-9]))?"
_PER = r"(?P<per> ?/ ?(?=[A-Za-z]))?"
_SIGN_FIRST = re.compile(
    rf"(?<![A-Za-z0-9])(?P<minus>-)?(?P<currency>{alternatives(_ALL)})(?P<minus_after>-)? ?{_AMOUNT}{_MAGNITUDE}{_PER}"
)
_SIGN_LAST = re.compile(rf"{NOT_INSIDE}{_AMOUNT}{_MAGNITUDE} ?(?P<currency>{alternatives(_ALL)})(?![A-Za-z0-9]){_PER}")


def _read_signed(match: re.Match[str]) -> str:
    return ("minus " if match["minus"] or match["minus_after"] else "") + _read(match)


def _read(match: re.Match[str]) -> str:
    currency = _ALL[match["currency"]]
    number = match["number"] or match["continental"].replace(".", "").replace(",", ".")
    whole, _, decimals = number.replace(",", "").partition(".")
    per = " per " if match["per"] else ""
    if match["magnitude"]:
        return f"{amount(number)} {_MAGNITUDES[match['magnitude']]} {currency.many}{per}"
    return _coins(whole.lstrip("0"), decimals, currency) + per


def _coins(whole: str, decimals: str, currency: Currency) -> str:
    """`whole` units without leading zeros, `decimals` as hundredths when they are that."""
    if decimals.strip("0") and (len(decimals) > 2 or not currency.cent):
        return f"{amount(f'{whole or 0}.{decimals}')} {currency.many}"
    hundredths = int(decimals[:2].ljust(2, "0"))
    said = []
    if whole or not hundredths:
        said.append(f"{cardinal(whole)} {currency.one if whole == '1' else currency.many}")
    if hundredths:
        said.append(f"{cardinal(str(hundredths))} {currency.cent if hundredths == 1 else currency.cents}")
    return ", ".join(said)


LONE_SIGNS = {sign: f" {SIGNS[sign].many if sign != '$' else 'dollar'} " for sign in CURRENCY_SIGNS}
"""What signs are called that stand by no amount."""

MONEY = rules(
    say(_SIGN_FIRST, _read_signed, "$", names=_CODES),
    say(_SIGN_LAST, _read, "$", names=_CODES),
    marks="0",
)
"""`£3.50` → `three pounds, fifty pence`; `$1.5 million` → `one point five million dollars`."""
