"""Which prefill kernel serves a call, with which tiles, and how it is launched.

Two sources: `attention_prefill.cu` on tensor cores (fp16 from compute capability 7.5 on, bf16 from 8.0 on), and
`attention_prefill_portable.cu` in fp32 arithmetic for everything else (fp32 anywhere, 16-bit types on older GPUs).
Both hold the query heads of a KV head as the rows of one matrix: seqlen_q * group rows for each (sequence, KV head).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from .launch import LaunchPlan, ProblemSizes

HEAD_DIMS = (32, 64, 128)
DTYPE_DEFINES = {"float16": "DTYPE_FP16", "bfloat16": "DTYPE_BF16", "float32": "DTYPE_FP32"}
MIN_COMPUTE_CAPABILITY = (7, 0)
TENSOR_CORES_FROM = {"float16": (7, 5), "bfloat16": (8, 0)}  # as mma.sync with fp32 accumulation

MAX_ROWS = 2**30  # rows and blocks are counted in 32 bits
MAX_GRID_Y = 65_535
PAIRS_TOGETHER = 16  # (sequence, KV head) pairs whose tiles alternate, so that their K and V stay in the L2 cache

KIB = 1024
# Shared memory of one multiprocessor; a block may have all of it but RESERVED_SHARED_BYTES (Turing: all of it).
SHARED_BYTES_PER_SM = {
    (7, 0): 96 * KIB, (7, 2): 96 * KIB, (7, 5): 64 * KIB,
    (8, 0): 164 * KIB, (8, 6): 100 * KIB, (8, 7): 164 * KIB, (8, 9): 100 * KIB,
    (9, 0): 228 * KIB, (10, 0): 228 * KIB, (10, 3): 228 * KIB, (11, 0): 228 * KIB,
    (12, 0): 100 * KIB, (12, 1): 100 * KIB,
}  # fmt: skip
UNKNOWN_SHARED_BYTES = 100 * KIB  # a GPU newer than this table: what the smallest of its predecessors had
RESERVED_SHARED_BYTES = 1 * KIB  # of each block, from compute capability 8.0 on


@dataclass(frozen=True)
class Tile:
    """One shape of the tensor-core kernel; the fields are its compile-time constants."""

    warps_m: int  # warps along the rows
    row_tiles: int  # 16-row tiles of each warp
    warps_n: int  # warps along the keys, merged at the end
    block_keys: int
    stages: int  # blocks of K and V in shared memory
    q_in_registers: bool
    min_blocks: int  # of a multiprocessor: bounds the registers
    reason: str

    @property
    def rows(self) -> int:
        return self.warps_m * self.row_tiles * 16

    @property
    def threads(self) -> int:
        return self.warps_m * self.warps_n * 32

    def shared_bytes(self, head_dim: int) -> int:
        """Q, then K and V, whose memory serves the merge of the warps along the keys once the loop is over."""
        keys_and_values = self.stages * 2 * self.block_keys * head_dim * 2
        states = self.warps_n * self.rows * 8
        partial_outputs = self.warps_n * self.rows * (head_dim + 8) * 4
        merge = states + partial_outputs if self.warps_n > 1 else 0
        return self.rows * head_dim * 2 + max(keys_and_values, merge)

    def fits(self, compute_capability: tuple[int, int], head_dim: int) -> bool:
        """Whether `min_blocks` of them fit a multiprocessor's shared memory."""
        shared = SHARED_BYTES_PER_SM.get(compute_capability, UNKNOWN_SHARED_BYTES)
        reserved = RESERVED_SHARED_BYTES if compute_capability >= (8, 0) else 0
        return self.min_blocks * (self.shared_bytes(head_dim) + reserved) <= shared


# Tiles by head_dim and by how many rows there are to share out; of each list the first that fits is taken. The sizes
# follow from what a multiprocessor holds: 255 registers for each of 256 threads, and its shared memory. A warp with
# 32 rows loads each piece of K and V half as often for the same work as one with 16, which shared memory's bandwidth
# asks for on the larger GPUs; then O takes 128 registers at head_dim 128 and Q stays in shared memory.
WIDE = {
    128: (
        Tile(4, 2, 1, 48, 2, False, 2, "32 rows a warp; S of 48 keys leaves registers, two blocks take 162 KB"),
        Tile(4, 1, 1, 64, 1, True, 2, "16 rows a warp: two blocks share 100 KB, one hides the other's barriers"),
        Tile(4, 1, 1, 64, 1, True, 1, "16 rows a warp: one block in the 64 KB of Turing"),
    ),
    64: (
        Tile(4, 2, 1, 64, 2, True, 2, "O takes 64 registers, so Q (32) stays in registers too"),
        Tile(4, 2, 1, 64, 2, True, 1, "one block in the 64 KB of Turing"),
    ),
    32: (Tile(4, 2, 1, 64, 2, True, 2, "everything is small; two blocks hide each other's barriers"),),
}  # fmt: skip
# Too few rows for those, or too few keys to share out: 64 rows, two blocks a multiprocessor hide each other's waits.
BALANCED = {
    128: (
        Tile(4, 1, 1, 64, 2, True, 2, "64 rows; two blocks take 160 KB"),
        Tile(4, 1, 1, 64, 1, True, 2, "64 rows; two blocks share 100 KB"),
        Tile(4, 1, 1, 64, 1, True, 1, "64 rows in the 64 KB of Turing"),
    ),
    64: (
        Tile(4, 1, 1, 64, 2, True, 2, "64 rows; two blocks take 80 KB"),
        Tile(4, 1, 1, 64, 2, True, 1, "64 rows in the 64 KB of Turing"),
    ),
    32: (Tile(4, 1, 1, 64, 2, True, 2, "64 rows; two blocks hide each other's waits"),),
}
# Fewer rows: eight warps, two for the same rows, halve the time that a block takes over its keys.
MEDIUM = {
    128: (
        Tile(4, 1, 2, 128, 2, True, 1, "64 rows; 128 keys at a time, 64 a warp"),
        Tile(4, 1, 2, 64, 2, True, 1, "64 rows; 64 keys at a time, 32 a warp, in 100 KB"),
        Tile(4, 1, 1, 64, 1, True, 1, "64 rows in the 64 KB of Turing"),
    ),
    64: (
        Tile(4, 1, 2, 128, 2, True, 1, "64 rows; 128 keys at a time, 64 a warp"),
        Tile(4, 1, 2, 64, 2, True, 1, "64 rows; 64 keys at a time in the 64 KB of Turing"),
    ),
    32: (Tile(4, 1, 2, 128, 2, True, 1, "64 rows; 128 keys at a time, 64 a warp"),),
}  # fmt: skip
# Hardly any rows: tiles of the smallest size there is, and four warps share the keys, so that a prompt of 64 tokens
# fills 16 multiprocessors and each is done after one step.
NARROW = {
    128: (
        Tile(1, 1, 4, 128, 2, True, 1, "16 rows; 128 keys at a time, 32 a warp"),
        Tile(1, 1, 4, 64, 2, True, 1, "16 rows; 64 keys at a time, 16 a warp, in 100 KB"),
        Tile(1, 1, 4, 64, 1, True, 1, "16 rows; 64 keys at a time, one stage in the 64 KB of Turing"),
    ),
    64: (
        Tile(1, 1, 4, 128, 2, True, 1, "16 rows; 128 keys at a time, 32 a warp"),
        Tile(1, 1, 4, 64, 2, True, 1, "16 rows; 64 keys at a time, 16 a warp, in the 64 KB of Turing"),
    ),
    32: (Tile(1, 1, 4, 128, 2, True, 1, "16 rows; 128 keys at a time, 32 a warp"),),
}  # fmt: skip

# The portable kernel's tile; constants of its source.
PORTABLE_ROWS = 64
PORTABLE_KEYS = 32
PORTABLE_THREADS = 128
PORTABLE_PADDING = 4  # floats after each row in shared memory


def refusal(
    *, compute_capability: tuple[int, int], dtype: str, head_dim: int, group: int, params_info: ProblemSizes
) -> str | None:
    """Why no prefill kernel serves such a call, as one line; None when one does."""
    if compute_capability < MIN_COMPUTE_CAPABILITY:
        return f"the prefill kernels need compute capability 7.0, not {compute_capability[0]}.{compute_capability[1]}"
    if dtype not in DTYPE_DEFINES:
        return f"the prefill kernels take {', '.join(DTYPE_DEFINES)}, not {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"the prefill kernels take head_dim {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if params_info.seqlen_q * group > MAX_ROWS:
        return f"{params_info.seqlen_q} queries of {group} heads are more than {MAX_ROWS} rows"
    pairs = params_info.batch * params_info.num_kv_heads
    if pairs > MAX_GRID_Y * PAIRS_TOGETHER:
        return f"{pairs} pairs of sequence and KV head are more than {MAX_GRID_Y * PAIRS_TOGETHER}"
    return None


def plan(
    *,
    compute_capability: tuple[int, int],
    dtype: str,
    head_dim: int,
    group: int,
    causal: bool,
    params_info: ProblemSizes,
    multiprocessors: int = 108,
) -> LaunchPlan | None:
    """The kernel for such a call; None where there is none, and `refusal` (same arguments) says why.

    group: query heads of one KV head. params_info: the call's sizes. multiprocessors: of the GPU; with the sizes it
    decides how small the tiles must be to occupy them.
    """
    if refusal(compute_capability=compute_capability, dtype=dtype, head_dim=head_dim, group=group,
               params_info=params_info) is not None:  # fmt: skip
        return None
    common = (("HEAD_DIM", head_dim), ("GROUP", group), ("CAUSAL", int(causal)), (DTYPE_DEFINES[dtype], 1))
    if compute_capability >= TENSOR_CORES_FROM.get(dtype, (99, 0)):
        tile = select_tile(compute_capability, head_dim, params_info, multiprocessors)
        return tensor_core_plan(tile, head_dim, common)
    padded = head_dim + PORTABLE_PADDING
    floats = (PORTABLE_ROWS + PORTABLE_KEYS) * padded + PORTABLE_ROWS * (PORTABLE_KEYS + PORTABLE_PADDING)
    return LaunchPlan(
        source="attention_prefill_portable.cu",
        kernel="attention_prefill_portable",
        defines=common,
        threads=PORTABLE_THREADS,
        shared_memory_bytes=floats * 4,
        grid=partial(_grid, PORTABLE_ROWS),
        description=f"prefill in fp32 arithmetic, tiles of {PORTABLE_ROWS} rows and {PORTABLE_KEYS} keys",
        tile_rows=PORTABLE_ROWS,
    )


def tensor_core_plan(tile: Tile, head_dim: int, common: tuple[tuple[str, int], ...]) -> LaunchPlan:
    """The launch of one tile shape. common: HEAD_DIM, GROUP, CAUSAL and the dtype."""
    return LaunchPlan(
        source="attention_prefill.cu",
        kernel="attention_prefill",
        defines=(
            *common,
            ("WARPS_M", tile.warps_m),
            ("ROW_TILES", tile.row_tiles),
            ("WARPS_N", tile.warps_n),
            ("BLOCK_KEYS", tile.block_keys),
            ("STAGES", tile.stages),
            ("Q_IN_REGISTERS", int(tile.q_in_registers)),
            ("MIN_BLOCKS", tile.min_blocks),
        ),
        threads=tile.threads,
        shared_memory_bytes=tile.shared_bytes(head_dim),
        grid=partial(_grid, tile.rows),
        description=f"prefill on tensor cores, tiles of {tile.rows} rows and {tile.block_keys} keys: {tile.reason}",
        tile_rows=tile.rows,
    )


def select_tile(compute_capability: tuple[int, int], head_dim: int, sizes: ProblemSizes, multiprocessors: int) -> Tile:
    """The largest tiles of which there are enough to keep every multiprocessor busy.

    Wide ones only where each multiprocessor has several to balance: under a causal mask the last tile of a sequence
    is twice the average. Narrow ones below half the multiprocessors, where time is latency; in between, two warps
    share the keys of a row where there is one block a multiprocessor, and many keys.
    """
    wide, balanced, medium, narrow = (_first_that_fits(table[head_dim], compute_capability, head_dim)
                                      for table in (WIDE, BALANCED, MEDIUM, NARROW))  # fmt: skip
    if _blocks(wide, sizes) >= WIDE_BLOCKS_PER_SM * multiprocessors:
        return wide
    if 2 * _blocks(medium, sizes) < multiprocessors:
        return narrow
    several_each = _blocks(balanced, sizes) >= BALANCED_BLOCKS_PER_SM * multiprocessors
    return balanced if several_each or sizes.seqlen_k <= SHORT_KEYS else medium


# Measured on an H200 by benchmarks/prefill_tiles.py.
WIDE_BLOCKS_PER_SM = 3
BALANCED_BLOCKS_PER_SM = 2
SHORT_KEYS = 256  # up to here two warps for the same rows have nothing to share


def _first_that_fits(tiles: tuple[Tile, ...], compute_capability: tuple[int, int], head_dim: int) -> Tile:
    return next(tile for tile in tiles if tile.fits(compute_capability, head_dim))


def _blocks(tile: Tile, sizes: ProblemSizes) -> int:
    group = sizes.num_heads // sizes.num_kv_heads
    return -(-sizes.seqlen_q * group // tile.rows) * sizes.batch * sizes.num_kv_heads


def _grid(rows: int, *, batch: int, seqlen_q: int, num_heads: int, num_kv_heads: int) -> tuple[int, int, int]:
    """Blocks as `select_tile` of kernels/attention_rows.cuh reads them: along x, the tiles of up to PAIRS_TOGETHER
    pairs, pairs fastest; along y, further sets of pairs."""
    tiles = -(-seqlen_q * (num_heads // num_kv_heads) // rows)
    pairs = batch * num_kv_heads
    together = min(pairs, PAIRS_TOGETHER)
    return tiles * together, -(-pairs // together), 1
