"""Calls of the decode kernel: batches on a cache, and how the emulated machine runs them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emulation
import ml_dtypes
import numpy as np

from soprano_cupy.attention import decode
from soprano_cupy.attention.launch import LaunchPlan

Array = np.ndarray[Any, Any]
DTYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
LENGTHS = (1, 63, 64, 65, 127, 128, 129, 257, 0)
CAPACITY = 272
MANY = 10_000  # multiprocessors: every split gets a thread block of its own
NONE = 0  # a GPU that any call fills: every sequence has one thread block, which takes all its splits


@dataclass(frozen=True)
class Call:
    """A batch on a cache: q (B, S, Hq, D), or (N, Hq, D) with cu_seqlens_q; what the cache does not use is NaN."""

    q: Array
    k: Array
    v: Array
    kv_lengths: Array | None = None
    cu_seqlens_q: Array | None = None
    cu_seqlens_k: Array | None = None
    causal: bool = True
    scale: float | None = None

    @property
    def lengths(self) -> dict[str, Array | None]:
        names = ("kv_lengths", "cu_seqlens_q", "cu_seqlens_k")
        return {name: getattr(self, name) for name in names}


def int32(values: Sequence[int]) -> Array:
    return np.array(values, np.int32)


def rows(seed: int, shape: Sequence[int], dtype: Any) -> Array:
    """Normal random numbers, NaN before and after them in memory."""
    array = emulation.poisoned(shape, dtype)
    array[...] = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    return array


def cache_call(
    dtype: str,
    head_dim: int,
    group: int,
    queries: int = 1,
    kv_heads: int = 1,
    lengths: Sequence[int] = LENGTHS,
    capacity: int = CAPACITY,
    causal: bool = True,
) -> Call:
    """Dense queries; sequence b has the same numbers in whatever call it stands."""
    kind = DTYPES[dtype]
    q = emulation.poisoned((len(lengths), queries, group * kv_heads, head_dim), kind)
    k, v = (emulation.poisoned((len(lengths), capacity, kv_heads, head_dim), kind) for _ in range(2))
    for b, length in enumerate(lengths):
        q[b] = rows(3 * length, q.shape[1:], kind)
        k[b, :length] = rows(3 * length + 1, (length, kv_heads, head_dim), kind)
        v[b, :length] = rows(3 * length + 2, (length, kv_heads, head_dim), kind)
    return Call(q, k, v, int32(lengths), causal=causal)


def packed_queries(call: Call, queries: Sequence[int]) -> Call:
    """The last `queries[b]` queries of each sequence, packed."""
    kept = [call.q[b, call.q.shape[1] - count :] for b, count in enumerate(queries)]
    q = emulation.poisoned((sum(queries), *call.q.shape[2:]), call.q.dtype)
    q[...] = np.concatenate(kept)
    return dataclasses.replace(call, q=q, cu_seqlens_q=int32([0, *itertools.accumulate(queries)]))


def plan_for(call: Call, multiprocessors: int, arch: int) -> LaunchPlan:
    starts = call.cu_seqlens_q
    plan = decode.plan(
        compute_capability=(arch // 100, arch // 10 % 10),
        dtype=call.q.dtype.name,
        head_dim=call.q.shape[-1],
        group=call.q.shape[-2] // call.k.shape[-2],
        causal=call.causal,
        batch=call.q.shape[0] if starts is None else len(starts) - 1,
        seqlen_q=call.q.shape[1] if starts is None else int(np.diff(starts).max()),
        seqlen_k=call.k.shape[1] if call.cu_seqlens_k is None else int(np.diff(call.cu_seqlens_k).max()),
        num_kv_heads=call.k.shape[-2],
        multiprocessors=multiprocessors,
    )
    assert plan is not None
    return plan


def with_stages(plan: LaunchPlan, stages: int) -> LaunchPlan:
    """The same launch with one or two blocks of keys and values in shared memory: 256 bytes a thread for each."""
    defines = dict(plan.defines)
    shared_bytes = plan.shared_memory_bytes + 256 * plan.threads * (stages - defines["STAGES"])
    return dataclasses.replace(
        plan, defines=tuple({**defines, "STAGES": stages}.items()), shared_memory_bytes=shared_bytes
    )


def run(
    call: Call,
    multiprocessors: int = MANY,
    arch: int = 800,
    launches: int = 1,
    stages: int | None = None,
    source: str | Path | None = None,
    **options: Any,
) -> tuple[Array, Array]:
    """(out, lse) of the kernel; what the workspace held before its first use is NaN but for the counters.

    stages, source: other than the plan's.
    """
    plan = plan_for(call, multiprocessors, arch)
    if stages is not None:
        plan = with_stages(plan, stages)
    out = emulation.poisoned(call.q.shape, call.q.dtype)
    lse = emulation.poisoned((call.q.shape[-2], math.prod(call.q.shape[:-2])), np.float32)
    workspace = emulation.poisoned((max(4, plan.workspace_bytes // 4),), np.float32)
    workspace[: decode.ARRIVAL_BYTES // 4] = 0
    params, buffers = emulation.attention_params(
        call.q, call.k, call.v, out, lse=lse, scale=call.scale, splits=plan.splits,
        workspace=workspace if plan.workspace_bytes else None, **call.lengths,
    )  # fmt: skip
    grid = plan.grid(
        batch=params.batch, seqlen_q=params.seqlen_q, num_heads=params.num_heads, num_kv_heads=params.num_kv_heads
    )
    library = emulation.build(source or plan.source, dict(plan.defines), arch)
    shared_bytes = options.pop("shared_bytes", plan.shared_memory_bytes)
    for _ in range(launches):
        library.launch(
            plan.kernel, params, grid=grid, threads=plan.threads, shared_bytes=shared_bytes, buffers=buffers, **options
        )
    if plan.workspace_bytes:
        assert not workspace[: decode.ARRIVAL_BYTES // 4].any(), "the counters are not back at zero"
    return out, lse
