"""The prefill planner: which kernel and tile serve which GPU, dtype and sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from soprano_cupy.attention import prefill
from soprano_cupy.attention.launch import LaunchPlan

COMPUTE_CAPABILITIES = [*prefill.SHARED_BYTES_PER_SM, (13, 0)]


@dataclass(frozen=True)
class Sizes:
    """One sequence of `seqlen_q` queries, four heads on one, unless told otherwise."""

    seqlen_q: int
    batch: int = 1
    num_heads: int = 4
    num_kv_heads: int = 1

    @property
    def seqlen_k(self) -> int:
        return self.seqlen_q


def plan(
    sizes: Sizes,
    compute_capability: tuple[int, int] = (9, 0),
    dtype: str = "bfloat16",
    head_dim: int = 128,
    multiprocessors: int = 132,
    **changes: Any,
) -> LaunchPlan | None:
    arguments: dict[str, Any] = {"group": sizes.num_heads // sizes.num_kv_heads, "causal": True, **changes}
    return prefill.plan(
        compute_capability=compute_capability,
        dtype=dtype,
        head_dim=head_dim,
        params_info=sizes,
        multiprocessors=multiprocessors,
        **arguments,
    )


def rows_of(found: LaunchPlan | None) -> int:
    assert found is not None
    constants = dict(found.defines)
    return constants["WARPS_M"] * constants["ROW_TILES"] * 16


@pytest.mark.parametrize(
    ("compute_capability", "dtype", "source"),
    [
        ((7, 0), "float16", "attention_prefill_portable.cu"),
        ((7, 5), "float16", "attention_prefill.cu"),
        ((7, 5), "bfloat16", "attention_prefill_portable.cu"),
        ((8, 0), "bfloat16", "attention_prefill.cu"),
        ((12, 1), "float16", "attention_prefill.cu"),
        ((9, 0), "float32", "attention_prefill_portable.cu"),
    ],
)
def test_tensor_cores_are_used_where_the_gpu_has_them(
    compute_capability: tuple[int, int], dtype: str, source: str
) -> None:
    found = plan(Sizes(100), compute_capability, dtype)
    assert found is not None
    assert found.source == source


@pytest.mark.parametrize("compute_capability", COMPUTE_CAPABILITIES)
@pytest.mark.parametrize("head_dim", prefill.HEAD_DIMS)
@pytest.mark.parametrize("dtype", list(prefill.DTYPE_DEFINES))
def test_every_plan_fits_the_gpu(compute_capability: tuple[int, int], head_dim: int, dtype: str) -> None:
    per_block = prefill.SHARED_BYTES_PER_SM.get(compute_capability, prefill.UNKNOWN_SHARED_BYTES)
    if compute_capability >= (8, 0):
        per_block -= prefill.RESERVED_SHARED_BYTES
    for seqlen in (1, 64, 1000, 100_000):
        found = plan(Sizes(seqlen), compute_capability, dtype, head_dim)
        assert found is not None
        assert 0 < found.shared_memory_bytes <= per_block
        assert found.shared_memory_bytes % 16 == 0
        assert found.threads in (128, 256)


def test_tiles_shrink_until_the_gpu_is_occupied() -> None:
    assert rows_of(plan(Sizes(64))) == 16
    assert rows_of(plan(Sizes(2048))) == 64
    assert rows_of(plan(Sizes(16384))) == 128
    assert rows_of(plan(Sizes(64, batch=512))) == 128
    # the same prompt needs no small tiles on a GPU with fewer multiprocessors
    assert rows_of(plan(Sizes(2048), multiprocessors=16)) == 128


@pytest.mark.parametrize(
    ("sizes", "warps"),
    [
        (Sizes(4096), 2),  # 256 blocks of 64 rows and many keys: two warps share the keys of a row
        (Sizes(8192), 1),  # 512 blocks: two a multiprocessor instead
        (Sizes(64, batch=64), 1),  # 256 blocks again, with no keys to share
        (Sizes(256, batch=8), 1),
    ],
)
def test_keys_are_shared_where_there_is_a_block_for_each_multiprocessor(sizes: Sizes, warps: int) -> None:
    found = plan(sizes, multiprocessors=132)
    assert rows_of(found) == 64
    assert dict(found.defines)["WARPS_N"] == warps


@pytest.mark.parametrize(
    ("sizes", "rows", "grid"),
    [
        (Sizes(1), 16, (1, 1, 1)),
        (Sizes(64), 16, (16, 1, 1)),
        (Sizes(65, batch=3), 16, (17 * 3, 1, 1)),
        (Sizes(4096, batch=64), 128, (128 * 16, 4, 1)),
        (Sizes(4096, batch=9, num_heads=6, num_kv_heads=2), 128, (96 * 16, 2, 1)),
    ],
)
def test_grid_covers_every_tile_once(sizes: Sizes, rows: int, grid: tuple[int, int, int]) -> None:
    found = plan(sizes)
    assert found is not None
    assert rows_of(found) == rows
    assert (
        found.grid(
            batch=sizes.batch, seqlen_q=sizes.seqlen_q, num_heads=sizes.num_heads, num_kv_heads=sizes.num_kv_heads
        )
        == grid
    )


def test_longest_sequence_stays_within_the_grid() -> None:
    sizes = Sizes(131_072, batch=8, num_heads=64)
    found = plan(sizes)
    assert found is not None
    x, y, z = found.grid(batch=8, seqlen_q=131_072, num_heads=64, num_kv_heads=1)
    assert (x, y, z) == (131_072 * 64 // 128 * 8, 1, 1)
    assert x < 2**31


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compute_capability": (6, 1)}, "need compute capability 7.0, not 6.1"),
        ({"dtype": "float64"}, "not float64"),
        ({"head_dim": 96}, "take head_dim 32, 64, 128, not 96"),
        ({"sizes": Sizes(2**28, num_heads=8)}, "rows"),
        ({"sizes": Sizes(1, batch=2_000_000)}, "pairs of sequence and KV head"),
    ],
)
def test_what_is_not_served_has_a_reason(changes: dict[str, Any], message: str) -> None:
    arguments = {"sizes": Sizes(10), "compute_capability": (8, 0), "dtype": "bfloat16", "head_dim": 128, **changes}
    assert plan(**arguments) is None
    sizes = arguments.pop("sizes")
    assert message in (prefill.refusal(**arguments, group=sizes.num_heads, params_info=sizes) or "")
