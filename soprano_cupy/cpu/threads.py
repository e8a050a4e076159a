"""How many threads the engine computes with."""

from __future__ import annotations

from .. import settings
from ..cores import available_cores
from . import _engine

MAX_THREADS = 256  # of the engine's team


def wanted_threads() -> int:
    """`SOPRANO_THREADS`, else the available cores; `ParameterError` for a setting that is no number of threads."""
    return min(settings.threads() or available_cores(), MAX_THREADS)


def use_wanted_threads() -> int:
    """Size the engine's team as wanted; returns its size."""
    return int(_engine.set_threads(wanted_threads()))
