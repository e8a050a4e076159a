"""The layers that both networks are made of, in array code for NumPy and CuPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import fused

Array = Any  # np.ndarray or cupy.ndarray


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
    if not isinstance(x, np.ndarray):
        return fused.rms_norm(x, weight, eps)
    mean_square = (x * x).mean(axis=-1, keepdims=True)
    return x / (mean_square + x.dtype.type(eps)) ** 0.5 * weight


def layer_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-6) -> Array:
    """Layer norm over the last axis (Ba, Kiros and Hinton, 2016)."""
    if not isinstance(x, np.ndarray):
        return fused.layer_norm(x, weight, bias, eps)
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    centred /= (variance + x.dtype.type(eps)) ** 0.5
    centred *= weight
    centred += bias
    return centred


def silu_gate(gate: Array, up: Array) -> Array:
    """gate times its logistic sigmoid, times up (Shazeer, 2020), written so that no exponential overflows."""
    if not isinstance(gate, np.ndarray):
        return fused.silu_gate(gate, up)
    half = gate.dtype.type(0.5)
    return gate * half * (1 + np.tanh(gate * half)) * up


def gelu(x: Array) -> Array:
    """Exact Gaussian error linear unit, x/2 (1 + erf(x / sqrt 2)) (Hendrycks and Gimpel, 2016); in place."""
    if not isinstance(x, np.ndarray):
        return fused.gelu(x)
    from ..cpu._math import gelu as gelu_in_place

    gelu_in_place(x, x)
    return x


def rope_tables(positions: np.ndarray, frequencies: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines (N, 1, head_dim / 2) of the rotary embedding for positions (N,) (Su et al., 2021).

    Angles are formed in float64, so that they are right for every position and dtype.
    """
    angles = positions.astype(np.float64)[:, None, None] * frequencies
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the pairs (i, i + D/2) of x (N, heads, D) by each row's angles."""
    if not isinstance(x, np.ndarray):
        return fused.rope(x, cos, sin)
    half = x.shape[-1] // 2
    low, high = x[..., :half], x[..., half:]
    return np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1)
