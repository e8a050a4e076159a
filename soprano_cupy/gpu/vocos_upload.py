"""The tables of one run of the decoder, from the host to where its kernels look for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from . import program
from ._tables import joined
from .vocos_plan import Specs
from .vocos_tables import TABLES, Piece, slice_tables

COPIED_ALONG = 1 << 16  # bytes between two tables that cost no more than the 2 us of another copy
ADDRESSES = (1 << 64) - 1


class HostTables:
    """Page-locked memory in which all tables lie as they do on the device.

    specs: of the tables, the first of which is `output`; places: their addresses in one arena.
    """

    def __init__(self, specs: Specs, places: Mapping[str, int]) -> None:
        from ._driver import copy

        self._copy = copy
        self._target = places["output"]
        offsets = {name: places[name] - self._target for name in specs}
        sizes = {name: math.prod(shape) * np.dtype(dtype).itemsize for name, (shape, dtype) in specs.items()}
        self._memory = program.MappedMemory(max(offsets[name] + sizes[name] for name in specs))
        view = np.frombuffer(self._memory.view(), np.uint8)
        self._tables = slice_tables({name: view[offsets[name] : offsets[name] + sizes[name]] for name in specs})
        self._offsets = [offsets[name] for name in TABLES]
        self._source = self._memory.device
        self._copied = program.Event()

    def send(
        self, pieces: Sequence[Piece], hops_of_a_block: int, stream: int, *, samples: int = 0, pcm: int = 0
    ) -> tuple[int, int, int]:
        """Write the pieces' tables and queue their copy, once that of the run before is done.

        Returns the rows, tokens and spans. hops_of_a_block: of whole voices; the hops of a stream's piece are one
        block's. samples, pcm: where float32 and 16-bit samples go; 0: nowhere. They may lie before the memory that is
        written: pieces count their hops from the first of several slices.
        """
        self._copied.synchronize()
        counts = self._tables.write(pieces, hops_of_a_block, samples=samples & ADDRESSES, pcm=pcm & ADDRESSES)
        for start, nbytes in joined(zip(self._offsets, _used_bytes(len(pieces), *counts), strict=True), COPIED_ALONG):
            self._copy(self._target + start, self._source + start, nbytes, stream)
        self._copied.record(stream)
        return counts


def _used_bytes(pieces: int, rows: int, tokens: int, spans: int) -> list[int]:
    """Of each of `TABLES`."""
    counts = (2, pieces, tokens, rows, spans)
    return [count * dtype.itemsize for count, dtype in zip(counts, TABLES.values(), strict=True)]
