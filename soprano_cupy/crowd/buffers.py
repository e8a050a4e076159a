"""Memory for samples that is used again once nobody has them.

Half a megabyte for each sentence, thousands of times a second, costs more to get from the system and to give back than
to fill: pages are mapped, cleared and unmapped, some of it under the interpreter's lock. So a few buffers are
remembered, and one that nobody but this remembers is filled again. Whoever has samples, or any part or view of them,
has a reference to their buffer: NumPy gives all views the array as their base that owns the memory.
"""

from __future__ import annotations

import sys
from collections import deque

import numpy as np

SMALLEST = 1 << 16  # bytes; less is quickly had
MOST = 128 << 20  # bytes that are remembered
LOOKS = 4  # buffers of a size that are looked at before another is made


class Buffers:
    """For one thread."""

    def __init__(self, most: int = MOST) -> None:
        self._left = most
        self._of_size: dict[int, deque[np.ndarray]] = {}
        probe = deque([np.empty(1, np.uint8)])
        self._unused = sys.getrefcount(probe[0])  # references to a buffer that only its queue has
        counted = getattr(sys, "_is_gil_enabled", lambda: True)()  # else references are not all counted at once
        self._smallest = SMALLEST if counted else 1 << 62

    def empty(self, nbytes: int) -> np.ndarray:
        """(nbytes,) uint8 of any content that are their holder's own."""
        if nbytes < self._smallest:
            return np.empty(nbytes, np.uint8)
        return self._take(_size_for(nbytes))[:nbytes]

    def _take(self, size: int) -> np.ndarray:
        """A buffer of `size` bytes that nobody has."""
        queue = self._of_size.get(size)
        if queue is None:
            queue = self._of_size[size] = deque()
        for _ in range(min(LOOKS, len(queue))):
            queue.rotate(-1)
            if sys.getrefcount(queue[0]) == self._unused:
                return queue[0]
        buffer: np.ndarray = np.empty(size, np.uint8)
        if self._left >= size:
            self._left -= size
            queue.append(buffer)
        return buffer


def _size_for(nbytes: int) -> int:
    """The next of four sizes between powers of two, so that a fifth is wasted at most."""
    step = 1 << max(0, nbytes.bit_length() - 3)
    return -(-nbytes // step) * step
