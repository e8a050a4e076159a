"""The call that cuBLAS gets, carried out by a stand-in that reads memory exactly as cuBLAS would."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from soprano_cupy.attention import products

TYPES = {0: np.float32, 1: np.float64, 2: np.float16, 14: ml_dtypes.bfloat16}


class DeviceArray(np.ndarray):
    """A NumPy array with the attributes of CuPy's that the wrapper uses."""

    device = SimpleNamespace(compute_capability="90")

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.ctypes.data)


def on_device(array: np.ndarray) -> Any:
    return array.view(DeviceArray)


def memory(address: int, kind: int, count: int) -> np.ndarray:
    dtype = np.dtype(TYPES[kind])
    buffer = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_ubyte * (count * dtype.itemsize)).from_address(address))
    return buffer.view(dtype)


def column_major(address: int, kind: int, transposed: int, rows: int, columns: int, leading: int) -> np.ndarray:
    """op(X) of (rows, columns), X stored column by column with `leading` elements between columns."""
    stored = (columns, rows) if transposed else (rows, columns)
    assert leading >= stored[0]
    flat = memory(address, kind, leading * (stored[1] - 1) + stored[0])
    step = flat.itemsize
    matrix = np.lib.stride_tricks.as_strided(flat, stored, (step, leading * step))
    return matrix.T if transposed else matrix


def gemm(handle: int, ta: int, tb: int, m: int, n: int, k: int, alpha: int, a: int, a_type: int, lda: int, a_step: int,
         b: int, b_type: int, ldb: int, b_step: int, beta: int, c: int, c_type: int, ldc: int, c_step: int,
         batch: int, compute: int, algorithm: int) -> None:  # fmt: skip
    """cublasGemmStridedBatchedEx: C = alpha op(A) op(B) + beta C, all column-major."""
    factor_type = {68: 0, 70: 1}[compute]
    assert memory(beta, factor_type, 1)[0] == 0
    wide = TYPES[factor_type]
    for i in range(batch):
        left = column_major(a + i * a_step * np.dtype(TYPES[a_type]).itemsize, a_type, ta, m, k, lda)
        right = column_major(b + i * b_step * np.dtype(TYPES[b_type]).itemsize, b_type, tb, k, n, ldb)
        result = column_major(c + i * c_step * np.dtype(TYPES[c_type]).itemsize, c_type, 0, m, n, ldc)
        result[...] = memory(alpha, factor_type, 1)[0] * (left.astype(wide) @ right.astype(wide))


@pytest.fixture(autouse=True)
def cublas_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stand-ins for the modules that need a GPU; the list holds the batch size of every call."""
    calls: list[int] = []

    def counted(*arguments: Any) -> None:
        calls.append(arguments[20])
        gemm(*arguments)

    names = ("cupy", "cupy_backends", "cupy_backends.cuda", "cupy_backends.cuda.libs")
    fakes: Any = {name: ModuleType(name) for name in names}
    fakes["cupy"].empty = lambda shape, dtype: on_device(np.full(shape, np.nan, dtype))
    fakes["cupy"].ascontiguousarray = lambda array: on_device(np.array(array, order="C"))
    fakes["cupy"].cuda = SimpleNamespace(device=SimpleNamespace(get_cublas_handle=lambda: 0))
    fakes["cupy_backends.cuda.libs"].cublas = SimpleNamespace(gemmStridedBatchedEx=counted)
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    return calls


def draw(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 1, 5, 7), (1, 2, 4, 6), (3, 2, 1, 5), (2, 3, 5, 1)])
def test_strided_operands(sizes: tuple[int, int, int, int], dtype: Any) -> None:
    """Queries on a slice of a cache, as attention has them: (B, S, H, D) and (B, L, H, D)."""
    batch, heads, rows, keys = sizes
    q = draw(batch, rows, heads, 8, dtype=dtype).transpose(0, 2, 1, 3)
    cache = draw(2, batch + 1, keys + 3, heads, 8, dtype=dtype)
    k_t, v = cache[0, 1:, 2 : keys + 2].transpose(0, 2, 3, 1), cache[1, 1:, 2 : keys + 2].transpose(0, 2, 1, 3)
    scores = products._cublas_product(on_device(q), on_device(k_t), 0.25)
    expected = products.scaled_product(q, k_t, 0.25)
    assert scores.dtype == expected.dtype == (np.float32 if np.dtype(dtype).itemsize == 2 else dtype)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
    weights = scores.astype(dtype)
    mixed = products._cublas_product(on_device(weights), on_device(v), 1.0)
    np.testing.assert_allclose(mixed, products.scaled_product(np.asarray(weights), v), rtol=1e-5, atol=1e-5)


def test_one_call_where_the_batch_axes_step_evenly(cublas_calls: list[int]) -> None:
    products._cublas_product(on_device(draw(3, 2, 4, 8)), on_device(draw(3, 2, 8, 5)), 1.0)
    products._cublas_product(on_device(draw(3, 1, 4, 8)), on_device(draw(3, 1, 8, 5)), 1.0)
    assert cublas_calls == [6, 3]


def test_operands_with_no_contiguous_axis_are_copied() -> None:
    a, b = draw(2, 1, 4, 16)[..., ::2], draw(2, 1, 16, 10)[:, :, ::2, ::2]
    result = products._cublas_product(on_device(a), on_device(b), 1.0)
    np.testing.assert_allclose(result, a @ b, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_widened_on_gpus_whose_cublas_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceArray, "device", SimpleNamespace(compute_capability="75"))
    monkeypatch.setitem(TYPES, 14, None)  # the stand-in would fail on it
    a, b = draw(1, 1, 4, 8, dtype=ml_dtypes.bfloat16), draw(1, 1, 8, 5, dtype=ml_dtypes.bfloat16)
    result = products._cublas_product(on_device(a), on_device(b), 1.0)
    np.testing.assert_allclose(result, a.astype(np.float32) @ b.astype(np.float32), rtol=1e-6)
