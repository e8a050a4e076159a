"""What a speech recogniser understands: resampling to its rate, and word error rates."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

RECOGNISER_HZ = 16_000


def halve_rate(samples: np.ndarray) -> np.ndarray:
    """32 kHz to 16 kHz: every second output of a Kaiser-windowed sinc that passes 7.4 kHz and stops 8.6 kHz by 80 dB.

    Crochiere and Rabiner, Multirate Digital Signal Processing (1983), chapter 4. samples: (n,) float.
    """
    reach = 128
    n = np.arange(-reach, reach + 1)
    low_pass = 0.5 * np.sinc(0.5 * n) * np.kaiser(len(n), 8.0)
    return np.convolve(samples, low_pass / low_pass.sum(), mode="same")[::2]


def to_recogniser(samples: np.ndarray) -> bytes:
    """32 kHz floats as 16 kHz 16-bit little-endian mono."""
    values: np.ndarray = np.clip(halve_rate(samples), -1, 1) * 32767
    return values.astype("<i2").tobytes()


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; an apostrophe stays inside its word."""
    return re.findall(r"[a-z0-9']+", text.lower())


def word_errors(expected: Sequence[str], heard: Sequence[str]) -> int:
    """Substitutions, insertions and deletions in the cheapest alignment (Levenshtein, 1966)."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(expected, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (word != other))
    return row[-1]
