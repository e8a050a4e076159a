"""Which attention runs: the flash kernels where they work, matmul-softmax everywhere else, and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from .. import settings
from ..device import resolve_device
from ..errors import AttentionUnavailable, DeviceError, ParameterError
from . import flash, standard
from .arguments import capturing, check
from .probe import PathError, Prober, ShapeClass, Verdict
from .problem import DTYPES, Array, Problem
from .standard import standard_attention

_NO_CPU = "the CPU has no flash kernels; matmul-softmax is used"

prober = Prober(flash.FlashBackend())


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
    """softmax(scale * q k^T) v by the best implementation for these arrays, or the one SOPRANO_ATTENTION names.

    Three forms, with B or n sequences, S queries, L keys, Hq query heads and Hkv key-value heads:

    1. dense: q (B, S, Hq, D), k and v (B, L, Hkv, D), optionally kv_lengths (B,): keys in use;
    2. packed: q (N, Hq, D), k and v (N, Hkv, D), cu_seqlens (n + 1,): self-attention in each sequence;
    3. packed queries on a cache: q (N, Hq, D), k and v (n, L, Hkv, D), cu_seqlens, optionally kv_lengths (n,).

    causal aligns bottom right: query i of S sees the keys j <= L - S + i of the L in use; a query that sees none
    gives zeros. Query head h reads KV head h // (Hq // Hkv). scale defaults to 1 / sqrt(D). The result has q's
    shape and dtype and is contiguous. Any strides are taken; on a GPU, rows of D that are not contiguous or not
    aligned to 16 bytes are copied first. Lengths may be lists, NumPy arrays or arrays on q's device (which are
    read back to be checked, except while a CUDA graph is captured).

    Raises `ParameterError`, a ValueError, naming the argument and its value before anything is computed, and
    `AttentionUnavailable` when SOPRANO_ATTENTION is "flash" and the flash kernels cannot serve the call.
    """
    problem = check(q, k, v, causal=causal, scale=scale, kv_lengths=kv_lengths, cu_seqlens=cu_seqlens)
    mode = settings.attention()
    if mode == "flash":
        return _flash(problem)
    return standard.run(problem) if mode == "standard" else _best(problem)


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
    return _flash(check(q, k, v, causal=causal, scale=scale, kv_lengths=kv_lengths, cu_seqlens=cu_seqlens))


def best_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = True,
    scale: float | None = None,
    kv_lengths: Array | None = None,
    cu_seqlens: Array | None = None,
) -> Array:
    """`attention` by the flash kernels where they work and by matmul-softmax elsewhere, whatever the environment."""
    return _best(check(q, k, v, causal=causal, scale=scale, kv_lengths=kv_lengths, cu_seqlens=cu_seqlens))


def select_attention(
    mode: str = "auto",
    *,
    device: str = "cpu",
    dtype: str = "float32",
    head_dim: int = 128,
    num_heads: int = 4,
    num_kv_heads: int = 1,
) -> AttentionChoice:
    """Choose the attention of a model, trying the flash kernels on its device at the first call.

    mode: "flash" (or `AttentionUnavailable`), "standard", or "auto": what the environment variable
    SOPRANO_ATTENTION says, else flash where it works. device: "cpu", "cuda" or "cuda:n". A model of another
    head_dim, dtype or ratio of heads is another choice.
    """
    mode = settings.attention(mode)
    shape = _shape(device, dtype, head_dim, num_heads, num_kv_heads)
    if mode == "standard":
        return AttentionChoice("standard", "standard attention was asked for", standard_attention)
    if shape.device == "cpu":
        if mode == "flash":
            raise AttentionUnavailable(f"attention = 'flash' cannot be used: {_NO_CPU}")
        return AttentionChoice("standard", _NO_CPU, standard_attention)
    verdict = prober.verdict(shape)
    if verdict.usable:
        return AttentionChoice("flash", verdict.reason, flash_attention if mode == "flash" else best_attention)
    if mode == "flash":
        raise AttentionUnavailable(_unavailable(shape, verdict.reason))
    prober.warn(shape)
    return AttentionChoice("standard", verdict.reason, standard_attention)


def _shape(device: str, dtype: str, head_dim: int, num_heads: int, num_kv_heads: int) -> ShapeClass:
    """The causal class of a model's calls."""
    if not isinstance(device, str) or not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise ParameterError(f"device = {device!r} must be cpu, cuda or cuda:N")
    if dtype not in DTYPES:
        raise ParameterError(f"dtype = {dtype!r} must be one of {', '.join(DTYPES)}")
    sizes = {"head_dim": head_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ParameterError(f"{name} = {value!r} must be a whole number above 0")
    if num_heads % num_kv_heads:
        raise ParameterError(f"num_kv_heads = {num_kv_heads} must divide num_heads = {num_heads}")
    if device == "cuda":
        with suppress(DeviceError):  # the prober finds out why, and says so
            device = resolve_device(device)[0]
    return ShapeClass(device, dtype, head_dim, num_heads // num_kv_heads, True)


def _best(problem: Problem) -> Array:
    """Flash where it works. A failure after the probe drops the class, is logged once, and standard answers."""
    if problem.device == "cpu":
        return standard.run(problem)
    shape = ShapeClass.of(problem)
    verdict = _verdict(shape)
    while verdict.usable:
        try:
            # out of memory surfaces: flash needs its output and little more, standard would need more
            return flash.run(problem, verdict.paths)
        except PathError as error:
            verdict = prober.fail(shape, error)
    prober.warn(shape)
    return standard.run(problem)


def _flash(problem: Problem) -> Array:
    """Flash or an error that says why not."""
    if problem.device == "cpu":
        raise AttentionUnavailable(f"flash attention cannot be used: {_NO_CPU}")
    shape = ShapeClass.of(problem)
    verdict = _verdict(shape)
    while verdict.usable:
        try:
            return flash.run(problem, verdict.paths)
        except PathError as error:
            verdict = prober.fail(shape, error)
    raise AttentionUnavailable(_unavailable(shape, verdict.reason))


def _verdict(shape: ShapeClass) -> Verdict:
    """The class's verdict; trying the kernels waits for the GPU, which a graph being captured forbids."""
    verdict = prober.known(shape)
    if verdict is None and capturing():
        raise DeviceError(f"attention was not yet tried for {shape}: call it once before capturing a CUDA graph")
    return verdict or prober.verdict(shape)


def _unavailable(shape: ShapeClass, reason: str) -> str:
    return f"flash attention cannot be used for {shape}: {reason}; or choose attention auto or standard"
