"""The Hopper prefill kernel's host side: what it takes, its tiles, its grid, and its tensor maps.

`kernels/attention_prefill_hopper.cu` reads q, k and v through tensor maps: 128-byte records, encoded by the
driver, that say where an array lies and which box of it one copy brings to shared memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec

import numpy as np

from ..errors import DeviceError
from .launch import LaunchPlan
from .problem import Array, Problem

SOURCE = "attention_prefill_hopper.cu"
FUNCTION = "attention_prefill_hopper"
COMPUTE_CAPABILITY = 90  # wgmma and setmaxnreg exist on this architecture alone

WARPGROUP_THREADS = 128
WARPGROUP_ROWS = 64  # query rows of one warpgroup's wgmma
BLOCK_KEYS = 128  # BLOCK_N of the kernel
MERGE_COST_BLOCKS = {1: 0.0, 2: 1.6, 4: 7.0}  # what merging so many blocks of a tile costs, in key blocks (H200)
PERSISTENT_WAVES = 2  # more tiles a multiprocessor than this run better one a block: 395 us against 414 us at 16,384
PANEL_COLUMNS = 64  # 16-bit elements in one 128-byte swizzled row
ALIGNMENT_BYTES = 1024  # of a tile: the swizzle's period
ELEMENT_BYTES = 2
DTYPES = {"bfloat16": "DTYPE_BF16", "float16": "DTYPE_FP16"}


@dataclass(frozen=True)
class Tiles:
    """Compile-time shape of the kernel.

    All registers of the block: 128 * (producer + consumers * consumer) <= 65,536; each a multiple of 8.
    """

    consumers: int  # warpgroups that compute, 64 query rows each
    stages: int  # places in the rings of K and of V
    consumer_registers: int
    producer_registers: int
    rescale_threshold: int  # the outputs follow a new row maximum once it is this much larger, as a power of two

    @property
    def rows(self) -> int:
        """Query rows of a tile: tokens times heads of the group."""
        return self.consumers * WARPGROUP_ROWS

    @property
    def threads(self) -> int:
        return (self.consumers + 1) * WARPGROUP_THREADS

    def shared_bytes(self, head_dim: int) -> int:
        """Dynamic shared memory: Q, the rings of K and V, the barriers, and room to align the first tile."""
        tiles = (self.rows + 2 * self.stages * BLOCK_KEYS) * head_dim * ELEMENT_BYTES
        barriers = 8 * (3 + 4 * self.stages)
        return ALIGNMENT_BYTES + tiles + barriers


# Two warpgroups of 64 rows leave 232 registers for O (64), S (64) and P (32) at head_dim 128; more rows would not
# fit. Two stages of K and V let the next block load while this one is used.
TILES = {128: Tiles(2, 2, 232, 40, 8), 64: Tiles(2, 2, 232, 40, 8)}


def refusal(problem: Problem, compute_capability: int) -> str | None:
    """Why this kernel cannot serve the call, as one line; None when it can."""
    if compute_capability != COMPUTE_CAPABILITY:
        return f"the Hopper kernel needs compute capability 9.0, not {compute_capability / 10:.1f}"
    if problem.dtype not in DTYPES:
        return f"the Hopper kernel takes float16 and bfloat16, not {problem.dtype}"
    if problem.head_dim not in TILES:
        return f"the Hopper kernel takes head_dim 64 and 128, not {problem.head_dim}"
    rows = TILES[problem.head_dim].rows
    if rows % problem.group:
        return f"a group of {problem.group} query heads does not divide the Hopper kernel's {rows} tile rows"
    return None


def defines(problem: Problem, splits: int = 1) -> tuple[tuple[str, int], ...]:
    """The kernel's compile-time constants for this call."""
    tiles = TILES[problem.head_dim]
    return (
        ("HEAD_DIM", problem.head_dim),
        ("GROUP", problem.group),
        ("CAUSAL", int(problem.causal)),
        (DTYPES[problem.dtype], 1),
        ("CONSUMERS", tiles.consumers),
        ("STAGES", tiles.stages),
        ("CONSUMER_REGISTERS", tiles.consumer_registers),
        ("PRODUCER_REGISTERS", tiles.producer_registers),
        ("RESCALE_THRESHOLD", tiles.rescale_threshold),
        ("SPLITS", splits),
    )


def plan(
    problem: Problem, compute_capability: int, multiprocessors: int, *, splits: int | None = None
) -> LaunchPlan | None:
    """How to launch the kernel for this call; None where `refusal` names a reason.

    splits: blocks that share the keys of one tile: 1, 2, or 4 at head_dim 128; by default what fills the GPU.
    """
    if refusal(problem, compute_capability) is not None:
        return None
    tiles = TILES[problem.head_dim]
    splits = splits or choose_splits(problem, multiprocessors)
    shared = "" if splits == 1 else f", {splits} blocks a tile"
    return LaunchPlan(
        source=SOURCE,
        kernel=FUNCTION,
        defines=defines(problem, splits),
        threads=tiles.threads,
        shared_memory_bytes=tiles.shared_bytes(problem.head_dim),
        grid=TileGrid(tiles.rows, splits, multiprocessors),
        description=f"Hopper prefill, wgmma tiles of {tiles.rows} rows and {BLOCK_KEYS} keys{shared}",
    )


def choose_splits(problem: Problem, multiprocessors: int) -> int:
    """The number of blocks a tile with the shortest estimated time, counted in key blocks.

    A call lasts as long as its longest tile's share, or as long as all tiles spread over the multiprocessors.
    """
    tiles = TileGrid(TILES[problem.head_dim].rows, 1, multiprocessors).tiles(
        problem.batch, problem.seqlen_q, problem.num_heads, problem.num_kv_heads
    )
    longest = -(-problem.seqlen_k // BLOCK_KEYS)
    shortest = max(problem.seqlen_k - problem.seqlen_q, 0) // BLOCK_KEYS + 1 if problem.causal else longest
    spread = tiles * (shortest + longest) / 2 / multiprocessors

    def estimate(splits: int) -> float:
        return max(longest / splits, spread) + MERGE_COST_BLOCKS[splits]

    return min((s for s in MERGE_COST_BLOCKS if problem.head_dim % (32 * s) == 0), key=estimate)


@dataclass(frozen=True)
class TileGrid:
    """A cluster of `splits` blocks for each tile; unsplit, one block a tile, or a persistent one a multiprocessor."""

    rows: int  # query rows of a tile
    splits: int
    multiprocessors: int

    def __call__(self, *, batch: int, seqlen_q: int, num_heads: int, num_kv_heads: int) -> tuple[int, int, int]:
        tiles = self.tiles(batch, seqlen_q, num_heads, num_kv_heads)
        persistent = self.splits == 1 and tiles <= PERSISTENT_WAVES * self.multiprocessors
        return (min(tiles, self.multiprocessors) if persistent else tiles * self.splits, 1, 1)

    def tiles(self, batch: int, seqlen_q: int, num_heads: int, num_kv_heads: int) -> int:
        """Tiles over all sequences and KV heads, those past a short sequence's end included."""
        tokens = self.rows // (num_heads // num_kv_heads)
        return -(-seqlen_q // tokens) * num_kv_heads * batch


def extra_arguments(problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tensor maps of q, k and v, which follow AttentionParams in the kernel's arguments.

    problem: `kernel_ready`, on a GPU. The arrays are addressed as they lie, copied nowhere.
    """
    tiles = TILES[problem.head_dim]
    tokens = tiles.rows // problem.group
    return (
        _map(problem.q, (1, 0), (problem.group, tokens)),
        _map(problem.k, (0, 1), (BLOCK_KEYS, 1)),
        _map(problem.v, (0, 1), (BLOCK_KEYS, 1)),
    )


def _map(array: Array, order: tuple[int, int], box: tuple[int, int]) -> np.ndarray:
    """A map of (batch, token, head, D) or (token, head, D): columns, two axes in `order` (0 token, 1 head), batch."""
    shape = tuple(int(n) for n in array.shape)
    strides = tuple(int(n) for n in array.strides)
    if len(shape) == 3:  # packed sequences: one long batch entry
        shape, strides = (1, *shape), (0, *strides)
    axes = (3, 1 + order[0], 1 + order[1], 0)
    # an axis of length 1 is never stepped along, but its stride must still be a multiple of 16 bytes
    steps = tuple(strides[axis] if shape[axis] > 1 else shape[3] * ELEMENT_BYTES for axis in axes[1:])
    return encode(
        int(array.data.ptr), array.dtype.name, tuple(shape[axis] for axis in axes), steps, (PANEL_COLUMNS, *box, 1)
    )


# ---- cuTensorMapEncodeTiled of the CUDA driver; the numbers are its enumerations' ----

_MAP_BYTES = 128
_MAP_ALIGNMENT = 64
_MAP_DTYPE = np.dtype([("bytes", np.uint8, (_MAP_BYTES,))])
_DATA_TYPES = {"float16": 6, "bfloat16": 9}
_INTERLEAVE_NONE = 0
_SWIZZLE_NONE = 0
_SWIZZLE_128B = 3
_L2_PROMOTION_256B = 3
_FILL_ZERO = 0  # what lies outside the array reads as 0
_INVALID_CONTEXT = 201


@lru_cache(maxsize=512)
def encode(
    address: int,
    dtype: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    *,
    swizzled: bool = True,
) -> np.ndarray:
    """One tensor map as a record that a kernel takes by value.

    shape and box: elements, innermost axis first; strides: bytes, of all axes but the innermost. Copies put the
    rows of a box one after the other: 128 bytes each, with the 128-byte swizzle, or of any length as they lie
    in memory. Raises `DeviceError`.
    """
    rank = len(shape)
    buffer = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
    aligned = -(-ctypes.addressof(buffer) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
    arguments = (
        aligned,
        _DATA_TYPES[dtype],
        rank,
        address,
        _array(ctypes.c_uint64, shape),
        _array(ctypes.c_uint64, strides),
        _array(ctypes.c_uint32, box),
        _array(ctypes.c_uint32, (1,) * rank),
        _INTERLEAVE_NONE,
        _SWIZZLE_128B if swizzled else _SWIZZLE_NONE,
        _L2_PROMOTION_256B,
        _FILL_ZERO,
    )
    status = _encode_tiled()(*arguments)
    if status == _INVALID_CONTEXT:  # this thread has not touched the GPU yet
        from cupy.cuda import runtime

        runtime.free(0)
        status = _encode_tiled()(*arguments)
    if status:
        raise DeviceError(
            f"the driver refused a tensor map of shape {shape}, strides {strides}, box {box} at {address:#x} "
            f"(error {status}); report the shapes, and use attention standard until then"
        )
    record = np.empty(1, _MAP_DTYPE)
    ctypes.memmove(record.ctypes.data, aligned, _MAP_BYTES)
    return record


def driver_encodes() -> bool:
    """Whether a driver encodes tensor maps and CuPy is there; without them there is no GPU to use them on either."""
    try:
        _encode_tiled()
    except DeviceError:
        return False
    return find_spec("cupy") is not None


@cache
def _encode_tiled() -> Callable[..., int]:
    """The driver's function; `DeviceError` when the driver is missing or older than CUDA 12."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        function = library.cuTensorMapEncodeTiled
        library.cuInit(0)  # harmless when CuPy has done it; plans may be made before CuPy touches the GPU
    except (OSError, AttributeError) as error:
        raise DeviceError(
            f"the NVIDIA driver has no tensor maps ({error}); install one for CUDA 12 or newer"
        ) from error
    pointer, number = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [
        pointer, number, ctypes.c_uint32, pointer, pointer, pointer, pointer, pointer, number, number, number, number,
    ]  # fmt: skip
    function.restype = number
    encode_tiled: Callable[..., int] = function
    return encode_tiled


def _array(kind: type[ctypes.c_uint32] | type[ctypes.c_uint64], values: Sequence[int]) -> ctypes.Array[ctypes.c_uint32]:
    return (kind * len(values))(*values)  # type: ignore[return-value]
