"""A crowd's sequences on the GPU: slots that are entered and left at any step, the programs that do it, and the graphs
that advance all of them.

Everything lies in one arena and is planned at start. All work goes on one stream, so that whatever is asked for comes
behind the steps asked for before: an entering sequence finds its row free, a removed one is gone for the next step.
Only the host reads without waiting: one word for each slot in mapped memory says how far it is.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..crowd.device import Entry
from ..errors import DeviceError
from . import program
from .arena import Arena
from .crowd_rows import Rows, buckets_up_to
from .crowd_sizes import GRAPH_ROWS, PROMPT_CLASSES, CrowdSizes, crowd_specs, packed_specs, staged_specs, step_rows_of
from .crowd_upload import Staging, plan_enter, write_entries
from .forward import (
    Activations,
    Cache,
    EntryPlaces,
    Forward,
    PromptSizes,
    PromptTables,
    SamplePlaces,
)
from .launch import Launch, RowRange, Symbol, row_class

logger = logging.getLogger(__name__)

AHEAD = 2  # steps under way
PACK_EVERY = 8  # steps, at least, from one packing of rows to the next
ANSWER_S = 20.0  # that the steps under way may take before the GPU counts as hung
SPIN_S = 20e-6  # that the host looks without a pause
PRIORITY = -5  # of streams in which somebody waits for the next step: more urgent than all others, as far as there are


class CrowdSteps:
    """Slots 0..n-1 on the current device; one thread uses it.

    invariant: one variant of each kernel for any number of rows, so that a sequence's bits do not depend on what runs
    beside it; small steps take longer.
    """

    def __init__(self, forward: Forward, sizes: CrowdSizes, *, invariant: bool = False) -> None:
        import cupy

        self.sizes, self._forward, self._config = sizes, forward, forward.config
        self._kernels_of = step_rows_of(sizes) if invariant else 0
        self.stream = cupy.cuda.Stream(non_blocking=True, priority=PRIORITY)
        self._capture_stream = cupy.cuda.Stream(non_blocking=True, priority=PRIORITY)  # which a graph's kernels keep
        self._arena = Arena(crowd_specs(self._config, sizes))
        self._workspace = cupy.zeros(max(1, self._workspace_bytes()), np.uint8)
        self._arena["slot_of_row"][:] = -1
        cupy.cuda.runtime.deviceSynchronize()  # our own stream does not wait for the zeros
        self.nbytes = int(self._arena.nbytes + self._workspace.nbytes)
        self._entries = Staging(self._arena, staged_specs(self._config, sizes))
        self._packing = Staging(self._arena, packed_specs(sizes))
        self._minus_one = program.MappedMemory(4)
        np.frombuffer(self._minus_one.view(), np.int32)[:] = -1
        self._progress_memory = program.MappedMemory(8 * sizes.slots)
        self._tokens_memory = program.MappedMemory(4 * sizes.slots * sizes.tokens)
        self.progress = np.frombuffer(self._progress_memory.view(), np.uint64)
        self.tokens = np.frombuffer(self._tokens_memory.view(), np.int32).reshape(sizes.slots, sizes.tokens)
        self.states: Any = self._arena["states"]
        self._prompt, self._step, self._entry = (
            Activations.of(self._arena, f"{name}.") for name in ("prompt", "step", "entry")
        )
        self._cache = Cache(self._arena.pointer("keys"), self._arena.pointer("values"), sizes.slots, sizes.capacity)
        self._rows = Rows(sizes.slots)
        self._under_way: deque[Any] = deque()  # the end of each step
        self._events: list[Any] = []  # to be used again
        self._steps_since_packed = 0
        self._programs: dict[tuple[Any, ...], Any] = {}
        self._graphs: dict[int, Any] = {}
        self._entry_graphs: dict[tuple[int, int], Any] = {}

    # -- what happens -------------------------------------------------------------------------------------------------

    def enter(self, entries: Sequence[Entry]) -> None:
        """Read the prompts of sequences that enter free slots, and draw their first tokens."""
        sizes = self.sizes
        bucket = sizes.entry_bucket(len(entries))
        rows = [self._rows.enter(entry.slot) for entry in entries]
        slots = [entry.slot for entry in entries]
        self.progress[slots] = 0
        used = write_entries(
            self._entries.begin(), entries, rows, bucket, sizes.capacity, sizes.tokens, sizes.padded_rows
        )
        self._entries.send(self.stream.ptr, used)
        count = used["ids"]
        if count in GRAPH_ROWS:
            self._entry_graph(count, bucket).launch(self.stream.ptr)
        else:
            longest = max(len(entry.request.ids) for entry in entries)
            self._entry_program(count, bucket).run(self.stream.ptr, rows=count, sequences=bucket, longest=longest)

    def leave(self, slot: int, *, running: bool) -> Any:
        """A slot's row is free; an event behind which a running one draws no more, else None."""
        from ._driver import copy

        row = self._rows.leave(slot)
        if not running:
            return None
        copy(self._arena.pointer("slot_of_row", row), self._minus_one.host, 4, self.stream.ptr)
        return self.mark()

    def advance(self) -> None:
        """Ask for the next step of all rows, once few enough are under way."""
        while len(self._under_way) >= AHEAD:
            self.wait(self._under_way[0])
            self._events.append(self._under_way.popleft())
        self._steps_since_packed += 1
        bucket, best = self._rows.bucket, self._rows.best_bucket
        if best < bucket and self._steps_since_packed >= PACK_EVERY:
            self._pack()
            bucket = best
        self._graph(bucket).launch(self.stream.ptr)
        event = self._events.pop() if self._events else program.Event()
        event.record(self.stream.ptr)
        self._under_way.append(event)

    def mark(self) -> Any:
        """An event behind everything asked for so far."""
        event = program.Event()
        event.record(self.stream.ptr)
        return event

    def wait(self, event: Any) -> None:
        """Wait for an event, letting other threads work; `DeviceError` where it does not come."""
        if not event.wait(ANSWER_S, spin_s=SPIN_S):
            raise DeviceError(f"the GPU has not answered within {ANSWER_S:g} s; see in nvidia-smi whether it hangs")

    def _pack(self) -> None:
        """Move the rows in use to the front, by way of the prompts' buffers."""
        from ._driver import copy

        self._steps_since_packed = 0
        sources = self._rows.pack()
        bucket = self._rows.bucket
        tables = self._packing.begin()
        tables["packed_starts"][: bucket + 1] = 1
        tables["packed_starts"][1 : len(sources) + 1] = sources + 1
        tables["packed_slots"][:] = self._rows.slot_of_row
        self._packing.send(self.stream.ptr, {"packed_starts": bucket + 1, "packed_slots": self.sizes.slots})
        self._program(("pack", bucket), lambda: self._pack_launches(bucket)).run(self.stream.ptr)
        pointer = self._arena.pointer
        for name in ("residual", "hidden", "square_sums"):
            nbytes = bucket * int(self._arena[f"step.{name}"].strides[0])
            copy(pointer(f"step.{name}"), pointer(f"prompt.{name}"), nbytes, self.stream.ptr)
        copy(pointer("slot_of_row"), pointer("packed_slots"), 4 * self.sizes.slots, self.stream.ptr)

    # -- programs -----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Build every program and capture every graph now, so that nobody waits for one later."""
        begin = time.perf_counter()
        sizes = self.sizes
        planned: dict[tuple[Any, ...], list[Launch]] = {}
        for bucket in buckets_up_to(sizes.slots):
            planned["step", bucket] = self.step_launches(bucket)
            planned["pack", bucket] = self._pack_launches(bucket)
        for rows in sizes.prompt_classes:
            for bucket in sizes.entry_buckets:
                if bucket <= rows:
                    key, span = self._entry_class(rows, bucket)
                    planned.setdefault(key, self.entry_launches(span, bucket))
        every = [launch for launches in planned.values() for launch in launches]
        program.compile_program(every, self._forward.facts.capability)  # all kernels side by side
        for key, launches in planned.items():
            self._program(key, lambda launches=launches: launches)
        for bucket in buckets_up_to(sizes.slots):
            self._graph(bucket)
        for rows, bucket in sizes.entry_graphs:
            self._entry_graph(rows, bucket)
        self.stream.synchronize()
        logger.info(
            "%d voices of up to %d tokens planned on the GPU: %.0f MB, %.1f s", self.sizes.slots, self.sizes.capacity,
            self.nbytes / 1e6, time.perf_counter() - begin,
        )  # fmt: skip

    def _program(self, key: tuple[Any, ...], launches: Any) -> Any:
        found = self._programs.get(key)
        if found is None:
            found = self._programs[key] = program.load_program(list(launches()), self._forward.facts.index)
        return found

    def _entry_class(self, rows: int, bucket: int) -> tuple[tuple[Any, ...], RowRange]:
        """The program for up to `bucket` prompts of `rows` tokens together, and the rows that it serves."""
        span = row_class(rows, self.sizes.prompt_rows, () if self._kernels_of else PROMPT_CLASSES)
        return ("entry", span.most, bucket), span

    def _entry_program(self, rows: int, bucket: int) -> Any:
        """From prompts to their first tokens."""
        key, span = self._entry_class(rows, bucket)
        return self._program(key, lambda: self.entry_launches(span, bucket))

    def _entry_graph(self, rows: int, bucket: int) -> Any:
        """The same for so many rows, of which some may be nobody's; prompts may be of any length among them."""
        graph = self._entry_graphs.get((rows, bucket))
        if graph is None:
            symbols = rows, bucket, min(rows, self.sizes.most_prompt)
            steps = [(self._entry_program(rows, bucket), *symbols)]
            graph = self._entry_graphs[rows, bucket] = program.Graph.capture(self._capture_stream.ptr, steps)
        return graph

    def entry_launches(self, span: RowRange, bucket: int) -> list[Launch]:
        """To their slots, a prefill, and the first token of each prompt, in rows of the decode step."""
        pointer, forward = self._arena.pointer, self._forward
        names = ("ids", "row_slots", "row_positions", "starts", "queries", "new_keys", "new_values")
        tables = PromptTables(lengths=0, **{name: pointer(name) for name in names})
        sizes = PromptSizes(bucket, 0, -(-span.most // bucket))
        if self._kernels_of:
            sizes = PromptSizes(bucket, 0, self.sizes.most_prompt, self.sizes.entries)
        most = self.sizes.entry_bucket(self.sizes.entries)
        entry = EntryPlaces(self._step, pointer("target_rows"), pointer("slot_of_row"))
        places = self._places(pointer("entry_slots"), pointer("entry_logits"))
        return [
            plan_enter(self._arena, forward.dtype),
            *forward.prompt_layers(self._prompt, self._cache, tables, span, sizes),
            forward.gather(self._prompt, self._entry, tables.starts, bucket, 0),
            forward.head(self._entry, self._kernels(bucket, most, Symbol.SEQUENCES), places.logits),
            forward.sample(self._entry, bucket, places, entry),
        ]

    def _kernels(self, rows: int, most: int, given_as: Symbol) -> RowRange:
        """The rows whose kernels so many take: their own number, or all there may be."""
        return RowRange(1, max(2, most), given_as) if self._kernels_of else RowRange(rows, rows)

    def step_launches(self, rows: int) -> list[Launch]:
        """One token for each of so many rows."""
        pointer, forward = self._arena.pointer, self._forward
        places = self._places(pointer("slot_of_row"), pointer("logits"))
        return [
            *forward.decode_layers(
                self._step, self._cache, rows, places.slots, places.slot_of_row, int(self._workspace.data.ptr),
                self._kernels_of,
            ),
            forward.head(self._step, self._kernels(rows, self._kernels_of, Symbol.ROWS), places.logits),
            forward.sample(self._step, rows, places),
        ]  # fmt: skip

    def _pack_launches(self, rows: int) -> list[Launch]:
        return [self._forward.gather(self._step, self._prompt, self._arena.pointer("packed_starts"), rows, 0)]

    def _graph(self, rows: int) -> Any:
        graph = self._graphs.get(rows)
        if graph is None:
            step = self._program(("step", rows), lambda: self.step_launches(rows))
            graph = self._graphs[rows] = program.Graph.capture(self._capture_stream.ptr, [(step, rows)])
        return graph

    def _places(self, slot_of_row: int, logits: int) -> SamplePlaces:
        pointer = self._arena.pointer
        return SamplePlaces(
            slots=pointer("slots"), seen=pointer("seen"), slot_of_row=slot_of_row, logits=logits,
            states=pointer("states"), most_tokens=self.sizes.tokens, tokens=self._tokens_memory.device,
            progress=self._progress_memory.device,
        )  # fmt: skip

    def _workspace_bytes(self) -> int:
        buckets = [self._kernels_of] if self._kernels_of else buckets_up_to(self.sizes.slots)
        return max(self._forward.workspace_bytes(rows, self.sizes.capacity) for rows in buckets)
