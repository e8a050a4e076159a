"""One attention call: the `Problem` that its arguments amount to, and the record that the kernels take.

Three forms share one contract. Shapes, with B or n sequences, S queries, L keys, D = head_dim:

1. dense: q (B, S, Hq, D), k and v (B, L, Hkv, D), optionally kv_lengths (B,): keys in use.
2. packed: q (N, Hq, D), k and v (N, Hkv, D), cu_seqlens (n + 1,): self-attention inside each sequence.
3. cache: q (N, Hq, D) packed by cu_seqlens (n + 1,), k and v (n, L, Hkv, D), optionally kv_lengths (n,).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ..device import array_module

Array = Any  # np.ndarray or cupy.ndarray
Form = Literal["dense", "packed", "cache"]

DTYPES = ("float16", "bfloat16", "float32", "float64")
LOG2_E = math.log2(math.e)
VECTOR_BYTES = 16  # the kernels' widest load


@dataclass(frozen=True, eq=False)
class Problem:
    """A checked attention call. `query_starts` and `key_lengths` live on the host, whatever was passed in."""

    form: Form
    q: Array
    k: Array
    v: Array
    cu_seqlens: Array | None  # as passed in
    kv_lengths: Array | None  # as passed in
    query_starts: np.ndarray | None  # (batch + 1,) int64, of the packed forms
    key_lengths: np.ndarray | None  # (batch,) int64 keys in use, or None: all of them
    device: str  # "cpu" or "cuda:0"
    dtype: str
    causal: bool
    scale: float
    batch: int
    total_q: int
    seqlen_q: int  # longest query sequence
    seqlen_k: int  # longest key sequence: the capacity of a cache
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def scale_log2(self) -> float:
        """The softmax scale for base-2 exponentials."""
        return self.scale * LOG2_E


# struct AttentionParams of kernels/attention_params.cuh: the same fields in the same order and places.
PARAMS_DTYPE = np.dtype(
    [(name, np.uint64) for name in ("q", "k", "v", "out", "lse", "cu_seqlens_q", "cu_seqlens_k", "kv_lengths")]
    + [(f"{name}_{axis}_stride", np.int64) for name in ("q", "k", "v", "out") for axis in ("batch", "token", "head")]
    + [("workspace", np.uint64)]
    + [(name, np.int32) for name in ("batch", "total_q", "seqlen_q", "seqlen_k", "num_heads", "num_kv_heads", "splits")]
    + [("scale_log2", np.float32)],
    align=True,
)


def kernel_ready(problem: Problem) -> Problem:
    """The problem as the kernels read it: arrays they can address, lengths as int32 on their device.

    The kernels read rows of head_dim in 16-byte pieces. An array whose last axis is not contiguous, or whose
    address or strides are not positive multiples of 16 bytes, is copied first; a slice of a cache along
    sequences, tokens or heads is not. A NumPy problem stays on the host, for kernels built as host code.
    """
    xp: Any = array_module(problem.device)

    def index(values: Array | None) -> Array | None:
        return None if values is None else xp.ascontiguousarray(xp.asarray(values), dtype=np.int32)

    def rows(array: Array) -> Array:
        return array if _in_vectors(array) else array.copy(order="C")

    return replace(
        problem,
        q=rows(problem.q),
        k=rows(problem.k),
        v=rows(problem.v),
        cu_seqlens=index(problem.cu_seqlens),
        kv_lengths=index(problem.kv_lengths),
    )


def pack_params(
    problem: Problem, out: Array, *, lse: Array | None = None, workspace: Array | None = None, splits: int = 1
) -> np.ndarray:
    """AttentionParams of a `kernel_ready` problem as one record of `PARAMS_DTYPE`, passed to a kernel by value.

    out: like q, rows contiguous. lse: (num_heads, total_q) float32. The caller keeps all arrays alive.
    """
    values: dict[str, Any] = {
        "lse": _address(lse),
        "cu_seqlens_q": _address(problem.cu_seqlens),
        "cu_seqlens_k": _address(problem.cu_seqlens) if problem.form == "packed" else 0,
        "kv_lengths": _address(problem.kv_lengths),
        "workspace": _address(workspace),
        "splits": splits,
    }
    for name, array in (("q", problem.q), ("k", problem.k), ("v", problem.v), ("out", out)):
        values[name] = _address(array)
        for axis, stride in zip(("batch", "token", "head"), _strides(array), strict=True):
            values[f"{name}_{axis}_stride"] = stride
    for name in ("batch", "total_q", "seqlen_q", "seqlen_k", "num_heads", "num_kv_heads", "scale_log2"):
        values[name] = getattr(problem, name)
    return np.array([tuple(values[name] for name in PARAMS_DTYPE.names or ())], PARAMS_DTYPE)


def _address(array: Array | None) -> int:
    if array is None:
        return 0
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)


def _strides(array: Array) -> tuple[int, int, int]:
    """Batch, token and head strides in elements. An axis of length 1 is never stepped along: any number does."""
    batch, token, head = (0, *array.strides)[-4:-1] if array.ndim == 3 else array.strides[:3]
    return batch // array.itemsize, token // array.itemsize, head // array.itemsize


def _in_vectors(array: Array) -> bool:
    """Whether every row of head_dim is contiguous and begins at a multiple of 16 bytes."""
    strides = [stride for stride, length in zip(array.strides[:-1], array.shape[:-1], strict=True) if length > 1]
    return (
        array.strides[-1] == array.itemsize
        and _address(array) % VECTOR_BYTES == 0
        and all(stride > 0 and stride % VECTOR_BYTES == 0 for stride in strides)
    )
