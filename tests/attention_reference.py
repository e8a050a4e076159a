"""What attention must give, in float64, and how exactly: the rule that all kernels are held to.

The rule compares the kernel's error against float64 with that of the plain implementation in the same precision: at
most twice its maximum and 1.5 times its mean. What rounding alone may cost takes the plain implementation's place
where that happens to do better: half a unit in the last place of the largest output for the maximum, the mean error
of the correctly rounded result for the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

MAX_ERROR_RATIO = 2.0
MEAN_ERROR_RATIO = 1.5


@dataclass(frozen=True)
class _Sequence:
    """Views of one sequence: q and out (S, Hq, D), k and v (L, Hkv, D); `columns` are its place in lse."""

    q: Array
    k: Array
    v: Array
    out: Array
    columns: slice


def _sequences(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    kv_lengths: Array | None,
    cu_seqlens_q: Array | None,
    cu_seqlens_k: Array | None,
) -> Iterator[_Sequence]:
    batch = q.shape[0] if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    for b in range(batch):
        if cu_seqlens_q is None:
            rows: Any = b
            columns = slice(b * q.shape[1], (b + 1) * q.shape[1])
        else:
            rows = columns = slice(int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1]))
        keys: Any = b if cu_seqlens_k is None else slice(int(cu_seqlens_k[b]), int(cu_seqlens_k[b + 1]))
        used = slice(None, None if kv_lengths is None else int(kv_lengths[b]))
        yield _Sequence(q[rows], k[keys][used], v[keys][used], out[rows], columns)


def _visible(queries: int, keys: int, causal: bool) -> Array:
    """(queries, keys): whether the query sees the key; causal masks are aligned bottom right."""
    if not causal:
        return np.ones((queries, keys), bool)
    return np.arange(keys) <= np.arange(queries)[:, None] + keys - queries


def reference(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool,
    scale: float | None = None,
    kv_lengths: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
) -> tuple[Array, Array]:
    """(out, lse) in float64: out like q, lse (heads, total queries), natural log of the sum of exponentials.

    q (batch, S, Hq, D), or (N, Hq, D) with `cu_seqlens_q`; k and v (batch, L, Hkv, D), or (M, Hkv, D) with
    `cu_seqlens_k`. A query that sees no key gives 0 and -inf.
    """
    out = np.zeros(q.shape, np.float64)
    group = q.shape[-2] // k.shape[-2]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    lse = np.full((q.shape[-2], math.prod(q.shape[:-2])), -np.inf)
    for sequence in _sequences(q, k, v, out, kv_lengths, cu_seqlens_q, cu_seqlens_k):
        seen = _visible(len(sequence.q), len(sequence.k), causal)
        if not seen.any():
            continue
        for head in range(q.shape[-2]):
            keys = sequence.k[:, head // group].astype(np.float64)
            values = sequence.v[:, head // group].astype(np.float64)
            scores = np.where(seen, sequence.q[:, head].astype(np.float64) @ keys.T * scale, -np.inf)
            top = np.maximum(scores.max(axis=1, keepdims=True), np.finfo(np.float64).min)
            weights = np.exp(scores - top)
            total = weights.sum(axis=1, keepdims=True)
            sequence.out[:, head] = weights @ values / np.where(total > 0, total, 1.0)
            with np.errstate(divide="ignore"):
                lse[head, sequence.columns] = (top + np.log(total))[:, 0]
    return out, lse


def plain(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool,
    scale: float | None = None,
    kv_lengths: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
) -> Array:
    """Matmul-softmax in q's precision: products accumulated in float32, softmax in float32, weights rounded to
    the dtype, the result too. The scores stay float32, which makes this a stricter yardstick than one that rounds them.
    """
    out = np.zeros(q.shape, q.dtype)
    group = q.shape[-2] // k.shape[-2]
    scale = np.float32(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    for sequence in _sequences(q, k, v, out, kv_lengths, cu_seqlens_q, cu_seqlens_k):
        seen = _visible(len(sequence.q), len(sequence.k), causal)
        for head in range(q.shape[-2]):
            keys, values = (array[:, head // group].astype(np.float32) for array in (sequence.k, sequence.v))
            scores = np.where(seen, sequence.q[:, head].astype(np.float32) @ keys.T * scale, np.float32(-np.inf))
            top = np.maximum(scores.max(axis=1, keepdims=True, initial=-np.inf), np.finfo(np.float32).min)
            weights = np.exp(scores - top)
            total = weights.sum(axis=1, keepdims=True)
            weights = (weights / np.where(total > 0, total, np.float32(1))).astype(q.dtype)
            sequence.out[:, head] = (weights.astype(np.float32) @ values).astype(q.dtype)
    return out


def assert_accurate(out: Array, expected: Array, baseline: Array) -> None:
    """Hold `out` to the rule. expected: float64; baseline: `plain`'s result in out's dtype.

    The message of a failure gives the share of the allowance that was used.
    """
    assert out.shape == expected.shape == baseline.shape
    assert np.isfinite(out.astype(np.float64)).all(), "the output holds NaN or infinity"
    error, plain_error, rounding_error = (
        np.abs(array.astype(np.float64) - expected) for array in (out, baseline, expected.astype(out.dtype))
    )
    largest = np.abs(expected).max().astype(out.dtype)
    half_step = float(np.nextafter(largest, out.dtype.type(np.inf))) / 2 - float(largest) / 2
    max_allowed = MAX_ERROR_RATIO * max(float(plain_error.max()), half_step)
    mean_allowed = MEAN_ERROR_RATIO * max(float(plain_error.mean()), float(rounding_error.mean()))
    worst, mean = float(error.max()), float(error.mean())
    for name, value, allowed in (("max", worst, max_allowed), ("mean", mean, mean_allowed)):
        share = value / allowed if allowed else np.inf
        assert value <= allowed, f"{name} error {value:.3g} uses {share:.0%} of the {allowed:.3g} allowed"
