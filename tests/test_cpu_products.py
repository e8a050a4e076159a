"""Matrix products with packed weights: every instruction set, every dtype, sizes on and off the tiles."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numerics import round_to_bfloat16

from soprano_cupy.cpu import _engine
from soprano_cupy.cpu.features import choose_isa
from soprano_cupy.errors import ParameterError

ISAS = _engine.instruction_sets()
DTYPES = ["float32", "bfloat16", "int8"]
SIZES = [(1, 1), (16, 64), (64, 16), (65, 63), (130, 100), (50, 333), (192, 129)]
ROWS = [1, 2, 3, 7, 8, 9, 17, 33, 50, 100]
UNIT = 2.0**-24  # half the distance from 1 to the next float32
GROUP = 64  # inputs that share a scale in int8
INT15 = 16383


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = _engine.get_threads()
    yield
    _engine.set_threads(before)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


def int8_weights(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers and scales as the packing defines them: (outputs, groups, 64) and (outputs, groups)."""
    outputs, inputs = weights.shape
    groups = -(-inputs // GROUP)
    padded = np.zeros((outputs, groups * GROUP), np.float32)
    padded[:, :inputs] = weights
    padded = padded.reshape(outputs, groups, GROUP)
    largest = (np.abs(padded).max(axis=-1) / np.float32(127)).view(np.uint32)
    scales = ((largest + 0xFFFF) & 0xFFFF0000).astype(np.uint32).view(np.float32)  # bfloat16, rounded up
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    return np.rint(padded * inverse[..., None]), scales


def int8_product(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """What an int8 product means, in float64."""
    whole, scales = int8_weights(weights)
    magnitude = np.abs(x).max(axis=1, keepdims=True)
    rows = np.zeros((len(x), whole.shape[1] * GROUP))
    rows[:, : x.shape[1]] = np.rint(x * (np.float32(INT15) / magnitude))
    sums = np.einsum("rgk,ogk->rog", rows.reshape(len(x), -1, GROUP), whole.astype(np.float64))
    return (sums * scales).sum(axis=-1) * (magnitude / INT15)


def reference(weights: np.ndarray, x: np.ndarray, dtype: str, isa: str) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64 of what the kernel multiplies, and the sum of the magnitudes of its terms."""
    if dtype == "int8":
        whole, scales = int8_weights(weights)
        kept = (whole * scales[..., None]).reshape(len(weights), -1)[:, : x.shape[1]]
        return int8_product(weights, x), np.abs(x.astype(np.float64)) @ np.abs(kept).T
    if dtype == "bfloat16":
        weights = round_to_bfloat16(weights)
        x = round_to_bfloat16(x) if isa == "amx" else x
    left, right = x.astype(np.float64), weights.astype(np.float64).T
    return left @ right, np.abs(left) @ np.abs(right)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_products_are_rounded_sums(isa: str, dtype: str, outputs: int, inputs: int) -> None:
    """The error of a float32 sum of n terms stays under (n + 2) units of the sum of their magnitudes."""
    weights = random(outputs, inputs)
    matrix = _engine.PackedMatrix(weights, dtype, isa)
    for rows in ROWS:
        x = random(rows, inputs)
        expected, magnitudes = reference(weights, x, dtype, isa)
        share = np.abs(matrix.multiply(x) - expected) / ((inputs + 2) * UNIT * magnitudes)
        assert share.max() <= 1, f"{rows} rows used {share.max():.2f} of the allowance"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_depend_on_nothing_beside_them(isa: str, dtype: str) -> None:
    weights, x = random(130, 200), random(101, 200)
    matrix = _engine.PackedMatrix(weights, dtype, isa)
    _engine.set_threads(1)
    single = np.concatenate([matrix.multiply(x[i : i + 1]) for i in range(len(x))])
    for threads in (1, 2, 5):
        _engine.set_threads(threads)
        for rows in (2, 8, 13, 49, 101):
            np.testing.assert_array_equal(matrix.multiply(x[:rows]), single[:rows])


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_int8_is_the_same_on_every_vector_unit(outputs: int, inputs: int) -> None:
    """Whole-number sums leave nothing to round until the scales, which fused multiply-add treats alike."""
    x = random(19, inputs)
    results = [_engine.PackedMatrix(random(outputs, inputs), "int8", isa).multiply(x) for isa in ISAS]
    for result in results[2:]:
        np.testing.assert_array_equal(result, results[1])
    np.testing.assert_allclose(results[0], results[-1], rtol=0, atol=8 * UNIT * np.abs(results[-1]).max())


@pytest.mark.parametrize("isa", ISAS)
def test_int8_keeps_weights_to_half_a_step(isa: str) -> None:
    """Unit rows read a matrix back: the largest weight of a group is exact to the scale's 8 bits."""
    weights = random(70, 130) * np.geomspace(1e-6, 1e6, 70, dtype=np.float32)[:, None]
    back = _engine.PackedMatrix(weights, "int8", isa).multiply(np.eye(130, dtype=np.float32)).T
    _, scales = int8_weights(weights)
    steps = np.repeat(scales, GROUP, axis=1)[:, :130]
    assert (np.abs(back - weights) / steps).max() <= 0.5 * (1 + 1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_int8_weights_too_small_to_scale_are_zero(isa: str) -> None:
    weights = np.full((3, 64), 1e-38, np.float32)
    weights[1] = 0
    weights[2, 5] = 1e-20
    back = _engine.PackedMatrix(weights, "int8", isa).multiply(np.eye(64, dtype=np.float32)).T
    np.testing.assert_array_equal(back[:2], 0)
    assert back[2, 5] == pytest.approx(1e-20, rel=1e-2)


@pytest.mark.parametrize("isa", ISAS)
def test_int8_rows_of_extreme_values(isa: str) -> None:
    weights = random(20, 70)
    matrix = _engine.PackedMatrix(weights, "int8", isa)
    x = random(4, 70) * np.array([[0], [1e-35], [1e30], [1]], np.float32)
    x[3, 5] = np.nan
    result = matrix.multiply(x)
    np.testing.assert_array_equal(result[:2], 0)
    np.testing.assert_allclose(result[2], int8_product(weights, x[2:3])[0], rtol=1e-4)
    assert np.isnan(result[3]).all()


def test_bfloat16_sources_are_taken_as_they_are() -> None:
    weights, x = round_to_bfloat16(random(40, 50)), random(3, 50)
    bits = (weights.view(np.uint32) >> 16).astype(np.uint16)
    for dtype in DTYPES:
        np.testing.assert_array_equal(
            _engine.PackedMatrix(bits, dtype).multiply(x), _engine.PackedMatrix(weights, dtype).multiply(x)
        )


def test_wrong_shapes_are_refused() -> None:
    matrix = _engine.PackedMatrix(random(8, 9), "float32")
    for x in (random(2, 8), np.empty((0, 9), np.float32)):
        with pytest.raises(ParameterError):
            matrix.multiply(x)
    with pytest.raises(ParameterError):
        _engine.PackedMatrix(random(8, 9).astype(np.float64), "float32")
    with pytest.raises(ParameterError):
        _engine.PackedMatrix(random(8, 9)[:, ::2], "float32")


def test_the_instruction_set_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOPRANO_CPU_ISA", raising=False)
    assert ISAS[0] == "portable"
    assert choose_isa()[0] == ISAS[-1]
    monkeypatch.setenv("SOPRANO_CPU_ISA", "portable")
    assert choose_isa() == ("portable", "set by SOPRANO_CPU_ISA")
    assert choose_isa(ISAS[-1]) == (ISAS[-1], "asked for")
    monkeypatch.setenv("SOPRANO_CPU_ISA", "mmx")
    with pytest.raises(ParameterError, match=r"mmx.*SOPRANO_CPU_ISA.*portable"):
        choose_isa()
