"""The arguments of `attention`, checked before anything is computed or launched.

Every mistake is a `ParameterError`, a ValueError, that names the argument and its value.
"""

from __future__ import annotations

import math

import numpy as np

from ..errors import ParameterError
from .problem import DTYPES, Array, Form, Problem

INT_MAX = 2**31 - 1  # the kernels count tokens in 32-bit integers


def check(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = True,
    scale: float | None = None,
    kv_lengths: Array | None = None,
    cu_seqlens: Array | None = None,
) -> Problem:
    """Check the arguments of `attention` and return the `Problem`.

    Lengths on a GPU are copied to the host to be checked, which waits for the work before them; pass NumPy
    arrays to avoid that. While a CUDA graph is being captured nothing can be read back: device lengths are
    then trusted, and host lengths refused.
    Raises `ParameterError`, a ValueError, that names the argument and its value.
    """
    form, device, dtype = _arrays(q, k, v)
    heads, head_dim = int(q.shape[-2]), int(q.shape[-1])
    kv_heads = int(k.shape[-2])
    _shapes(form, q, k, v)
    if form == "dense":
        if cu_seqlens is not None:
            raise ParameterError(
                f"cu_seqlens is for packed queries (N, heads, head_dim), and q has shape {q.shape}: leave it out"
            )
        starts, batch, total_q, seqlen_q = None, int(q.shape[0]), int(q.shape[0] * q.shape[1]), int(q.shape[1])
    else:
        if cu_seqlens is None:
            raise ParameterError(f"cu_seqlens is missing: q of shape {q.shape} is packed and needs it")
        total_q = int(q.shape[0])
        count = None if form == "packed" else int(k.shape[0])
        batch, starts = _query_starts(cu_seqlens, total_q, count, device)
        seqlen_q = total_q if starts is None else int(np.diff(starts).max())
    if form == "packed":
        if kv_lengths is not None:
            raise ParameterError("kv_lengths is for keys with a batch axis; packed keys end where cu_seqlens says")
        seqlen_k, lengths = seqlen_q, None
    else:
        seqlen_k = int(k.shape[1])
        lengths = None if kv_lengths is None else _key_lengths(kv_lengths, batch, seqlen_k, device)
    return Problem(
        form=form,
        q=q,
        k=k,
        v=v,
        cu_seqlens=cu_seqlens,
        kv_lengths=kv_lengths,
        query_starts=starts,
        key_lengths=lengths,
        device=device,
        dtype=dtype,
        causal=_flag("causal", causal),
        scale=_scale(scale, head_dim),
        batch=batch,
        total_q=total_q,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
    )


def device_of(array: Array) -> str | None:
    """ "cpu" for a NumPy array, "cuda:n" for a CuPy array, None for anything else."""
    if isinstance(array, np.ndarray):
        return "cpu"
    if type(array).__module__.split(".")[0] == "cupy" and hasattr(array, "data"):
        return f"cuda:{array.device.id}"
    return None


def _arrays(q: Array, k: Array, v: Array) -> tuple[Form, str, str]:
    """Kinds, devices, dtypes and ranks of the three arrays."""
    device = dtype = ""
    for name, array in (("q", q), ("k", k), ("v", v)):
        place = device_of(array)
        if place is None:
            raise ParameterError(f"{name} must be a NumPy or CuPy array, not {type(array).__name__}")
        if array.dtype.name not in DTYPES:
            raise ParameterError(f"{name} has dtype {array.dtype.name}; attention takes {', '.join(DTYPES)}")
        if name == "q":
            device, dtype = place, array.dtype.name
        elif place != device:
            raise ParameterError(f"{name} is on {place} and q on {device}; move them to one device")
        elif array.dtype.name != dtype:
            raise ParameterError(f"{name} has dtype {array.dtype.name} and q {dtype}; cast them to one")
    ranks = (q.ndim, k.ndim, v.ndim)
    forms: dict[tuple[int, int, int], Form] = {(4, 4, 4): "dense", (3, 3, 3): "packed", (3, 4, 4): "cache"}
    if ranks not in forms:
        raise ParameterError(
            f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; expected (B, S, heads, D) with (B, L, heads, D), "
            "or packed queries (N, heads, D) with (N, heads, D) or (n, L, heads, D)"
        )
    return forms[ranks], device, dtype


def _shapes(form: Form, q: Array, k: Array, v: Array) -> None:
    """Bind the axes of the three arrays to one another."""
    for name, array in (("q", q), ("k", k), ("v", v)):
        if 0 in array.shape:
            raise ParameterError(f"{name} has shape {array.shape}: no axis may have length 0")
        if max(array.shape) > INT_MAX or math.prod(array.shape[:-2]) > INT_MAX:
            raise ParameterError(f"{name} has shape {array.shape}: at most 2**31 - 1 tokens are supported")
    if k.shape != v.shape:
        raise ParameterError(f"v has shape {v.shape} and k {k.shape}; they must be equal")
    if k.shape[-1] != q.shape[-1]:
        raise ParameterError(f"k has head_dim {k.shape[-1]} and q {q.shape[-1]}; they must be equal")
    if q.shape[-2] % k.shape[-2]:
        raise ParameterError(f"k has {k.shape[-2]} heads, which do not divide q's {q.shape[-2]}")
    if form == "dense" and q.shape[0] != k.shape[0]:
        raise ParameterError(f"k has batch size {k.shape[0]} and q {q.shape[0]}; they must be equal")
    if form == "packed" and q.shape[0] != k.shape[0]:
        raise ParameterError(f"k has {k.shape[0]} packed tokens and q {q.shape[0]}; they must be equal")


def _query_starts(cu_seqlens: Array, total: int, count: int | None, device: str) -> tuple[int, np.ndarray | None]:
    """The number of sequences and, unless it cannot be read now, where each begins."""
    array = _integers("cu_seqlens", cu_seqlens, device)
    if array.shape[0] < 2:
        raise ParameterError(f"cu_seqlens has {array.shape[0]} entries; n sequences need n + 1")
    batch = int(array.shape[0]) - 1
    if count is not None and batch != count:
        raise ParameterError(f"cu_seqlens has {batch + 1} entries; the {count} sequences of k need {count + 1}")
    values = _host(array)
    if values is None:
        return batch, None
    if values[0] != 0:
        raise ParameterError(f"cu_seqlens[0] = {values[0]} must be 0")
    if values[-1] != total:
        raise ParameterError(f"cu_seqlens[{batch}] = {values[-1]} must be the number of rows of q, {total}")
    wrong = np.flatnonzero(values[1:] <= values[:-1])
    if wrong.size:
        at = int(wrong[0]) + 1
        raise ParameterError(
            f"cu_seqlens[{at}] = {values[at]} must be above cu_seqlens[{at - 1}] = {values[at - 1]}: "
            "every sequence has at least one query"
        )
    return batch, values


def _key_lengths(kv_lengths: Array, batch: int, capacity: int, device: str) -> np.ndarray | None:
    """The keys in use of each sequence, unless they cannot be read now."""
    array = _integers("kv_lengths", kv_lengths, device)
    if array.shape[0] != batch:
        raise ParameterError(f"kv_lengths has {array.shape[0]} entries for {batch} sequences")
    values = _host(array)
    if values is not None:
        wrong = np.flatnonzero((values < 1) | (values > capacity))
        if wrong.size:
            at = int(wrong[0])
            raise ParameterError(f"kv_lengths[{at}] = {values[at]} must be from 1 to {capacity}, the length of k")
    return values


def _integers(name: str, values: Array, device: str) -> Array:
    """A one-dimensional integer array on the host or on the queries' device."""
    if isinstance(values, (list, tuple)):
        try:
            values = np.asarray(values)
        except ValueError as error:
            raise ParameterError(f"{name} = {values!r} must be a flat list of integers") from error
    place = device_of(values)
    if place is None:
        raise ParameterError(f"{name} must be a list, a NumPy or a CuPy array, not {type(values).__name__}")
    if place not in ("cpu", device):
        raise ParameterError(f"{name} is on {place} and q on {device}; move it there, or pass a NumPy array")
    if values.dtype.kind not in "iu" or values.ndim != 1:
        raise ParameterError(f"{name} must hold integers on one axis, not {values.dtype.name} of shape {values.shape}")
    if place == "cpu" and device != "cpu" and capturing():
        raise ParameterError(f"{name} must be on {device} while a CUDA graph is captured")
    return values


def _host(values: Array) -> np.ndarray | None:
    """The values as int64 on the host; None when a graph capture forbids reading them."""
    if not isinstance(values, np.ndarray):
        if capturing():
            return None
        values = values.get()
    return np.asarray(values.astype(np.int64))


def capturing() -> bool:
    """Whether CuPy's current stream records a CUDA graph."""
    import cupy

    return bool(cupy.cuda.get_current_stream().is_capturing())


def _flag(name: str, value: bool) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ParameterError(f"{name} = {value!r} must be True or False")
    return bool(value)


def _scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, (bool, np.bool_)) or not isinstance(scale, (int, float, np.integer, np.floating)):
        raise ParameterError(f"scale = {scale!r} must be a number")
    if not 0 < float(scale) < math.inf:
        raise ParameterError(f"scale = {scale!r} must be positive and finite")
    return float(scale)
