"""Products for `linear_hopper.cu` on a GPU: arrays, launch through CuPy, error against float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from soprano_cupy.cuda.module import device_facts, load
from soprano_cupy.gpu.launch import Field, Launch
from soprano_cupy.gpu.linear import End, LinearRequest
from soprano_cupy.gpu.linear_hopper import Variant, plan
from soprano_cupy.gpu.packing import interleave_gate_up, pack_linear

NORM_SCALE = {"bfloat16": 1.0, "float16": 1.0 / 16}
HALF_STEP = {
    "bfloat16": 2.0**-9,
    "float16": 2.0**-12,
}  # of rounding, relative
NAN_BITS = 0x7FFF


def to_bits(values: Any, dtype: str) -> Any:
    """float32 to the bits of the 16-bit type, nearest even."""
    import cupy as cp

    if dtype == "float16":
        return values.astype(cp.float16).view(cp.uint16)
    words = values.astype(cp.float32).view(cp.uint32)
    return ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(cp.uint16)


def from_bits(bits: Any, dtype: str) -> Any:
    """The bits of the 16-bit type as float64."""
    import cupy as cp

    if dtype == "float16":
        return bits.view(cp.float16).astype(cp.float64)
    return (bits.astype(cp.uint32) << 16).view(cp.float32).astype(cp.float64)


@dataclass(frozen=True)
class Case:
    """One product. `spare` rows of NaN follow the rows in every buffer; `skew` widens the rows of float outputs."""

    end: End
    features: int
    depth: int
    rows: int
    dtype: str = "bfloat16"
    norm: bool = False
    bias: bool = False
    spare: int = 0
    skew: int = 0

    def __str__(self) -> str:
        extras = "".join(f" {name}" for name in ("norm", "bias") if getattr(self, name))
        return f"{self.end.name} {self.rows} x {self.features} x {self.depth} {self.dtype}{extras}"

    @property
    def columns(self) -> int:
        return self.features // 2 if self.end is End.SWIGLU else self.features


def padded(count: int, step: int) -> int:
    return -(-count // step) * step


class Product:
    """The arrays of a case, NaN wherever nothing may be read, and what they should become."""

    def __init__(self, case: Case, seed: int = 0, copies: int = 1) -> None:
        import cupy as cp

        self.case = case
        random = cp.random.RandomState(seed)
        rows, most = case.rows, case.rows + case.spare
        normal = lambda *shape: random.standard_normal(shape, dtype=cp.float32)  # noqa: E731
        weights = to_bits(normal(case.features, case.depth) / np.sqrt(case.depth), case.dtype)
        self.weights = from_bits(weights, case.dtype)
        if case.end is End.SWIGLU:
            weights = interleave_gate_up(weights[: case.columns], weights[case.columns :], cp)
        packed = pack_linear(weights, cp)
        self.packed = [packed.copy() for _ in range(copies)]
        self.input = cp.zeros((most, padded(case.depth, 64)), cp.uint16)
        self.input[:rows, : case.depth] = to_bits(normal(rows, case.depth), case.dtype)
        self.input[rows:] = NAN_BITS
        self.bias = normal(case.features) if case.bias else None
        sums = padded(case.depth, 16) // 16
        self.square_sums = cp.full((most, sums), np.nan, cp.float32)
        self.square_sums[:rows] = random.uniform(0.5, 30.0, (rows, sums)).astype(cp.float32)
        floats = case.end in (End.STORE, End.ADD)
        self.stride = case.columns + case.skew if floats else padded(case.columns, 64)
        self.residual = cp.full((most, padded(case.features, 64)), np.nan, cp.float32)
        self.residual[:rows, : case.features] = normal(rows, case.features)
        self.before = self.residual.copy()
        self.gain = normal(case.features)
        self.output = cp.full((most, self.stride), np.nan, cp.float32) if floats else cp.full(
            (most, self.stride), NAN_BITS, cp.uint16
        )  # fmt: skip
        self.next_sums = cp.full((most, padded(case.features, 16) // 16), np.nan, cp.float32)

    def request(self, copy: int = 0) -> LinearRequest:
        facts = device_facts(0)
        case = self.case
        strided = case.end in (End.RESIDUAL, End.ADD)
        return LinearRequest(
            end=case.end,
            dtype=case.dtype,
            capability=facts.capability,
            multiprocessors=facts.multiprocessors,
            rows=case.rows,
            features=case.features if case.end is not End.SWIGLU else 2 * padded(case.columns, 8),
            depth=case.depth,
            weights=self.packed[copy].data.ptr,
            input=self.input.data.ptr,
            input_stride=self.input.shape[1],
            output=self.output.data.ptr,
            output_stride=self.stride,
            bias=self.bias.data.ptr if self.bias is not None else 0,
            square_sums=self.square_sums.data.ptr if case.norm else 0,
            epsilon=1e-6,
            residual=self.residual.data.ptr if strided else 0,
            residual_stride=self.residual.shape[1] if strided else 0,
            next_gain=self.gain.data.ptr if case.end is End.RESIDUAL else 0,
            next_square_sums=self.next_sums.data.ptr if case.end is End.RESIDUAL else 0,
        )

    def reset(self) -> None:
        """The arrays as they were before the first run."""
        import cupy as cp

        self.residual[...] = self.before
        self.output[...] = np.nan if self.output.dtype == cp.float32 else NAN_BITS
        self.next_sums[...] = np.nan

    def errors(self) -> dict[str, float]:
        """The largest share of its allowance that each result takes; inf for NaN and where a guard is overwritten."""
        import cupy as cp

        case, rows = self.case, self.case.rows
        x = from_bits(self.input[:rows, : case.depth], case.dtype)
        product, size = x @ self.weights.T, cp.abs(x) @ cp.abs(self.weights).T
        slack = size * (case.depth / 16 + 4) * 2.0**-22  # sums of 16, one rounding each, and some more at the end
        if case.norm:
            mean = self.square_sums[:rows].astype(cp.float64).sum(1) / case.depth + 1e-6
            factor = (1 / cp.sqrt(mean) / NORM_SCALE[case.dtype])[:, None]
            product, slack = product * factor, slack * factor + cp.abs(product) * factor * 2.0**-20
        if self.bias is not None:
            product = product + self.bias
        found = self._float_errors if case.end in (End.STORE, End.ADD, End.RESIDUAL) else self._element_errors
        return {**found(product, slack), "guards": self._guards()}

    def _float_errors(self, product: Any, slack: Any) -> dict[str, float]:
        import cupy as cp

        case, rows, columns = self.case, self.case.rows, self.case.columns
        want = product if case.end is End.STORE else product + self.before[:rows, :columns]
        slack = slack + cp.abs(want) * 2.0**-22
        if case.end is not End.RESIDUAL:
            return {"output": share(self.output[:rows, :columns], want, slack)}
        scaled = want * self.gain * NORM_SCALE[case.dtype]
        allowed = slack * cp.abs(self.gain) + cp.abs(scaled) * 2 * HALF_STEP[case.dtype] + 1e-7
        pad = padded(columns, 16) - columns
        squares, loose = (cp.pad(a, ((0, 0), (0, pad))).reshape(rows, -1, 16).sum(2)
                          for a in (want**2, 2 * cp.abs(want) * slack + want**2 * 2.0**-20))  # fmt: skip
        return {
            "residual": share(self.residual[:rows, :columns], want, slack),
            "output": share(from_bits(self.output[:rows, :columns], case.dtype), scaled, allowed),
            "square_sums": share(self.next_sums[:rows], squares, loose),
        }

    def _element_errors(self, product: Any, slack: Any) -> dict[str, float]:
        import cupy as cp
        from cupyx.scipy.special import erf

        case, rows, columns = self.case, self.case.rows, self.case.columns
        if case.end is End.GELU:
            want, slack = 0.5 * product * (1 + erf(product / np.sqrt(2))), 1.13 * slack
        else:
            gate, up = product[:, :columns], product[:, columns:]
            silu = gate / (1 + cp.exp(-gate))
            want = silu * up
            slack = 1.1 * cp.abs(up) * slack[:, :columns] + cp.abs(silu) * slack[:, columns:] + cp.abs(want) * 2.0**-20
        allowed = slack + cp.abs(want) * 2 * HALF_STEP[case.dtype] + 1e-6
        return {"output": share(from_bits(self.output[:rows, :columns], case.dtype), want, allowed)}

    def _guards(self) -> float:
        """0 while rows and columns that are not the product's keep their NaN, else inf."""
        import cupy as cp

        rows, columns = self.case.rows, self.request().columns  # of gate and up those that fill their packed tiles
        if self.case.end in (End.GELU, End.SWIGLU):  # 16 bytes at a time: what follows the last column may become 0
            columns = padded(columns, 8)
        parts = [self.output[rows:], self.output[:rows, columns:], self.residual[rows:],
                 self.residual[:rows, self.case.features :], self.next_sums[rows:]]  # fmt: skip
        kept = all(
            bool((part == NAN_BITS).all() if part.dtype == cp.uint16 else cp.isnan(part).all()) for part in parts
        )
        return 0.0 if kept else float("inf")


def share(got: Any, want: Any, allowed: Any) -> float:
    import cupy as cp

    ratio = cp.abs(got.astype(cp.float64) - want) / allowed
    return float(cp.where(cp.isnan(ratio), np.inf, ratio).max())


def launched(product: Product, variant: Variant | None = None, copy: int = 0, blocks: int | None = None) -> Any:
    """A function that launches the product through CuPy. blocks: of the grid, instead of the planned number."""
    found = plan(product.request(copy), variant)
    assert found is not None
    return launcher(found, product.case.rows, blocks)


def launcher(launch: Launch, rows: int, blocks: int | None = None) -> Any:
    params = bytearray(launch.params)
    for field in launch.fields:
        assert isinstance(field, Field)
        params[field.offset : field.offset + 4] = int(rows).to_bytes(4, "little")
    record = np.frombuffer(bytes(params), np.dtype([("bytes", np.uint8, (len(params),))]))
    kernel = load(launch.source, launch.kernel, launch.defines, 0, specific=launch.specific)
    grid = (blocks or launch.grid[0], 1, 1)
    return lambda: kernel(grid, (launch.threads,), (record,), launch.shared_bytes)
