"""Which row of the decode step belongs to which slot, on the host.

Entering sequences take the lowest free rows; when many have left, the rows are packed, so that a step has few more rows
than there are sequences. The device's own table says -1 for rows that ended since; what the host still believes of them
does no harm, as a row whose slot has ended is left alone.
"""

from __future__ import annotations

import heapq

import numpy as np

BUCKETS = (
    1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048,
)  # fmt: skip


def bucket_of(rows: int) -> int:
    """The rows of the decode step that serves rows 0 to `rows` - 1."""
    return next(size for size in BUCKETS if size >= rows)


def buckets_up_to(rows: int) -> list[int]:
    """The steps that so many rows may need."""
    return [size for size in BUCKETS if size < rows] + [bucket_of(rows)]


class Rows:
    """Rows of up to `slots` slots."""

    def __init__(self, slots: int) -> None:
        self.slot_of_row = np.full(slots, -1, np.int32)
        self._row_of: dict[int, int] = {}
        self._free = list(range(slots))

    def __len__(self) -> int:
        """Rows in use."""
        return len(self._row_of)

    @property
    def bucket(self) -> int:
        """Rows of the step that covers all in use; at least 1."""
        used = np.flatnonzero(self.slot_of_row >= 0)
        return bucket_of(int(used[-1]) + 1 if len(used) else 1)

    @property
    def best_bucket(self) -> int:
        """What it would be, were the rows packed."""
        return bucket_of(max(1, len(self)))

    def enter(self, slot: int) -> int:
        """The row of a slot that enters."""
        row = heapq.heappop(self._free)
        self.slot_of_row[row], self._row_of[slot] = slot, row
        return row

    def leave(self, slot: int) -> int:
        """The row that a slot had."""
        row = self._row_of.pop(slot)
        self.slot_of_row[row] = -1
        heapq.heappush(self._free, row)
        return row

    def pack(self) -> np.ndarray:
        """Move all rows in use to the front, in their order; where each of the first rows was."""
        sources = np.flatnonzero(self.slot_of_row >= 0)
        slots = self.slot_of_row[sources]
        self.slot_of_row[:] = -1
        self.slot_of_row[: len(slots)] = slots
        self._row_of = {slot: row for row, slot in enumerate(slots.tolist())}
        self._free = list(range(len(slots), len(self.slot_of_row)))
        return sources
