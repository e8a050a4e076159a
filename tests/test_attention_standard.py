"""Matmul-softmax attention on NumPy against a loop over single dot products in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from soprano_cupy.attention import attention, standard, standard_attention
from soprano_cupy.attention.arguments import check

HEADS = [(4, 1), (4, 2), (3, 3)]
LENGTHS = [(1, 1), (1, 9), (3, 3), (5, 12), (7, 5)]


def by_definition(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool, scale: float | None = None) -> np.ndarray:
    """One sequence, (S, Hq, D) on (L, Hkv, D), one query and head at a time, in float64."""
    q, k, v = (array.astype(np.float64) for array in (q, k, v))
    out = np.zeros(q.shape)
    group = q.shape[1] // k.shape[1]
    for i, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        seen = max(k.shape[0] - q.shape[0] + i + 1, 0) if causal else k.shape[0]
        if seen == 0:
            continue
        scores = k[:seen, h // group] @ q[i, h] * (scale or 1 / math.sqrt(q.shape[2]))
        weights = np.exp(scores - scores.max())
        out[i, h] = weights @ v[:seen, h // group] / weights.sum()
    return out


def draw(*shapes: tuple[int, ...], dtype: Any = np.float64, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("chunk", [standard.CHUNK_SCORES_CPU, 40])
def test_the_three_forms_against_the_definition(
    lengths: tuple[int, int], heads: tuple[int, int], causal: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unused keys hold NaN; `_whole_batch`, the GPU's batched form, runs on NumPy here."""
    monkeypatch.setattr(standard, "CHUNK_SCORES_CPU", chunk)
    monkeypatch.setattr(standard, "CHUNK_SCORES_GPU", chunk)
    (queries, keys), (hq, hkv) = lengths, heads
    q, k, v = draw((2, queries, hq, 16), (2, keys, hkv, 16), (2, keys, hkv, 16))
    used = np.array([keys, max(1, keys - 2)])
    k[1, used[1] :] = v[1, used[1] :] = np.nan
    expected = np.stack([by_definition(q[i], k[i, : used[i]], v[i, : used[i]], causal) for i in range(2)])

    dense = standard_attention(q, k, v, causal=causal, kv_lengths=used)
    np.testing.assert_allclose(dense, expected, rtol=0, atol=1e-13)
    batched = standard._whole_batch(check(q, k, v, causal=causal, kv_lengths=used), np)
    np.testing.assert_allclose(batched, expected, rtol=0, atol=1e-13)

    starts = np.array([0, queries, 2 * queries])
    rows = q.reshape(-1, hq, 16)
    on_cache = standard_attention(rows, k, v, causal=causal, kv_lengths=used, cu_seqlens=starts)
    np.testing.assert_array_equal(on_cache.reshape(q.shape), dense)

    if queries == keys:
        k, v = draw((2 * keys, hkv, 16), (2 * keys, hkv, 16), seed=1)
        packed = standard_attention(rows, k, v, causal=causal, cu_seqlens=starts)
        for i in range(2):
            part = slice(starts[i], starts[i + 1])
            reference = by_definition(rows[part], k[part], v[part], causal)
            np.testing.assert_allclose(packed[part], reference, rtol=0, atol=1e-13)


def test_ragged_queries_on_a_ragged_cache() -> None:
    starts, used = [0, 1, 6, 8], [4, 9, 2]
    q, k, v = draw((8, 4, 32), (3, 10, 2, 32), (3, 10, 2, 32))
    out = standard_attention(q, k, v, cu_seqlens=starts, kv_lengths=used)
    for i, length in enumerate(used):
        part = slice(starts[i], starts[i + 1])
        reference = by_definition(q[part], k[i, :length], v[i, :length], True)
        np.testing.assert_allclose(out[part], reference, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_narrow_types_round_the_inputs_and_the_result_only(dtype: Any) -> None:
    """16-bit inputs are widened to float32: the error is one rounding of the result, and float32's own."""
    q, k, v = draw((1, 33, 4, 64), (1, 70, 1, 64), (1, 70, 1, 64), dtype=dtype)
    out = standard_attention(q, k, v)
    expected = by_definition(q[0], k[0], v[0], True)
    rounding = 0.0 if dtype is np.float32 else float(ml_dtypes.finfo(dtype).eps) / 2
    error = np.abs(out[0].astype(np.float64) - expected)
    assert out.dtype == np.dtype(dtype)
    assert (error <= rounding * np.abs(expected) + 2e-6).all()


def test_rows_that_see_nothing_are_zero() -> None:
    q, k, v = draw((1, 5, 4, 16), (1, 2, 1, 16), (1, 2, 1, 16))
    out = standard_attention(q, k, v)
    assert (out[0, :3] == 0).all()
    assert (np.abs(out[0, 3:]) > 0).all()


def test_scale_and_large_scores() -> None:
    """Scores of +-3,000 overflow exp unless the maximum is taken off first."""
    q, k, v = draw((1, 4, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8))
    out = standard_attention(q * 1000, k, v, scale=3.0, causal=False)
    np.testing.assert_allclose(out[0], by_definition(q[0] * 1000, k[0], v[0], False, 3.0), rtol=0, atol=1e-12)


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    q, k, v = draw((5, 3, 4, 64), (5, 40, 1, 64), (5, 40, 1, 64), dtype=np.float32)
    used = np.array([40, 3, 17, 29, 40])
    together = standard_attention(q, k, v, kv_lengths=used)
    for i in range(5):
        alone = standard_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], kv_lengths=used[i : i + 1])
        np.testing.assert_array_equal(alone[0], together[i])


def test_strided_views_of_a_cache_give_the_same_bits() -> None:
    q, cache = draw((2, 3, 4, 32), (2, 4, 2, 50, 2, 32), dtype=np.float32)
    k, v = cache[0, :2].transpose(0, 2, 1, 3, 4)[:, :20, 0], cache[1, :2].transpose(0, 2, 1, 3, 4)[:, :20, 1]
    copied = standard_attention(q, np.ascontiguousarray(k), np.ascontiguousarray(v))
    np.testing.assert_array_equal(standard_attention(q, k, v), copied)


def test_attention_on_numpy_is_standard_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOPRANO_ATTENTION", raising=False)
    q, k, v = draw((1, 6, 4, 32), (1, 6, 1, 32), (1, 6, 1, 32), dtype=np.float32)
    np.testing.assert_array_equal(attention(q, k, v, causal=False), standard_attention(q, k, v, causal=False))
