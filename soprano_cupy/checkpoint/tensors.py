"""Named tensors of one memory-mapped file, handed out one by one as fresh arrays.

The file stays on disk until a tensor is popped; its pages are given back to the system as soon as they
are converted, so that a process never holds a checkpoint twice.
"""

from __future__ import annotations

import math
import mmap
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from ..errors import CheckpointError
from .convert_dtype import STORED_AS, TARGETS, convert_block, finite

BLOCK_ELEMENTS = 1 << 18  # converted at a time: bounds both the temporaries and the mapped pages in memory
CRC_BYTES = 1 << 20  # summed at a time
NAMES_SHOWN = 4
NOT_FINITE = "values that are not finite; the file is damaged, download it again"


@dataclass(frozen=True)
class Storage:
    """A run of bytes of the file, with the CRC-32 that the file claims for it (None: it claims none)."""

    start: int
    size: int
    crc32: int | None = None


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: its elements start `offset` bytes into `storage`; strides count elements."""

    dtype: str
    shape: tuple[int, ...]
    storage: Storage
    offset: int = 0
    strides: tuple[int, ...] | None = None  # None: C-contiguous

    @property
    def count(self) -> int:
        return math.prod(self.shape)


class TensorFile:
    """The tensors of one checkpoint file, whichever its format; a context manager.

    Readers of the formats check every offset before they build one. All failures are `CheckpointError`.
    """

    def __init__(self, path: Path, mapping: mmap.mmap, entries: Mapping[str, TensorEntry]) -> None:
        self.path = path
        self._mapping = mapping
        self._entries = dict(entries)
        self._taken: set[str] = set()
        self._verified: set[Storage] = set()
        self._viewed: list[Storage] = []  # whose pages are still in memory

    def names(self) -> frozenset[str]:
        """The names of all tensors, popped or not."""
        return frozenset(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """What the file holds: "bfloat16", "float16", "float32" or "float64"."""
        return self._entry(name).dtype

    def pop(self, name: str, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
        """The tensor as a new C-contiguous array; each name can be popped once.

        dtype: "float64", "float32", "float16", or "bfloat16", which NumPy lacks: its bits as uint16. A
        narrower type is rounded to nearest even. Values that are not finite, or too large for the
        narrower type, are refused: one of them would silence the whole voice without a word.
        """
        entry = self._checked(name, shape, dtype)
        array = np.empty(entry.shape, TARGETS[dtype])
        problem = self._fill(array, entry, dtype)
        if problem:
            raise CheckpointError(f"{self.path}: tensor {name} holds {problem}")
        self._taken.add(name)
        return array

    def view(self, name: str, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
        """What `pop` returns, but without a copy where the file holds just that: a read-only view of its pages.

        For readers that look at a tensor once, and then call `release_views`.
        """
        entry = self._checked(name, shape, dtype)
        start = entry.storage.start + entry.offset
        if entry.dtype != dtype or entry.strides is not None or start % STORED_AS[dtype].itemsize or not entry.count:
            return self.pop(name, shape, dtype)
        flat = np.frombuffer(self._mapping, STORED_AS[dtype], entry.count, start)  # unlike _view, it keeps the mapping
        for first in range(0, len(flat), BLOCK_ELEMENTS):
            block = flat[first : first + BLOCK_ELEMENTS]
            if not finite(block, dtype):
                raise CheckpointError(f"{self.path}: tensor {name} holds {NOT_FINITE}")
            self._release(start + first * flat.itemsize, block.nbytes)
        self._taken.add(name)
        self._viewed.append(entry.storage)
        return flat.reshape(entry.shape)

    def release_views(self) -> None:
        """Give the pages of all views back to the system; the views stay valid."""
        while self._viewed:
            storage = self._viewed.pop()
            self._release(storage.start, storage.size)

    def discard(self, name: str) -> None:
        """Count a tensor as used without reading it; it need not be there."""
        self._taken.add(name)

    def rewind(self) -> None:
        """Count every tensor as unread again, for another reader."""
        self._taken.clear()

    def finish(self) -> None:
        """`CheckpointError` if the file holds tensors that nobody popped or discarded."""
        surplus = sorted(self._entries.keys() - self._taken)
        if surplus:
            more = f" and {len(surplus) - NAMES_SHOWN} more" if len(surplus) > NAMES_SHOWN else ""
            raise CheckpointError(
                f"{self.path} holds tensors that this architecture does not have: "
                f"{', '.join(surplus[:NAMES_SHOWN])}{more}; is it a Soprano checkpoint?"
            )

    def close(self) -> None:
        """Unmap the file; arrays that were popped stay valid, and a view keeps the mapping until it is dropped."""
        with suppress(BufferError):  # an error on its way up holds the views of the functions that it left
            self._mapping.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: tensor {name} is missing; download the checkpoint again") from None

    def _checked(self, name: str, shape: tuple[int, ...], dtype: str) -> TensorEntry:
        """The entry of a tensor that may be read as `dtype`."""
        entry = self._entry(name)
        if name in self._taken:
            raise CheckpointError(f"{self.path}: tensor {name} was already read")
        if entry.shape != tuple(shape):
            raise CheckpointError(f"{self.path}: tensor {name} has shape {entry.shape}, expected {tuple(shape)}")
        if dtype not in TARGETS:
            raise CheckpointError(f"{self.path}: tensor {name} cannot be read as {dtype!r}, only as {list(TARGETS)}")
        self._verify(entry.storage, name)
        return entry

    def _fill(self, array: np.ndarray, entry: TensorEntry, dtype: str) -> str | None:
        """Convert block after block along the first axis (contiguous tensors count as flat).

        Returns what is wrong with the values, and leaves no view of the mapping behind either way.
        """
        if entry.count == 0:
            return None
        source, target = self._view(entry), array
        if entry.strides is None:
            source, target = source.reshape(-1), array.reshape(-1)
        rows = max(1, BLOCK_ELEMENTS // (entry.count // len(source)))
        for first in range(0, len(source), rows):
            block, out = source[first : first + rows], target[first : first + rows]
            if not finite(block, entry.dtype):
                return NOT_FINITE
            convert_block(block, entry.dtype, out, dtype)
            if not finite(out, dtype):
                return f"values too large for {dtype}; use float32"
            if entry.strides is None:
                self._release(entry.storage.start + entry.offset + first * source.itemsize, block.nbytes)
        self._release(entry.storage.start, entry.storage.size)
        return None

    def _view(self, entry: TensorEntry) -> np.ndarray:
        """The tensor inside the mapping, strides and all, as the integers or floats that it is stored as."""
        stored = STORED_AS[entry.dtype]
        start = entry.storage.start + entry.offset
        strides = None if entry.strides is None else tuple(stride * stored.itemsize for stride in entry.strides)
        view: np.ndarray = np.ndarray(entry.shape, stored, self._mapping, start, strides)
        return view

    def _verify(self, storage: Storage, name: str) -> None:
        """Compare a storage's CRC-32, once, just before its pages are needed anyway."""
        if storage.crc32 is None or storage in self._verified:
            return
        crc, end = 0, storage.start + storage.size
        with memoryview(self._mapping) as view:
            for first in range(storage.start, end, CRC_BYTES):
                crc = zlib.crc32(view[first : min(first + CRC_BYTES, end)], crc)
                self._release(first, min(CRC_BYTES, end - first))
        if crc != storage.crc32:
            raise CheckpointError(f"{self.path}: tensor {name} is damaged (its CRC-32 differs); download it again")
        self._verified.add(storage)

    def _release(self, start: int, size: int) -> None:
        """Drop mapped pages from this process; the system's file cache keeps them."""
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED") and size > 0:
            self._mapping.madvise(mmap.MADV_DONTNEED, first, start + size - first)


def map_file(path: Path) -> mmap.mmap:
    """Map a file for reading; `CheckpointError` when it is missing, empty, a folder or not readable."""
    try:
        with path.open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; download the checkpoint again") from error
    except ValueError as error:  # mmap cannot map nothing
        raise CheckpointError(f"{path} is empty; download the checkpoint again") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
