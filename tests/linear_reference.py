"""What a linear kernel must give, in float64, and how far from it rounding may take it.

The bound is derived: a matrix instruction adds 8 or 16 products to a sum with an error of at most one unit (2^-23) of
the largest term, so a sum of `depth` products is off by at most depth / 8 units of the sum of their magnitudes; 16 more
cover the other additions. The norm's factor has a relative error under 2^-20. Outputs of 16 bits are rounded once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import emulation
import ml_dtypes
import numpy as np

from soprano_cupy.gpu.launch import Symbol
from soprano_cupy.gpu.linear import End, LinearRequest
from soprano_cupy.gpu.packing import interleave_gate_up, pack_linear

Array = np.ndarray[Any, Any]
DTYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
NORM_SCALE = {"float16": 0.0625, "bfloat16": 1.0}
ELEMENT_UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # half a unit in the last place, relative
EPSILON = 1e-6
SUM_UNIT, FACTOR_ERROR = 2.0**-23, 2.0**-20
SPARE_ROWS = 3  # of every array, NaN and never touched

_erf = np.vectorize(math.erf, otypes=[np.float64])

LARGEST_FP16 = 65_504.0  # beyond it a result is infinite


@dataclass(frozen=True)
class Bounded:
    """Exact values (rows, columns) and the largest permitted distance from each."""

    value: Array
    error: Array


@dataclass(frozen=True)
class LinearCase:
    """One product. Strides are the columns, or what is beyond them by `padding`."""

    end: End
    rows: int
    features: int
    depth: int
    dtype: str = "bfloat16"
    norm: bool = False
    bias: bool = False
    padding: int = 0
    in_place: bool = False  # ADD: the output is the residual
    symbolic: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("norm", "bias", "in_place", "symbolic") if getattr(self, name)]
        return "-".join([self.end.name.lower(), f"{self.rows}x{self.features}x{self.depth}", self.dtype, *flags])

    @property
    def columns(self) -> int:
        return self.features // 2 if self.end is End.SWIGLU else self.features

    @property
    def tiles(self) -> int:
        return -(-self.features // 16)

    @property
    def padded_depth(self) -> int:
        return -(-self.depth // 64) * 64

    @property
    def has_residual(self) -> bool:
        return self.end in (End.RESIDUAL, End.ADD)

    @property
    def output_dtype(self) -> Any:
        return np.float32 if self.end in (End.STORE, End.ADD) else DTYPES[self.dtype]

    @cached_property
    def weights(self) -> Array:
        """(features, depth), gate and up one after the other."""
        return self._normal(1, (self.features, self.depth)).astype(DTYPES[self.dtype])

    @cached_property
    def packed(self) -> Array:
        weights = self.weights
        if self.end is End.SWIGLU:
            weights = interleave_gate_up(weights[: self.columns], weights[self.columns :], np)
        packed = emulation.poisoned((pack_linear(weights, np).size,), DTYPES[self.dtype])
        packed[:] = pack_linear(weights, np)
        return packed

    @cached_property
    def arrays(self) -> dict[str, Array]:
        """Inputs and outputs as the kernel sees them; outputs and all that is not in use hold NaN."""
        rows = self.rows + SPARE_ROWS
        element = DTYPES[self.dtype]
        made = {
            "weights": self.packed,
            "input": self._rows(2, rows, self.depth, self.padded_depth + 8 * self.padding, element),
            "output": emulation.poisoned((rows, self.columns + self.padding), self.output_dtype),
        }
        made["input"][: self.rows, self.depth : self.padded_depth] = 0
        if self.bias:
            made["bias"] = self._vector(3, self.features)
        if self.norm:
            made["square_sums"] = self._rows(4, rows, -(-self.depth // 16), -(-self.depth // 16), np.float32)
            made["square_sums"][...] = np.abs(made["square_sums"]) * 16
        if self.has_residual:
            made["residual"] = self._rows(5, rows, self.columns, self.columns + self.padding, np.float32)
            if self.in_place:
                made["output"] = made["residual"]
        if self.end is End.RESIDUAL:
            made["next_gain"] = self._vector(6, self.features)
            made["next_square_sums"] = emulation.poisoned((rows, self.tiles), np.float32)
        return made

    def request(
        self, addresses: dict[str, int], capability: tuple[int, int] = (8, 0), multiprocessors: int = 4
    ) -> LinearRequest:
        return LinearRequest(
            end=self.end, dtype=self.dtype, capability=capability, multiprocessors=multiprocessors,
            rows=Symbol.ROWS if self.symbolic else self.rows, rows_max=self.rows, features=self.features,
            depth=self.depth, input_stride=self.arrays["input"].shape[1], output_stride=self.columns + self.padding,
            residual_stride=self.columns + self.padding if self.has_residual else 0, epsilon=EPSILON,
            **addresses,
        )  # fmt: skip

    def expected(self, rows: Array | None = None) -> dict[str, Bounded]:
        """Every array that the kernel writes, in some rows (else all in use); call it before the launch."""
        rows = np.arange(self.rows) if rows is None else rows
        product = self._product(rows)
        if self.end is End.SWIGLU:
            return {"output": self._rounded(self._gated(product))}
        if self.end is End.GELU:
            gelu = product.value * 0.5 * (1 + _erf(product.value / math.sqrt(2)))
            return {"output": self._rounded(Bounded(gelu, 1.13 * product.error + 8 * SUM_UNIT * np.abs(gelu)))}
        if self.end is End.STORE:
            return {"output": product}
        residual = self.arrays["residual"][rows, : self.columns].astype(np.float64)
        total = residual + product.value
        stream = Bounded(total, product.error + SUM_UNIT * (np.abs(residual) + np.abs(product.value)))
        if self.end is End.ADD:
            return {"residual" if self.in_place else "output": stream}
        gain = self.arrays["next_gain"].astype(np.float64) * NORM_SCALE[self.dtype]
        gained = Bounded(total * gain, (stream.error + 2 * SUM_UNIT * np.abs(total)) * np.abs(gain))
        return {
            "residual": stream,
            "output": self._rounded(gained),
            "next_square_sums": Bounded(
                self._by_tiles(total**2),
                self._by_tiles(2 * np.abs(total) * stream.error + stream.error**2 + 16 * SUM_UNIT * total**2),
            ),
        }

    def _product(self, rows: Array) -> Bounded:
        x = self.arrays["input"][rows, : self.depth].astype(np.float64)
        w = self.weights.astype(np.float64)
        value, magnitude = x @ w.T, np.abs(x) @ np.abs(w).T
        if self.norm:
            mean = self.arrays["square_sums"][rows].astype(np.float64).sum(1, keepdims=True) / self.depth
            factor = 1 / (np.sqrt(mean + np.float32(EPSILON)) * NORM_SCALE[self.dtype])
            value, magnitude = value * factor, magnitude * factor
        bias = self.arrays["bias"].astype(np.float64) if self.bias else np.zeros(self.features)
        error = (self.depth / 8 + 16) * SUM_UNIT * (magnitude + np.abs(bias)) + self.norm * FACTOR_ERROR * np.abs(value)
        return Bounded(value + bias, error)

    def _gated(self, product: Bounded) -> Bounded:
        gate, up = product.value[:, : self.columns], product.value[:, self.columns :]
        gate_error, up_error = product.error[:, : self.columns], product.error[:, self.columns :]
        silu = gate / (1 + np.exp(np.minimum(-gate, 700.0)))
        silu_error = 1.1 * gate_error + 16 * SUM_UNIT * np.abs(gate)
        return Bounded(silu * up, silu_error * (np.abs(up) + up_error) + np.abs(silu) * up_error)

    def _rounded(self, exact: Bounded) -> Bounded:
        unit = ELEMENT_UNIT[self.dtype]
        return Bounded(exact.value, exact.error * (1 + unit) + unit * np.abs(exact.value) + 2.0**-25)

    def _by_tiles(self, values: Array) -> Array:
        padded = np.zeros((len(values), self.tiles * 16))
        padded[:, : self.features] = values
        return padded.reshape(len(values), self.tiles, 16).sum(2)

    def _normal(self, stream: int, shape: tuple[int, ...]) -> Array:
        return np.random.default_rng([stream, self.features, self.depth]).standard_normal(shape).astype(np.float32)

    def _rows(self, stream: int, rows: int, columns: int, stride: int, dtype: Any) -> Array:
        """Row r is the same in every case of these features and this depth."""
        array = emulation.poisoned((rows, stride), dtype)
        array[: self.rows, :columns] = self._normal(stream, (self.rows, columns)).astype(dtype)
        return array

    def _vector(self, stream: int, size: int) -> Array:
        array = emulation.poisoned((size,), np.float32)
        array[:] = self._normal(stream, (size,))
        return array


def assert_as_expected(
    case: LinearCase, expected: dict[str, Bounded], read: Callable[[str], Array], rows: Array | None = None
) -> None:
    """Values within their bounds in `rows` (all in use), NaN still where nothing is. read: an array by its name."""
    rows = np.arange(case.rows) if rows is None else rows
    for name, bounded in expected.items():
        array = np.asarray(read(name)).astype(np.float64)
        columns = bounded.value.shape[1]
        value, found = bounded.value, array[rows, :columns]
        if name == "output" and case.dtype == "float16" and case.end not in (End.STORE, End.ADD):  # ends at 65,504
            value, found = np.clip(value, -LARGEST_FP16, LARGEST_FP16), np.clip(found, -LARGEST_FP16, LARGEST_FP16)
        share = np.abs(found - value) / bounded.error
        assert np.all(share <= 1), f"{name}: {np.nanmax(share):.3g} of the allowed error, {np.isnan(share).sum()} NaN"
        assert np.all(np.isnan(array[case.rows :])), f"{name}: rows that are not in use were written"
        assert np.all(np.isnan(array[:, columns:])), f"{name}: columns beyond the last were written"
