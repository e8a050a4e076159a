"""Packed weights against the layout as it is written down in kernels/linear_params.cuh."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from soprano_cupy.errors import ParameterError
from soprano_cupy.gpu.packing import interleave_gate_up, pack_linear, packed_shape, unpack_linear


def numbered(features: int, depth: int, dtype: Any = np.uint16) -> np.ndarray:
    """A matrix whose elements differ (up to 65,535 of them) and are not zero."""
    bits = np.arange(1, features * depth + 1, dtype=np.uint16).reshape(features, depth)
    return bits.view(dtype)


@pytest.mark.parametrize(("features", "depth"), [(16, 64), (48, 128), (1, 1), (17, 65), (40, 100), (250, 192)])
def test_each_word_is_where_a_lane_expects_it(features: int, depth: int) -> None:
    weights = numbered(features, depth)
    rows, columns = packed_shape(features, depth)
    padded = np.zeros((rows, columns), np.uint16)
    padded[:features, :depth] = weights
    packed = pack_linear(weights, np).reshape(rows // 16, columns // 16, 32, 4, 2)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for word, (row, column) in enumerate(((g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8))):
            for pair in range(2):
                np.testing.assert_array_equal(packed[:, :, lane, word, pair], padded[row::16, column + pair :: 16])


@pytest.mark.parametrize("dtype", [np.uint16, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("features", "depth"), [(16, 64), (2050, 8), (33, 130)])
def test_unpacking_gives_the_same_bits(features: int, depth: int, dtype: Any) -> None:
    weights = numbered(features, depth, dtype)
    packed = pack_linear(weights, np)
    assert packed.dtype == weights.dtype
    assert packed.flags.c_contiguous
    again = unpack_linear(packed, features, depth, np)
    np.testing.assert_array_equal(again.view(np.uint16), weights.view(np.uint16))


def test_views_are_packed_by_what_they_show() -> None:
    weights = numbered(64, 192)
    expected = pack_linear(np.ascontiguousarray(weights[8:40, 64:128]), np)
    np.testing.assert_array_equal(pack_linear(weights[8:40, 64:128], np), expected)


@pytest.mark.parametrize(("channels", "depth"), [(8, 4), (20, 3), (1, 5), (2304, 2)])
def test_gate_and_up_alternate_in_eights(channels: int, depth: int) -> None:
    both = numbered(2 * channels, depth)
    gate, up = both[:channels], both[channels:]
    merged = interleave_gate_up(gate, up, np)
    groups = -(-channels // 8)
    assert merged.shape == (16 * groups, depth)
    for feature, row in enumerate(merged):
        source, channel = (up if feature % 16 >= 8 else gate), feature // 16 * 8 + feature % 8
        np.testing.assert_array_equal(row, source[channel] if channel < channels else np.zeros(depth))


@pytest.mark.parametrize(
    "weights",
    [np.zeros(8, np.uint16), np.zeros((2, 2, 2), np.uint16), np.zeros((4, 4), np.float32), np.zeros((0, 4), np.uint16)],
)
def test_other_arrays_are_refused(weights: np.ndarray) -> None:
    with pytest.raises(ParameterError, match="features, depth"):
        pack_linear(weights, np)


def test_halves_that_differ_are_refused() -> None:
    with pytest.raises(ParameterError, match="differ"):
        interleave_gate_up(np.zeros((8, 4), np.uint16), np.zeros((8, 5), np.uint16), np)
    with pytest.raises(ParameterError, match="differ"):
        interleave_gate_up(np.zeros((8, 4), np.uint16), np.zeros((8, 4), np.float16), np)


def test_packed_weights_of_another_size_are_refused() -> None:
    with pytest.raises(ParameterError, match="no packed weights"):
        unpack_linear(np.zeros(1024, np.uint16), 32, 64, np)
