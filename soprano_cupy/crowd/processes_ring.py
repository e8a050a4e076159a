"""Samples from one process to another: memory that both have mapped, written round and round by one of them.

The memory is an anonymous file: it has no name that could be left behind, and is gone with the last process that has
it. Places are counted on and on; where a piece would run over the end, it begins at the front again. What has been
read is told to the writer in a message, since only messages order what two processes do to memory.
"""

from __future__ import annotations

import mmap
import os

import numpy as np

from .buffers import Buffers

ALIGNMENT = 64  # bytes; a cache line


class Ring:
    """The memory of an open file, which this does not close."""

    def __init__(self, file: int, size: int) -> None:
        self.size = size
        self._map = mmap.mmap(file, size)
        self._bytes = np.frombuffer(self._map, np.uint8)

    @staticmethod
    def create(size: int) -> int:
        """A file of `size` bytes without a name; memory is taken only as it is written."""
        file = os.memfd_create("soprano-audio", os.MFD_CLOEXEC)
        os.ftruncate(file, size)
        return file

    def close(self) -> None:
        """Give the memory back; nothing may use it any more."""
        self._bytes = np.empty(0, np.uint8)
        self._map.close()


class RingWriter(Ring):
    """The end that writes."""

    def __init__(self, file: int, size: int) -> None:
        super().__init__(file, size)
        self._next = 0  # where the next piece may begin
        self._free = size  # the place up to which nothing is waiting to be read

    def put(self, samples: np.ndarray) -> int | None:
        """Copy samples; the place at which they begin, or None where there is no room yet."""
        begin = self._next
        if begin % self.size + samples.nbytes > self.size:
            begin += self.size - begin % self.size
        if begin + samples.nbytes > self._free:
            return None
        at = begin % self.size
        self._bytes[at : at + samples.nbytes] = np.ascontiguousarray(samples).view(np.uint8).reshape(-1)
        self._next = _aligned(begin + samples.nbytes)
        return begin

    def freed(self, place: int) -> None:
        """Everything before this place has been read."""
        self._free = place + self.size


class RingReader(Ring):
    """The end that reads."""

    def __init__(self, file: int, size: int) -> None:
        super().__init__(file, size)
        self._buffers = Buffers()
        self.read = 0  # the place before which everything has been read

    def take(self, begin: int, count: int, dtype: str) -> np.ndarray:
        """A copy of `count` samples that begin at a place; pieces are taken in the order in which they were put."""
        self.skip(begin, nbytes := count * np.dtype(dtype).itemsize)
        at = begin % self.size
        samples: np.ndarray = self._buffers.copy(self._bytes[at : at + nbytes]).view(dtype)
        return samples

    def skip(self, begin: int, nbytes: int) -> None:
        """A piece is not wanted."""
        self.read = _aligned(begin + nbytes)


def _aligned(place: int) -> int:
    return -(-place // ALIGNMENT) * ALIGNMENT
