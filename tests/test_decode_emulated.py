"""The decode kernel's own source, run on the CPU: against float64, and bit by bit across batches, grids and tiles."""

from __future__ import annotations

import dataclasses
import itertools
import mmap
from pathlib import Path
from typing import Any

import emulation
import numpy as np
import pytest
from attention_reference import assert_accurate, plain, reference
from decode_calls import (
    CAPACITY,
    LENGTHS,
    MANY,
    NONE,
    Array,
    Call,
    cache_call,
    int32,
    packed_queries,
    plan_for,
    rows,
    run,
    with_stages,
)
from numerics import same_bits

MAP_NORESERVE = 0x4000  # Linux; in Python's mmap from 3.13 on


def sequence_calls(call: Call) -> list[Call]:
    """Each sequence of a dense call as a call of its own."""
    assert call.kv_lengths is not None
    return [
        dataclasses.replace(call, q=call.q[b : b + 1], k=call.k[b : b + 1], v=call.v[b : b + 1],
                            kv_lengths=call.kv_lengths[b : b + 1])
        for b in range(len(call.q))
    ]  # fmt: skip


def check(call: Call, out: Array, lse: Array) -> None:
    """The accuracy rule, and the log-sum-exp."""
    options: dict[str, Any] = {"causal": call.causal, "scale": call.scale, **call.lengths}
    expected, expected_lse = reference(call.q, call.k, call.v, **options)
    assert_accurate(out, expected, plain(call.q, call.k, call.v, **options))
    np.testing.assert_allclose(lse, expected_lse, rtol=3e-7, atol=3e-6)


# dtype, __CUDA_ARCH__, head_dim, group, KV heads, queries. The rows of one KV head, group x queries, choose the tile.
SHAPES = (
    ("bfloat16", 800, 128, 4, 1, 1),
    ("bfloat16", 800, 128, 4, 2, 2),
    ("bfloat16", 900, 128, 4, 1, 4),
    ("bfloat16", 800, 128, 4, 1, 16),  # two row groups of 32
    ("bfloat16", 800, 128, 1, 2, 9),
    ("float16", 750, 128, 8, 1, 1),
    ("float16", 800, 64, 3, 2, 1),
    ("float16", 800, 64, 3, 1, 5),
    ("float16", 750, 32, 8, 1, 3),  # two row groups of 16
    ("bfloat16", 800, 32, 1, 1, 1),
    ("float32", 800, 128, 4, 1, 1),
    ("float32", 750, 64, 3, 2, 5),  # two row groups of 8
    ("float32", 800, 32, 8, 1, 1),
    ("float16", 700, 64, 4, 1, 1),
    ("bfloat16", 750, 128, 1, 1, 6),
)


@pytest.mark.parametrize(("dtype", "arch", "head_dim", "group", "kv_heads", "queries"), SHAPES)
def test_every_length_is_accurate_however_it_is_shared_out(
    dtype: str, arch: int, head_dim: int, group: int, kv_heads: int, queries: int
) -> None:
    call = cache_call(dtype, head_dim, group, queries, kv_heads)
    out, lse = run(call, MANY, arch)
    check(call, out, lse)
    undivided = run(call, NONE, arch)
    assert same_bits(out, undivided[0])
    assert same_bits(lse, undivided[1])


@pytest.mark.parametrize(("dtype", "keys"), [("bfloat16", 2049), ("float32", 513)])
def test_splits_of_several_blocks(dtype: str, keys: int) -> None:
    """From 2,049 keys on (513 in fp32) a split has two blocks; both lengths are in one call."""
    call = cache_call(dtype, 128, 4, lengths=(keys, keys - 1, keys + 130), capacity=keys + 131)
    out, lse = run(call, MANY)
    check(call, out, lse)
    for multiprocessors in (NONE, 4, 9):
        assert same_bits(out, run(call, multiprocessors)[0])


# dtype, head_dim, queries, keys of the longest sequence: every tile from Ampere on, and splits of two blocks
TWO_STAGES = (
    ("bfloat16", 128, 1, 270),
    ("bfloat16", 128, 4, 270),
    ("bfloat16", 128, 16, 270),
    ("bfloat16", 128, 1, 2049),
    ("float16", 64, 1, 270),
    ("float16", 32, 3, 270),
    ("float32", 128, 1, 270),
    ("float32", 64, 2, 520),
)


@pytest.mark.parametrize(("dtype", "head_dim", "queries", "keys"), TWO_STAGES)
def test_two_stages_change_no_bit(dtype: str, head_dim: int, queries: int, keys: int) -> None:
    lengths = (*LENGTHS, keys) if keys < 1000 else (keys, keys - 1)
    call = cache_call(dtype, head_dim, 4, queries, lengths=lengths, capacity=keys + 3)
    single = run(call, NONE, stages=1)
    check(call, *single)
    for multiprocessors in (NONE, 7, MANY):
        for double in (run(call, multiprocessors, stages=2), run(call, multiprocessors, stages=2, reverse=True)):
            assert same_bits(single[0], double[0])
            assert same_bits(single[1], double[1])


def test_full_attention_among_the_queries() -> None:
    call = cache_call("bfloat16", 64, 4, 2, causal=False)
    check(call, *run(call))


def test_more_queries_than_keys() -> None:
    """Bottom right: the first queries of a sequence shorter than its queries see nothing and give zeros."""
    call = cache_call("bfloat16", 128, 4, 4, lengths=(1, 3, 4))
    out, lse = run(call)
    check(call, out, lse)
    assert not out[0, :3].any()
    assert np.isneginf(lse[:, :3]).all()


def test_bits_do_not_depend_on_the_batch_the_slot_or_the_grid() -> None:
    call = cache_call("bfloat16", 128, 4)
    out, _ = run(call)
    for b, alone in enumerate(sequence_calls(call)):
        assert same_bits(run(alone, MANY)[0], out[b : b + 1])
        assert same_bits(run(alone, NONE)[0], out[b : b + 1])
    turned = cache_call("bfloat16", 128, 4, lengths=LENGTHS[::-1], capacity=600)
    for multiprocessors in (NONE, 13, MANY):
        assert same_bits(run(turned, multiprocessors)[0][::-1].copy(), out)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bits_do_not_depend_on_how_many_queries_come_at_once(dtype: str) -> None:
    """One query of 257 keys: alone, beside a neighbour with 16, and as the last or first of several of its own."""
    neighbours = (65, 257, 64)
    call = cache_call(dtype, 128, 4, 16, lengths=neighbours)
    mixed = packed_queries(call, (16, 1, 2))
    out, _ = run(mixed)
    check(mixed, out, run(mixed)[1])
    full, _ = run(call)
    assert same_bits(out[16:17], full[1, 15:])
    assert same_bits(out[17:], full[2, 14:])
    single = packed_queries(call, (1, 1, 1))
    assert same_bits(run(single, NONE)[0][1:2], full[1, 15:])
    # query 9 of 16 sees 6 keys fewer than the last
    shorter = dataclasses.replace(call, q=call.q[:, 9:10].copy(), kv_lengths=int32([n - 6 for n in neighbours]))
    assert same_bits(run(shorter)[0], full[:, 9:10].copy())


def test_repeated_launches_and_the_order_of_threads_change_nothing() -> None:
    call = cache_call("bfloat16", 128, 4)
    out, lse = run(call)
    for options in ({"launches": 3}, {"reverse": True}):
        again = run(call, **options)
        assert same_bits(out, again[0])
        assert same_bits(lse, again[1])


def test_packed_keys_and_a_cache_with_heads_first() -> None:
    """Self-attention of packed sequences, and a cache (B, H, L, D) with room between its rows."""
    lengths = (5, 1, 16)
    starts = int32([0, *itertools.accumulate(lengths)])
    q, k, v = (rows(seed, (sum(lengths), heads, 64), np.float16) for seed, heads in ((0, 6), (1, 2), (2, 2)))
    call = Call(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts)
    out, _ = run(call)
    for first, last in itertools.pairwise(starts.tolist()):
        part = (q[None, first:last], k[None, first:last], v[None, first:last])
        assert_accurate(out[None, first:last], reference(*part, causal=True)[0], plain(*part, causal=True))

    dense = cache_call("float16", 64, 3, kv_heads=2)
    wide = emulation.poisoned((2, len(LENGTHS), 2, CAPACITY, 80), np.float16)
    wide[0, ..., :64], wide[1, ..., :64] = dense.k.transpose(0, 2, 1, 3), dense.v.transpose(0, 2, 1, 3)
    moved = dataclasses.replace(
        dense, k=wide[0, ..., :64].transpose(0, 2, 1, 3), v=wide[1, ..., :64].transpose(0, 2, 1, 3)
    )
    assert same_bits(run(moved)[0], run(dense)[0])


def test_offsets_beyond_32_bits() -> None:
    """A cache whose second sequence begins 2**32 bytes after the first, of which only the used pages exist."""
    dense = cache_call("bfloat16", 128, 4, lengths=(3, 65))
    stride = 2**32
    try:
        memory = mmap.mmap(-1, stride + dense.k.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except OSError as error:
        pytest.skip(f"no address space of 4 GB: {error}")
    base = np.frombuffer(memory, dense.k.dtype, CAPACITY * 128)
    k = np.lib.stride_tricks.as_strided(base, dense.k.shape, (stride, 256, 256, 2))
    k[...] = dense.k
    assert same_bits(run(dataclasses.replace(dense, k=k))[0], run(dense)[0])


def test_infinite_scores_and_a_scale() -> None:
    """Scores of any size; a key of infinity gives NaN to the queries that see it and to no other sequence."""
    call = dataclasses.replace(cache_call("bfloat16", 128, 4, lengths=(65, 129, 257)), scale=3.0)
    out, lse = run(call)
    check(call, out, lse)
    call.k[1, 3] = np.inf
    broken, _ = run(call)
    assert np.isnan(broken[1].astype(np.float32)).any()
    assert same_bits(broken[::2].copy(), out[::2].copy())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_faults_are_caught(dtype: str) -> None:
    """The emulated machine would notice a missing barrier or wait, and the planner's memory is exactly what is used."""
    long = cache_call(dtype, 128, 4, lengths=(2100,), capacity=2100)
    run(long, NONE)
    with pytest.raises(emulation.EmulationError, match="outside the"):
        run(long, NONE, shared_bytes=plan_for(long, NONE, 800).shared_memory_bytes - 16)
    call = cache_call(dtype, 128, 4, lengths=(257,))
    for fault in ({"skip_barrier": 0}, {"skip_barrier": 1}, {"skip_wait": 0}, {"skip_wait": 1}):
        with pytest.raises(emulation.EmulationError, match=r"race|in flight"):
            run(call, NONE, **fault)
    with pytest.raises(emulation.EmulationError, match="race"):
        run(call, MANY, skip_barrier={"bfloat16": 3, "float32": 4}[dtype])  # behind the counter


@pytest.mark.parametrize(("dtype", "queries"), [("bfloat16", 1), ("bfloat16", 16), ("float32", 1)])
def test_faults_of_two_stages_are_caught(dtype: str, queries: int) -> None:
    """Each of the first waits, for the keys and the values of both stages."""
    call = cache_call(dtype, 128, 4, queries, lengths=(257,))
    for wait in range(6):
        with pytest.raises(emulation.EmulationError, match=r"race|in flight"):
            run(call, NONE, stages=2, skip_wait=wait)
    shared_bytes = with_stages(plan_for(call, NONE, 800), 2).shared_memory_bytes
    long = cache_call(dtype, 128, 4, queries, lengths=(2100,), capacity=2100)
    with pytest.raises(emulation.EmulationError, match="outside the"):
        run(long, NONE, stages=2, shared_bytes=shared_bytes - 16)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("queries", [1, 16])
@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("copy_async_wait<2 * STAGES - 1>()", "copy_async_wait<2 * STAGES>()"),  # keys
        ("(ROW_TILES == 1 ? 1 : 2)>()", "(ROW_TILES == 1 ? 0 : 1)>()"),  # values
        ("first_stage + STAGE_BYTES : first_stage", "first_stage : first_stage + STAGE_BYTES"),
    ],
)
def test_a_wait_too_short_or_the_wrong_stage_is_caught(
    tmp_path: Path, stages: int, queries: int, text: str, instead: str
) -> None:
    source = (emulation.KERNELS / "attention_decode.cu").read_text(encoding="utf-8")
    assert source.count(text) == 1
    mutant = tmp_path / "mutant.cu"
    mutant.write_text(source.replace(text, instead), encoding="utf-8")
    call = cache_call("bfloat16", 128, 4, queries, lengths=(257,))
    with pytest.raises(emulation.EmulationError, match=r"race|in flight|outside the"):
        run(call, NONE, stages=stages, source=mutant)
