"""The layers that both networks are made of, in array code for NumPy and CuPy."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np

Array = Any  # np.ndarray or cupy.ndarray

GELU_CUDA = "y = x * T(0.5) * (T(1) + erf(x * T(0.70710678118654752440)))"


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x W^T + b for x (..., in) and weight (out, in); a 16-bit weight rounds x and multiplies in 16 bits.

    Products accumulate in float32 or wider; the result has the dtype of x.
    """
    y = (x.astype(weight.dtype, copy=False) @ weight.T).astype(x.dtype, copy=False)
    if bias is not None:
        y += bias
    return y


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Root-mean-square norm over the last axis (Zhang and Sennrich, 2019)."""
    mean_square = (x * x).mean(axis=-1, keepdims=True)
    return x / (mean_square + x.dtype.type(eps)) ** 0.5 * weight


def layer_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-6) -> Array:
    """Layer norm over the last axis (Ba, Kiros and Hinton, 2016)."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    centred /= (variance + x.dtype.type(eps)) ** 0.5
    centred *= weight
    centred += bias
    return centred


def silu(x: Array, xp: ModuleType) -> Array:
    """x times its logistic sigmoid, written so that no exponential overflows."""
    return x * 0.5 * (1 + xp.tanh(x * 0.5))


def gelu(x: Array) -> Array:
    """Exact Gaussian error linear unit, x/2 (1 + erf(x / sqrt 2)) (Hendrycks and Gimpel, 2016); in place."""
    if isinstance(x, np.ndarray):
        from ..cpu._math import gelu as gelu_in_place

        gelu_in_place(x, x)
        return x
    return _gelu_kernel()(x, x)


@lru_cache(maxsize=1)
def _gelu_kernel() -> Any:
    import cupy

    return cupy.ElementwiseKernel("T x", "T y", GELU_CUDA, "soprano_gelu")


def rope_tables(positions: np.ndarray, frequencies: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines (N, 1, head_dim / 2) of the rotary embedding for positions (N,) (Su et al., 2021).

    Angles are formed in float64, so that they are right for every position and dtype.
    """
    angles = positions.astype(np.float64)[:, None, None] * frequencies
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def rope(x: Array, cos: Array, sin: Array, xp: ModuleType) -> Array:
    """Rotate the pairs (i, i + D/2) of x (N, heads, D) by each row's angles."""
    half = x.shape[-1] // 2
    low, high = x[..., :half], x[..., half:]
    return xp.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1)
