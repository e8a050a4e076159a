"""What the host tells a batch before it generates: one piece of pinned memory, one copy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..generation import Request
from ._driver import MappedMemory, copy
from ._tables import write_prompts, write_seen_masks, write_slot_states
from .arena import Arena
from .batch_sizes import BatchSizes, Specs


def host_views(memory: MappedMemory, specs: Specs, offsets: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Arrays of these shapes and types, so many bytes from the memory's beginning."""
    return {
        name: np.frombuffer(memory.view(), np.dtype(dtype), math.prod(shape), offsets[name]).reshape(shape)
        for name, (shape, dtype) in specs.items()
    }


class Upload:
    """The buffers of `upload_specs`, on the host, and their way to the arena, where they lie side by side."""

    def __init__(self, arena: Arena, specs: Specs) -> None:
        names = list(specs)
        self._target = arena.pointer(names[0])
        ends = [arena.pointer(name) + arena[name].nbytes for name in names]
        self._memory = MappedMemory(ends[-1] - self._target)
        self._offsets = {name: arena.pointer(name) - self._target for name in names}
        self._views = host_views(self._memory, specs, self._offsets)

    def slots(self, requests: Sequence[Request], sizes: BatchSizes, *, give_up: bool) -> None:
        """The sampling state of slot i for request i; rows 0..n-1 of the step are slots 0..n-1."""
        count = len(requests)
        write_slot_states(self._views["slots"], requests, [give_up] * count, sizes.capacity)
        write_seen_masks(self._views["seen"], [request.ids for request in requests])
        self._views["slot_of_row"][:] = -1
        self._views["slot_of_row"][:count] = np.arange(count)

    def prompts(self, prompts: Sequence[np.ndarray], first: int, padded_rows: int = 0) -> None:
        """Rows of the prompts of slots first, first + 1, ...; behind them, up to `padded_rows`, rows of no slot."""
        count = len(prompts)
        self._views["lengths"][:count] = [len(ids) for ids in prompts]
        write_prompts(self._views, prompts, range(first, first + count), lambda rows: max(rows, padded_rows))

    def rows(self, sources: np.ndarray, slots: np.ndarray) -> None:
        """Rows 0, 1, ... of the step are rows `sources` of before, with these slots; further rows have none."""
        views = self._views
        views["starts"][:] = 1
        views["starts"][1 : len(sources) + 1] = sources + 1
        views["slot_of_row"][:] = -1
        views["slot_of_row"][: len(slots)] = slots

    def send(self, stream: int, names: Sequence[str] = ()) -> None:
        """Copy everything, or only these buffers, to the GPU, in the stream's order; those side by side go together."""
        if not names:
            copy(self._target, self._memory.host, self._memory.nbytes, stream)
        for run in self._runs(names):
            begin, end = self._offsets[run[0]], self._offsets[run[-1]] + self._views[run[-1]].nbytes
            copy(self._target + begin, self._memory.host + begin, end - begin, stream)

    def _runs(self, names: Sequence[str]) -> list[list[str]]:
        """The names in the order of their places, cut where others lie between them."""
        order = {name: place for place, name in enumerate(self._offsets)}
        runs: list[list[str]] = []
        for name in sorted(names, key=order.__getitem__):
            if runs and order[runs[-1][-1]] + 1 == order[name]:
                runs[-1].append(name)
            else:
                runs.append([name])
        return runs
