"""Normalised text to pieces that the model speaks in one go: sentences, the long ones cut, the short ones joined."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from ..errors import ParameterError

MAX_LENGTH = 300  # characters; the reference's limit, well inside the model's positions
MIN_LENGTH = 30  # characters; the model speaks shorter pieces badly

_SENTENCE_END = re.compile(r"\s(?<=[.!?]\s)")
_WORD = re.compile(r"[^\W_]")


def split_sentences(clean: str, max_length: int = MAX_LENGTH) -> list[str]:
    """Sentences of `clean` in order, none longer than `max_length` characters; every word is in one of them.

    A longer sentence is cut at its last comma if that leaves at least half of the length, else at its last space,
    and a word without any in its middle. What holds no letter or digit is left out.
    Raises `ParameterError` when `clean` is not a string or `max_length` is under `MIN_LENGTH`.
    """
    if not isinstance(clean, str):
        raise ParameterError(f"text must be a string, not {type(clean).__name__}; decode bytes first")
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < MIN_LENGTH:
        raise ParameterError(f"max_length = {max_length!r} must be a whole number of characters, at least {MIN_LENGTH}")
    pieces: list[str] = []
    for raw in _SENTENCE_END.split(clean):
        sentence = " ".join(raw.split())
        pieces += (sentence,) if len(sentence) <= max_length else _cut(sentence, max_length)
    return [piece for piece in pieces if _WORD.search(piece)]


def merge_short(sentences: Iterable[str], min_length: int = MIN_LENGTH, max_length: int = MAX_LENGTH) -> list[str]:
    """Join sentences under `min_length` to the one before (the first to the one after), up to `max_length` together."""
    merged: list[str] = []
    for sentence in sentences:
        short = merged and min(len(sentence), len(merged[-1])) < min_length
        if short and len(merged[-1]) + 1 + len(sentence) <= max_length:
            merged[-1] = f"{merged[-1]} {sentence}"
        else:
            merged.append(sentence)
    return merged


def _cut(sentence: str, max_length: int) -> Iterator[str]:
    start = 0
    while len(sentence) - start > max_length:
        comma = sentence.rfind(", ", start + max_length // 2, start + max_length + 1) + 1
        space = sentence.rfind(" ", start + 1, start + max_length + 1)
        end = comma or (space if space > 0 else start + max_length)
        yield sentence[start:end]
        start = end + (sentence[end] == " ")
    yield sentence[start:]
