"""Functions that NumPy lacks, against the C library's in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from soprano_cupy.cpu._math import gelu
from soprano_cupy.errors import ParameterError


def exact_gelu(x: np.ndarray) -> np.ndarray:
    return np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x.astype(np.float64)])


def sweep() -> np.ndarray:
    tiny_to_large = np.geomspace(1e-37, 40, 4001)
    return np.concatenate([np.linspace(-14.5, 14.5, 20_011), tiny_to_large, -tiny_to_large])


@pytest.mark.parametrize(("dtype", "ulps"), [("float32", 6), ("float64", 4)])
def test_gelu_is_exact_to_a_few_units_in_the_last_place(dtype: str, ulps: int) -> None:
    x = sweep().astype(dtype)
    expected = exact_gelu(x)
    smallest = np.finfo(dtype).tiny
    unit = np.spacing(np.maximum(np.abs(expected), smallest).astype(dtype)).astype(np.float64)
    if dtype == "float64":  # both sides round the argument of erfc, and its tail magnifies that x^2 times
        unit *= 1 + x * x
    error = np.abs(gelu(x, np.empty_like(x)).astype(np.float64) - expected) / unit
    assert error.max() <= ulps, f"worst at x = {x[error.argmax()]}"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(0,), (1,), (3,), (4,), (7, 5), (2, 3, 17)])
def test_gelu_works_in_place_at_any_size(dtype: str, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    separate = gelu(x, np.empty_like(x))
    in_place = x.copy()
    assert gelu(in_place, in_place) is in_place
    np.testing.assert_array_equal(in_place, separate)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gelu_of_special_values(dtype: str) -> None:
    x = np.array([np.inf, -np.inf, np.nan, 0.0, 3e38, -3e38], dtype)
    np.testing.assert_array_equal(gelu(x, np.empty_like(x)), np.array([np.inf, 0, np.nan, 0, 3e38, 0], dtype))


def test_gelu_refuses_what_it_cannot_write() -> None:
    x = np.zeros((4, 6), np.float32)
    whole = x.astype(int)
    for bad_x, bad_out in [(x, x.astype(np.float64)), (x, x[:2]), (x[:, ::2], x[:, ::2]), (whole, whole)]:
        with pytest.raises(ParameterError):
            gelu(bad_x, bad_out)
