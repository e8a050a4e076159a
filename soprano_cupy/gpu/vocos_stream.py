"""Streams of the decoder on the GPU: voices whose states arrive piece by piece, each token's frames computed once.

A `StreamTable` holds what a number of voices remember, each in a slot: the last states, the frames that convolutions
still need of each layer, the sums that later frames will add to. One run takes the next states of any of its voices.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import FRAMES_PER_TOKEN, DecoderConfig
from ..device import module_of
from ..errors import ParameterError
from ..runner import DecoderStream
from . import program, vocos_plan
from .arena import Arena
from .launch import RowRange, row_class
from .vocos_plan import Capacity, Plan
from .vocos_tables import FIRST_HOP, Piece, Progress, margins, stream_piece
from .vocos_upload import HostTables

if TYPE_CHECKING:
    from .vocos import GpuDecoder

logger = logging.getLogger(__name__)

Array = Any  # cupy.ndarray or numpy.ndarray

# Frames of one run. Up to here one kind of kernel serves the products, whose sums do not vary with the number of rows:
# a voice has the same bits whatever the sizes of its pushes. Longer pushes take several runs.
MOST_ROWS = 64
LEAST_CHUNK = 4  # tokens of a run, for decoders whose windows reach so far that these are more than MOST_ROWS
GRAPH_AFTER, MOST_GRAPHS = 2, 32  # uses of the same numbers of rows, tokens and spans; graphs that are kept
STREAM_CLASSES = (4, 16)  # most frames of a program; beyond, what the table holds


@dataclass(frozen=True)
class StreamSizes:
    """What a table is planned for, by the reach of a decoder's windows."""

    lag: int  # frames that a sample's windows reach beyond it
    chunk_tokens: int  # of one voice in one run
    rows: int  # frames of a run
    ring: int  # states that are kept of a voice

    @classmethod
    def of(cls, config: DecoderConfig) -> StreamSizes:
        """The sizes for a decoder."""
        lag = margins(config).total
        waiting = -(-(lag + FIRST_HOP) // FRAMES_PER_TOKEN) + 1  # tokens of a voice without a sample of theirs, at most
        spare = FRAMES_PER_TOKEN * waiting + lag + 1
        chunk = max(LEAST_CHUNK, (MOST_ROWS - spare) // FRAMES_PER_TOKEN)
        history = -(-2 * (config.embed_kernel // 2) // FRAMES_PER_TOKEN) + 2  # states that a push needs of those before
        ring = 1 << (chunk + waiting + history - 1).bit_length()
        return cls(lag, chunk, max(MOST_ROWS, FRAMES_PER_TOKEN * chunk + spare), ring)

    def row_class(self, rows: int) -> RowRange:
        """The numbers of frames that one program serves, among which `rows` is."""
        return row_class(rows, self.rows, STREAM_CLASSES)

    def row_classes(self) -> list[RowRange]:
        """Of all programs: a voice begins with many frames, and goes on with a token's."""
        return [self.row_class(end) for end in (*STREAM_CLASSES, self.rows)]


class StreamTable:
    """`slots` voices and the programs that take them on; nothing is allocated while they run.

    Nothing here is locked: the decoder's lock is held around every call.
    """

    def __init__(self, config: DecoderConfig, plan: Plan, slots: int, device: int) -> None:
        import cupy

        self.config, self._plan, self._slots, self._device = config, plan, slots, device
        self._sizes = StreamSizes.of(config)
        self.chunk_tokens, self.ring, rows = self._sizes.chunk_tokens, self._sizes.ring, self._sizes.rows
        capacity = Capacity(rows=rows, tokens=rows, pieces=slots, spans=slots)
        tables = vocos_plan.table_specs(capacity)
        specs = tables | vocos_plan.activation_specs(config, capacity)
        specs |= vocos_plan.stream_specs(config, capacity, slots)
        specs["ring"] = ((slots, self.ring, config.input_size), "float32")
        self._arena = Arena(specs)
        self._places = {name: self._arena.pointer(name) for name in specs}
        self._tables = HostTables(tables, self._places)
        self._states = program.MappedMemory(slots * self.ring * config.input_size * 4)
        self._host_ring = np.frombuffer(self._states.view(), np.float32).reshape(slots, self.ring, config.input_size)
        self._samples = program.MappedMemory(rows * config.hop_length * 4)
        self._host_samples = np.frombuffer(self._samples.view(), np.float32)
        self._programs: dict[int, program.Program] = {}
        self._graphs: dict[tuple[int, ...], program.Graph] = {}
        self._uses: Counter[tuple[int, ...]] = Counter()
        self._free = list(range(slots))
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._capture_stream = cupy.cuda.Stream(non_blocking=True)
        self._entered, self._left = program.Event(), program.Event()
        cupy.cuda.runtime.deviceSynchronize()  # the arena is zeroed: our own stream would not wait for that
        for span in self._sizes.row_classes():
            self._program(span.most)
        logger.info("decoder: %d streams, %.0f MB", slots, self.nbytes / 1e6)

    @property
    def nbytes(self) -> int:
        """GPU memory of the voices and their activations."""
        return self._arena.nbytes

    def acquire(self) -> int | None:
        """A free slot; None where there is none. What it remembers is never read before it is written."""
        return self._free.pop() if self._free else None

    def release(self, slot: int) -> None:
        """The slot may serve another voice."""
        self._free.append(slot)

    def put(self, slot: int, first: int, states: Array) -> None:
        """Append states (n, input_size), at most `chunk_tokens`, to a voice that has `first` already."""
        on_host = module_of(states) is np
        if not on_host:
            self._wait_for_caller()
            import cupy

            states = cupy.ascontiguousarray(cupy.asarray(states, np.float32))
        taken = 0
        while taken < len(states):
            start = (first + taken) % self.ring
            count = min(len(states) - taken, self.ring - start)
            self._put(slot, start, states[taken : taken + count], on_host)
            taken += count
        if not on_host:
            self._hold_caller()

    def _put(self, slot: int, start: int, states: Array, on_host: bool) -> None:
        """Rows `start` and on of a slot's ring, without a break."""
        from ._driver import copy

        row_bytes = self.config.input_size * 4
        offset = (slot * self.ring + start) * row_bytes
        if on_host:
            self._host_ring[slot, start : start + len(states)] = states
            source = self._states.device + offset
        else:
            source = int(states.data.ptr)
        copy(self._places["ring"] + offset, source, len(states) * row_bytes, self._stream.ptr)

    def piece(self, slot: int, turn: int, done: Progress, tokens: int, *, ends: bool, output: int = 0) -> Piece:
        """What takes a voice on to `tokens` states; they have been put before."""
        return stream_piece(
            states=self._places["ring"] + slot * self.ring * self.config.input_size * 4,
            ring=self.ring, slot=slot, turn=turn, done=done, tokens=tokens, ends=ends, lag=self._sizes.lag,
            output=output,
        )  # fmt: skip

    def run(self, pieces: Sequence[Piece]) -> np.ndarray:
        """The samples of the pieces' hops, float32, where each piece's `output` put them; waits for the GPU."""
        from ._driver import synchronize

        self._launch(*self._tables.send(pieces, 1, self._stream.ptr, samples=self._samples.device))
        synchronize(self._stream.ptr)
        count = sum(piece.hops for piece in pieces) * self.config.hop_length
        samples: np.ndarray = self._host_samples[:count].copy()
        return samples

    def _launch(self, *counts: int) -> None:
        """Rows, tokens and spans; those that come again by a graph: launching 30 kernels takes longer than they do."""
        graph = self._graphs.get(counts)
        if graph is None:
            launches = self._program(counts[0])
            launches.run(self._stream.ptr, *counts)
            self._uses[counts] += 1
            if self._uses[counts] == GRAPH_AFTER and len(self._graphs) < MOST_GRAPHS:
                self._graphs[counts] = program.Graph.capture(self._capture_stream.ptr, [(launches, *counts)])
            return
        graph.launch(self._stream.ptr)

    def _program(self, rows: int) -> program.Program:
        span = self._sizes.row_class(rows)
        if span.most not in self._programs:
            launches = list(self._plan.streams(self._places, span, span.most, self._slots))
            self._programs[span.most] = program.load_program(launches, self._device)
        return self._programs[span.most]

    def _wait_for_caller(self) -> None:
        """The caller's states are written in the order of CuPy's current stream."""
        import cupy

        self._entered.record(cupy.cuda.get_current_stream().ptr)
        self._entered.hold(self._stream.ptr)

    def _hold_caller(self) -> None:
        """The caller may write over the states once they are copied."""
        import cupy

        self._left.record(self._stream.ptr)
        self._left.hold(cupy.cuda.get_current_stream().ptr)


class GpuStream(DecoderStream):
    """One voice. States wait until a token's samples are final: the first audio costs one run, not one a token."""

    def __init__(self, decoder: GpuDecoder, table: StreamTable, slot: int) -> None:
        self._decoder, self._table, self._slot = decoder, table, slot
        self._put = 0  # states so far
        self._done, self._turn = Progress(), 0
        self._release = weakref.finalize(self, table.release, slot)  # also of a stream that is given up
        self._release.atexit = False

    def push(self, states: Array) -> np.ndarray:
        """Take (n, input_size) further states; return the samples that are final now, a token's at least, or none."""
        if not self._release.alive:
            raise ParameterError("the utterance has ended; begin a new stream")
        if len(states) == 0:
            return np.empty(0, np.float32)
        if states.ndim != 2 or states.shape[1] != self._table.config.input_size:
            raise ParameterError(f"states of shape {states.shape} must be (n, {self._table.config.input_size})")
        pieces = []
        with self._decoder.turn():
            for start in range(0, len(states), self._table.chunk_tokens):
                chunk = states[start : start + self._table.chunk_tokens]
                self._table.put(self._slot, self._put, chunk)
                self._put += len(chunk)
                pieces.append(self._run(ends=False))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def finish(self) -> np.ndarray:
        """The remaining samples; the voice ends and its slot is free again."""
        if not self._release.alive:
            raise ParameterError("the utterance has ended; begin a new stream")
        with self._decoder.turn():
            samples = self._run(ends=True) if self._put > 1 else np.empty(0, np.float32)
            self._release()
        return samples

    def _run(self, *, ends: bool) -> np.ndarray:
        piece = self._table.piece(self._slot, self._turn, self._done, self._put, ends=ends)
        # A run costs the same for a part of a token's samples, and chunks are whole tokens.
        if piece.hops < (1 if ends else self._table.config.frames_per_token):
            return np.empty(0, np.float32)
        samples = self._table.run([piece])
        self._turn ^= 1
        self._done = Progress(self._put, self._done.hops + piece.hops)
        return samples
