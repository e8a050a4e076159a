"""The Vocos decoder on the GPU engine: float16 products, everything else in float32."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import numpy as np

from ..checkpoint import TensorFile
from ..config import DecoderConfig
from ..cuda.module import device_facts
from ..device import cuda_index, module_of
from ..errors import DeviceError, ParameterError
from ..runner import DecoderRunner, DecoderStream, Take
from . import ahead, program
from .linear import plan_linear
from .packing import pack_linear
from .vocos_plan import Facts, Plan, unsupported
from .vocos_slices import LEAST_ROWS, ROW_CLASSES, Slices, make_slices
from .vocos_stream import GpuStream, StreamTable
from .vocos_tables import Piece, group_pieces, margins, whole_pieces
from .vocos_weights import HostWeights

logger = logging.getLogger(__name__)

Array = Any  # cupy.ndarray

MIN_CAPABILITY = (7, 5)  # the first with float16 matrix instructions of 16 x 8 x 8
# Frames of a slice for each multiprocessor. Tiles of 128 x 128 outputs then come out even on 132 of them: 66 tiles of
# rows times 18, 6 and 16 of features are 9, 3 and 8 whole rounds at the 80M model's sizes.
SLICE_ROWS_EACH = 64
ALIGNMENT = 16  # bytes; of states, for the kernels
STREAM_SLOTS = 8  # voices of one table
UNDER_WAY = 3  # slices that are computed or copied


class Voice(NamedTuple):
    """States on the device, (tokens, input_size) float32 and contiguous."""

    address: int
    tokens: int


def decoder_problem(config: DecoderConfig, device: str) -> str | None:
    """Why the GPU engine cannot run such a decoder there, as one line; None when it can."""
    reason = program.driver_problem()
    if reason is not None:
        return reason
    facts = device_facts(cuda_index(device))
    if facts.capability < MIN_CAPABILITY:
        return f"float16 products need compute capability 7.5, and {facts.name} has {facts.compute_capability / 10:.1f}"
    return unsupported(config)


class GpuDecoder(DecoderRunner):
    """Runs whole utterances and streams. Any number of threads may use it; they take turns.

    A voice's samples do not depend on what is decoded beside it as long as the number of frames of a launch stays in
    the same class (`ROW_CLASSES`): products of different sizes may add up in different orders.
    """

    dtype = "float16"

    def __init__(self, file: TensorFile, config: DecoderConfig, device: str, reason: str) -> None:
        """Read, round and pack all weights. `DeviceError` where `decoder_problem` names one, or where a weight is
        beyond float16."""
        import cupy

        self.config, self.device, self.reason = config, device, reason
        problem = decoder_problem(config, device)
        if problem is not None:
            raise DeviceError(f"the GPU decoder cannot run: {problem}; choose dtype float32")
        facts = device_facts(cuda_index(device))
        self._index, self._lock = facts.index, threading.RLock()
        self._most_rows = max(LEAST_ROWS, SLICE_ROWS_EACH * facts.multiprocessors)
        ahead.begin(lambda: ahead.decoder_kernels(config, facts, self._most_rows), facts.index)
        with program.on_device(self._index):
            self._weights = _place(HostWeights(file, config))
            self._stream = cupy.cuda.Stream(non_blocking=True)
            self._copies = cupy.cuda.Stream(non_blocking=True)
            self._entered, self._left = program.Event(), program.Event()
            cupy.cuda.get_current_stream().synchronize()  # our own streams do not wait for it
        self._plan = Plan(
            config,
            Facts(facts.capability, facts.multiprocessors),
            {name: int(array.data.ptr) for name, array in self._weights.items()},
            plan_linear,
        )
        self._slices: Slices | None = None
        self._tables: list[StreamTable] = []

    @property
    def weight_bytes(self) -> int:
        """GPU memory of all weights."""
        return sum(int(array.nbytes) for array in self._weights.values())

    @property
    def nbytes(self) -> int:
        """GPU memory of weights, activations and streams."""
        slices = self._slices.nbytes if self._slices else 0
        return self.weight_bytes + slices + sum(table.nbytes for table in self._tables)

    # -- whole utterances ------------------------------------------------------------------------------------------

    def decode(self, states: Array) -> Array:
        """(B, T, input_size) floats, CuPy or NumPy, T >= 2, to CuPy float32 (B, (T - 1) * token_samples).

        Ordered after and before what CuPy's current stream does; returns before the GPU is done.
        """
        import cupy

        with self.turn():
            states = self._on_device(states, 3)
            batch, tokens, size = states.shape
            out = cupy.empty((batch, (tokens - 1) * self.config.token_samples), np.float32)
            start = int(states.data.ptr)
            voices = [Voice(start + i * tokens * size * 4, tokens) for i in range(batch)]
            with self._ordered():
                slices, groups = self._groups(voices)
                for group in groups:
                    slices.run(group, self._stream.ptr, samples=int(out.data.ptr))
        return out

    def decode_in_turn(self, utterances: Sequence[Array], take: Take) -> None:
        """Utterances (T, input_size) of any lengths, CuPy or NumPy, to float32 samples in page-locked host memory.

        The arrays of a call share blocks of that memory; a block is given back when its last array goes. `take` is
        called while this decoder is held, so it must not wait for another thread that wants it.
        """
        self._to_host(utterances, np.dtype(np.float32), take)

    def decode_pcm16(self, utterances: Sequence[Array]) -> list[np.ndarray]:
        """All of them as the 16-bit samples of a WAV file (`audio.to_pcm16`), made on the GPU: half as much to copy."""
        audio: list[np.ndarray] = []
        self._to_host(utterances, np.dtype(np.int16), audio.extend)
        return audio

    def _to_host(self, utterances: Sequence[Array], dtype: np.dtype[Any], take: Take) -> None:
        if not utterances:
            return
        with self.turn():
            arrays = self._upload(utterances)
            voices = [Voice(int(array.data.ptr), len(array)) for array in arrays]
            cutter = Cutter([self.config.token_samples * (voice.tokens - 1) for voice in voices])
            with self._ordered(), closing(self._run_and_copy(*self._groups(voices), dtype)) as blocks:
                for block in blocks:
                    take(cutter.cut(block))

    def _run_and_copy(
        self, slices: Slices, groups: Sequence[Sequence[Piece]], dtype: np.dtype[Any]
    ) -> Generator[np.ndarray, None, None]:
        """Each slice's samples in a block of page-locked memory, while the next ones are computed."""
        import cupy

        from ._driver import copy, synchronize

        stream, copies = self._stream.ptr, self._copies.ptr
        most = max(sum(piece.hops for piece in group) for group in groups)
        buffers = [cupy.empty(most * self.config.hop_length, dtype) for _ in groups[:UNDER_WAY]]
        computed, copied = program.Event(), [program.Event() for _ in buffers]
        self._entered.record(cupy.cuda.get_current_stream().ptr)  # the buffers are made in its order
        self._entered.hold(stream)
        waiting: deque[tuple[program.Event, np.ndarray]] = deque()

        def first() -> np.ndarray:
            waiting[0][0].synchronize()
            return waiting.popleft()[1]

        try:
            for i, group in enumerate(groups):
                turn = i % len(buffers)
                if len(waiting) == len(buffers):
                    yield first()
                address, hop_bytes = int(buffers[turn].data.ptr), self.config.hop_length * dtype.itemsize
                begin = address - group[0].output * hop_bytes  # pieces count their hops from the first of all slices
                slices.run(group, stream, **{"pcm" if dtype == np.int16 else "samples": begin})
                computed.record(stream)
                computed.hold(copies)
                nbytes = sum(piece.hops for piece in group) * hop_bytes
                block = np.frombuffer(cupy.cuda.alloc_pinned_memory(nbytes), dtype, nbytes // dtype.itemsize)
                copy(block.ctypes.data, address, nbytes, copies)
                copied[turn].record(copies)
                waiting.append((copied[turn], block))
            while waiting:
                yield first()
        finally:  # where it is left early: before the memory is given back, nobody writes to it any more
            if waiting:
                synchronize(copies)

    def _groups(self, voices: Sequence[Voice]) -> tuple[Slices, list[list[Piece]]]:
        """The voices in slices, one after the other in the output, and what runs them."""
        margin, frames_each = margins(self.config).total, self.config.frames_per_token
        slices = self._slices_for(sum(frames_each * (voice.tokens - 1) + 1 for voice in voices))
        pieces: list[Piece] = []
        output = 0
        for voice in voices:
            pieces += whole_pieces(voice.address, voice.tokens, output, margin, slices.rows)
            output += (voice.tokens - 1) * frames_each
        return slices, group_pieces(pieces, slices.rows) if pieces else []

    def _slices_for(self, frames: int) -> Slices:
        """Activations for so many frames, or for as many as go through at a time."""
        sizes = [end for end in ROW_CLASSES if LEAST_ROWS <= end < self._most_rows]
        wanted = next((size for size in sizes if size >= frames), self._most_rows)
        if self._slices is None or self._slices.rows < wanted:
            if self._slices is not None:
                self._stream.synchronize()
                self._slices = None  # first, so that its memory can serve again
            self._slices = make_slices(self.config, self._plan, wanted, self._index)
            if self._slices.rows < wanted:
                self._most_rows = self._slices.rows  # there is no memory for more
        return self._slices

    def own_slices(self, *, one_class: bool = False) -> Slices:
        """Activations and programs for somebody who decodes by himself, on the present device.

        one_class: the same kernels for any number of frames, so that nothing depends on what is decoded together.
        """
        return make_slices(self.config, self._plan, self._most_rows, self._index, () if one_class else ROW_CLASSES)

    # -- streams ---------------------------------------------------------------------------------------------------

    def stream(self) -> DecoderStream:
        """A fresh streaming state for one voice; states may be CuPy or NumPy, any number at a time."""
        with self.turn():
            for table in self._tables:
                slot = table.acquire()
                if slot is not None:
                    return GpuStream(self, table, slot)
            table = StreamTable(self.config, self._plan, STREAM_SLOTS, self._index)
            self._tables.append(table)
            slot = table.acquire()
            assert slot is not None
            return GpuStream(self, table, slot)

    # -- devices and streams ---------------------------------------------------------------------------------------

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One thread at a time, on our device."""
        with self._lock, program.on_device(self._index):
            yield

    @contextmanager
    def _ordered(self) -> Iterator[None]:
        """What our stream is given within comes after the caller's work so far and before the caller's next."""
        import cupy

        current = cupy.cuda.get_current_stream().ptr
        self._entered.record(current)
        self._entered.hold(self._stream.ptr)
        try:
            yield
        finally:
            self._left.record(self._stream.ptr)
            self._left.hold(current)

    def _on_device(self, states: Array, axes: int) -> Array:
        """States as contiguous float32 on our device."""
        import cupy

        if getattr(getattr(states, "device", None), "id", self._index) != self._index:
            states = states.get()  # of another GPU
        array = cupy.ascontiguousarray(cupy.asarray(states, np.float32))
        if int(array.data.ptr) % ALIGNMENT:
            array = array.copy()
        least = 2 if axes == 3 else 0
        if array.ndim != axes or array.shape[-1] != self.config.input_size or array.shape[-2] < least:
            form = "(B, T, {})" if axes == 3 else "(T, {})"
            raise ParameterError(
                f"states of shape {array.shape} must be {form.format(self.config.input_size)} with T >= 2"
            )
        return array

    def _upload(self, utterances: Sequence[Array]) -> list[Array]:
        """All utterances on the device; those of the host travel together."""
        for states in utterances:
            if states.ndim != 2 or states.shape[0] < 2 or states.shape[1] != self.config.input_size:
                raise ParameterError(
                    f"states of shape {states.shape} must be (T, {self.config.input_size}) with T >= 2"
                )
        hosted = [i for i, states in enumerate(utterances) if module_of(states) is np]
        arrays = list(utterances)
        if hosted:
            together = self._on_device(np.concatenate([np.asarray(utterances[i], np.float32) for i in hosted]), 2)
            ends = np.cumsum([len(utterances[i]) for i in hosted])
            for i, end in zip(hosted, ends.tolist(), strict=True):
                arrays[i] = together[end - len(utterances[i]) : end]
        return [self._on_device(array, 2) for array in arrays]


def _place(weights: HostWeights) -> dict[str, Array]:
    """All weights on the current device, matrices packed."""
    import cupy

    matrices = set(weights.matrices())
    placed: dict[str, Array] = {}
    for name, values in weights.arrays.items():
        placed[name] = cupy.asarray(pack_linear(values, np) if name in matrices else values)
    return placed


class Cutter:
    """Cuts consecutive blocks anew, into arrays of these lengths; only those that lie in several blocks are copied."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = deque(lengths)
        self._parts: list[np.ndarray] = []  # of the next array, which lacks `_missing`
        self._missing = self._lengths.popleft()

    def cut(self, block: np.ndarray) -> list[np.ndarray]:
        """The arrays that end in the next block."""
        ended = []
        while len(block):
            part, block = block[: self._missing], block[self._missing :]
            self._parts.append(part)
            self._missing -= len(part)
            if not self._missing:
                ended.append(part if len(self._parts) == 1 else np.concatenate(self._parts))
                self._parts = []
                self._missing = self._lengths.popleft() if self._lengths else 0
        return ended
