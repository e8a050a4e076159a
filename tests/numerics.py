"""Measures of error, and of equality, that the tests share."""

from __future__ import annotations

import numpy as np


def relative_error(values: np.ndarray, reference: np.ndarray) -> float:
    """Frobenius norm of the difference over that of the reference, in float64."""
    reference = np.asarray(reference, np.float64)
    return float(np.linalg.norm(np.asarray(values, np.float64) - reference) / np.linalg.norm(reference))


def snr_db(values: np.ndarray, reference: np.ndarray) -> float:
    """Signal-to-noise ratio of `values` as an approximation of `reference`, in decibels."""
    return float(-20 * np.log10(max(relative_error(values, reference), 1e-300)))


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 values (ties to even), in the dtype of `values`."""
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(values.dtype)


def same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    """Of one shape, and every byte the same: NaN equals NaN, and -0 is not 0."""
    return first.shape == second.shape and first.tobytes() == second.tobytes()
