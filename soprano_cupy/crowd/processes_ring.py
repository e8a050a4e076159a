"""Samples from one process to another: memory that both have mapped, written round and round by one of them.

The memory is an anonymous file: it has no name that could be left behind, and is gone with the last process that has
it. Places are counted on and on; where a piece would run over the end, it begins at the front again. What has been
read is told to the writer in a message, since only messages order what two processes do to memory. Either end copies
all pieces that there are in one go, for which the interpreter's lock is given away once.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable

import numpy as np

from .buffers import Buffers

ALIGNMENT = 64  # bytes; a cache line


class Ring:
    """The memory of an open file, which this does not close."""

    def __init__(self, file: int, size: int) -> None:
        self.size = size
        self._map = mmap.mmap(file, size)
        self._address: int | None = np.frombuffer(self._map, np.uint8).ctypes.data

    @staticmethod
    def create(size: int) -> int:
        """A file of `size` bytes without a name; memory is taken only as it is written."""
        file = os.memfd_create("soprano-audio", os.MFD_CLOEXEC)
        os.ftruncate(file, size)
        return file

    def close(self) -> None:
        """Give the memory back; nothing may use it any more."""
        self._address = None
        self._map.close()

    def _at(self, place: int) -> int:
        """The address of a place."""
        if self._address is None:
            raise ValueError("the ring has been closed")
        return self._address + place % self.size


class RingWriter(Ring):
    """The end that writes."""

    def __init__(self, file: int, size: int) -> None:
        super().__init__(file, size)
        self._next = 0  # where the next piece may begin
        self._free = size  # the place up to which nothing is waiting to be read
        self._put: list[tuple[np.ndarray, int]] = []  # what is to be copied, and to which place

    def put(self, samples: np.ndarray) -> int | None:
        """Let samples be copied by the next `flush`; the place at which they begin, or None where there is no room."""
        begin = self._next
        if begin % self.size + samples.nbytes > self.size:
            begin += self.size - begin % self.size
        if begin + samples.nbytes > self._free:
            return None
        self._put.append((np.ascontiguousarray(samples), begin))
        self._next = _aligned(begin + samples.nbytes)
        return begin

    def flush(self) -> None:
        """Copy what has been put; not before then may the other end be told."""
        from ..gpu._driver import copy_on_host

        put, self._put = self._put, []
        copy_on_host([(self._at(place), samples.ctypes.data, samples.nbytes) for samples, place in put])

    def freed(self, place: int) -> None:
        """Everything before this place has been read."""
        self._free = place + self.size


class RingReader(Ring):
    """The end that reads."""

    def __init__(self, file: int, size: int) -> None:
        super().__init__(file, size)
        self._buffers = Buffers()
        self.read = 0  # the place before which everything has been read

    def take(self, pieces: Iterable[tuple[int, int, str]]) -> list[np.ndarray]:
        """Copies of pieces, of the place, the number and the type of their samples, in the order of their places."""
        from ..gpu._driver import copy_on_host

        taken, copies = [], []
        for begin, count, dtype in pieces:
            samples: np.ndarray = self._buffers.empty(count * np.dtype(dtype).itemsize).view(dtype)
            copies.append((samples.ctypes.data, self._at(begin), samples.nbytes))
            taken.append(samples)
            self.read = _aligned(begin + samples.nbytes)
        copy_on_host(copies)
        return taken


def _aligned(place: int) -> int:
    return -(-place // ALIGNMENT) * ALIGNMENT
