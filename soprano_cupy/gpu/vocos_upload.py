"""The tables of one run of the decoder, from the host to where its kernels look for them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from . import program
from .vocos_plan import Specs
from .vocos_tables import Tables

ONE_COPY_BYTES = 1 << 16  # tables up to this size travel whole, in one copy: each copy costs the GPU some 2 us
ADDRESSES = (1 << 64) - 1


class HostTables:
    """Page-locked memory in which all tables lie as they do on the device.

    specs: of the tables, the first of which is `output`; places: their addresses in one arena.
    """

    def __init__(self, specs: Specs, places: Mapping[str, int]) -> None:
        self._target = places["output"]
        self._offsets = {name: places[name] - self._target for name in specs}
        ends = [
            self._offsets[name] + math.prod(shape) * np.dtype(dtype).itemsize for name, (shape, dtype) in specs.items()
        ]
        self._memory = program.MappedMemory(max(ends))
        self._bytes = np.frombuffer(self._memory.view(), np.uint8)
        self._copied = program.Event()

    def send(self, tables: Tables, stream: int, *, samples: int = 0, pcm: int = 0) -> None:
        """Write the tables and queue their copies, once those of the run before are done.

        samples, pcm: where float32 and 16-bit samples go; 0: nowhere. They may lie before the memory that is written:
        pieces count their hops from the first of several slices.
        """
        self._copied.synchronize()
        parts = {
            "output": np.array([samples & ADDRESSES, pcm & ADDRESSES], np.uint64),
            "segments": tables.segments,
            "tokens": tables.tokens,
            "rows": tables.rows,
            "spans": tables.spans,
        }
        for name, table in parts.items():
            start = self._offsets[name]
            self._bytes[start : start + table.nbytes] = table.reshape(-1).view(np.uint8)
        if len(self._bytes) <= ONE_COPY_BYTES:
            self._copy(0, len(self._bytes), stream)
        else:
            for name, table in parts.items():
                self._copy(self._offsets[name], table.nbytes, stream)
        self._copied.record(stream)

    def _copy(self, offset: int, nbytes: int, stream: int) -> None:
        from ._driver import copy

        copy(self._target + offset, self._memory.device + offset, nbytes, stream)
