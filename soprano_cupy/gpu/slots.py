"""The record that each slot keeps on the device while its sequence generates, and the word it publishes to the host.

`SLOT_STATE` is `SlotState` of `kernels/step_params.cuh`; `kernels/sample.cu` defines the word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..generation import Request

RUNNING = 0
STOP = 1  # the end token was drawn
LENGTH = 2  # the limit of tokens was reached
STUCK = 3  # the voice repeats itself and was to be given up then
FAILED = 4  # the logits were not finite

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

_LARGEST_SCALE = 1e37  # of log2(e) / temperature: any colder takes the most likely token all the same
_LARGEST_PENALTY = float(np.finfo(np.float32).max)


def slot_state(request: Request, capacity: int, *, give_up: bool = False) -> Any:
    """The record, a `SLOT_STATE` scalar, with which a sequence begins: behind its prompt, before its first token.

    capacity: tokens of a slot. give_up: end as soon as the loop check finds the voice stuck. The sequence ends by
    length at `max_new_tokens`, or where its next token would have no place in the cache any more.
    """
    params = request.params
    scale = 0.0 if params.temperature == 0 else min(math.log2(math.e) / params.temperature, _LARGEST_SCALE)
    record = np.zeros((), SLOT_STATE)
    record["seed"] = params.seed or 0
    record["stream"] = request.stream
    record["top_p"] = params.top_p
    record["scale_high"] = np.float32(scale)
    record["scale_low"] = np.float32(scale - float(np.float32(scale)))
    record["penalty"] = np.float32(min(params.repetition_penalty, _LARGEST_PENALTY))
    record["options"] = (OPTION_GREEDY if params.temperature == 0 else 0) | (OPTION_GIVE_UP if give_up else 0)
    record["limit"] = min(params.max_new_tokens, capacity - len(request.ids) + 1)
    record["position"] = len(request.ids) - 1
    return record[()]


def seen_masks(prompts: Sequence[np.ndarray], words: int) -> np.ndarray:
    """(len(prompts), words) uint32: bit i % 32 of word i / 32 is set for each id i that the prompt holds."""
    held = np.zeros((len(prompts), words * 32), np.uint8)
    for row, ids in zip(held, prompts, strict=True):
        row[ids] = 1
    return np.packbits(held, axis=1, bitorder="little").view(np.uint32)


def progress_count(word: Any) -> Any:
    """Tokens drawn so far, of one progress word (int) or of an array of them (uint64)."""
    return _bits(word, 0, 32)


def progress_status(word: Any) -> Any:
    """RUNNING, STOP, LENGTH, STUCK or FAILED."""
    return _bits(word, 32, 7)


def progress_stuck(word: Any) -> Any:
    """Whether the loop check has found the voice stuck, now or before (and even where it goes on)."""
    return _bits(word, 39, 1) != 0


def progress_token(word: Any) -> Any:
    """The token drawn last."""
    return _bits(word, 40, 24)


def _bits(word: Any, first: int, count: int) -> Any:
    if isinstance(word, int):
        return word >> first & ((1 << count) - 1)
    return (word >> np.uint64(first) & np.uint64((1 << count) - 1)).astype(np.int64)
