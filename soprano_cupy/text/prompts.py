"""Text to the prompts that the language model was trained on."""

from __future__ import annotations

from .normalizer import normalize
from .sentences import MAX_LENGTH, merge_short, split_sentences


def build_prompts(text: str, max_length: int = MAX_LENGTH) -> list[str]:
    """`"[STOP][TEXT]{sentence}[START]"` for every piece of `text`, in order; an empty list when nothing can be spoken.

    No piece is longer than `max_length` characters. Marks of the prompt format inside `text` are read as text.
    Raises `ParameterError` when `text` is not a string or `max_length` is too small.
    """
    sentences = split_sentences(normalize(text), max_length)
    return [f"[STOP][TEXT]{piece}[START]" for piece in merge_short(sentences, max_length=max_length)]
