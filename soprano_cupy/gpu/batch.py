"""Sequences that generate together on the GPU: their memory, their programs, and the graphs that advance them.

Everything is planned for a number of slots when a `Batch` is made: nothing is allocated while it generates. A slot
holds a sequence's keys and values, its sampling state, its hidden states and its tokens. The sampling kernel keeps all
of that up to date by itself, so any number of steps can be asked for ahead; the host reads how far each slot is from
one word of mapped memory.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DeviceError
from ..generation import Request
from ..sampling import SamplingParams
from . import step
from ._driver import Event, Graph, MappedMemory, Program, copy
from .arena import Arena
from .batch_launches import BatchLaunches
from .batch_sizes import BUCKETS, BatchSizes, batch_specs, bucket_of, prompt_capacity, prompt_groups, upload_specs
from .batch_upload import Upload
from .forward import ITEM_BYTES, Forward
from .launch import Launch
from .persistent import Common, Places
from .persistent_run import ControlWords, PersistentRun
from .program import load_program

if TYPE_CHECKING:
    from .persistent_path import PersistentPath

logger = logging.getLogger(__name__)

Array = Any  # cupy.ndarray

SLOT_TABLES = ("slots", "seen", "slot_of_row")  # of an upload: what the sampling kernel needs
PROMPT_TABLES = ("starts", "lengths", "ids", "row_slots", "row_positions")  # what a prefill needs
SPIN_S, LISTENER_SPIN_S = 50e-6, 1e-3  # that a wait looks without a pause; behind that, sleeps of 20 us take 70
PADDED_PROMPT, MOST_PADDED_PROMPT = 16, 256  # a prompt's rows in a graph are a multiple of this, and at most that
STEPS = 2  # of a graph
AHEAD = 6  # steps under way before the host waits
SHRINK_EVERY = 16  # steps after which rows that have ended are left behind; a fixed number, so that every run is alike
SHRINK_FROM = 16  # rows; fewer cost as much as one
PROFILE_NODES = 40  # launches of a graph that times one kind


class Batch:
    """Slots 0..n-1 with all they need. One thread uses a batch at a time.

    path: takes the few voices that the persistent kernel serves faster than graphs do.
    """

    def __init__(self, forward: Forward, sizes: BatchSizes, path: PersistentPath | None = None) -> None:
        import cupy

        self.sizes, self._forward, self._path = sizes, forward, path
        self._config = forward.config
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._capture_stream = cupy.cuda.Stream(non_blocking=True)
        self._arena = Arena(batch_specs(self._config, sizes))
        self._workspace = cupy.zeros(max(1, self._workspace_bytes()), np.uint8)
        cupy.cuda.get_current_stream().synchronize()  # our own stream does not wait for it
        self.nbytes = self._arena.nbytes + int(self._workspace.nbytes)
        self._upload = Upload(self._arena, upload_specs(self._config, sizes))
        self._progress_memory = MappedMemory(8 * sizes.slots)
        self._tokens_memory = MappedMemory(4 * sizes.slots * sizes.tokens)
        self.progress = np.frombuffer(self._progress_memory.view(), np.uint64)
        self.tokens = np.frombuffer(self._tokens_memory.view(), np.int32).reshape(sizes.slots, sizes.tokens)
        self.states: Array = self._arena["states"]
        self._launches = BatchLaunches(
            forward, sizes, self._arena, tokens=self._tokens_memory.device, progress=self._progress_memory.device,
            workspace=int(self._workspace.data.ptr),
        )  # fmt: skip
        self._programs: dict[tuple[Any, ...], Program] = {}
        self._graphs: dict[int, Graph] = {}
        self._prompt_graphs: dict[int, Graph | None] = {}  # of one voice, by padded rows
        self._prompt_due = 0  # rows of a graph that the next call may want
        self._words = ControlWords()
        self._run: PersistentRun | None = None  # of the present call, while the persistent kernel computes it
        logger.info(
            "%d voices of up to %d tokens planned on the GPU: %.0f MB", sizes.slots, sizes.capacity, self.nbytes / 1e6
        )

    def prepare(self) -> None:
        """Build what the first call for one voice needs; `DeviceError` when a kernel does not compile or load."""
        for rows in self._launches.usual_prompts():
            self._prompt_program(rows, 1, 0)
        self._tail(1)
        self._graph(1).upload(self.stream.ptr)

    # -- a call ---------------------------------------------------------------------------------------------------

    def begin(self, requests: Sequence[Request], *, give_up: bool) -> None:
        """Put request i into slot i, read the prompts and draw the first tokens; nothing is waited for."""
        self._requests = requests
        self._rows = bucket_of(len(requests))
        self._slot_of_row = np.arange(len(requests))
        self.progress[:] = 0
        self._read([r.ids for r in requests])
        self._upload.slots(requests, self.sizes, give_up=give_up)  # while the prompts are being read
        self._upload.send(self.stream.ptr, SLOT_TABLES)
        self._tail(self._rows).run(self.stream.ptr)
        self.steps = 1  # asked for so far
        if self._path is not None and self._path.takes(requests):
            self._run = PersistentRun(self._path, self, self._words, len(requests))
            self._run.start()

    def advance(self) -> None:
        """Ask for the next steps of all sequences."""
        self._graph(self._rows).launch(self.stream.ptr)
        self.steps += STEPS

    def wait(self, slot: int, count: int) -> int:
        """Wait until a slot has made `count` tokens or has ended; its progress word."""
        while True:
            word = int(self.progress[slot])
            if step.progress_count(word) >= count or step.progress_status(word):
                return word
            if self._run is not None:
                self._run.await_change(slot, word)
                continue
            while self.steps < count + AHEAD:
                self.advance()
            self.await_word(slot, word, listened=True)

    def await_word(self, slot: int, word: int, *, listened: bool = False) -> None:
        """Wait until a slot's progress word is no longer `word`; `DeviceError` where nothing will change it.

        listened: somebody waits for this very token, which is worth a busy core.
        """
        spin_s = LISTENER_SPIN_S if listened else SPIN_S
        self._progress_memory.wait(8 * slot, word, self.stream.ptr, changed=True, nbytes=8, spin_s=spin_s)

    def finish(self, count: int) -> list[int]:
        """Generate slots 0 to count - 1 to their ends; their last progress words."""
        due = 1 + SHRINK_EVERY
        while True:
            words = self.progress[:count].copy()
            running = np.flatnonzero(step.progress_status(words) == step.RUNNING)
            if len(running) == 0:
                return [int(word) for word in words]
            made = step.progress_count(words[running])
            slowest = int(running[made.argmin()])
            if self._run is not None:
                self._run.await_change(slowest, int(words[slowest]), whole=True)
                continue
            if self._rows >= SHRINK_FROM and int(made.min()) == self.steps and self.steps >= due:
                due += SHRINK_EVERY
                if bucket_of(len(running)) < self._rows:
                    self._shrink(running)
            while self.steps < min(int(made.min()) + AHEAD, due if self._rows >= SHRINK_FROM else 1 << 30):
                self.advance()
            self.await_word(slowest, int(words[slowest]))

    def _shrink(self, running: np.ndarray) -> None:
        """Move the rows of slots `running` together; the next steps are those of a smaller bucket."""
        rows = np.flatnonzero(np.isin(self._slot_of_row, running))
        self._rows = bucket_of(len(rows))
        self._slot_of_row = self._slot_of_row[rows]
        self._upload.rows(rows, self._slot_of_row)
        self._upload.send(self.stream.ptr, ("slot_of_row", "starts"))
        bucket = self._rows
        self._program(("shrink", bucket), lambda: self._launches.shrink(bucket)).run(self.stream.ptr)
        for name in ("residual", "hidden", "square_sums"):
            source, target = f"prompt.{name}", f"step.{name}"
            nbytes = self._rows * self._arena[target].strides[0]
            copy(self._arena.pointer(target), self._arena.pointer(source), nbytes, self.stream.ptr)

    def settle(self, count: int) -> None:
        """Make ready for another call, once the present stream has read what it wants."""
        import cupy

        self._leave_kernel()
        if (step.progress_status(self.progress[:count]) == step.RUNNING).any():  # given up by the caller
            self.stream.synchronize()
        self.stream.wait_event(cupy.cuda.get_current_stream().record())
        self._capture_prompt()

    def abandon(self) -> None:
        """After an error, before the memory is freed: the persistent kernel writes to it no more."""
        with contextlib.suppress(DeviceError):
            self._leave_kernel()

    def _read(self, prompts: Sequence[np.ndarray]) -> None:
        """The prompts of slots 0, 1, ..., ready for the first tokens."""
        first = 0
        for group in prompt_groups([len(ids) for ids in prompts], prompt_capacity(self.sizes)):
            if first:
                self.stream.synchronize()  # the tables are read from the host's memory until then
            self._prefill([prompts[i] for i in group], first)
            first += len(group)

    def _prefill(self, prompts: Sequence[np.ndarray], first: int) -> None:
        """The prompts of slots first, first + 1, ...: their keys and values, and the last row of each."""
        lengths = [len(ids) for ids in prompts]
        rows, longest = sum(lengths), max(lengths)
        padded_rows = -(-rows // PADDED_PROMPT) * PADDED_PROMPT
        graph = self._prompt_graphs.get(padded_rows) if self.sizes.slots == 1 else None
        self._upload.prompts(prompts, first, padded_rows if graph is not None else rows)
        self._upload.send(self.stream.ptr, PROMPT_TABLES)
        if graph is not None:
            graph.launch(self.stream.ptr)
            return
        program = self._prompt_program(rows, len(prompts), first)
        program.run(self.stream.ptr, rows=rows, sequences=len(prompts), longest=longest)
        if self.sizes.slots == 1 and padded_rows <= min(MOST_PADDED_PROMPT, prompt_capacity(self.sizes)):
            self._prompt_due = padded_rows

    def _capture_prompt(self) -> None:
        """A graph for prompts as long as the last one: launching a hundred kernels takes longer than they do.

        Rows are rounded up; those behind the prompt have no slot and mean nothing to the others. It is made when a call
        is over, so that nobody waits for it.
        """
        rows, self._prompt_due = self._prompt_due, 0
        if not rows or rows in self._prompt_graphs:
            return
        self._prompt_graphs[rows] = None  # for good, where it fails
        try:
            steps = [(self._prompt_program(rows, 1, 0), rows, 1, rows)]
            self._prompt_graphs[rows] = Graph.capture(self._capture_stream.ptr, steps)
        except DeviceError as error:
            if error.sticky:
                raise
            logger.info("no graph for prompts of %d tokens: %s", rows, error)

    # -- the persistent kernel --------------------------------------------------------------------------------------

    def places(self, slot: int) -> Places:
        """Where the persistent kernel finds the sequence of a slot, whose row of the step has the slot's number."""
        pointer, c = self._arena.pointer, self._config
        cache = ITEM_BYTES * self.sizes.capacity * c.num_kv_heads * c.head_dim * slot
        return Places(
            keys=pointer("keys") + cache, values=pointer("values") + cache, slot=pointer("slots", slot),
            seen=pointer("seen", slot), tokens=self._tokens_memory.device + 4 * self.sizes.tokens * slot,
            states=pointer("states", slot), progress=self._progress_memory.device + 8 * slot,
            residual=pointer("step.residual", slot), hidden=pointer("step.hidden", slot),
            square_sums=pointer("step.square_sums", slot), slot_of_row=pointer("slot_of_row", slot), slot_index=slot,
        )  # fmt: skip

    def common(self, budget: int, *, cancel: int = 0, report: int = 0) -> Common:
        """What the persistent kernel knows of all slots; see `persistent.Common`."""
        c, sizes = self._config, self.sizes
        elements = sizes.slots * sizes.capacity * c.num_kv_heads * c.head_dim
        return Common(elements, sizes.tokens, budget, cancel, report)

    def go_on(self, *, again: bool) -> None:
        """By graphs from here, behind the tokens that the host knows of.

        again: the kernel has left nothing for whoever goes on, so what stands in the cache is computed once more.
        """
        self._leave_kernel()
        words = self.progress[: len(self._requests)]
        counts, running = step.progress_count(words), step.progress_status(words) == step.RUNNING
        if not running.any():
            return
        self.steps = max(1, int(counts[running].min()))
        if again:
            held = [
                np.concatenate((request.ids, self.tokens[slot, : counts[slot]])) if running[slot] else request.ids[:1]
                for slot, request in enumerate(self._requests)
            ]
            self._read(held)  # the slots' own records are as the kernel left them
            self._tail(self._rows).run(self.stream.ptr)
            self.steps += 1

    def _leave_kernel(self) -> None:
        """The persistent kernel has ended, or does at once."""
        run, self._run = self._run, None
        if run is not None:
            run.close()

    # -- measuring ------------------------------------------------------------------------------------------------

    def time_persistent(
        self, path: PersistentPath, count: int, context: int, steps: int, repeats: int, temperature: float
    ) -> list[float]:
        """Seconds of a step of the persistent kernel for `count` sequences, as `time_steps` for graphs."""
        results = []
        places = [self.places(slot) for slot in range(count)]
        for _ in range(repeats + 1):  # the first warms up
            self._pretend(count, max(1, context - steps // 2), temperature)
            start, end = Event(timing=True), Event(timing=True)
            start.record(self.stream.ptr)
            path.decoder.launch(self.stream.ptr, places, self.common(steps))
            end.record(self.stream.ptr)
            end.synchronize()
            path.decoder.check()
            if int(step.progress_count(self.progress[:count]).min()) < steps:
                raise DeviceError("a sequence ended while its steps were timed; use a checkpoint that goes on")
            results.append(end.elapsed_ms(start) / 1e3 / steps)
        return results[1:]

    def time_steps(self, count: int, context: int, steps: int, repeats: int, temperature: float = 0.0) -> list[float]:
        """Seconds of a decode step for `count` sequences of about `context` tokens, one mean for each repeat."""
        replays = max(1, steps // STEPS)
        results = []
        for _ in range(repeats + 1):  # the first warms up
            self._pretend(count, max(1, context - steps // 2), temperature)
            start, end = Event(timing=True), Event(timing=True)
            start.record(self.stream.ptr)
            self._graph(self._rows).launch(self.stream.ptr, replays)
            end.record(self.stream.ptr)
            end.synchronize()
            if int(step.progress_count(self.progress[:count]).min()) < replays * STEPS:
                raise DeviceError("a sequence ended while its steps were timed; use a checkpoint that goes on")
            results.append(end.elapsed_ms(start) / 1e3 / (replays * STEPS))
        return results[1:]

    def profile_step(self, count: int, context: int) -> list[tuple[str, float]]:
        """Microseconds of each kind of launch in a decode step, all launches of a kind together.

        A kind is timed as a graph of copies of itself, each of which waits for the one before, as they do in a step;
        but its weights come from the L2 cache.
        """
        self._pretend(count, context)
        kinds: dict[str, list[Launch]] = {}
        for launch in self._launches.step(self._rows):
            size = launch.grid if isinstance(launch.grid[0], int) else ()
            constants = " ".join(f"{name}={value}" for name, value in launch.defines)
            kinds.setdefault(f"{launch.kernel} {size} {constants}", []).append(launch)
        return [(kind, self._time_copies(launches)) for kind, launches in kinds.items()]

    def _time_copies(self, launches: Sequence[Launch]) -> float:
        """Microseconds of one pass over the launches."""
        copies = max(1, PROFILE_NODES // len(launches))
        program = load_program(list(launches), self._forward.facts.index)
        graph = Graph.capture(self._capture_stream.ptr, [(program,)] * copies)
        start, end = Event(timing=True), Event(timing=True)
        graph.launch(self.stream.ptr)
        start.record(self.stream.ptr)
        graph.launch(self.stream.ptr)
        end.record(self.stream.ptr)
        end.synchronize()
        return 1e3 * end.elapsed_ms(start) / copies

    def _pretend(self, count: int, context: int, temperature: float = 0.0) -> None:
        """Slots that hold `context` tokens of nothing."""
        params = SamplingParams(temperature, max_new_tokens=self.sizes.tokens, seed=1)
        self._rows = bucket_of(count)
        self.stream.synchronize()
        self.progress[:] = 0
        self._upload.slots([Request(np.zeros(context, np.int32), params)] * count, self.sizes, give_up=False)
        self._upload.send(self.stream.ptr)

    # -- programs -------------------------------------------------------------------------------------------------

    def _program(self, key: tuple[Any, ...], launches: Any) -> Program:
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = load_program(list(launches()), self._forward.facts.index)
        return program

    def _prompt_program(self, rows: int, sequences: int, first: int) -> Program:
        span = self._launches.prompt_class(rows)
        key = ("prompt", span.most, sequences, first)
        return self._program(key, lambda: self._launches.prompt(span, sequences, first))

    def _tail(self, rows: int) -> Program:
        return self._program(("tail", rows), lambda: self._launches.tail(rows))

    def _graph(self, rows: int) -> Graph:
        graph = self._graphs.get(rows)
        if graph is None:
            program = self._program(("step", rows), lambda: self._launches.step(rows))
            graph = self._graphs[rows] = Graph.capture(self._capture_stream.ptr, [(program,)] * STEPS)
        return graph

    def _workspace_bytes(self) -> int:
        return max(
            self._forward.workspace_bytes(rows, self.sizes.capacity) for rows in BUCKETS if rows <= self.sizes.slots
        )
