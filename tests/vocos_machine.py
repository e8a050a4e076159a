"""The GPU decoder on the emulated machine: its own plan and kernels; products in NumPy with the same rounding."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from emulation import Buffer, build, poisoned
from launches import at_sizes

from soprano_cupy.checkpoint import TensorFile
from soprano_cupy.config import DecoderConfig
from soprano_cupy.gpu import vocos_plan
from soprano_cupy.gpu.launch import Launch, RowRange, Symbol
from soprano_cupy.gpu.linear import End, LinearRequest
from soprano_cupy.gpu.vocos_tables import (
    TABLES,
    Piece,
    Progress,
    group_pieces,
    margins,
    slice_tables,
    stream_piece,
    whole_pieces,
)
from soprano_cupy.gpu.vocos_weights import HostWeights
from soprano_cupy.portable.ops import gelu

Step = Launch | LinearRequest


def product(request: LinearRequest, rows: int, matrix: np.ndarray, bias: np.ndarray, view: Any) -> np.ndarray:
    """What a request's end is given, (rows, features) float32; summed in float64, each row by itself."""
    stride = request.input_stride
    inputs = view(request.input, (rows, stride), np.float16)
    assert (inputs[:, request.depth : request.padded_depth] == 0).all(), "padding of an input is not zero"
    wide = matrix.astype(np.float64)
    with np.errstate(all="ignore"):
        sums = [wide @ row[: request.depth].astype(np.float64) + bias for row in inputs]
        result = np.array(sums).astype(np.float32)
        return gelu(result) if request.end is End.GELU else result


class Machine:
    """A decoder whose arrays are NumPy's; every address is checked."""

    def __init__(self, file: TensorFile, config: DecoderConfig, rows: int = 96, slots: int = 3) -> None:
        self.config, self.slots = config, slots
        self.capacity = vocos_plan.Capacity.of_rows(rows)
        self.lag = margins(config).total
        self.weights = {name: aligned(array) for name, array in HostWeights(file, config).arrays.items()}
        specs = vocos_plan.table_specs(self.capacity) | vocos_plan.activation_specs(config, self.capacity)
        specs |= vocos_plan.stream_specs(config, self.capacity, slots)
        self.arrays = {name: blank(shape, dtype) for name, (shape, dtype) in specs.items()}
        used = {"states": config.embed_kernel * config.input_size, "normed": config.dim}
        for name, columns in (used | {"expanded": config.intermediate_size}).items():
            self.arrays[name][:, columns:] = 0
        at = {name: array.ctypes.data for name, array in self.arrays.items()}
        plan = vocos_plan.Plan(
            config,
            vocos_plan.Facts((8, 0), 4),
            {name: array.ctypes.data for name, array in self.weights.items()},
            lambda request: request,
        )
        whole = RowRange(1, rows)
        self._whole: list[Step] = list(plan.whole(at, whole, self.capacity.tokens))
        self._streams: list[Step] = list(plan.streams(at, whole, self.capacity.tokens, slots))
        self.transform = plan.transform

    def decode(self, utterances: Sequence[np.ndarray], hops_of_a_block: int = 5, pcm: bool = False) -> list[np.ndarray]:
        """Whole utterances (T, input) float32 in as many slices as they need."""
        held = [aligned(states) for states in utterances]
        starts = np.cumsum([0] + [4 * (len(states) - 1) for states in held])
        pieces = [
            piece
            for states, start in zip(held, starts, strict=False)
            for piece in whole_pieces(states.ctypes.data, len(states), int(start), self.lag, self.capacity.rows)
        ]
        out = blank((int(starts[-1]), self.config.hop_length), "int16" if pcm else "float32")
        for group in group_pieces(pieces, self.capacity.rows):
            self.run(self._whole, group, held, out, hops_of_a_block)
        return [out[a:b].reshape(-1) for a, b in itertools.pairwise(starts)]

    def push(self, pieces: Sequence[Piece], held: Sequence[np.ndarray]) -> np.ndarray:
        """The next states of streams; (hops, hop_length)."""
        out = poisoned((sum(piece.hops for piece in pieces), self.config.hop_length), np.float32)
        self.run(self._streams, pieces, held, out, 1)
        return out

    def run(
        self,
        steps: Iterable[Step],
        pieces: Sequence[Piece],
        held: Sequence[np.ndarray],
        out: np.ndarray,
        hops_of_a_block: int,
    ) -> None:
        memory = {name: self.arrays[name] for name in TABLES}
        for table in memory.values():
            table.view(np.uint8)[...] = 255
        address = out.ctypes.data
        kind = "pcm" if out.dtype == np.int16 else "samples"
        rows, tokens, spans = slice_tables(memory).write(pieces, hops_of_a_block, **{kind: address})
        symbols = {Symbol.ROWS: rows, Symbol.SEQUENCES: tokens, Symbol.LONGEST: spans}
        for step in steps:
            if isinstance(step, LinearRequest):
                self._multiply(step, symbols)
            else:
                self._launch(step, symbols, [*held, out])

    def _launch(self, step: Launch, symbols: dict[Symbol, int], extra: Sequence[np.ndarray]) -> None:
        params, grid = at_sizes(step, symbols)
        buffers = [Buffer(array) for array in self.weights.values()]
        buffers += [Buffer(array, writable=True) for array in (*self.arrays.values(), *extra) if array.size]
        build(step.source, dict(step.defines)).launch(
            step.kernel,
            params,
            grid=grid,
            threads=step.threads,
            shared_bytes=step.shared_bytes,
            buffers=buffers,
        )

    def _multiply(self, request: LinearRequest, symbols: dict[Symbol, int]) -> None:
        rows = symbols[Symbol(request.rows)]
        by_address = {array.ctypes.data: array for array in self.weights.values()}
        result = product(request, rows, by_address[request.weights], by_address[request.bias], self._view)
        kind = np.float16 if request.end is End.GELU else np.float32
        target = self._view(request.output, (rows, request.output_stride), kind)[:, : request.features]
        if request.end is End.ADD:
            result = self._view(request.residual, (rows, request.residual_stride), np.float32) + result
        target[...] = result

    def _view(self, address: int, shape: tuple[int, int], kind: Any) -> np.ndarray:
        """The memory at an address, which must lie inside one array."""
        for array in self.arrays.values():
            offset = address - array.ctypes.data
            size = shape[0] * shape[1] * np.dtype(kind).itemsize
            if 0 <= offset < array.nbytes:
                assert offset + size <= array.nbytes, "a product leaves its array"
                return array.reshape(-1).view(np.uint8)[offset : offset + size].view(kind).reshape(shape)
        raise AssertionError(f"address {address:#x} is in no array")


class StreamedVoice:
    """One voice on a machine, as `soprano_cupy/gpu/vocos_stream.py` leads it."""

    def __init__(self, machine: Machine, states: np.ndarray, slot: int, ring: int = 16) -> None:
        self.machine, self.states, self.slot = machine, states, slot
        self.ring = poisoned((ring, states.shape[1]), np.float32)
        self.done, self.turn = Progress(), 0
        self.pieces: list[np.ndarray] = []

    def take(self, tokens: int, output: int = 0) -> Piece:
        """The piece of the next `tokens` states, or of the end where there are none left behind them."""
        end = min(self.done.tokens + tokens, len(self.states))
        for token in range(self.done.tokens, end):
            self.ring[token % len(self.ring)] = self.states[token]
        piece = stream_piece(
            states=self.ring.ctypes.data,
            ring=len(self.ring),
            slot=self.slot,
            turn=self.turn,
            done=self.done,
            tokens=end,
            ends=end == len(self.states),
            lag=self.machine.lag,
            output=output,
        )
        self.turn ^= 1
        self.done = Progress(end, self.done.hops + piece.hops)
        return piece


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy with NaN on both sides, aligned as device memory is."""
    copy = poisoned(array.shape, array.dtype)
    copy[...] = array
    return copy


def blank(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    kinds = {"uint16": np.float16, "float32": np.float32}
    if dtype in kinds:
        return poisoned(shape, kinds[dtype])
    storage = np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize + 16, 255, np.uint8)
    start = -storage.ctypes.data % 16
    return storage[start : len(storage) - 16 + start].view(dtype).reshape(shape)
