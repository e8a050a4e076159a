"""Any Unicode text to printable ASCII, newlines and the few signs that later passes read.

Scripts other than Latin are transliterated by `anyascii` (ISC licence). What has no sound, an emoji for example,
is left out and logged once per process.
"""

from __future__ import annotations

import logging
import re
import unicodedata

from .numbers import fraction
from .rules import CURRENCY_SIGNS, DEGREE

_SYMBOLS = {
    **dict.fromkeys("“”„‟«»‹›″〝〞〟", '"'),
    **dict.fromkeys("‘’‚‛′ʼ´", "'"),
    **dict.fromkeys("—―⸺⸻•‣◦▪▫●○■□·", " - "),
    **dict.fromkeys("\v\f\x85\u2028\u2029", "\n"),
    **dict.fromkeys("\t\x1c\x1d\x1e\x1f", " "),
    **dict.fromkeys("¿¡", ""),
    **{sign: sign for sign in CURRENCY_SIGNS + DEGREE + "\n"},
    "ا": "a",  # as a long vowel; anyascii leaves it out
    "\u200b": " ",  # zero-width space: marks the end of a word
    "…": "...",
    "−": " minus ",
    "×": " times ",
    "÷": " divided by ",
    "±": " plus or minus ",
    "≠": " not equal to ",
    "≤": " <= ",
    "≥": " >= ",
    "≈": " approximately ",
    "∞": " infinity ",
    "√": " square root of ",
    "→": " to ",
    "⇒": " implies ",
    "←": " left arrow ",
    "↑": " up arrow ",
    "↓": " down arrow ",
    "∗": "*",
    "⁄": "/",
    "∕": "/",
    "²": "^2",
    "³": "^3",
    "©": " copyright ",
    "®": " registered ",
    "™": " trademark ",
    "№": " number ",
    "§": " section ",
    "¶": " paragraph ",
    "‰": " per mille ",
    "℃": f"{DEGREE}C",
    "℉": f"{DEGREE}F",
}
_PLAIN_PUNCTUATION = frozenset(".,!?;:'\"`()[]{}-/%&@*_\\")
_VULGAR = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")

_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_DECOMPOSED = re.compile(
    "[^\u0300-\u036f\u3099\u309a][\u0300-\u036f\u3099\u309a]{1,3}|[\u1100-\u115f][\u1160-\u11a7][\u11a8-\u11ff]?"
)
_VULGAR_FRACTION = re.compile(rf"(?P<whole>[0-9] ?)?(?P<sign>[{_VULGAR}])")
_POWER = re.compile("(?<=[0-9)])[⁰¹²³⁴-⁹⁻]{1,36}")
_NUMBER_DASH = re.compile(r"(?<=[0-9mM]) ?[–‒] ?(?=[0-9])")
_GROUPING = re.compile("(?<=[0-9])[_\u00a0\u2009\u202f](?=[0-9]{3}(?![0-9]))")
_MICRO = re.compile("µ|μ(?=[A-Za-z])")
_LONE_GREEK = re.compile("(?<![\u0370-\u03ff\u1f00-\u1fff])[Α-ΖΘ-ΞΠΡΣ-Ωα-ζθ-ξπρσ-ω](?![\u0370-\u03ff\u1f00-\u1fff])")
_CARRIAGE_RETURN = re.compile(r"\r\n?")
_READABLE_AS_IT_IS = re.compile(r"[\n -%'-^`-~]*")  # neither an entity nor an underscore between figures

logger = logging.getLogger(__name__)


def to_readable(text: str) -> str:
    """`text` in printable ASCII, newlines, `CURRENCY_SIGNS` and `DEGREE`; every other character said, or logged."""
    if _READABLE_AS_IT_IS.fullmatch(text):
        return text
    text = _CARRIAGE_RETURN.sub("\n", text)
    text = _ENTITY.sub(_unescape, text)
    text = _GROUPING.sub(",", text)
    if not text.isascii():
        text = _DECOMPOSED.sub(lambda match: unicodedata.normalize("NFC", match[0]), text)
        text = _VULGAR_FRACTION.sub(_say_fraction, text)
        text = _POWER.sub(lambda match: "^" + match[0].translate(_SUPERSCRIPTS), text)
        text = _NUMBER_DASH.sub("-", text)
        text = _MICRO.sub("micro", text)
        text = _LONE_GREEK.sub(lambda match: f" {unicodedata.name(match[0]).split()[3].lower()} ", text)
    return text.translate(_READABLE)


def _unescape(match: re.Match[str]) -> str:
    from html import unescape

    return unescape(match[0])


def _say_fraction(match: re.Match[str]) -> str:
    numerator, _, denominator = unicodedata.normalize("NFKC", match["sign"]).partition("⁄")
    said = fraction(int(numerator), int(denominator))
    if not match["whole"]:
        return f" {said} "
    return f"{match['whole']} and {'a half' if said == 'one half' else said} "


class ReadableCharacters(dict[int, str]):
    """A table for `str.translate` that is filled as characters are met, each looked into once."""

    MAX_ENTRIES = 1 << 16  # hostile text cannot grow the table without end
    MAX_NAMED = 64  # nor the log

    def __init__(self) -> None:
        super().__init__({ord(char): said for char, said in _SYMBOLS.items()})
        self.unspeakable: set[int] = set()

    def __missing__(self, code: int) -> str:
        said = _said_as(chr(code))
        if said is None:
            self._report(code)
            said = "" if chr(code).isalpha() else " "
        if len(self) < self.MAX_ENTRIES:
            self[code] = said
        return said

    def _report(self, code: int) -> None:
        if code in self.unspeakable or len(self.unspeakable) > self.MAX_NAMED:
            return
        self.unspeakable.add(code)
        if len(self.unspeakable) > self.MAX_NAMED:
            logger.warning("further characters that cannot be spoken are left out without naming each")
            return
        name = unicodedata.name(chr(code), "unnamed character")
        logger.warning("U+%04X (%s) cannot be spoken and is left out; write it in words to hear it", code, name)


_READABLE = ReadableCharacters()


def _said_as(char: str) -> str | None:
    """ASCII for one character that is not in `_SYMBOLS`; `None` when it has no sound."""
    if " " <= char <= "~":
        return char
    category = unicodedata.category(char)
    if category == "Zs":
        return " "
    if category in ("Cf", "Me"):  # joiners, direction marks, soft hyphens, enclosing circles
        return ""
    if category[0] == "S":
        return _said_as_symbol(char)
    if category[0] in "LMNP":
        return _transliterate(char, category)
    return None


def _said_as_symbol(char: str) -> str | None:
    """Signs that are letters in disguise (Ⓐ, ㎞, fullwidth £): by Unicode's compatibility mapping."""
    plain = unicodedata.normalize("NFKC", char)
    if plain == char or not all(part.isalnum() or part in CURRENCY_SIGNS + "+<=>|~^()/" for part in plain):
        return None
    return "".join(_SYMBOLS.get(part) or _said_as(part) or "" for part in plain)


def _transliterate(char: str, category: str) -> str | None:
    from anyascii import anyascii

    said: str = anyascii(char)
    if category[0] == "P":
        return said if said and _PLAIN_PUNCTUATION.issuperset(said) else None
    if category[0] == "M":  # vowel signs sound, accents that could not be composed do not
        return said if said.isalpha() else ""
    if not said:
        return "" if category == "Lm" else None
    name = unicodedata.name(char, "")
    if name.startswith("HANGUL"):
        return said.lower()  # a word is several syllables
    if name.startswith("CJK"):
        return f" {said} "  # a syllable is a word
    return said
