"""Matmul-softmax attention in array code: the portable path on NumPy and CuPy, and the oracle of the tests.

    S = scale * Q K^T;   P = exp(S - max S);   O = P V / sum P

The query heads of a group are rows of one matrix, so K and V are never repeated. Queries are taken in chunks
that bound the score matrix; a causal chunk stops at the last key that its last query sees.
Scores, softmax and sums are float32 (float64 for float64 inputs). 16-bit products are accumulated in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .arguments import check
from .problem import Array, Problem
from .products import scaled_product, widened

CHUNK_SCORES_CPU = 1 << 18  # float32 scores that stay in a core's L2 cache: 1 MB
CHUNK_SCORES_GPU = 1 << 27  # 512 MB: one chunk up to 5,792 tokens of 4 heads


def standard_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = True,
    scale: float | None = None,
    kv_lengths: Array | None = None,
    cu_seqlens: Array | None = None,
) -> Array:
    """Attention by matrix products and a softmax; arguments and result as for `attention`.

    Works for float16, bfloat16, float32 and float64, any head_dim, on NumPy and CuPy arrays. On NumPy a
    sequence's result does not depend on its neighbours in the batch.
    """
    return run(check(q, k, v, causal=causal, scale=scale, kv_lengths=kv_lengths, cu_seqlens=cu_seqlens))


def run(problem: Problem) -> Array:
    """`standard_attention` for arguments that are checked."""
    if problem.device == "cpu":
        return _each_sequence(problem, np)
    import cupy

    with cupy.cuda.Device(problem.q.device.id):
        if problem.form != "packed" and problem.total_q == problem.batch * problem.seqlen_q:
            return _whole_batch(problem, cupy)
        return _each_sequence(problem, cupy)


def _each_sequence(problem: Problem, xp: Any) -> Array:
    """One sequence after the other, reading only the keys in use."""
    q, k, v = problem.q, problem.k, problem.v
    out = xp.empty(q.shape, q.dtype)
    starts = _starts(problem)
    for i in range(problem.batch):
        if problem.form == "dense":
            rows: Any = i
        else:
            rows = slice(int(starts[i]), int(starts[i + 1]))
        if problem.form == "packed":
            keys: Any = rows
        else:
            length = problem.seqlen_k if problem.key_lengths is None else int(problem.key_lengths[i])
            keys = (i, slice(0, length))
        _one_sequence(q[rows], k[keys], v[keys], out[rows], problem, xp)
    return out


def _starts(problem: Problem) -> np.ndarray:
    if problem.query_starts is None:
        return np.arange(problem.batch + 1) * problem.seqlen_q
    return problem.query_starts


def _one_sequence(q: Array, k: Array, v: Array, out: Array, problem: Problem, xp: Any) -> None:
    """q and out (S, Hq, D), k and v (L, Hkv, D): fill `out`."""
    queries, keys, dim = q.shape[0], k.shape[0], q.shape[2]
    if xp is np:  # NumPy multiplies no 16-bit numbers: widen the keys once, not in every chunk
        k, v = widened(k), widened(v)
    k_t, v_t = k.transpose(1, 2, 0)[None], v.transpose(1, 0, 2)[None]  # (1, Hkv, D, L), (1, Hkv, L, D)
    budget = CHUNK_SCORES_CPU if xp is np else CHUNK_SCORES_GPU
    step = max(1, budget // (keys * problem.num_heads))
    for first in range(0, queries, step):
        last = min(first + step, queries)
        seen = max(keys - queries + last, 0) if problem.causal else keys  # keys that the last query sees
        if seen == 0:
            out[first:last] = 0
            continue
        scores = scaled_product(_rows(q[None, first:last], problem.group), k_t[..., :seen], problem.scale)
        if problem.causal and last - first > 1:
            _mask_future(scores, first, keys - queries, problem.group, xp)
        mixed = _mix(scores, v_t[:, :, :seen], xp)
        mixed = mixed.reshape(-1, last - first, problem.group, dim).transpose(1, 0, 2, 3)
        out[first:last] = mixed.reshape(last - first, -1, dim)


def _whole_batch(problem: Problem, xp: Any) -> Array:
    """All sequences at once, every one of S queries; keys beyond a sequence's length are masked out."""
    batch, queries, keys = problem.batch, problem.seqlen_q, problem.seqlen_k
    heads, kv_heads, group, dim = problem.num_heads, problem.num_kv_heads, problem.group, problem.head_dim
    if problem.key_lengths is not None:
        keys = int(problem.key_lengths.max())
    q = problem.q.reshape(batch, queries, heads, dim)
    k, v = problem.k[:, :keys], problem.v[:, :keys]
    position = xp.arange(keys)
    if problem.kv_lengths is None:
        lengths = xp.full((batch, 1), keys)
    else:
        lengths = xp.asarray(problem.kv_lengths).astype(np.int64)[:, None]
        v = _silenced(v, position >= lengths, xp)
    k_t, v_t = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)  # (B, Hkv, D, L), (B, Hkv, L, D)
    out = xp.empty(q.shape, q.dtype)
    step = max(1, CHUNK_SCORES_GPU // (batch * heads * keys))
    for first in range(0, queries, step):
        last = min(first + step, queries)
        scores = scaled_product(_rows(q[:, first:last], group), k_t, problem.scale)
        if problem.kv_lengths is not None or (problem.causal and queries > 1):
            visible = lengths - (queries - 1 - xp.arange(first, last)) if problem.causal else lengths
            hidden = position >= visible[:, :, None]  # (B, S or 1, L)
            block = scores.reshape(batch, kv_heads, last - first, group, keys)
            block[...] = xp.where(hidden[:, None, :, None], block.dtype.type(-np.inf), block)
        mixed = _mix(scores, v_t, xp).reshape(batch, kv_heads, last - first, group, dim).transpose(0, 2, 1, 3, 4)
        out[:, first:last] = mixed.reshape(batch, last - first, heads, dim)
    return out.reshape(problem.q.shape)


def _rows(q: Array, group: int) -> Array:
    """(B, S, Hq, D) -> (B, Hkv, S * group, D): row r is of query r // group. A view where Hkv or S is 1."""
    batch, queries, heads, dim = q.shape
    q = q.reshape(batch, queries, heads // group, group, dim).transpose(0, 2, 1, 3, 4)
    return q.reshape(batch, heads // group, queries * group, dim)


def _silenced(v: Array, unused: Array, xp: Any) -> Array:
    """v (B, L, Hkv, D) with zeros where `unused` (B, L): a weight of 0 does not silence NaN or infinity.

    16-bit numbers are handled as their bits, which every array library can select.
    """
    bits = v.view(np.uint16) if v.dtype.itemsize == 2 else v
    return xp.where(unused[:, :, None, None], bits.dtype.type(0), bits).view(v.dtype)


def _mask_future(scores: Array, first: int, offset: int, group: int, xp: Any) -> None:
    """Query `first + r // group` sees the keys up to itself plus `offset`; only the last columns need a look."""
    rows, seen = scores.shape[-2:]
    queries = rows // group
    visible = xp.arange(first, first + queries) + (offset + 1)  # keys that each query sees
    start = max(first + offset + 1, 0)  # every query of the chunk sees the keys before this one
    hidden = xp.arange(start, seen) >= visible[:, None]
    block = scores.reshape(-1, queries, group, seen)[..., start:]
    block[...] = xp.where(hidden[:, None, :], scores.dtype.type(-np.inf), block)


def _mix(scores: Array, v: Array, xp: Any) -> Array:
    """softmax(S) V for S (B, Hkv, R, L), which is overwritten, and v (B, Hkv, L, D), in float32 or wider.

    Rows that see nothing give 0. On a GPU the weights take v's dtype, for tensor cores.
    """
    top = scores.max(axis=-1, keepdims=True)
    scores -= xp.where(top == -np.inf, top.dtype.type(0), top)
    weights = xp.exp(scores, out=scores)
    total = weights.sum(axis=-1, keepdims=True)
    mixed = scaled_product(weights if xp is np else weights.astype(v.dtype, copy=False), v)
    mixed /= xp.where(total == 0, total.dtype.type(1), total)
    return mixed
