"""How a decode step's attention is shared out: splits, clusters, and the blocks that ask for later weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from soprano_cupy.cuda.module import DeviceFacts
from soprano_cupy.gpu import attention_step, step

SHAPE_SIZES: dict[str, Any] = {
    "dtype": "bfloat16", "capability": (9, 0), "multiprocessors": 132, "rows": 1, "num_heads": 4, "num_kv_heads": 1,
    "head_dim": 128, "capacity": 1024,
}  # fmt: skip


def shape_for(**change: Any) -> attention_step.AttentionStepShape:
    return step.attention_step_shape(**{**SHAPE_SIZES, **change})


@pytest.mark.parametrize(
    ("change", "splits", "clusters"),
    [
        ({"rows": 2000}, 1, False), ({"capacity": 64}, 1, False), ({"capacity": 130}, 4, True),
        ({"capacity": 30_000}, 118, False),  # more states than shared memory takes
        ({"capability": (8, 0)}, 16, False), ({"capability": (12, 0)}, 8, True),
        ({"capability": (7, 5), "dtype": "float16"}, 16, False),
    ],
)  # fmt: skip
def test_how_many_thread_blocks_take_a_sequence(change: dict[str, Any], splits: int, clusters: bool) -> None:
    shape = shape_for(**change)
    assert (shape.splits, shape.cluster) == (splits, splits if clusters else 1)
    wanted = step.attention_step_workspace_bytes(**{**SHAPE_SIZES, **change})
    assert (wanted > attention_step.decode.ARRIVAL_BYTES) == (splits > 1 and not clusters)
    assert (wanted == 0) == (splits == 1 or clusters)


def test_clusters_shrink_as_rows_come() -> None:
    """Never more blocks than the table allows, and never a smaller cluster where it allows a larger."""
    table = attention_step.CLUSTER_BLOCKS
    for rows in range(1, 400):
        shape = shape_for(rows=rows)
        allowed = [size for size, share in table.items() if rows * size <= share * 132]
        assert shape.cluster == max(allowed, default=1)
        assert shape.shared_bytes <= 227 * 1024


def test_when_weights_are_asked_for_meanwhile() -> None:
    """For few rows, and where the second-level cache has room for twice as much."""
    gpu = DeviceFacts(0, "GPU", (9, 0), 132, l2_bytes=50 << 20)
    assert step.fetches_ahead(gpu, 1, 25 << 20)
    assert step.fetches_ahead(gpu, 64, 1 << 20)
    assert not step.fetches_ahead(gpu, 65, 1 << 20)
    assert not step.fetches_ahead(gpu, 1, 26 << 20)
    assert not step.fetches_ahead(replace(gpu, capability=(8, 0)), 1, 1 << 20)
    assert not step.fetches_ahead(replace(gpu, l2_bytes=0), 1, 1)


@pytest.mark.parametrize(("rows", "spare"), [(1, 14), (2, 14), (4, 14), (8, 0), (16, 14), (32, 28), (64, 56)])
def test_spare_blocks_find_room(rows: int, spare: int) -> None:
    """The 80M model on 132 multiprocessors: (splits, heads, rows and spare ones); 8 rows fill half of them alone."""
    plan = step.plan_attention_step(
        dtype="bfloat16", capability=(9, 0), multiprocessors=132, rows=rows, num_heads=4, num_kv_heads=1, head_dim=128,
        epsilon=1e-6, qkv=16, attended=16, attended_stride=512, q_gain=16, k_gain=16, rope=16, keys=16, values=16,
        capacity=1088, slot_of_row=16, slots=16, workspace=16, ahead=[(256, 1 << 16)],
    )  # fmt: skip
    assert plan.grid[2] - rows == spare
    assert plan.grid[0] * plan.grid[1] * spare in (0, 112)
