"""Measures of error that the tests share."""

from __future__ import annotations

import numpy as np


def relative_error(values: np.ndarray, reference: np.ndarray) -> float:
    """Frobenius norm of the difference over that of the reference, in float64."""
    reference = np.asarray(reference, np.float64)
    return float(np.linalg.norm(np.asarray(values, np.float64) - reference) / np.linalg.norm(reference))


def snr_db(values: np.ndarray, reference: np.ndarray) -> float:
    """Signal-to-noise ratio of `values` as an approximation of `reference`, in decibels."""
    return float(-20 * np.log10(max(relative_error(values, reference), 1e-300)))
