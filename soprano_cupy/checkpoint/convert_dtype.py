"""Weights from one floating-point type to another, a block at a time; bfloat16 as its 16 bits."""

from __future__ import annotations

from typing import Any

import numpy as np

STORED_AS: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
}
TARGETS: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
BFLOAT16_EXPONENT = 0x7F80  # all ones: infinity or not a number


def finite(block: np.ndarray, dtype: str) -> bool:
    """Whether every value is finite."""
    if dtype == "bfloat16":
        return not ((block & BFLOAT16_EXPONENT) == BFLOAT16_EXPONENT).any()
    return bool(np.isfinite(block).all())


def convert_block(block: np.ndarray, source: str, out: np.ndarray, target: str) -> None:
    """Write `block` (as stored, finite values) into `out`, rounding to nearest even where it narrows."""
    if source == target:
        out[...] = block
    elif target == "bfloat16":
        out[...] = float32_to_bfloat16(_odd_float32(block) if source == "float64" else block.astype(np.float32))
    elif source == "bfloat16" and target == "float32":
        np.left_shift(block, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        with np.errstate(over="ignore"):  # the caller looks for what became infinite
            out[...] = bfloat16_to_float32(block) if source == "bfloat16" else block


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits to float32, exactly: they are its upper half."""
    widened: np.ndarray = bits.astype(np.uint32) << np.uint32(16)
    return widened.view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Finite float32 to bfloat16 bits: half of the last place kept is added, a little less before an even one."""
    bits: np.ndarray = np.asarray(values, np.float32, order="C").view(np.uint32)
    rounded: np.ndarray = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return rounded.astype(np.uint16)


def _odd_float32(values: np.ndarray) -> np.ndarray:
    """float64 to float32 rounded to odd, after which rounding again to bfloat16 is right.

    Rounding to nearest twice can land on the wrong side of a tie; an inexact value whose last bit is set
    is never taken for a tie.
    """
    with np.errstate(over="ignore"):
        nearest = np.asarray(values, order="C").astype(np.float32)
    bits = nearest.view(np.uint32)
    magnitude = np.abs(values)
    away = np.abs(nearest).astype(np.float64) > magnitude
    towards_zero = bits - away.astype(np.uint32)
    inexact = nearest.astype(np.float64) != values
    odd: np.ndarray = towards_zero | inexact.astype(np.uint32)
    return odd.view(np.float32)
