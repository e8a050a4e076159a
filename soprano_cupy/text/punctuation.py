"""Signs that are words, brackets and dashes that are pauses, and the tidy text that the tokenizer can encode."""

from __future__ import annotations

import re

from .money import LONE_SIGNS
from .rules import replace, rule, rules

# Patterns begin with a sign where they can, even those that look back at what stands before it: the search for
# a sign is many times faster than trying a pattern at every character.

ALPHABET = frozenset("abcdefghijklmnopqrstuvwxyz ',.!?-")
"""The characters of normalised text: each stands in the vocabulary of every published tokenizer."""

_PLURAL_IN_BRACKETS = re.compile(r"\((?<=[A-Za-z]\()(e?s)\)")
_CLOSING_BEFORE_STOP = re.compile(r"[)\]}](?=[.!?,\n]|$)")
_DOT_IN_WORD = re.compile(r"\.(?<=[A-Za-z]\.)(?=[A-Za-z])")
_DOT_SENTENCE = re.compile(r"\.(?<=[a-z]{2}\.)(?=[A-Z][a-z])")
_DOT_FIRST = re.compile(r"\.(?<![\w.!?,;:)\]}']\.)(?=[a-z]|[A-Z]{2})")
_COLON_IN_PATH = re.compile(r":(?<=[A-Za-z]:)(?=[\\/])")
_HASHTAG = re.compile(r"#(?=[A-Za-z])")
_DASH = re.compile(r"(?<=\S) -{1,2} (?=\S)|(?<=\w)--(?=\w)|(?<=\w)--(?= )")
_QUOTE_IN_WORD = re.compile(r"\"(?<=\w\")(?=\w)")

_PAIRS = (  # in their order: what of `=>=` is a pair depends on it
    ("<=", " less than or equal to "),
    (">=", " greater than or equal to "),
    ("!=", " not equal to "),
    ("->", " to "),
    ("=>", " to "),
    ("==", " equals "),
    ("~~", " "),
    ("::", " "),
    ("~/", " tilde slash "),
    ("&&", " and "),
)
_SIGNS = {
    "<": " less than ",
    ">": " greater than ",
    "=": " equals ",
    "@": " at ",
    "&": " and ",
    "%": " percent ",
    "+": " plus ",
    "\\": " backslash ",
    "/": " slash ",
    "~": " about ",
    "#": " hash ",
    "^": " caret ",
    "°": " degrees ",
    ":": ".",
    ";": ",",
    "|": ",",
    "_": " ",
    "*": " ",
    "`": "",
    '"': "",
    "(": ", ",
    "[": ", ",
    "{": ", ",
    ")": ", ",
    "]": ", ",
    "}": ", ",
    **LONE_SIGNS,
}

_SIGN = re.compile(f"[{re.escape(''.join(_SIGNS))}]")

_LOOSE_HYPHEN = re.compile(r"-(?:(?<![a-z]-)|(?![a-z]))")
_LOOSE_APOSTROPHE = re.compile(r"'(?<![a-z]')(?![a-z])")
_SPACE_BEFORE_STOP = re.compile(r" (?=[.,!?])")
_STOP_RUN = re.compile(r"[.,!?][.,!?]+")
_STOP_IN_WORD = re.compile(r"[.,!?](?=[a-z'])")
_REPEATED = re.compile(r"(?<![a-z])[xvlcdm]{0,8}iii(?![a-z])|([a-z])\1{2,}")
_TRIPLE = re.compile(r"([a-z])\1\1")


def _strongest(stops: str) -> str:
    """One mark for a run of marks; an ellipsis stays."""
    for mark in ("?", "!", "...", "."):
        if mark in stops:
            return mark
    return ","


def _read_pairs(text: str) -> str:
    for pair, said in _PAIRS:
        text = text.replace(pair, said)
    return text


def _single_spaces(text: str) -> str:
    return " ".join(text.split())


def _shorten_repeats(text: str) -> str:
    """No letter more than twice in a row; Roman numerals keep their three."""
    if not _TRIPLE.search(text):
        return text
    return _REPEATED.sub(lambda match: 2 * match[1] if match[1] else match[0], text)


DOTS = rules(
    replace(_DOT_SENTENCE, ". ", "aa.Aa"),
    replace(_DOT_IN_WORD, " dot ", ".a .A"),
    replace(_DOT_FIRST, "dot ", ".a .AA"),
)
"""Dots inside words: "dot" in names of files and sites, a stop where a space was forgotten."""

MARKS = rules(
    replace(_PLURAL_IN_BRACKETS, r"\1", "(a"),
    replace(_COLON_IN_PATH, " colon ", ":/ :\\"),
    replace(_HASHTAG, " hashtag ", "#a #A"),
    replace(_DASH, ", ", (" - ", "--")),
    replace(_CLOSING_BEFORE_STOP, "", ") ] }"),
    replace(_QUOTE_IN_WORD, " ", '"'),
    rule(_read_pairs, "= > ~~ ~/ :: &&"),
    replace(_SIGN, lambda match: _SIGNS[match[0]]),
)
"""Signs in words, dashes and brackets as pauses; what is left are letters, spaces, newlines and `',.!?-`."""

TIDY = rules(
    rule(str.lower),
    replace(_LOOSE_HYPHEN, " ", "-"),
    replace(_LOOSE_APOSTROPHE, "", "'"),
    rule(_single_spaces),
    replace(_SPACE_BEFORE_STOP, "", (" .", " ,", " !", " ?")),
    replace(_STOP_RUN, lambda match: _strongest(match[0])),
    replace(_STOP_IN_WORD, lambda match: f"{match[0]} "),
    rule(_shorten_repeats),
)
"""Lower case, single spaces, one mark of punctuation at a time and no letter more than twice in a row."""
