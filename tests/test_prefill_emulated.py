"""The prefill kernels' own source, run on the CPU against float64: every tile shape, head size, group and mask."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import emulation
import ml_dtypes
import numpy as np
import pytest
from attention_reference import assert_accurate, plain, reference

from soprano_cupy.attention import prefill
from soprano_cupy.attention.launch import LaunchPlan

Array = np.ndarray[Any, Any]
DTYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


@dataclass(frozen=True)
class Sizes:
    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_kv_heads: int


@dataclass(frozen=True)
class Call:
    """The arguments of one attention call, unused memory poisoned with NaN."""

    q: Array
    k: Array
    v: Array
    out: Array
    lengths: dict[str, Array]  # kv_lengths, cu_seqlens_q, cu_seqlens_k as the reference and the kernels take them
    scale: float | None = None


def rows(rng: np.random.Generator, shape: Sequence[int], dtype: Any, order: Sequence[int] | None = None) -> Array:
    """Normal random numbers, NaN before and after them in memory. order: the array's axes from slowest to fastest."""
    order = range(len(shape)) if order is None else order
    array = emulation.poisoned([shape[axis] for axis in order], dtype).transpose(np.argsort(order))
    array[...] = rng.standard_normal(shape).astype(dtype)
    return array


def int32(values: Sequence[int]) -> Array:
    return np.array(values, np.int32)


def dense(
    queries: int,
    keys: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: Any,
    batch: int = 1,
    kv_lengths: Sequence[int] | None = None,
    heads_first: bool = False,
) -> Call:
    """q (B, S, Hq, D) with k, v (B, L, Hkv, D); keys past kv_lengths are NaN."""
    rng = np.random.default_rng(queries * 1000 + keys)
    order = (0, 2, 1, 3) if heads_first else None
    q = rows(rng, (batch, queries, heads, head_dim), dtype, order)
    k, v = (rows(rng, (batch, keys, kv_heads, head_dim), dtype, order) for _ in range(2))
    for b, length in enumerate(kv_lengths or ()):
        k[b, length:] = v[b, length:] = np.nan
    out = emulation.poisoned(q.shape, dtype)
    return Call(q, k, v, out, {} if kv_lengths is None else {"kv_lengths": int32(kv_lengths)})


def packed(lengths: Sequence[int], heads: int, kv_heads: int, head_dim: int, dtype: Any) -> Call:
    """Self-attention inside each of several packed sequences."""
    rng = np.random.default_rng(sum(lengths))
    total = sum(lengths)
    starts = int32([0, *itertools.accumulate(lengths)])
    q = rows(rng, (total, heads, head_dim), dtype)
    k, v = (rows(rng, (total, kv_heads, head_dim), dtype) for _ in range(2))
    return Call(q, k, v, emulation.poisoned(q.shape, dtype), {"cu_seqlens_q": starts, "cu_seqlens_k": starts})


def cached(
    lengths: Sequence[int], capacity: int, used: Sequence[int], heads: int, kv_heads: int, head_dim: int, dtype: Any
) -> Call:
    """Packed queries on a cache that keeps K and V interleaved by head; its unused part is NaN."""
    rng = np.random.default_rng(sum(lengths) + capacity)
    starts = int32([0, *itertools.accumulate(lengths)])
    q = rows(rng, (sum(lengths), heads, head_dim), dtype)
    cache = rows(rng, (len(lengths), capacity, kv_heads, 2, head_dim), dtype)
    for b, length in enumerate(used):
        cache[b, length:] = np.nan
    return Call(
        q,
        cache[..., 0, :],
        cache[..., 1, :],
        emulation.poisoned(q.shape, dtype),
        {"cu_seqlens_q": starts, "kv_lengths": int32(used)},
    )


def calls(heads: int, kv_heads: int, head_dim: int, dtype: Any) -> list[Call]:
    """Every form, with lengths of 1, odd, on and beside the tiles' edges."""
    shape = (heads, kv_heads, head_dim, dtype)
    return [
        dense(1, 1, *shape),
        dense(7, 63, *shape, batch=2, kv_lengths=(63, 1)),
        dense(65, 64, *shape, heads_first=True),  # causal: the first query sees nothing
        dense(130, 130, *shape),
        dense(200, 20, *shape),  # causal: whole tiles see nothing
        packed((1, 65, 30), *shape),
        cached((3, 64), 160, (130, 129), *shape),
    ]  # fmt: skip


def launch(plan: LaunchPlan, call: Call, arch: int, **options: Any) -> Array:
    """Run the plan's kernel into call.out; returns lse (heads, total queries)."""
    total = math.prod(call.q.shape[:-2])
    lse = emulation.poisoned((call.q.shape[-2], total), np.float32)
    params, buffers = emulation.attention_params(
        call.q, call.k, call.v, call.out, lse=lse, scale=call.scale, **call.lengths
    )
    grid = plan.grid(
        batch=params.batch, seqlen_q=params.seqlen_q, num_heads=params.num_heads, num_kv_heads=params.num_kv_heads
    )
    library = emulation.build(plan.source, dict(plan.defines), arch)
    library.launch(
        plan.kernel,
        params,
        grid=grid,
        threads=plan.threads,
        shared_bytes=plan.shared_memory_bytes,
        buffers=buffers,
        **options,
    )
    return lse


def check(plan: LaunchPlan, call: Call, causal: bool, arch: int, **options: Any) -> None:
    lse = launch(plan, call, arch, **options)
    expected, expected_lse = reference(call.q, call.k, call.v, causal=causal, scale=call.scale, **call.lengths)
    baseline = plain(call.q, call.k, call.v, causal=causal, scale=call.scale, **call.lengths)
    assert_accurate(call.out, expected, baseline)
    # lse is fp32: its sum and logarithm err by a few units in the last place of scores that are themselves exact to
    # HEAD_DIM roundings of fp32, whatever the dtype of the inputs.
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=2e-6)


def plan_of(tile: prefill.Tile, head_dim: int, group: int, causal: bool, dtype: str) -> LaunchPlan:
    common = (("HEAD_DIM", head_dim), ("GROUP", group), ("CAUSAL", int(causal)), (prefill.DTYPE_DEFINES[dtype], 1))
    return prefill.tensor_core_plan(tile, head_dim, common)


# ---- every tile of the table, both masks; groups and dtypes take turns ----

TILES = [
    (head_dim, tile)
    for table in (prefill.WIDE, prefill.BALANCED, prefill.MEDIUM, prefill.NARROW)
    for head_dim, tiles in table.items()
    for tile in tiles
]
GROUPS = ((4, 1), (8, 1), (3, 1), (2, 2), (4, 2))  # query heads, KV heads: groups of 4, 8, 3, 1 and 2


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    "index", range(len(TILES)), ids=[f"{d}-{t.rows}x{t.block_keys}-{t.warps_n}-{t.stages}" for d, t in TILES]
)
def test_tensor_core_tiles(index: int, causal: bool) -> None:
    head_dim, tile = TILES[index]
    heads, kv_heads = GROUPS[(2 * index + causal) % len(GROUPS)]
    arch = 750 if "Turing" in tile.reason else 800
    dtype = "float16" if arch == 750 or (index + causal) % 2 else "bfloat16"
    plan = plan_of(tile, head_dim, heads // kv_heads, causal, dtype)
    for call in calls(heads, kv_heads, head_dim, DTYPES[dtype]):
        check(plan, call, causal, arch)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16, 64])
@pytest.mark.parametrize("table", [prefill.WIDE, prefill.NARROW], ids=["wide", "narrow"])
def test_groups(table: dict[int, tuple[prefill.Tile, ...]], group: int) -> None:
    call = packed((9, 1, 23), group, 1, 64, ml_dtypes.bfloat16)
    check(plan_of(table[64][0], 64, group, True, "bfloat16"), call, True, 800)


@pytest.mark.parametrize(
    ("dtype", "arch", "head_dim", "heads", "kv_heads", "causal"),
    [
        ("float32", 900, 32, 4, 1, True),
        ("float32", 900, 64, 3, 1, True),
        ("float32", 900, 128, 4, 2, True),
        ("float32", 700, 32, 2, 2, False),
        ("float32", 700, 64, 4, 1, False),
        ("float32", 700, 128, 3, 1, False),
        ("float16", 700, 64, 4, 2, True),
        ("float16", 700, 128, 2, 2, False),
        ("bfloat16", 750, 32, 3, 1, False),
        ("bfloat16", 750, 128, 2, 1, True),
    ],
)
def test_portable_kernel(dtype: str, arch: int, head_dim: int, heads: int, kv_heads: int, causal: bool) -> None:
    plan = prefill.plan(
        compute_capability=divmod(arch // 10, 10),
        dtype=dtype,
        head_dim=head_dim,
        group=heads // kv_heads,
        causal=causal,
        params_info=Sizes(1, 1, 1, heads, kv_heads),
    )
    assert plan is not None
    assert plan.source == "attention_prefill_portable.cu"
    for call in calls(heads, kv_heads, head_dim, DTYPES[dtype]):
        check(plan, call, causal, arch)


# ---- numbers that strain the online softmax ----


def softmax_plans() -> list[LaunchPlan]:
    portable = prefill.plan(
        compute_capability=(8, 0), dtype="float32", head_dim=64, group=1, causal=False, params_info=Sizes(1, 1, 1, 1, 1)
    )
    assert portable is not None
    return [
        plan_of(prefill.WIDE[64][0], 64, 1, False, "float16"),
        plan_of(prefill.NARROW[64][0], 64, 1, False, "float16"),
        portable,
    ]


def dtype_of(plan: LaunchPlan) -> Any:
    return np.float32 if ("DTYPE_FP32", 1) in plan.defines else np.float16


@pytest.mark.parametrize("step", [0.5, 7.0, 40.0])
@pytest.mark.parametrize("plan", softmax_plans(), ids=["wide", "narrow", "portable"])
def test_scores_that_rise_from_block_to_block(plan: LaunchPlan, step: float) -> None:
    """The reference of the exponentials moves within the slack, now and then, or with every block."""
    call = dense(64, 400, 1, 1, 64, dtype_of(plan))
    call.q[..., 0] = 1
    call.k[0, :, 0, 0] = np.arange(400) // 16 * step
    check(plan, dataclasses.replace(call, scale=0.7), False, 800)


@pytest.mark.parametrize("plan", softmax_plans(), ids=["wide", "narrow", "portable"])
def test_falling_and_huge_scores(plan: LaunchPlan) -> None:
    call = dense(20, 200, 1, 1, 64, dtype_of(plan))
    call.q[...] *= 30
    call.k[...] *= 30
    call.k[0, :16] *= 2
    check(plan, call, False, 800)


# ---- layout, determinism, faults ----


@pytest.mark.parametrize("name", ["wide", "narrow"])
def test_a_sequence_does_not_depend_on_its_neighbours(name: str) -> None:
    tile = {"wide": prefill.WIDE, "narrow": prefill.NARROW}[name][64][0]
    plan = plan_of(tile, 64, 4, True, "bfloat16")
    together = packed((40, 70, 9), 4, 1, 64, ml_dtypes.bfloat16)
    lse = launch(plan, together, 800)
    part = slice(40, 110)
    alone = Call(
        together.q[None, part],
        together.k[None, part],
        together.v[None, part],
        emulation.poisoned((1, 70, 4, 64), ml_dtypes.bfloat16),
        {},
    )
    lse_alone = launch(plan, alone, 800, reverse=True)
    np.testing.assert_array_equal(alone.out[0].view(np.uint16), together.out[part].view(np.uint16))
    np.testing.assert_array_equal(lse_alone, lse[:, part])


def test_more_pairs_than_are_taken_together() -> None:
    call = dense(5, 20, 6, 3, 32, np.float16, batch=7)  # 21 pairs
    check(plan_of(prefill.NARROW[32][0], 32, 2, True, "float16"), call, True, 800)


def test_lse_may_be_left_out() -> None:
    plan = plan_of(prefill.WIDE[32][0], 32, 1, True, "float16")
    call = dense(10, 10, 1, 1, 32, np.float16)
    params, buffers = emulation.attention_params(call.q, call.k, call.v, call.out)
    emulation.build(plan.source, dict(plan.defines)).launch(
        plan.kernel,
        params,
        grid=(1, 1, 1),
        threads=plan.threads,
        shared_bytes=plan.shared_memory_bytes,
        buffers=buffers,
    )
    assert_accurate(
        call.out,
        *(
            f(call.q, call.k, call.v, causal=True)[0] if f is reference else f(call.q, call.k, call.v, causal=True)
            for f in (reference, plain)
        ),
    )


# Where each barrier and wait stands, by how many a thread has met before it, over three blocks of keys.
FAULTS = {
    "two stages": (plan_of(prefill.WIDE[128][0], 128, 1, False, "bfloat16"),
                   [("skip_barrier", n) for n in range(4)] + [("skip_wait", n) for n in range(4)]
                   + [("skip_warp_barrier", n) for n in range(2)]),
    "one stage": (plan_of(prefill.WIDE[128][1], 128, 1, False, "bfloat16"),
                  [("skip_barrier", n) for n in range(7)] + [("skip_wait", n) for n in range(7)]),
    "merge": (plan_of(prefill.NARROW[128][1], 128, 1, False, "bfloat16"),
              [("skip_barrier", n) for n in range(7)]),
    "portable": (softmax_plans()[2], [("skip_barrier", n) for n in range(1, 24)]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "fault", "n"), [(name, *fault) for name, (_, faults) in FAULTS.items() for fault in faults]
)
def test_every_barrier_and_wait_is_needed(name: str, fault: str, n: int) -> None:
    plan = FAULTS[name][0]
    head_dim = dict(plan.defines)["HEAD_DIM"]
    call = dense(40, 192, 1, 1, head_dim, ml_dtypes.bfloat16 if head_dim == 128 else np.float32)
    launch(plan, call, 800)  # as it is, it runs through
    with pytest.raises(emulation.EmulationError, match=r"race|in flight|deadlock"):
        launch(plan, call, 800, **{fault: n})
