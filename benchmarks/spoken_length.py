"""Sentences of a definite length, so that every run and every peer makes as much sound."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock


@contextmanager
def held_to(tokens: int) -> Iterator[None]:
    """`infer` and its like speak at most `tokens` tokens of a sentence while the context lasts, and do not warn of it.

    They make their `SamplingParams` by the name that the pipeline's module has for them.
    """
    from soprano_cupy import pipeline
    from soprano_cupy.sampling import SamplingParams

    complaints = logging.getLogger("soprano_cupy.engine")
    level = complaints.level
    complaints.setLevel(logging.ERROR)
    try:
        with mock.patch.object(pipeline, "SamplingParams", partial(SamplingParams, max_new_tokens=tokens)):
            yield
    finally:
        complaints.setLevel(level)
