"""The language model of Soprano-1.1-80M's size in array code, with random weights, by kind of attention."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from soprano_cupy import Qwen3
from soprano_cupy.runner import LanguageModelRunner
from soprano_cupy.testing import SOPRANO_1_1_80M, SOPRANO_1_1_80M_DECODER, make_checkpoint

MODES = ("flash", "standard")
MAX_DISTANCE = 0.02  # of two bfloat16 computations of the same states, relative (Frobenius)


class LanguageModels:
    """One checkpoint, loaded once for each kind of attention."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            make_checkpoint(folder, seed=0, config=SOPRANO_1_1_80M, decoder=SOPRANO_1_1_80M_DECODER)
            self.runners = {mode: Qwen3.load(folder, "cuda", "bfloat16", mode).runner for mode in MODES}

    def prefill(self, tokens: int) -> dict[str, Callable[[], Any]]:
        """By kind of attention, a call that runs `tokens` prompt tokens of one sequence."""
        return self._checked({mode: extending(runner, 0, tokens) for mode, runner in self.runners.items()})

    def step(self, context: int) -> dict[str, Callable[[], Any]]:
        """By kind of attention, a call that runs the token behind `context` others."""
        return self._checked({mode: extending(runner, context, 1) for mode, runner in self.runners.items()})

    def _checked(self, calls: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
        flash, standard = (call().astype(np.float64) for call in (calls["flash"], calls["standard"]))
        distance = float(((flash - standard) ** 2).sum() ** 0.5 / (standard**2).sum() ** 0.5)
        if not distance < MAX_DISTANCE:
            raise SystemExit(
                f"language model: WRONG RESULT, nothing is written: flash and standard differ by {distance:.3g}"
            )
        return calls


def extending(runner: LanguageModelRunner, before: int, tokens: int) -> Callable[[], Any]:
    """A call that appends `tokens` tokens to a sequence of `before` tokens, always the same ones."""
    rng = np.random.default_rng(before + tokens)
    ids = rng.integers(4, runner.config.vocab_size, before + tokens).astype(np.int32)
    cache = runner.new_cache(1, before + tokens)
    if before:
        runner.extend(cache, ids[:before], np.array([0, before], np.int32), last_only=True)

    def call() -> Any:
        cache.lengths[0] = before
        return runner.extend(cache, ids[before:], np.array([0, tokens], np.int32), last_only=True)

    return call
