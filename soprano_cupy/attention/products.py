"""Batched matrix products of strided arrays: NumPy's matmul, or cuBLAS called so that it copies nothing.

CuPy's own batched product copies transposed operands, widens float16 to float32 and knows no bfloat16 (CuPy 14);
cuBLAS takes strides, multiplies 16-bit operands on tensor cores and returns the float32 sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .problem import Array

# Enumerations of the CUDA runtime and of cuBLAS.
_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}
_COMPUTE_32F, _COMPUTE_64F = 68, 70
_DEFAULT_ALGORITHM = -1
_BFLOAT16_CAPABILITY = 80  # cuBLAS multiplies bfloat16 from compute capability 8.0 on


class Operand(NamedTuple):
    """A matrix in cuBLAS's column-major words."""

    transposed: int
    leading: int  # elements from one column to the next


def scaled_product(a: Array, b: Array, scale: float = 1.0) -> Array:
    """scale * a @ b for a (X, Y, M, K) and b (X, Y, K, N), any strides.

    Returns (X, Y, M, N), float32 for 16-bit operands, which are accumulated in float32, else of their dtype.
    """
    if isinstance(a, np.ndarray):
        product = np.matmul(widened(a), widened(b))
        if scale != 1.0:
            product *= product.dtype.type(scale)
        return product
    return _cublas_product(a, b, scale)


def widened(array: Array) -> Array:
    """16-bit numbers as float32; anything else as it is."""
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array


def _cublas_product(a: Array, b: Array, scale: float) -> Array:
    import cupy
    from cupy_backends.cuda.libs import cublas

    if a.dtype.name == "bfloat16" and int(a.device.compute_capability) < _BFLOAT16_CAPABILITY:
        a, b = widened(a), widened(b)
    left, right = _as_operand(a), _as_operand(b)
    a, b = (array if operand else cupy.ascontiguousarray(array) for array, operand in ((a, left), (b, right)))
    left, right = left or _contiguous_operand(a), right or _contiguous_operand(b)
    narrow = a.dtype.itemsize == 2
    out = cupy.empty((*a.shape[:2], a.shape[2], b.shape[3]), np.float32 if narrow else a.dtype)
    factors = np.array([scale, 0.0], np.float64 if out.dtype == np.float64 else np.float32)
    for part_a, part_b, part_out in _batches(a, b, out):
        m, k = part_a.shape[1:]
        n = part_b.shape[2]
        # row-major out = a b is column-major out^T = b^T a^T
        cublas.gemmStridedBatchedEx(
            cupy.cuda.device.get_cublas_handle(),
            right.transposed,
            left.transposed,
            n,
            m,
            k,
            factors.ctypes.data,
            part_b.data.ptr,
            _TYPES[b.dtype.name],
            right.leading,
            part_b.strides[0] // b.itemsize,
            part_a.data.ptr,
            _TYPES[a.dtype.name],
            left.leading,
            part_a.strides[0] // a.itemsize,
            factors.ctypes.data + factors.itemsize,
            part_out.data.ptr,
            _TYPES[out.dtype.name],
            n,
            part_out.strides[0] // out.itemsize,
            part_out.shape[0],
            _COMPUTE_64F if out.dtype == np.float64 else _COMPUTE_32F,
            _DEFAULT_ALGORITHM,
        )
    return out


def _as_operand(array: Array) -> Operand | None:
    """How cuBLAS sees the last two axes where they lie; None when neither is contiguous."""
    rows, columns = array.shape[2:]
    row_step, column_step = (stride // array.itemsize for stride in array.strides[2:])
    if (column_step == 1 or columns == 1) and (row_step >= columns or rows == 1):
        return Operand(0, max(row_step, columns) if rows > 1 else columns)
    if (row_step == 1 or rows == 1) and (column_step >= rows or columns == 1):
        return Operand(1, max(column_step, rows) if columns > 1 else rows)
    return None


def _contiguous_operand(array: Array) -> Operand:
    return Operand(0, array.shape[3])


def _batches(a: Array, b: Array, out: Array) -> list[tuple[Array, Array, Array]]:
    """The two batch axes as few single ones: merged where every array steps evenly over both, else one by one."""
    outer, inner = out.shape[:2]
    if outer == 1:
        return [(a[0], b[0], out[0])]
    if inner == 1:
        return [(a[:, 0], b[:, 0], out[:, 0])]
    arrays: tuple[Any, ...] = (a, b, out)
    if all(array.strides[0] == inner * array.strides[1] for array in arrays):
        return [tuple(array.reshape(outer * inner, *array.shape[2:]) for array in arrays)]
    if inner <= outer:
        return [(a[:, i], b[:, i], out[:, i]) for i in range(inner)]
    return [(a[i], b[i], out[i]) for i in range(outer)]
