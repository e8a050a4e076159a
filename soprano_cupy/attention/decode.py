"""Which decode kernel serves a call with few queries a sequence, and how it is launched.

One source, `attention_decode.cu`: on tensor cores for fp16 from compute capability 7.5 and bf16 from 8.0 on, in fp32
arithmetic for everything else. A block of threads takes up to `tile_rows` query rows (query tokens times the query
heads of one KV head) through one reading of K and V.

The keys of a sequence are cut into splits by a rule of the sequence's own length, and their results are merged in
order. How many blocks of threads share the splits of a sequence is decided here, from the size of the whole call; it
does not change a bit of the result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from .launch import LaunchPlan
from .prefill import RESERVED_SHARED_BYTES, SHARED_BYTES_PER_SM, UNKNOWN_SHARED_BYTES

MAX_QUERIES = 16
HEAD_DIMS = (32, 64, 128)
DTYPE_DEFINES = {"float16": "DTYPE_FP16", "bfloat16": "DTYPE_BF16", "float32": "DTYPE_FP32"}
MIN_COMPUTE_CAPABILITY = (7, 0)
TENSOR_CORES_FROM = {"float16": (7, 5), "bfloat16": (8, 0)}

MAX_GRID_YZ = 65_535
ARRIVAL_BYTES = 16_384  # a counter for each (sequence, KV head, row group) at the start of the workspace
MAX_SLOTS = ARRIVAL_BYTES // 4
WARP_TILE_BYTES = 4096  # of K, and of V, that a warp has in flight or in use

# How many blocks of threads share a sequence, by what an H200 (132 multiprocessors) took, with 4 query heads on 1 KV
# head, head_dim 128 and bfloat16, in microseconds; one block has two stages, several have one:
#
#     sequences   keys    1 block a sequence   2       4       8       16
#     16          256     5.05                 5.85    4.90
#     16          1,024   13.46                12.66   9.04    7.59    7.64
#     32          256     5.26                 6.04    5.36
#     32          512     8.09                 8.37    6.88    6.90
#     64          256     5.76                 6.84    6.58
#     64          512     8.64                 9.86    8.93    9.49
#     64          1,024   14.62                16.53   14.59   14.78   16.39
#     128         512     11.18                13.82   13.95   15.50
#     128         1,024   19.57                24.27   24.42   25.82   27.06
#
# So from about half a sequence a multiprocessor on, dividing them gains nothing: a block that asks for its next keys
# before it has computed the present ones hides most of the memory's latency by itself, and has nothing to merge.
# Fewer sequences are divided evenly. Up to two blocks a multiprocessor, one split for each block is the best way.
# Beyond, two are: the keys of the second arrive while the first is computed. A multiprocessor holds four blocks at
# once; more would queue.
ENOUGH_BLOCKS = 0.45  # for each multiprocessor
BLOCKS_OF_ONE_SPLIT = 2
SPLITS_OF_A_BLOCK = 2  # at least, beyond
MOST_BLOCKS = 4

# With few blocks of threads a multiprocessor, memory's latency rules and not its throughput: then each has two blocks
# of keys and values in shared memory, the second on its way from the start. Two such ask for as much as four others.
BLOCKS_OF_TWO_STAGES = 2  # for each multiprocessor, at most
ASYNCHRONOUS_COPIES_FROM = (8, 0)
FEW_SPLITS = 3  # are not worth dividing; as in kernels/decode_state.cuh


@dataclass(frozen=True)
class Tile:
    """One shape of the kernel: the rows of a block of threads, and what follows from them."""

    rows: int
    tensor_cores: bool
    head_dim: int
    item_bytes: int
    stages: int = 1

    @property
    def block_keys(self) -> int:
        """Keys that are taken at a time."""
        return 128 // self.item_bytes

    @property
    def state_bytes(self) -> int:
        """The unfinished result of a block of threads: 12 floats for 8 outputs of a row, or 4 for one."""
        floats = 12 * self.rows * self.head_dim // 8 if self.tensor_cores else 4 * self.rows * self.head_dim
        return 4 * floats

    @property
    def shared_bytes(self) -> int:
        """As `attention_decode.cu` lays it out: keys and values, two of scores, states, a word, queries, total."""
        score_bytes = min(self.rows, 16) * (self.block_keys + 8) * 4
        if self.tensor_cores:
            row_states, query_row = 0, self.head_dim * 2 + (0 if self.head_dim == 32 else 64)
        else:
            row_states, query_row = self.rows * 8, self.head_dim * 4
        tiles = self.stages * 2 * (self.head_dim // 32) * WARP_TILE_BYTES
        return tiles + 2 * score_bytes + row_states + 16 + self.rows * query_row + self.state_bytes


def plan(
    *,
    compute_capability: tuple[int, int],
    dtype: str,
    head_dim: int,
    group: int,
    causal: bool,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    num_kv_heads: int,
    multiprocessors: int,
) -> LaunchPlan | None:
    """The decode launch for such a call; None where this kernel does not serve it.

    group: query heads of one KV head. seqlen_q: queries of the longest sequence, at most 16. seqlen_k: the capacity
    of the cache, or keys of the longest sequence. multiprocessors: of the GPU.
    """
    served = (
        compute_capability >= MIN_COMPUTE_CAPABILITY
        and dtype in DTYPE_DEFINES
        and head_dim in HEAD_DIMS
        and 1 <= seqlen_q <= MAX_QUERIES
        and max(batch, num_kv_heads) <= MAX_GRID_YZ
    )
    if not served:
        return None
    tile = select_tile(compute_capability, dtype, head_dim, seqlen_q * group)
    row_groups = -(-seqlen_q * group // tile.rows)
    slots = batch * num_kv_heads * row_groups
    splits = select_splits(slots, seqlen_k, tile.block_keys, multiprocessors)
    if -(-seqlen_k // tile.block_keys) > splits:  # a block of threads has more than one of keys
        tile = replace(tile, stages=select_stages(tile, slots * splits, compute_capability, multiprocessors))
    states = slots * most_splits(seqlen_k, tile.block_keys)
    return LaunchPlan(
        source="attention_decode.cu",
        kernel="attention_decode",
        defines=(
            ("HEAD_DIM", head_dim),
            ("GROUP", group),
            ("CAUSAL", int(causal and seqlen_q > 1)),  # one query sees every key
            (DTYPE_DEFINES[dtype], 1),
            ("TILE_ROWS", tile.rows),
            ("STAGES", tile.stages),
        ),
        threads=head_dim,  # a warp for every 32 dimensions
        shared_memory_bytes=tile.shared_bytes,
        grid=partial(_grid, tile.rows, splits),
        description=f"decode {'on tensor cores' if tile.tensor_cores else 'in fp32 arithmetic'}, "
        f"{tile.rows} query rows a block, {splits} block{'s' if splits > 1 else ''} a sequence",
        splits=splits,
        workspace_bytes=0 if splits == 1 else ARRIVAL_BYTES + states * tile.state_bytes,
    )


def select_tile(compute_capability: tuple[int, int], dtype: str, head_dim: int, rows: int) -> Tile:
    """The smallest tile that takes `rows` query rows, or the largest there is."""
    tensor_cores = compute_capability >= TENSOR_CORES_FROM.get(dtype, (99, 0))
    # 32 rows do not fit the 64 KB of Turing at head_dim 128; without tensor cores, more than 8 need too many registers.
    sizes = (4, 8) if not tensor_cores else (8, 16) if compute_capability < (8, 0) else (8, 16, 32)
    fitting = next((size for size in sizes if size >= rows), sizes[-1])
    return Tile(fitting, tensor_cores, head_dim, 4 if dtype == "float32" else 2)


def select_splits(slots: int, seqlen_k: int, block_keys: int, multiprocessors: int) -> int:
    """Blocks of threads for each of `slots` (sequence, KV head, row group); at most one for each split."""
    splits = most_splits(seqlen_k, block_keys)
    if slots >= ENOUGH_BLOCKS * multiprocessors or slots > MAX_SLOTS or splits <= FEW_SPLITS:
        return 1
    if slots * splits <= BLOCKS_OF_ONE_SPLIT * multiprocessors:
        return splits
    splits_of_a_block = max(SPLITS_OF_A_BLOCK, -(-slots * splits // (MOST_BLOCKS * multiprocessors)))
    return -(-splits // splits_of_a_block)


def select_stages(tile: Tile, blocks: int, compute_capability: tuple[int, int], multiprocessors: int) -> int:
    """Blocks of keys in the shared memory of each of `blocks` blocks of threads: two where those run all at once."""
    if compute_capability < ASYNCHRONOUS_COPIES_FROM:
        return 1
    shared_bytes = SHARED_BYTES_PER_SM.get(compute_capability, UNKNOWN_SHARED_BYTES)
    fitting = shared_bytes // (replace(tile, stages=2).shared_bytes + RESERVED_SHARED_BYTES)
    return 2 if blocks <= min(fitting, BLOCKS_OF_TWO_STAGES) * multiprocessors else 1


def split_keys(keys: int, block_keys: int) -> int:
    """Keys in a split of a sequence of `keys` keys: `split_blocks` of kernels/decode_state.cuh.

    A power of two, at least the block, with split**2 >= 2 * keys: the blocks of a split are worked on one after the
    other, and so are the splits when they are merged.
    """
    split = block_keys
    while split * split < 2 * keys:
        split *= 2
    return split


def most_splits(capacity: int, block_keys: int) -> int:
    """The most splits of any sequence of up to `capacity` keys: of all of them, or just before the size doubles."""
    split = split_keys(capacity, block_keys)
    before = split // 4 if split > block_keys else 0
    return max(-(-capacity // split), before)


def _grid(
    tile_rows: int, splits: int, *, batch: int, seqlen_q: int, num_heads: int, num_kv_heads: int
) -> tuple[int, int, int]:
    row_groups = -(-seqlen_q * (num_heads // num_kv_heads) // tile_rows)
    return row_groups * splits, num_kv_heads, batch
