"""Titles, initials, short forms and acronyms in words."""

from __future__ import annotations

import re

from .rules import alternatives, replace, rules, words

# Read as titles with or without a stop, in any case of letters: they are nothing else.
_TITLES = {
    "mr": "mister",
    "mrs": "misess",
    "dr": "doctor",
    "drs": "doctors",
    "prof": "professor",
    "sgt": "sergeant",
    "capt": "captain",
    "messrs": "messers",
}
# Also words or units in lower case: read as titles when capitalised, with a stop and with more to follow.
_CAPITAL_TITLES = {
    "Ms": "miss",
    "Gen": "general",
    "Maj": "major",
    "Rev": "reverend",
    "Lt": "lieutenant",
    "Hon": "honorable",
    "Col": "colonel",
    "Cmdr": "commander",
    "Adm": "admiral",
    "Gov": "governor",
    "Sen": "senator",
    "Rep": "representative",
    "Pres": "president",
    "Mt": "mount",
    "Ft": "fort",
}
# Stand after what they belong to, so that their stop may also end the sentence.
_SUFFIXES = {
    "jr": "junior",
    "sr": "senior",
    "esq": "esquire",
    "ltd": "limited",
    "inc": "incorporated",
    "corp": "corporation",
    "co": "company",
    "ave": "avenue",
    "blvd": "boulevard",
    "rd": "road",
    "approx": "approximately",
    "dept": "department",
    "vs": "versus",
    "a.m": "am",
    "p.m": "pm",
    "e.g": "for example",
    "i.e": "that is",
}
_STOP_OPTIONAL = ("vs", "Jr", "Sr", "Ltd", "Inc")
_REFERENCES = {  # only before a figure
    "No": "number",
    "no": "number",
    "Nos": "numbers",
    "Nr": "number",
    "Fig": "figure",
    "fig": "figure",
    "Vol": "volume",
    "vol": "volume",
    "Ch": "chapter",
    "ch": "chapter",
    "p": "page",
    "pp": "pages",
}
_PHRASES = {"and/or": "and or", "w/o": "without", "w/": "with ", "c/o": "care of", "24/7": "twenty-four seven"}
_ACRONYMS = {"API": "a p i", "CLI": "c l i", "CPU": "c p u", "GPU": "g p u"}
_BYTES = {"KB": "kilobyte", "MB": "megabyte", "GB": "gigabyte", "TB": "terabyte", "Hz": "hertz", "kHz": "kilohertz"}
_WORDS = {
    "etc": "et cetera",  # its stop stays: a pause is in place there
    **_ACRONYMS,
    **{f"{name}s": f"{said}'s" for name, said in _ACRONYMS.items()},
    **_BYTES,
    **{f"{name}s": f"{said}s" for name, said in _BYTES.items() if name.endswith("B")},
}

# Words that begin a sentence rather than a name: `at 5 p.m. He left` against `the U.S. Army`.
_STARTERS = words(
    "A After All Although An And Any As At Because Before Both But By Each Every For From He Her Here His How "
    "However I If In It Its Many Meanwhile Most My No Not Now On Or Our Please She Since So Some Such That The "
    "Their Then There These They This Those To Today Tomorrow We What When Where Which While Who Why With You Your"
)
_SENTENCE_ENDS = re.compile(rf"[\"')\]]{{0,3}}(?:\n|$| [\"'(]?{alternatives(_STARTERS)}(?![A-Za-z]))")
_NAME_FOLLOWS = re.compile(r" ?[A-Z]")

_TITLE = re.compile(rf"\b({alternatives(_TITLES)})(?:(?P<stop>\.) ?|(?= [A-Z]))", re.IGNORECASE)
_CAPITAL_TITLE = re.compile(
    rf"\b({alternatives([*_CAPITAL_TITLES, *map(str.upper, _CAPITAL_TITLES)])})(?:\. ?(?=[A-Za-z])|(?<=Ms) (?=[A-Z]))"
)
_SUFFIX = re.compile(rf"\b({alternatives(_SUFFIXES)})(?P<stop>\.)", re.IGNORECASE)
_BARE_SUFFIX = re.compile(
    rf"(?<!/)\b({alternatives(_STOP_OPTIONAL)}|(?<=[a-z] )(?:Ave(?! Maria)|Blvd|Rd))\b(?!\.[A-Za-z])"
)
_SAINT = re.compile(r"\b[Ss][Tt](?P<stop>\.)(?! ?[0-9])|\bSt(?= [A-Z])|(?<=[a-z] )St\b")
_PLACE_BEFORE = re.compile(r"(?:\b[A-Z][a-z]{1,30}|[0-9](?:st|nd|rd|th)) $")
_REFERENCE = re.compile(rf"\b({alternatives(_REFERENCES)})\. ?(?=[0-9])")
_PHRASE = re.compile(rf"(?<![\w/]){alternatives(_PHRASES)}(?:(?<=w/)|(?![\w/]))")
_INITIALS = re.compile(
    r"(?<![A-Za-z0-9.])(?P<letters>(?:[A-Za-z]|Ph|Ed)(?:\.[A-Za-z]){1,16})(?P<stop>\.)?(?![A-Za-z0-9])"
)
_ACRONYM = re.compile(rf"\b(?:{alternatives(_WORDS)})\b")
_WORD = re.compile(r"[A-Za-z]+")
_HUMPS = re.compile(r"[A-Z][a-z]*")
_SAME_CAPITALS = re.compile(r"\b(?!III)(?:([A-Z])\1\1|www)\b")


def _stop_if_sentence_ends(match: re.Match[str]) -> str:
    """The stop of a short form, kept where it also ends the sentence."""
    return "." if match["stop"] and _SENTENCE_ENDS.match(match.string, match.end()) else ""


def _stop_if_line_ends(match: re.Match[str]) -> str:
    """The stop of a form that a name follows, kept where nothing follows."""
    return "." if match["stop"] and match.string[match.end() : match.end() + 1] in ("", "\n") else ""


def _read_saint(match: re.Match[str]) -> str:
    """`St` before a name is a saint, after a name a street."""
    before = match.string[max(0, match.start() - 32) : match.start()]
    ends = _SENTENCE_ENDS.match(match.string, match.end())
    if _PLACE_BEFORE.search(before) and (ends or not _NAME_FOLLOWS.match(match.string, match.end())):
        return "street" + _stop_if_sentence_ends(match)
    return "saint" + _stop_if_line_ends(match)


def _read_title(match: re.Match[str]) -> str:
    return f"{_TITLES[match[1].lower()]}{_stop_if_line_ends(match)} "


def _read_suffix(match: re.Match[str]) -> str:
    return _SUFFIXES[match[1].lower()] + _stop_if_sentence_ends(match)


def _read_initials(match: re.Match[str]) -> str:
    """`U.S.A.` → `U S A`, `Ph.D.` → `Ph D`; two letters without a stop between them at the end are a file or a site."""
    letters = match["letters"]
    if not match["stop"] and (letters.islower() or (len(letters) == 3 and not letters.isupper())):
        return match[0]
    return letters.replace(".", " ") + _stop_if_sentence_ends(match)


def _split_humps(word: str) -> str:
    if word.islower() or word.isupper() or not word[0].isupper():
        return word
    humps = _HUMPS.findall(word)
    if 1 < len(humps) == len(word) - 1 and word[-1] == "s":
        return f"{word[:-1]}'s"  # the plural of an acronym
    return " ".join(humps)


SHORT_FORMS = rules(
    replace(_PHRASE, lambda match: _PHRASES[match[0]], "/"),
    replace(_REFERENCE, lambda match: f"{_REFERENCES[match[1]]} ", ("a.0", "a. 0")),
    replace(_SAINT, _read_saint, names=["st"]),
    replace(_TITLE, _read_title, names=_TITLES),
    replace(_CAPITAL_TITLE, lambda match: f"{_CAPITAL_TITLES[match[1].capitalize()]} ", names=_CAPITAL_TITLES),
    replace(_SUFFIX, _read_suffix, ".a. .A.", names=_SUFFIXES),  # `a.m` is no word
    replace(_BARE_SUFFIX, lambda match: _SUFFIXES[match[1].lower()], names=[*_STOP_OPTIONAL, "Ave", "Blvd", "Rd"]),
    replace(_INITIALS, _read_initials, ".a .A"),
)
"""Short forms with their stops; read before the figures, since some stand before one."""

CAPITALS = rules(
    replace(_ACRONYM, lambda match: _WORDS[match[0]], names=_WORDS),
    replace(_SAME_CAPITALS, lambda match: " ".join(match[0]), "AAA", names=["www"]),
    replace(_WORD, lambda match: _split_humps(match[0]), "aA AAa"),
)
"""Acronyms by letter and words written in humps: `HTTPServer` → `H T T P Server`, `GPUs` → `g p u's`."""
