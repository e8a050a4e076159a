"""The plan of a decode step's attention: how many thread blocks take a sequence, and in what form.

`kernels/attention_step.cu` is the kernel, `kernels/step_params.cuh` explains its parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..attention import decode
from ..attention.prefill import RESERVED_SHARED_BYTES, SHARED_BYTES_PER_SM, UNKNOWN_SHARED_BYTES
from ..cuda.module import DeviceFacts
from .launch import Launch
from .step_launch import ELEMENT_BYTES, dtype_define, floats, ints, make_launch, param_struct

# Thread blocks of a sequence in a decode step. The blocks of a cluster (compute capability 9.0 and newer) put their
# results together in one block's shared memory. What an H200 took with 4 query heads on 1 KV head, head_dim 128,
# bfloat16 and 256 tokens, in microseconds, as blocks of a cluster and stages:
#
#     rows   1      2, 1   2, 2   4, 1   4, 2   8, 1   8, 2
#     1      4.69   3.69   3.79   2.92   2.94   2.93   2.95
#     8      4.80   3.74   3.83   2.99   2.98   3.11   3.02
#     16     5.02   3.96   3.86   3.43   3.03   3.69   4.67
#     32     5.08   4.60   3.91   3.82   5.89   5.23   7.56
#     64     6.06   5.08   5.14   6.53   8.99   8.19
#     128    6.95   6.45   9.88   10.4   15.9
#     512    18.7   25.8   38.6
#
# So the largest cluster with which there is at most one block a multiprocessor, two stages as long as there is half of
# that; and two blocks up to two a multiprocessor.
CLUSTERS_FROM = (9, 0)
CLUSTER_SIZES = (8, 4, 2)  # 8 is the most that every GPU takes
CLUSTER_BLOCKS = {8: 1.0, 4: 1.0, 2: 2.0}  # for each multiprocessor, at most, by the size of a cluster
BLOCKS_OF_TWO_STAGES = 0.5  # of clusters, for each multiprocessor, at most

# Blocks that ask for later weights in the second-level cache, which must be several times what they ask for. Beyond so
# many rows the keys and values of the step keep the memory busy.
AHEAD_BLOCKS = 112
AHEAD_RANGES = 4
AHEAD_ROWS = 64
AHEAD_SHARE = 0.5  # of the second-level cache, at most
# Blocks of two stages, for each multiprocessor, at most: among more, spare ones wait until those end. A step of the 80M
# model on an H200, us, with spare blocks and without, for 1, 2, 4 and 8 rows (8, 16, 32 and 64 blocks of two stages):
# 158 and 163, 169 and 174, 179 and 184, 223 and 208; for 16, 32 and 64 rows: 222 and 227, 268 and 283, 309 and 316.
AHEAD_BESIDE = 0.3
LINE_BYTES = 128

ATTENTION_STEP_PARAMS = param_struct(
    "qkv q_gain k_gain rope slot_of_row slots keys values attended workspace", ("ahead", np.uint64, (AHEAD_RANGES,)),
    *ints("attended_stride capacity splits"), *floats("scale_log2 epsilon"), *ints("rows"),
    ("ahead_lines", np.int32, (AHEAD_RANGES,)),
)  # fmt: skip


@dataclass(frozen=True)
class AttentionStepShape:
    """How a decode step's attention is cut into thread blocks."""

    tile: decode.Tile  # its stages, and query rows of a block
    row_groups: int  # blocks for the query heads of one KV head
    splits: int  # blocks for each sequence, KV head and row group
    cluster: int  # equal to `splits`, or 1
    live_rows: int  # query rows of a block that exist
    most_splits: int  # of the longest sequence that the cache takes

    @property
    def shared_bytes(self) -> int:
        """As `attention_step.cu` lays it out: `attention_decode.cu`'s, and the newest key and value."""
        newest = 2 * self.tile.head_dim * ELEMENT_BYTES
        if self.cluster == 1:
            return self.tile.shared_bytes + newest
        split_bytes = 3 * (self.tile.head_dim // 32) * self.live_rows * 4 * 16
        return self.tile.shared_bytes - self.tile.state_bytes + newest + self.most_splits * split_bytes


def attention_step_shape(
    *,
    dtype: str,
    capability: tuple[int, int],
    multiprocessors: int,
    rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    capacity: int,
) -> AttentionStepShape:
    """The thread blocks of a decode step with `rows` rows on a cache of `capacity` tokens a slot."""
    group = num_heads // num_kv_heads
    tile = decode.select_tile(capability, dtype, head_dim, group)
    row_groups = -(-group // tile.rows)
    count = rows * num_kv_heads * row_groups
    most = decode.most_splits(capacity, tile.block_keys)
    live_rows = min(group, tile.rows)
    if capability >= CLUSTERS_FROM:
        limit = SHARED_BYTES_PER_SM.get(capability, UNKNOWN_SHARED_BYTES) - RESERVED_SHARED_BYTES
        for size in CLUSTER_SIZES:
            if size >= 2 * most or count * size > CLUSTER_BLOCKS[size] * multiprocessors:
                continue
            two = most > size and count * size <= BLOCKS_OF_TWO_STAGES * multiprocessors
            for stages in (2, 1) if two else (1,):
                shape = AttentionStepShape(replace(tile, stages=stages), row_groups, size, size, live_rows, most)
                if shape.shared_bytes <= limit:
                    return shape
    splits = decode.select_splits(count, capacity, tile.block_keys, multiprocessors)
    stages = decode.select_stages(tile, count * splits, capability, multiprocessors) if most > splits else 1
    return AttentionStepShape(replace(tile, stages=stages), row_groups, splits, 1, live_rows, most)


def fetches_ahead(facts: DeviceFacts, rows: int, nbytes: int) -> bool:
    """Whether a step of so many rows should ask for so many bytes of later weights during its attention."""
    return facts.capability >= CLUSTERS_FROM and rows <= AHEAD_ROWS and nbytes <= AHEAD_SHARE * facts.l2_bytes


def attention_step_workspace_bytes(
    *,
    dtype: str,
    capability: tuple[int, int],
    multiprocessors: int,
    rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    capacity: int,
) -> int:
    """Bytes of the workspace that `plan_attention_step` needs for the same sizes; 0: none.

    Its first `decode.ARRIVAL_BYTES` are zero before the first use and after each; all layers may share it.
    """
    shape = attention_step_shape(
        dtype=dtype, capability=capability, multiprocessors=multiprocessors, rows=rows, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, capacity=capacity,
    )  # fmt: skip
    if shape.cluster > 1 or shape.splits == 1:
        return 0
    states = rows * num_kv_heads * shape.row_groups * shape.most_splits
    return decode.ARRIVAL_BYTES + states * shape.tile.state_bytes


def plan_attention_step(
    *,
    dtype: str,
    capability: tuple[int, int],
    multiprocessors: int,
    rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    epsilon: float,
    qkv: int,
    attended: int,
    attended_stride: int,
    q_gain: int,
    k_gain: int,
    rope: int,
    keys: int,
    values: int,
    capacity: int,
    slot_of_row: int,
    slots: int,
    workspace: int = 0,
    shape: AttentionStepShape | None = None,
    ahead: Sequence[tuple[int, int]] = (),
) -> Launch:
    """Attention of one new token for each row, its head norms, rotation and cache write included.

    qkv: raw products (rows, (num_heads + 2 num_kv_heads) head_dim) float32. attended: (rows, num_heads, head_dim)
    Element, row stride attended_stride. keys, values: this layer's cache (slots, capacity, num_kv_heads, head_dim).
    Row r is the token at `slots[slot_of_row[r]].position`; rows of slot -1 are left alone. shape: another than these
    sizes choose. ahead: addresses and bytes of weights that the next products read, to be asked for meanwhile.
    """
    if shape is None:
        shape = attention_step_shape(
            dtype=dtype, capability=capability, multiprocessors=multiprocessors, rows=rows, num_heads=num_heads,
            num_kv_heads=num_kv_heads, head_dim=head_dim, capacity=capacity,
        )  # fmt: skip
    fields: dict[str, Any] = {
        "qkv": qkv, "q_gain": q_gain, "k_gain": k_gain, "rope": rope, "slot_of_row": slot_of_row, "slots": slots,
        "keys": keys, "values": values, "attended": attended, "workspace": workspace,
        "attended_stride": attended_stride, "capacity": capacity, "splits": shape.splits,
        "scale_log2": math.log2(math.e) / math.sqrt(head_dim), "epsilon": epsilon, "rows": rows,
    }  # fmt: skip
    unused = [(0, 0)] * (AHEAD_RANGES - len(ahead))
    fields["ahead"], fields["ahead_lines"] = zip(*((a, n // LINE_BYTES) for a, n in [*ahead, *unused]), strict=True)
    blocks = shape.row_groups * shape.splits
    crowded = shape.tile.stages > 1 and blocks * num_kv_heads * rows > AHEAD_BESIDE * multiprocessors
    more = -(-AHEAD_BLOCKS // (blocks * num_kv_heads)) if ahead and not crowded else 0
    return make_launch(
        "attention_step.cu",
        "attention_step",
        ATTENTION_STEP_PARAMS,
        fields,
        defines=(
            ("HEAD_DIM", head_dim),
            ("GROUP", num_heads // num_kv_heads),
            ("CAUSAL", 0),  # one query sees every key
            dtype_define(dtype),
            ("TILE_ROWS", shape.tile.rows),
            ("STAGES", shape.tile.stages),
            ("CLUSTER", shape.cluster),
        ),
        blocks=(blocks, num_kv_heads, rows + more),
        threads=head_dim,  # a warp for every 32 dimensions
        shared_bytes=shape.shared_bytes,
        cluster=shape.cluster,
    )
