"""The text front end: written English → spoken words → sentences → prompts."""

from __future__ import annotations

from .normalizer import normalize
from .prompts import build_prompts
from .sentences import split_sentences

__all__ = ["build_prompts", "normalize", "split_sentences"]
