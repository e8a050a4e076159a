"""A request as the front sees it: where it is, what has been heard of it, and how much is left."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from .processes_messages import Speak
from .speech import Speech

if TYPE_CHECKING:
    from .processes_station import Station

MARKS = 16  # characters: what a request costs beside its own
SAMPLES_EACH = 2000  # that a character makes, about
ALIKE = 0.01  # share of the power by which what is said again may differ: other kernels round otherwise


class Ticket:
    """One request. Its station's thread alone adds to what has been heard."""

    __slots__ = ("_chunks", "_skip", "_skipped", "faults", "left", "number", "speak", "speech", "station")

    def __init__(self, speech: Speech, speak: Speak, size: int) -> None:
        self.speech, self.speak, self.number = speech, speak, speak.number
        self.left = float(size + MARKS)  # characters
        self.station: Station | None = None
        self.faults = 0  # processes that have died while it was there
        self._chunks: list[np.ndarray] = []  # heard
        self._skip = self._skipped = 0  # samples that are being said again, and how many of them have been

    def advance(self, samples: int) -> float:
        """So many samples more have been made: the characters that leaves less."""
        done = min(samples / SAMPLES_EACH, self.left - 1)
        self.left -= done
        return done

    def begin_again(self) -> None:
        """It will be said from its beginning; what has been heard is not heard again."""
        self.faults += 1
        self._skip, self._skipped = sum(len(chunk) for chunk in self._chunks), 0

    def hear(self, samples: np.ndarray) -> bool:
        """Hand samples on; False where it is not what had been heard before."""
        if self._skipped < self._skip:
            again = samples[: self._skip - self._skipped]
            if not _alike(again, self._before(len(again))):
                return False
            self._skipped += len(again)
            samples = samples[len(again) :]
        if len(samples):
            if not self._chunks:
                self.speech.first_audio_s = time.monotonic() - self.speak.submitted
            self._chunks.append(samples)
            self.speech.add_chunk(samples)
        return True

    def _before(self, count: int) -> np.ndarray:
        """What had been heard at the place that is being said again."""
        if len(self._chunks) > 1:
            self._chunks = [np.concatenate(self._chunks)]
        return self._chunks[0][self._skipped : self._skipped + count]


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """The same but for roundings."""
    if np.array_equal(one, other):
        return True
    a, b = one.astype(np.float64), other.astype(np.float64)
    return bool(((a - b) ** 2).sum() <= ALIKE * (b**2).sum())
