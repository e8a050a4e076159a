"""Signs that are words, brackets and dashes that are pauses, and the tidy text that the tokenizer can encode."""

from __future__ import annotations

import re

from .money import read_lone_signs

ALPHABET = frozenset("abcdefghijklmnopqrstuvwxyz ',.!?-")
"""The characters of normalised text: each stands in the vocabulary of every published tokenizer."""

_PLURAL_IN_BRACKETS = re.compile(r"(?<=[A-Za-z])\((e?s)\)")
_CLOSING_BEFORE_STOP = re.compile(r"[)\]}](?=[.!?,\n]|$)")
_DOT_IN_WORD = re.compile(r"(?<=[A-Za-z])\.(?=[A-Za-z])")
_DOT_SENTENCE = re.compile(r"(?<=[a-z]{2})\.(?=[A-Z][a-z])")
_DOT_FIRST = re.compile(r"(?<![\w.!?,;:)\]}'])\.(?=[a-z]|[A-Z]{2})")
_COLON_IN_PATH = re.compile(r"(?<=[A-Za-z]):(?=[\\/])")
_HASHTAG = re.compile(r"#(?=[A-Za-z])")
_DASH = re.compile(r"(?<=\S) -{1,2} (?=\S)|(?<=\w)--(?=\w)|(?<=\w)--(?= )")
_QUOTE_IN_WORD = re.compile(r"(?<=\w)\"(?=\w)")

_SIGNS = (  # longer signs first
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
    ("<", " less than "),
    (">", " greater than "),
    ("=", " equals "),
    ("@", " at "),
    ("&", " and "),
    ("%", " percent "),
    ("+", " plus "),
    ("\\", " backslash "),
    ("/", " slash "),
    ("~", " about "),
    ("#", " hash "),
    ("^", " caret "),
    ("°", " degrees "),
    (":", "."),
    (";", ","),
    ("|", ","),
    ("_", " "),
    ("*", " "),
    ("`", ""),
    ('"', ""),
    ("(", ", "),
    ("[", ", "),
    ("{", ", "),
    (")", ", "),
    ("]", ", "),
    ("}", ", "),
)

_LOOSE_HYPHEN = re.compile(r"(?<![a-z])-|-(?![a-z])")
_LOOSE_APOSTROPHE = re.compile(r"(?<![a-z])'(?![a-z])")
_SPACE_BEFORE_STOP = re.compile(r" (?=[.,!?])")
_STOP_RUN = re.compile(r"[.,!?]+")
_STOP_IN_WORD = re.compile(r"(?<=[.,!?])(?=[a-z'])")
_REPEATED = re.compile(r"(?<![a-z])[xvlcdm]{0,8}iii(?![a-z])|([a-z])\1{2,}")  # Roman numerals keep their three


def read_dots(text: str) -> str:
    """Dots inside words: "dot" in names of files and sites, a stop where a space was forgotten."""
    text = _DOT_SENTENCE.sub(". ", text)
    text = _DOT_IN_WORD.sub(" dot ", text)
    return _DOT_FIRST.sub("dot ", text)


def read_signs(text: str) -> str:
    """Signs in words, dashes and brackets as pauses; what is left are letters, spaces, newlines and `',.!?-`."""
    text = _PLURAL_IN_BRACKETS.sub(r"\1", text)
    text = _COLON_IN_PATH.sub(" colon ", text)
    text = _HASHTAG.sub(" hashtag ", text)
    text = _DASH.sub(", ", text)
    text = _CLOSING_BEFORE_STOP.sub("", text)
    text = _QUOTE_IN_WORD.sub(" ", text)
    for sign, said in _SIGNS:
        text = text.replace(sign, said)
    return read_lone_signs(text)


def tidy(text: str) -> str:
    """Lower case, single spaces, one mark of punctuation at a time and no letter more than twice in a row."""
    text = _LOOSE_HYPHEN.sub(" ", text.lower())
    text = _LOOSE_APOSTROPHE.sub("", text)
    text = " ".join(text.split())
    text = _SPACE_BEFORE_STOP.sub("", text)
    text = _STOP_RUN.sub(lambda match: _strongest(match[0]), text)
    text = _STOP_IN_WORD.sub(" ", text)
    return _REPEATED.sub(lambda match: 2 * match[1] if match[1] else match[0], text)


def _strongest(stops: str) -> str:
    """One mark for a run of marks; an ellipsis stays."""
    for mark in ("?", "!", "...", "."):
        if mark in stops:
            return mark
    return ","
