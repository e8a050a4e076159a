"""Tensors of a mapped file: types, rounding, shapes, what is left over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from soprano_cupy.checkpoint.convert_dtype import bfloat16_to_float32, convert_block, float32_to_bfloat16
from soprano_cupy.checkpoint.safetensors import open_safetensors, write_safetensors
from soprano_cupy.checkpoint.tensors import BLOCK_ELEMENTS
from soprano_cupy.errors import CheckpointError


def write(path: Path, arrays: dict[str, np.ndarray], dtype: str) -> Path:
    specs = {name: (dtype, array.shape) for name, array in arrays.items()}
    write_safetensors(path, specs, arrays.__getitem__)
    return path


def test_bfloat16_widens_exactly():
    bits = np.array([0x0000, 0x8000, 0x3F80, 0xBF80, 0x4049, 0x0001, 0x7F7F], np.uint16)
    expected = [0.0, -0.0, 1.0, -1.0, 3.140625, 2.0**-133, (2 - 2.0**-7) * 2.0**127]
    np.testing.assert_array_equal(bfloat16_to_float32(bits), np.array(expected, np.float32))


def test_float32_rounds_to_nearest_even_bfloat16():
    step = 2.0**-7  # between neighbours at 1
    values = [1.0, 1 + step / 2, 1 + 3 * step / 2, 1 + step / 2 + 2.0**-23, 1 + step / 2 - 2.0**-23, -1 - step / 2]
    expected = [1.0, 1.0, 1 + 2 * step, 1 + step, 1.0, -1.0]
    result = bfloat16_to_float32(float32_to_bfloat16(np.array(values, np.float32)))
    np.testing.assert_array_equal(result, np.array(expected, np.float32))


def test_bfloat16_rounding_is_the_nearest_for_random_values():
    values = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    bits = float32_to_bfloat16(values)
    error = np.abs(bfloat16_to_float32(bits) - values)
    for neighbour in (bits - 1, bits + 1):
        assert np.all(error <= np.abs(bfloat16_to_float32(neighbour.astype(np.uint16)) - values))


def test_float64_is_not_rounded_twice_on_its_way_to_bfloat16():
    # Above the tie by less than float32 can tell: rounding by way of float32 would fall back to even.
    values = np.array([1 + 2.0**-8 + 2.0**-40, 1 + 3 * 2.0**-8 - 2.0**-40, -(1 + 2.0**-8 + 2.0**-40), 0.0, 1e-60])
    bits = np.empty(5, np.uint16)
    convert_block(values, "float64", bits, "bfloat16")
    np.testing.assert_array_equal(bits, [0x3F81, 0x3F81, 0xBF81, 0x0000, 0x0000])


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("wanted", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (7, 1, 3), (0, 4)])
def test_every_type_to_every_other(tmp_path, stored, wanted, shape):
    """Values with 7 bits and a small exponent are exact in all four types."""
    exact = np.random.default_rng(1).integers(-64, 64, shape) / 8.0
    held = float32_to_bfloat16(exact) if stored == "bfloat16" else exact.astype(stored)
    path = write(tmp_path / "a.safetensors", {"pad": np.zeros(1, held.dtype), "x": held.reshape(shape)}, stored)
    with open_safetensors(path) as file:
        array = file.pop("x", shape, wanted)
    assert array.dtype == (np.uint16 if wanted == "bfloat16" else wanted)
    assert array.shape == shape
    assert array.flags.c_contiguous
    assert array.flags.owndata
    assert array.flags.writeable
    np.testing.assert_array_equal(bfloat16_to_float32(array) if wanted == "bfloat16" else array, exact.reshape(shape))


@pytest.mark.parametrize("count", [BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1, 2 * BLOCK_ELEMENTS + 17])
def test_blocks_join_without_a_seam(tmp_path, count):
    values = np.arange(count, dtype=np.float32)
    path = write(tmp_path / "a.safetensors", {"before": np.ones(3, np.float32), "x": values}, "float32")
    with open_safetensors(path) as file:
        np.testing.assert_array_equal(file.pop("x", (count,)), values)
        np.testing.assert_array_equal(file.pop("before", (3,)), 1)  # its pages were dropped meanwhile


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("wanted", ["bfloat16", "float32"])
def test_values_that_are_not_finite_are_refused(tmp_path, stored, bad, wanted):
    values = np.array([1.0, bad, 2.0], np.float32)
    held = (values.view(np.uint32) >> 16).astype(np.uint16) if stored == "bfloat16" else values.astype(stored)
    with (
        open_safetensors(write(tmp_path / "a.safetensors", {"x": held}, stored)) as file,
        pytest.raises(CheckpointError, match="tensor x holds values that are not finite"),
    ):
        file.pop("x", (3,), wanted)


@pytest.mark.parametrize(
    ("stored", "value", "wanted"),
    [
        ("float32", 70_000.0, "float16"),
        ("bfloat16", 70_000.0, "float16"),
        ("float64", 1e39, "float32"),
        ("float64", 1e39, "bfloat16"),
        ("float32", 3.4e38, "bfloat16"),
    ],
)
def test_values_too_large_for_a_narrower_type_are_refused(tmp_path, stored, value, wanted):
    held = np.array([value], "float32" if stored == "bfloat16" else stored)
    held = float32_to_bfloat16(held) if stored == "bfloat16" else held
    with open_safetensors(write(tmp_path / "a.safetensors", {"x": held}, stored)) as file:
        with pytest.raises(CheckpointError, match=f"too large for {wanted}; use float32"):
            file.pop("x", (1,), wanted)
        assert np.isfinite(file.pop("x", (1,), "float64")).all()


def test_tensor_file_tells_what_it_holds(tmp_path):
    path = write(tmp_path / "a.safetensors", {"b": np.ones((2, 3), np.float16), "a": np.ones(4, np.float16)}, "float16")
    with open_safetensors(path) as file:
        assert file.path == path
        assert file.names() == {"a", "b"}
        assert "a" in file
        assert "c" not in file
        assert (file.shape("b"), file.dtype("b")) == ((2, 3), "float16")


def test_pop_names_what_is_wrong(tmp_path):
    path = write(tmp_path / "a.safetensors", {"x": np.ones((2, 3), np.float32)}, "float32")
    with open_safetensors(path) as file:
        with pytest.raises(CheckpointError, match=r"tensor x has shape \(2, 3\), expected \(3, 2\)"):
            file.pop("x", (3, 2))
        with pytest.raises(CheckpointError, match="tensor y is missing"):
            file.pop("y", (3, 2))
        with pytest.raises(CheckpointError, match="tensor y is missing"):
            file.shape("y")
        with pytest.raises(CheckpointError, match="cannot be read as 'int8'"):
            file.pop("x", (2, 3), "int8")
        file.pop("x", (2, 3))
        with pytest.raises(CheckpointError, match="tensor x was already read"):
            file.pop("x", (2, 3))


def test_finish_lists_surplus_tensors(tmp_path):
    path = write(tmp_path / "a.safetensors", {name: np.ones(1, np.float32) for name in "gfedcba"}, "float32")
    with open_safetensors(path) as file:
        file.pop("a", (1,))
        file.discard("b")
        file.discard("not there")
        with pytest.raises(CheckpointError, match=r"does not have: c, d, e, f and 1 more;"):
            file.finish()
        for name in "cdefg":
            file.pop(name, (1,))
        file.finish()


def test_arrays_outlive_the_file(tmp_path):
    path = write(tmp_path / "a.safetensors", {"x": np.arange(5, dtype=np.float32)}, "float32")
    with open_safetensors(path) as file:
        array = file.pop("x", (5,))
    path.unlink()
    np.testing.assert_array_equal(array, np.arange(5))


@pytest.mark.parametrize("wanted", ["bfloat16", "float32"])
def test_views_are_what_pop_returns(tmp_path, wanted):
    """bfloat16 tensors lie in the file as they are, float32 ones are converted; a block and a bit of each."""
    values = np.random.default_rng(2).standard_normal((3, BLOCK_ELEMENTS // 2)).astype(np.float32)
    path = write(tmp_path / "a.safetensors", {"x": float32_to_bfloat16(values), "y": np.ones(3, np.uint16)}, "bfloat16")
    with open_safetensors(path) as file, open_safetensors(path) as other:
        expected = other.pop("x", values.shape, wanted)
        view = file.view("x", values.shape, wanted)
        assert view.dtype == expected.dtype
        assert view.flags.owndata == (wanted == "float32")
        assert view.flags.writeable == (wanted == "float32")
        with pytest.raises(CheckpointError, match="already read"):
            file.view("x", values.shape, wanted)
        file.view("y", (3,), wanted)
        file.release_views()  # of their pages, not of their values
        np.testing.assert_array_equal(view, expected)
        file.finish()


def test_a_view_outlives_its_file(tmp_path):
    path = write(tmp_path / "a.safetensors", {"x": np.arange(6, dtype=np.float32)}, "float32")
    with open_safetensors(path) as file:
        view = file.view("x", (6,))
    np.testing.assert_array_equal(view, np.arange(6))


def test_views_refuse_what_pop_refuses(tmp_path):
    values = np.ones(BLOCK_ELEMENTS + 5, np.float32)
    values[-1] = np.inf
    path = write(tmp_path / "a.safetensors", {"x": values}, "float32")
    with open_safetensors(path) as file:
        with pytest.raises(CheckpointError, match="expected"):
            file.view("x", (5,))
        with pytest.raises(CheckpointError, match="not finite"):
            file.view("x", values.shape)
        with pytest.raises(CheckpointError, match="missing"):
            file.view("y", (1,))
