"""Which decode kernel serves a call, and how many thread blocks share a sequence."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from soprano_cupy.attention import decode

PLAN: dict[str, Any] = {
    "compute_capability": (9, 0), "dtype": "bfloat16", "head_dim": 128, "group": 4, "causal": True, "batch": 1,
    "seqlen_q": 1, "seqlen_k": 1024, "num_kv_heads": 1, "multiprocessors": 132,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"seqlen_q": 17}, {"dtype": "float64"}, {"head_dim": 96}, {"compute_capability": (6, 1)}, {"batch": 65_536},
        {"num_kv_heads": 65_536},
    ],
)  # fmt: skip
def test_calls_that_are_not_served(change: dict[str, Any]) -> None:
    assert decode.plan(**PLAN) is not None
    assert decode.plan(**{**PLAN, **change}) is None


@pytest.mark.parametrize(
    ("change", "rows_of_a_block", "splits"),
    [
        ({}, 8, 16),
        ({"seqlen_k": 64}, 8, 1),
        ({"seqlen_k": 192}, 8, 1),
        ({"seqlen_k": 193}, 8, 4),
        ({"batch": 16}, 8, 16),  # 256 splits: one for each block
        ({"batch": 17}, 8, 8),  # 272: two
        ({"batch": 32, "seqlen_k": 512}, 8, 8),
        ({"batch": 59, "seqlen_k": 256}, 8, 4),
        ({"batch": 59}, 8, 8),
        ({"batch": 59, "seqlen_k": 2048}, 8, 8),  # at most eight, so that no blocks queue
        ({"batch": 60}, 8, 1),  # 0.45 a multiprocessor
        ({"batch": 64, "seqlen_k": 512}, 8, 1),
        ({"batch": 512}, 8, 1),
        ({"seqlen_q": 4}, 16, 16),
        ({"seqlen_q": 16}, 32, 16),
        ({"seqlen_q": 16, "compute_capability": (7, 5), "dtype": "float16"}, 16, 16),
        ({"dtype": "float32"}, 4, 16),
        ({"dtype": "float32", "seqlen_q": 2}, 8, 16),
        ({"compute_capability": (7, 5)}, 4, 16),
    ],
)
def test_tiles_and_splits(change: dict[str, Any], rows_of_a_block: int, splits: int) -> None:
    plan = decode.plan(**{**PLAN, **change})
    assert plan is not None
    assert dict(plan.defines)["TILE_ROWS"] == rows_of_a_block
    assert plan.splits == splits
    assert (plan.workspace_bytes > 0) == (splits > 1)


def test_how_many_blocks_share_a_sequence() -> None:
    """One split each up to two blocks a multiprocessor; then two, or as many as four blocks a multiprocessor take."""
    for multiprocessors, keys in itertools.product((16, 40, 132), (1, 192, 193, 512, 1000, 2049, 16_384, 70_000)):
        splits = decode.most_splits(keys, 64)
        for slots in range(1, 300):
            shares = decode.select_splits(slots, keys, 64, multiprocessors)
            if splits <= 3 or slots >= 0.45 * multiprocessors:
                assert shares == 1
            elif slots * splits <= 2 * multiprocessors:
                assert shares == splits
            else:
                most = -(-splits // shares)
                assert most >= 2
                assert (shares - 1) * most < splits, "fewer blocks would do"
                assert slots * shares < 4 * multiprocessors + slots
                assert most == 2 or slots * -(-splits // (most - 1)) > 4 * multiprocessors, "more blocks would fit"


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({}, 1),  # one block of keys each
        ({"seqlen_k": 64}, 1),
        ({"seqlen_k": 65}, 2),
        ({"seqlen_k": 4096}, 2),  # splits of two blocks
        ({"batch": 33, "seqlen_k": 512}, 1),  # one block of keys each again
        ({"batch": 34, "seqlen_k": 512}, 2),  # 136 blocks of threads on 132 multiprocessors, with two splits each
        ({"batch": 59}, 1),  # 472
        ({"batch": 60}, 2),
        ({"batch": 264}, 2),
        ({"batch": 265}, 1),
        ({"batch": 132, "seqlen_q": 16}, 2),  # two row groups of 107 KB, of the 228
        ({"batch": 200, "compute_capability": (8, 0)}, 2),
        ({"batch": 132, "compute_capability": (8, 0), "seqlen_q": 16}, 1),  # of the 164, two do not fit
        ({"batch": 132, "seqlen_k": 192, "compute_capability": (8, 9)}, 2),  # 77 KB of the 100: one fits
        ({"batch": 133, "seqlen_k": 192, "compute_capability": (8, 9)}, 1),
        ({"seqlen_k": 192, "compute_capability": (12, 0), "seqlen_q": 16}, 1),
        ({"seqlen_k": 192, "compute_capability": (7, 5), "dtype": "float16"}, 1),  # no asynchronous copies
    ],
)
def test_stages(change: dict[str, Any], stages: int) -> None:
    plan = decode.plan(**{**PLAN, **change})
    assert plan is not None
    assert dict(plan.defines)["STAGES"] == stages


def test_split_rule() -> None:
    """A split is a power of two of at least a block with split**2 >= 2 * keys; the capacity bounds every length."""
    for block in (32, 64):
        counts = [-(-keys // decode.split_keys(keys, block)) for keys in range(1, 40_000)]
        largest = np.maximum.accumulate(counts)
        assert decode.split_keys(block * block // 2, block) == block
        assert decode.split_keys(block * block // 2 + 1, block) == 2 * block
        for capacity in (1, 64, 512, 513, 1024, 2048, 2049, 2500, 4096, 8192, 8193, 9000, 32_768, 39_999):
            assert decode.most_splits(capacity, block) == largest[capacity - 1]
