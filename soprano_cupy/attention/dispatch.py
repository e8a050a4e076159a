"""Which attention runs: the flash kernels where they work, matmul-softmax everywhere else, and why."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import AttentionUnavailable, ParameterError
from .arguments import check, device_of
from .problem import DTYPES, Array
from .standard import standard_attention

MODES = ("auto", "flash", "standard")


@dataclass(frozen=True)
class AttentionChoice:
    """What `select_attention` decided; `function` is called like `attention`."""

    name: str  # "flash" or "standard"
    reason: str  # one line for -v and doctor
    function: Callable[..., Array]


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = True,
    scale: float | None = None,
    kv_lengths: Array | None = None,
    cu_seqlens: Array | None = None,
) -> Array:
    """softmax(scale * q k^T) v by the best implementation for these arrays.

    Three forms, with B or n sequences, S queries, L keys, Hq query heads and Hkv key-value heads:

    1. dense: q (B, S, Hq, D), k and v (B, L, Hkv, D), optionally kv_lengths (B,): keys in use;
    2. packed: q (N, Hq, D), k and v (N, Hkv, D), cu_seqlens (n + 1,): self-attention in each sequence;
    3. packed queries on a cache: q (N, Hq, D), k and v (n, L, Hkv, D), cu_seqlens, optionally kv_lengths (n,).

    causal aligns bottom right: query i of S sees the keys j <= L - S + i of the L in use; a query that sees none
    gives zeros. Query head h reads KV head h // (Hq // Hkv). scale defaults to 1 / sqrt(D). The result has q's
    shape and dtype. Raises `ParameterError`, a ValueError, naming the argument before anything is computed.
    """
    dtype = getattr(getattr(q, "dtype", None), "name", "")
    if device_of(q) == "cpu" or dtype not in DTYPES or getattr(q, "ndim", 0) < 3 or getattr(k, "ndim", 0) < 3:
        function: Callable[..., Array] = standard_attention  # which also names what is wrong
    else:
        function = select_attention(
            device=device_of(q) or "cpu",
            dtype=dtype,
            head_dim=q.shape[-1],
            num_heads=q.shape[-2],
            num_kv_heads=k.shape[-2],
        ).function
    return function(q, k, v, causal=causal, scale=scale, kv_lengths=kv_lengths, cu_seqlens=cu_seqlens)


def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = True,
    scale: float | None = None,
    kv_lengths: Array | None = None,
    cu_seqlens: Array | None = None,
) -> Array:
    """`attention` by the CUDA flash kernels alone; `AttentionUnavailable` says why where they cannot run."""
    problem = check(q, k, v, causal=causal, scale=scale, kv_lengths=kv_lengths, cu_seqlens=cu_seqlens)
    if problem.device == "cpu":
        raise AttentionUnavailable(_NO_CPU)
    raise AttentionUnavailable("the flash kernels are not part of this build; use attention auto or standard")


def select_attention(
    mode: str = "auto",
    *,
    device: str = "cpu",
    dtype: str = "float32",
    head_dim: int = 128,
    num_heads: int = 4,
    num_kv_heads: int = 1,
) -> AttentionChoice:
    """Choose the attention of a model.

    mode: "flash" (or `AttentionUnavailable`), "standard", or "auto": what the environment variable
    SOPRANO_ATTENTION says, else flash where it works. device: "cpu", "cuda" or "cuda:n".
    """
    if mode == "auto":
        mode = os.environ.get("SOPRANO_ATTENTION") or "auto"
    if mode not in MODES:
        raise ParameterError(f"attention = {mode!r} must be one of {', '.join(MODES)}")
    if dtype not in DTYPES:
        raise ParameterError(f"dtype = {dtype!r} must be one of {', '.join(DTYPES)}")
    if mode == "standard":
        return AttentionChoice("standard", "standard attention was asked for", standard_attention)
    reason = _NO_CPU if device == "cpu" else "the flash kernels are not part of this build"
    if mode == "flash":
        raise AttentionUnavailable(reason)
    return AttentionChoice("standard", reason, standard_attention)


_NO_CPU = "the CPU has no flash kernels; matmul-softmax is used"
