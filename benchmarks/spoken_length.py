"""Sentences of a definite length, so that every run and every peer makes as much sound."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial


@contextmanager
def held_to(tokens: int) -> Iterator[None]:
    """`SopranoTTS` speaks at most `tokens` tokens of a sentence while the context lasts, and does not warn of it."""
    from soprano_cupy import pipeline

    exact, complaints = pipeline.SamplingParams, logging.getLogger("soprano_cupy.engine")
    level = complaints.level
    pipeline.SamplingParams = partial(exact, max_new_tokens=tokens)  # type: ignore[assignment,misc]
    complaints.setLevel(logging.ERROR)
    try:
        yield
    finally:
        pipeline.SamplingParams = exact  # type: ignore[misc]
        complaints.setLevel(level)
