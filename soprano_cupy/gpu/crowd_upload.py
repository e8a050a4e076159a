"""What the host tells a crowd on the GPU: page-locked tables in turns, so that it never waits for a copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ..crowd.device import Entry
from . import program
from ._tables import joined, write_column, write_prompts, write_seen_masks, write_slot_states
from .arena import Arena
from .batch_sizes import Specs
from .batch_upload import host_views
from .launch import Launch, Symbol
from .slots import SLOT_STATE
from .step_launch import block_for_each, dtype_define, ints, make_launch, param_struct

TURNS = 4  # tables under way
COPIED_ALONG = 1 << 15  # bytes between two tables that cost no more than the 2 us of another copy
ENTER_THREADS = 256
ENTER_PARAMS = param_struct(
    "staged_slots staged_seen entry_slots slots seen", *ints("entries record_words mask_words reserved")
)


class Staging:
    """Host tables for the buffers `specs` of an arena, which lie there side by side."""

    def __init__(self, arena: Arena, specs: Specs) -> None:
        from ._driver import copy

        self._copy = copy
        self._names = list(specs)
        self._target = arena.pointer(self._names[0])
        end = arena.pointer(self._names[-1]) + int(arena[self._names[-1]].nbytes)
        self._offsets = {name: arena.pointer(name) - self._target for name in self._names}
        self._memories = [program.MappedMemory(end - self._target) for _ in range(TURNS)]
        self._sent = [program.Event() for _ in range(TURNS)]
        self._views = [host_views(memory, specs, self._offsets) for memory in self._memories]
        self._turn = 0

    def begin(self) -> dict[str, np.ndarray]:
        """Tables to be written; those of some turns ago, which have been read by now."""
        self._turn = (self._turn + 1) % TURNS
        self._sent[self._turn].synchronize()
        return self._views[self._turn]

    def send(self, stream: int, used: dict[str, int]) -> None:
        """Copy the first so many rows of each table to the GPU, in the stream's order."""
        memory, views = self._memories[self._turn], self._views[self._turn]
        parts = [(self._offsets[name], used[name] * views[name].strides[0]) for name in self._names if name in used]
        for offset, nbytes in joined(parts, COPIED_ALONG):
            self._copy(self._target + offset, memory.host + offset, nbytes, stream)
        self._sent[self._turn].record(stream)


def plan_enter(arena: Arena, dtype: str) -> Launch:
    """The staged records and masks of as many entries as there are sequences, to their slots."""
    words = {name: math.prod(arena[name].shape[1:]) * arena[name].dtype.itemsize // 4 for name in ("slots", "seen")}
    addresses = {name: arena.pointer(name) for name in ("staged_slots", "staged_seen", "entry_slots", "slots", "seen")}
    values = {
        **addresses, "entries": Symbol.SEQUENCES, "record_words": words["slots"], "mask_words": words["seen"],
    }  # fmt: skip
    return make_launch(
        "enter_slots.cu", "enter_slots", ENTER_PARAMS, values, defines=(dtype_define(dtype),),
        blocks=(block_for_each(Symbol.SEQUENCES), 1, 1), threads=ENTER_THREADS,
    )  # fmt: skip


def write_entries(
    tables: dict[str, np.ndarray],
    entries: Sequence[Entry],
    rows: Sequence[int],
    bucket: int,
    capacity: int,
    tokens: int,
    padded: Callable[[int], int],
) -> dict[str, int]:
    """Fill the tables of a prefill; how much of each is used.

    rows: of the decode step, for each entry. bucket: sequences that the program takes: those beyond are empty. padded:
    from the prompts' tokens to the rows that the program takes: those beyond belong to nobody.
    """
    count = len(entries)
    requests = [entry.request for entry in entries]
    prompts = [request.ids for request in requests]
    slots = [entry.slot for entry in entries]
    total, end = write_prompts(tables, prompts, slots, padded)
    records = tables["staged_slots"].view(SLOT_STATE)[:, 0]
    write_slot_states(records, requests, [entry.give_up for entry in entries], capacity, tokens)
    write_seen_masks(tables["staged_seen"], prompts)
    write_column(tables["entry_slots"], slots, bucket, -1)
    write_column(tables["target_rows"], rows, bucket, 0)
    tables["starts"][count + 1 : bucket + 1] = total
    return {
        "staged_slots": count, "staged_seen": count, "entry_slots": bucket, "target_rows": bucket, "starts": bucket + 1,
        "ids": end, "row_slots": end, "row_positions": end,
    }  # fmt: skip
