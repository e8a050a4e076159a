"""One voice from its first token to its last in one launch (`kernels/decode_persistent.cu`).

A step of a captured graph waits about ninety times for a kernel to end, which costs more than the arithmetic of one
voice. Here a grid of a few dozen blocks, all of them running at once, goes through all layers and all tokens by itself;
`docs/persistent-decode.md` has the design and the candidates that were measured. It takes over where the graph path's
sampling kernel has drawn at least one token, and leaves everything as that kernel would.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import ModelConfig
from ..cuda.module import DeviceFacts, load
from ..errors import DeviceError
from ..generation import LOOP_DISTANCE, LOOP_LENGTH
from .launch import Launch
from .persistent_schedule import THREADS, WARPS, Shape, ceil
from .persistent_weights import PersistentWeights, gather_blocks, pack_persistent
from .weights import Weights

if TYPE_CHECKING:
    from ._driver import Event, Program

logger = logging.getLogger(__name__)

SOURCE, KERNEL = "decode_persistent.cu", "decode_persistent"
MIN_CAPABILITY = (9, 0)  # clusters
MOST_VOCAB = 8192  # scores that the first block keeps in shared memory, as in kernels/sample_scores.cuh
SHARED_BYTES = {
    (9, 0): 232_448,
    (10, 0): 232_448,
    (10, 3): 232_448,
    (11, 0): 232_448,
    (12, 0): 101_376,
    (12, 1): 101_376,
}
UNLIMITED = 1 << 30  # tokens of a launch

VOICES = (1, 2, 4, 8)  # that a kernel is compiled for
MOST_VOICES = VOICES[-1]

GridChoice = tuple[int, int, int]  # clusters, ranks of a cluster, shares of the values' dimensions
# The first that fits the model and the GPU is taken.
GRIDS: tuple[GridChoice, ...] = ((4, 16, 2), (4, 16, 1), (4, 8, 1), (2, 16, 1), (2, 8, 1), (1, 16, 1), (1, 8, 1))

# What a wait that took too long was for: the error word's codes in kernels/persistent_*.cuh.
WAITS = {
    1: "weights", 2: "room for weights", 3: "a token", 4: "the best scores", 5: "the scores",
    7: "the clerk", 8: "the sum behind attention", 9: "the sum behind the MLP", 16: "queries", 17: "attention",
    18: "a layer's input", 19: "the MLP's input", 20: "gated channels", 21: "a layer's norm", 22: "the MLP's norm",
    23: "states",
}  # fmt: skip

# Of one voice; VoicePlaces of persistent_head.cuh.
VOICE = np.dtype(
    [(name, np.uint64) for name in ("slot", "seen", "tokens", "states", "progress")]
    + [(name, np.uint64) for name in ("residual", "hidden", "square_sums", "slot_of_row")]
    + [("slot_index", np.int32), ("reserved", np.int32)]
)


def params_dtype(voices: int) -> np.dtype[Any]:
    """PersistentParams of persistent_head.cuh, field by field, from LayerParams (persistent_layer_params.cuh) on."""
    return np.dtype(
        [(name, np.uint64) for name in ("stream", "gains", "head_gains", "rope")]
        + [("keys", np.uint64, voices), ("values", np.uint64, voices), ("words", np.uint64), ("error", np.uint64)]
        + [("stream_bytes", np.int64), ("layer_elements", np.int64), ("layers", np.int32), ("epsilon", np.float32)]
        + [(name, np.uint64) for name in ("embeddings", "cancel", "report")]
        + [(n, np.int32) for n in ("voices", "most_tokens", "budget", "positions", "end_token", "loop_length")]
        + [("loop_distance", np.float32), ("stall_at", np.int32), ("places", VOICE, voices)]
    )


@dataclass(frozen=True)
class Places:
    """Device addresses of one sequence, as the graph path's prefill and first sampling have left them.

    keys, values: of the slot, (layers, capacity, kv_heads, head_dim), layers `Common.layer_elements` apart. slot: its
    `SLOT_STATE` record. seen, states, tokens, progress: of the slot, as `kernels/sample.cu` writes them. residual,
    hidden, square_sums, slot_of_row: the decode step's row of the sequence; read, and at the end written for whoever
    goes on, `slot_of_row` with slot_index or -1.
    """

    keys: int
    values: int
    slot: int
    seen: int
    tokens: int
    states: int
    progress: int
    residual: int
    hidden: int
    square_sums: int
    slot_of_row: int
    slot_index: int


@dataclass(frozen=True)
class Common:
    """What the sequences of a launch share.

    layer_elements: elements from one layer's keys to the next's. most_tokens: room for tokens and states of a slot.
    budget: tokens that a launch makes of each, at most. cancel: address of a 32-bit word of mapped memory that ends
    the launch at the next token once it is not 0, or 0. report: of a 64-bit word of mapped memory that becomes 1 + the
    error's code when the launch ends, or 0. stall_at: for tests of the watchdog, the token at which a block falls
    silent.
    """

    layer_elements: int
    most_tokens: int
    budget: int = UNLIMITED
    cancel: int = 0
    report: int = 0
    stall_at: int = 0


class PersistentDecoder:
    """The persistent kernel for one model on one GPU, for up to `MOST_VOICES` sequences a launch.

    weights: gives the model's, or waits until they have been read; the kernel is compiled without them, and they are
    packed at the first launch. Launches share what lies between the blocks, and the GPU has room for one: whatever
    streams they are given, they follow each other. Any thread may launch.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Callable[[], Weights],
        facts: DeviceFacts,
        dtype: str,
        grids: Sequence[GridChoice] = GRIDS,
    ) -> None:
        self._config, self._source, self._facts, self._dtype = config, weights, facts, dtype
        self._grids = grids
        self._found: dict[int, Shape | str] = {}
        self._weights: dict[tuple[int, int], PersistentWeights] = {}
        self._programs: dict[tuple[Any, ...], Program] = {}
        self._before: Event | None = None  # the end of the launch before
        self._lock = threading.Lock()

    def problem(self, voices: int = 1) -> str | None:
        """Why so many voices are left to the graph path, as one line; None when the kernel serves them.

        The first call for a number compiles and loads the kernel. Raises `DeviceError` only where the driver fails.
        """
        found = self._grid(voices)
        return found if isinstance(found, str) else None

    def prepare(self, voices: int = 1) -> None:
        """Pack the weights for so many voices ahead of the first launch, and wait for that; any thread."""
        shape = self._grid(voices)
        if isinstance(shape, str):
            return
        from .program import on_device

        with self._lock, on_device(self._facts.index):
            self._packed(shape)

    def launch(self, stream: int, places: Sequence[Places], common: Common) -> None:
        """Generate the sequences at `places` to their ends, or `budget` tokens of them; returns before it is done.

        What the host sees while it runs is what the sampling kernel publishes: states, tokens, progress words. Raises
        `DeviceError` with `problem()`'s reason. Once the stream is done, `check` says whether it went well.
        """
        shape = self._grid(len(places))
        if isinstance(shape, str):
            raise DeviceError(f"the persistent decode kernel cannot run: {shape}")
        from ._driver import Event, copy

        with self._lock:
            program = self._program(shape, tuple(places), common)
            if self._before is None:
                self._before = Event()
            self._before.hold(stream)
            copy(int(self._scratch.data.ptr), int(self._zeros.data.ptr), int(self._zeros.nbytes), stream)
            program.run(stream)
            self._before.record(stream)

    def check(self) -> None:
        """Once the launch has ended: raises `DeviceError` where a wait of the kernel was given up."""
        code = int(self._error.get()[0])
        if code:
            raise stalled(code)

    @property
    def nbytes(self) -> int:
        """GPU memory of the weights in stream order; 0 before the first launch."""
        return sum(weights.nbytes for weights in self._weights.values())

    # ---- choosing a grid ----

    def _grid(self, voices: int) -> Shape | str:
        """The grid for so many voices, or why there is none; threads that ask together may both look."""
        lanes = next((n for n in VOICES if n >= voices), 0)
        if not lanes or voices < 1:
            return f"{voices} voices at once are more than {VOICES[-1]}"
        if lanes not in self._found:
            self._found[lanes] = found = self._examine(lanes)
            if isinstance(found, str):
                logger.info("voices at once, up to %d: a graph for each token; %s", lanes, found)
            else:
                logger.info(
                    "voices at once, up to %d: %d clusters of %d blocks stay", lanes, found.clusters, found.ranks
                )
        return self._found[lanes]

    def _examine(self, voices: int) -> Shape | str:
        config, facts = self._config, self._facts
        if facts.capability < MIN_CAPABILITY:
            return f"{facts.name} has no thread block clusters (compute capability 9.0)"
        if config.vocab_size > MOST_VOCAB:
            return f"a vocabulary of {config.vocab_size} is larger than {MOST_VOCAB}"
        reason = "there is no grid to try"
        for number, choice in enumerate(self._grids):
            found = self._try(Shape.of(config, *choice, voices))
            if not isinstance(found, str):
                return found
            reason = found if number == 0 else reason
        return reason

    def _try(self, shape: Shape) -> Shape | str:
        reason = shape.problem()
        if reason is not None:
            return reason
        limit, shared = SHARED_BYTES.get(self._facts.capability, 101_376), shared_bytes(shape)
        if shared > limit:
            return f"a layer's share of a block takes {shared} bytes of shared memory, and there are {limit}"
        fit = self._clusters_at_once(shape)
        if fit < shape.clusters:
            return f"only {fit} of {shape.clusters} clusters of {shape.ranks} blocks run at once"
        return shape

    def _clusters_at_once(self, shape: Shape) -> int:
        from . import _driver
        from .program import on_device

        kernel = load(SOURCE, KERNEL, kernel_defines(shape, self._dtype), self._facts.index)
        shared = shared_bytes(shape)
        with on_device(self._facts.index):
            kernel.allow_shared_bytes(shared)
            if shape.ranks > 8:
                _driver.allow_large_clusters(kernel.pointer)
            grid = (shape.blocks, 1, 1)
            return _driver.max_active_clusters(kernel.pointer, grid, THREADS, shared, shape.ranks)

    # ---- launching ----

    def _program(self, shape: Shape, places: tuple[Places, ...], common: Common) -> Program:
        key = (shape, places, common)
        program = self._programs.get(key)
        if program is None:
            from .program import load_program

            if len(self._programs) >= 64:  # sequences that are gone
                self._programs.clear()
            program = self._programs[key] = load_program([self._plan(shape, places, common)], self._facts.index)
        return program

    def _plan(self, shape: Shape, places: Sequence[Places], common: Common) -> Launch:
        w, source = self._packed(shape), self._source()
        tables = {
            "stream": w.stream.data.ptr, "stream_bytes": w.stream_bytes, "gains": w.gains.data.ptr,
            "head_gains": w.head_gains.data.ptr, "rope": source.rope.data.ptr, "embeddings": source.embeddings.data.ptr,
            "words": self._scratch.data.ptr, "error": self._error.data.ptr,
        }  # fmt: skip
        return plan_persistent(self._config, shape, self._dtype, places, common, tables)

    def _packed(self, shape: Shape) -> PersistentWeights:
        """The weights for a shape; clusters and ranks alone decide about their order."""
        import cupy

        key = shape.clusters, shape.ranks
        if key not in self._weights:
            source = self._source()
            gather = partial(gather_blocks, dtype=self._dtype, device=self._facts.index)
            packed = pack_persistent(shape, source.layers, source.head, source.norm, cupy, gather)
            self._weights[key] = packed
            if len(self._weights) == 1:
                shapes = [Shape.of(self._config, *choice, VOICES[-1]) for choice in self._grids]
                words = 2 * max(scratch_words(s) for s in shapes)
                self._scratch, self._zeros = (cupy.zeros(words + 32, np.uint32) for _ in range(2))
                self._error = self._scratch[words:]
            cupy.cuda.get_current_stream().synchronize()
            logger.info("weights in stream order: %.0f MB more", packed.nbytes / 1e6)
        return self._weights[key]


def plan_persistent(
    config: ModelConfig, shape: Shape, dtype: str, places: Sequence[Places], common: Common, tables: dict[str, int]
) -> Launch:
    """The launch. tables: addresses of what does not change from sequence to sequence, and `stream_bytes`."""
    params = np.zeros(1, params_dtype(shape.voices))
    values: dict[str, Any] = {
        **tables, **asdict(common), "voices": len(places), "layers": config.num_layers, "epsilon": config.rms_norm_eps,
        "positions": config.max_positions, "end_token": config.eos_token_id, "loop_length": LOOP_LENGTH,
        "loop_distance": LOOP_DISTANCE,
    }  # fmt: skip
    for name, value in values.items():
        params[name] = value
    for voice, place in enumerate(places):
        for name, value in asdict(place).items():
            if name in ("keys", "values"):
                params[name].reshape(1, -1)[0, voice] = value
            else:
                params["places"].reshape(1, -1)[0, voice][name] = value
    return Launch(
        source=SOURCE, kernel=KERNEL, defines=kernel_defines(shape, dtype), grid=(shape.blocks, 1, 1),
        threads=THREADS, shared_bytes=shared_bytes(shape), params=params.tobytes(), cluster=shape.ranks,
        programmatic=False,
    )  # fmt: skip


def stalled(code: int) -> DeviceError:
    """The error for a code of the error word."""
    what = WAITS.get(code, f"something (code {code})")
    return DeviceError(
        f"the persistent decode kernel waited too long for {what}; another process may hold part of the GPU: "
        "set SOPRANO_PERSISTENT=0 to do without it, and please report it"
    )


def kernel_defines(shape: Shape, dtype: str) -> tuple[tuple[str, int], ...]:
    """The constants that the kernel is compiled with."""
    element = {"bfloat16": "DTYPE_BF16", "float16": "DTYPE_FP16"}[dtype]
    return (*shape.defines(), ("THREADS", WARPS * 32), ("SEARCH_BARRIER", 1), (element, 1))


def scratch_words(shape: Shape) -> int:
    """64-bit words between blocks, as persistent_head.cuh counts them."""
    v = shape.voices
    keys = shape.blocks * (head_rows(shape) // 32)
    sums = 2 * shape.clusters * v * shape.hidden if shape.clusters > 1 else 0
    written = ceil(ceil(sums, 16) * 16 + 16 + v * shape.ranks * shape.owners, 16) * 16
    key_words = ceil(written + shape.ranks, 16) * 16
    return ceil(key_words + 2 * v * keys, 16) * 16 + v * shape.vocab


def head_rows(shape: Shape) -> int:
    """Rows of the output head that a block takes, rounded up to whole warps."""
    return ceil(ceil(shape.head_tiles, shape.blocks) * 16, 32) * 32


BINS, CANDIDATES = 64, 128  # of kernels/sample_search.cuh
SEARCH_BYTES = 3 * BINS * 32 * 4 + 2 * BINS * 12 + 32 + 16 + 16 + CANDIDATES * 16


def shared_bytes(shape: Shape) -> int:
    """Dynamic shared memory of a block: that of the layers, and the sampler's where no room for weights holds it."""
    v = shape.voices
    rules = ceil(shape.shared_bytes(), 16) * 16 + ceil(v * 4, 16) * 16
    seen = rules + ceil(v * 8, 16) * 16
    sampler = ceil(seen + v * head_rows(shape) // 8, 16) * 16 + shape.owners * v * 32 * 8
    sampler = ceil(sampler + shape.owners * v * 4, 16) * 16
    distances = sampler + 64 + 80 + WARPS * 16 + 4 + 12 + WARPS * 4
    end = ceil(distances + shape.ranks * shape.owners * 4, 16) * 16
    scores = SEARCH_BYTES + ceil(shape.vocab, 4) * 16
    return end if scores <= shape.room_bytes()[2] else end + scores
