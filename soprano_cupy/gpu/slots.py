"""The record that each slot keeps on the device while its sequence generates, and the word it publishes to the host.

`SLOT_STATE` is `SlotState` of `kernels/step_params.cuh`; `kernels/sample.cu` defines the word.
"""

from __future__ import annotations

from typing import Any

import numpy as np

RUNNING = 0
STOP = 1  # the end token was drawn
LENGTH = 2  # the limit of tokens was reached
STUCK = 3  # the voice repeats itself and was to be given up then
FAILED = 4  # the logits were not finite

# Of the word that a slot publishes: where each part begins, and how many bits it has.
COUNT = 0, 32
STATUS = 32, 7
IS_STUCK = 39, 1
TOKEN = 40, 24

OPTION_GREEDY = 1
OPTION_GIVE_UP = 2

SLOT_STATE = np.dtype(
    [
        ("seed", np.uint64),
        ("stream", np.uint64),
        ("top_p", np.float64),
        ("scale_high", np.float32),
        ("scale_low", np.float32),
        ("penalty", np.float32),
        ("options", np.int32),
        ("limit", np.int32),
        ("count", np.int32),
        ("position", np.int32),
        ("status", np.int32),
        ("repeats", np.int32),
        ("stuck", np.int32),
    ]
)


def progress_count(word: Any) -> Any:
    """Tokens drawn so far, of one progress word (int) or of an array of them (uint64)."""
    return _bits(word, *COUNT)


def progress_status(word: Any) -> Any:
    """RUNNING, STOP, LENGTH, STUCK or FAILED."""
    return _bits(word, *STATUS)


def progress_stuck(word: Any) -> Any:
    """Whether the loop check has found the voice stuck, now or before (and even where it goes on)."""
    return _bits(word, *IS_STUCK) != 0


def progress_token(word: Any) -> Any:
    """The token drawn last."""
    return _bits(word, *TOKEN)


def _bits(word: Any, first: int, count: int) -> Any:
    if isinstance(word, int):
        return word >> first & ((1 << count) - 1)
    return (word >> np.uint64(first) & np.uint64((1 << count) - 1)).astype(np.int64)
