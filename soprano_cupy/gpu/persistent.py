"""One voice from its first token to its last in one launch (`kernels/decode_persistent.cu`).

A step of a captured graph waits about ninety times for a kernel to end, which costs more than the arithmetic of one
voice. Here a grid of a few dozen blocks, all of them running at once, goes through all layers and all tokens by itself;
`docs/persistent-decode.md` has the design and the candidates that were measured. It takes over where the graph path's
sampling kernel has drawn at least one token, and leaves everything as that kernel would.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import ModelConfig
from ..cuda.module import DeviceFacts, load
from ..errors import DeviceError
from ..generation import LOOP_DISTANCE, LOOP_LENGTH
from .launch import Launch
from .persistent_schedule import CHUNK_BLOCKS, PASS_TILES, THREADS, WARPS, Shape, ceil
from .persistent_weights import PersistentWeights, pack_persistent
from .weights import Weights

if TYPE_CHECKING:
    from ._driver import Program

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

# Clusters, ranks of a cluster, shares of the values' dimensions: the first that fits the model and the GPU is taken.
GRIDS = ((4, 16, 2), (4, 16, 1), (4, 8, 1), (2, 16, 1), (2, 8, 1), (1, 16, 1), (1, 8, 1))

# What a wait that took too long was for: the error word's codes in kernels/persistent_*.cuh.
WAITS = {
    1: "weights", 2: "room in the ring", 3: "a token", 4: "the best scores", 5: "the scores", 6: "the state's distance",
    7: "the clerk", 8: "the sum behind attention", 9: "the sum behind the MLP", 16: "queries", 17: "attention",
    18: "a layer's input", 19: "the MLP's input", 20: "gated channels", 21: "a layer's norm", 22: "the MLP's norm",
}  # fmt: skip

# PersistentParams, field by field; the first ones are LayerParams of persistent_layer.cuh.
PARAMS = np.dtype(
    [(name, np.uint64) for name in ("stream", "gains", "head_gains", "rope", "keys", "values", "words", "error")]
    + [(name, np.int64) for name in ("stream_bytes", "layer_elements")]
    + [("layers", np.int32), ("epsilon", np.float32)]
    + [(name, np.uint64) for name in ("embeddings", "slot", "seen", "tokens", "states", "progress", "cancel", "report")]
    + [(name, np.uint64) for name in ("residual", "hidden", "square_sums", "slot_of_row")]
    + [(n, np.int32) for n in ("slot_index", "most_tokens", "budget", "positions", "end_token", "loop_length")]
    + [("loop_distance", np.float32), ("stall_at", np.int32)]
)


@dataclass(frozen=True)
class Places:
    """Device addresses of one sequence, as the graph path's prefill and first sampling have left them.

    keys, values: of the slot, (layers, capacity, kv_heads, head_dim) with `layer_elements` from layer to layer. slot:
    its `SLOT_STATE` record. seen, states, tokens, progress: of the slot, as `kernels/sample.cu` writes them. residual,
    hidden, square_sums, slot_of_row: the decode step's row of the sequence; read, and at the end written for whoever
    goes on. cancel: a 32-bit word of mapped memory that ends the launch at the next token once it is not 0, or 0.
    report: a 64-bit word of mapped memory that becomes 1 + the error's code when the launch has ended, or 0.
    """

    keys: int
    values: int
    layer_elements: int
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
    most_tokens: int  # room for tokens and states of the slot
    cancel: int = 0
    report: int = 0
    stall_at: int = 0  # tests of the watchdog: the token at which the last block falls silent


class PersistentDecoder:
    """The persistent kernel for one model on one GPU. Weights are packed at the first launch; one launch at a time."""

    def __init__(
        self, config: ModelConfig, weights: Weights, facts: DeviceFacts, dtype: str, grids: tuple[Any, ...] = GRIDS
    ) -> None:
        self._config, self._source, self._facts, self._dtype = config, weights, facts, dtype
        self._grids = grids
        self._shape: Shape | None = None
        self._slots = 0
        self._reason: str | None = None
        self._examined = False
        self._weights: PersistentWeights | None = None
        self._programs: dict[tuple[Places, int], Program] = {}

    def problem(self) -> str | None:
        """Why this model and GPU are left to the graph path, as one line; None when the kernel serves them.

        The first call compiles and loads the kernel. Raises `DeviceError` only where the driver itself fails.
        """
        if not self._examined:
            self._reason = self._examine()
            self._examined = True
            if self._reason is None:
                assert self._shape is not None
                s = self._shape
                logger.info("one voice: %d clusters of %d blocks stay on the GPU for a sentence", s.clusters, s.ranks)
            else:
                logger.info("one voice: a graph for each token; %s", self._reason)
        return self._reason

    def launch(self, stream: int, places: Places, budget: int = UNLIMITED) -> None:
        """Generate the sequence at `places` to its end, or `budget` tokens of it; returns before it is done.

        What the host sees while it runs is what the sampling kernel publishes: states, tokens, progress words. Raises
        `DeviceError` with `problem()`'s reason. Afterwards, on the same stream, `check` says whether it went well.
        """
        reason = self.problem()
        if reason is not None:
            raise DeviceError(f"the persistent decode kernel cannot run: {reason}")
        from ._driver import copy

        program = self._program(places, budget)
        copy(int(self._scratch.data.ptr), int(self._zeros.data.ptr), int(self._zeros.nbytes), stream)
        program.run(stream)

    def check(self) -> None:
        """Once the launch has ended: raises `DeviceError` where a wait of the kernel was given up."""
        code = int(self._error.get()[0])
        if code:
            raise stalled(code)

    @property
    def nbytes(self) -> int:
        """GPU memory of the weights in stream order; 0 before the first launch."""
        return self._weights.nbytes if self._weights else 0

    # ---- choosing a grid ----

    def _examine(self) -> str | None:
        config, facts = self._config, self._facts
        if facts.capability < MIN_CAPABILITY:
            return f"{facts.name} has no thread block clusters (compute capability 9.0)"
        if config.vocab_size > MOST_VOCAB:
            return f"a vocabulary of {config.vocab_size} is larger than {MOST_VOCAB}"
        reasons = [self._try(Shape.of(config, *grid)) for grid in self._grids]
        if self._shape is None:
            return next((reason for reason in reasons if reason is not None), "there is no grid to try")
        return None

    def _try(self, shape: Shape) -> str | None:
        """Take this shape if none has been taken and it fits; else why not."""
        if self._shape is not None:
            return None
        reason = shape.problem()
        if reason is not None:
            return reason
        slots = ring_slots(shape, SHARED_BYTES.get(self._facts.capability, 101_376))
        if slots < least_slots(shape):
            return f"a block's shared memory holds {max(slots, 0)} chunks of weights, and needs {least_slots(shape)}"
        fit = self._clusters_at_once(shape, slots)
        if fit < shape.clusters:
            return f"only {fit} of {shape.clusters} clusters of {shape.ranks} blocks run at once"
        self._shape, self._slots = shape, slots
        return None

    def _clusters_at_once(self, shape: Shape, slots: int) -> int:
        from . import _driver
        from .program import on_device

        kernel = load(SOURCE, KERNEL, kernel_defines(shape, slots, self._dtype), self._facts.index)
        shared = shared_bytes(shape, slots)
        with on_device(self._facts.index):
            kernel.allow_shared_bytes(shared)
            if shape.ranks > 8:
                _driver.allow_large_clusters(kernel.pointer)
            grid = (shape.blocks, 1, 1)
            return _driver.max_active_clusters(kernel.pointer, grid, THREADS, shared, shape.ranks)

    # ---- launching ----

    def _program(self, places: Places, budget: int) -> Program:
        program = self._programs.get((places, budget))
        if program is None:
            from .program import load_program

            if self._weights is None:
                self._pack()
            if len(self._programs) >= 64:  # sequences that are gone
                self._programs.clear()
            launch = self._plan(places, budget)
            program = self._programs[places, budget] = load_program([launch], self._facts.index)
        return program

    def _pack(self) -> None:
        import cupy

        assert self._shape is not None
        source = self._source
        self._weights = pack_persistent(self._shape, source.layers, source.head, source.norm, cupy)
        words = 2 * scratch_words(self._shape)
        self._scratch, self._zeros = cupy.zeros(words + 32, np.uint32), cupy.zeros(words + 32, np.uint32)
        self._error = self._scratch[words:]
        cupy.cuda.get_current_stream().synchronize()
        logger.info("weights in stream order: %.0f MB more", self._weights.nbytes / 1e6)

    def _plan(self, places: Places, budget: int) -> Launch:
        assert self._shape is not None
        assert self._weights is not None
        w, source = self._weights, self._source
        tables = {
            "stream": w.stream.data.ptr, "stream_bytes": w.stream_bytes, "gains": w.gains.data.ptr,
            "head_gains": w.head_gains.data.ptr, "rope": source.rope.data.ptr, "embeddings": source.embeddings.data.ptr,
            "words": self._scratch.data.ptr, "error": self._error.data.ptr, "budget": budget,
        }  # fmt: skip
        return plan_persistent(self._config, self._shape, self._slots, self._dtype, places, tables)


def plan_persistent(
    config: ModelConfig, shape: Shape, slots: int, dtype: str, places: Places, tables: dict[str, int]
) -> Launch:
    """The launch. tables: addresses of what does not change from sequence to sequence, `stream_bytes` and `budget`."""
    params = np.zeros(1, PARAMS)
    values: dict[str, Any] = {
        **tables, **{name: getattr(places, name) for name in Places.__dataclass_fields__},
        "layers": config.num_layers, "epsilon": config.rms_norm_eps, "positions": config.max_positions,
        "end_token": config.eos_token_id, "loop_length": LOOP_LENGTH, "loop_distance": LOOP_DISTANCE,
    }  # fmt: skip
    for name, value in values.items():
        params[name] = value
    return Launch(
        source=SOURCE, kernel=KERNEL, defines=kernel_defines(shape, slots, dtype), grid=(shape.blocks, 1, 1),
        threads=THREADS, shared_bytes=shared_bytes(shape, slots), params=params.tobytes(), cluster=shape.ranks,
        programmatic=False,
    )  # fmt: skip


def stalled(code: int) -> DeviceError:
    """The error for a code of the error word."""
    what = WAITS.get(code, f"something (code {code})")
    return DeviceError(
        f"the persistent decode kernel waited too long for {what}; another process may hold part of the GPU: "
        "set SOPRANO_PERSISTENT=0 to do without it, and please report it"
    )


def kernel_defines(shape: Shape, slots: int, dtype: str) -> tuple[tuple[str, int], ...]:
    """The constants that the kernel is compiled with."""
    element = {"bfloat16": "DTYPE_BF16", "float16": "DTYPE_FP16"}[dtype]
    return (*shape.defines(slots), ("THREADS", WARPS * 32), ("SEARCH_BARRIER", 1), (element, 1))


def least_slots(shape: Shape) -> int:
    """Chunks of the longest product, which the ring has to hold."""
    hidden, qkv = ceil(shape.hidden_tiles, shape.ranks), ceil(shape.qkv_tiles, shape.ranks)
    blocks = max(
        hidden * shape.gated_steps,
        hidden * shape.attended_steps,
        qkv * shape.hidden_tiles,
        PASS_TILES * shape.hidden_tiles,
    )
    return ceil(blocks, CHUNK_BLOCKS)


def scratch_words(shape: Shape) -> int:
    """64-bit words between blocks, as persistent_head.cuh counts them."""
    rows = ceil(shape.head_tiles, shape.blocks) * 16
    keys = shape.blocks * min(ceil(rows, 32), WARPS)
    distances = shape.ranks * owners(shape)
    sums = 2 * shape.clusters * shape.hidden if shape.clusters > 1 else 0
    key_words = ceil(ceil(sums, 16) * 16 + 16 + distances, 16) * 16
    return ceil(key_words + 2 * keys, 16) * 16 + shape.vocab


def owners(shape: Shape) -> int:
    """Warps of a block that own rows of the residual stream."""
    return (ceil(shape.hidden_tiles, shape.ranks) + 1) // 2


BINS, CANDIDATES = 64, 128  # of kernels/sample_search.cuh
SEARCH_BYTES = 3 * BINS * 32 * 4 + 2 * BINS * 12 + 32 + 16 + 16 + CANDIDATES * 16


def shared_bytes(shape: Shape, slots: int) -> int:
    """Dynamic shared memory of a block: that of the layers, and the sampler's."""
    rows = ceil(shape.head_tiles, shape.blocks) * 16
    seen = ceil(shape.shared_bytes(slots), 16) * 16 + 16
    sampler = ceil(seen + ceil(rows, 32) * 4, 16) * 16
    distances = sampler + 64 + 80 + WARPS * 16 + 4 + 12
    search = ceil(distances + shape.ranks * owners(shape) * 4, 16) * 16
    return search + SEARCH_BYTES + ceil(shape.vocab, 4) * 16


def ring_slots(shape: Shape, limit: int) -> int:
    """Chunks of the longest ring that leaves room for the rest."""
    slots = (limit - shared_bytes(shape, 0)) // 8192
    while slots > 0 and shared_bytes(shape, slots) > limit:
        slots -= 1
    return slots
