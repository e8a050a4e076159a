"""Plans of y = x Wᵀ with a fused end: which kernel, which tile, which launch.

`LinearRequest` says what is wanted; `plan_linear` answers with a `Launch`. The weights are packed once by `packing.py`;
`kernels/linear_params.cuh` defines the packing, the ends and the parameters.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from .launch import Field, Symbol

TILE_FEATURES = 16  # of one packed tile, and columns of one partial sum of squares
DEPTH_STEP = 64  # depth is padded to a multiple of this

DTYPE_DEFINES = {"float16": "DTYPE_FP16", "bfloat16": "DTYPE_BF16"}

_PARAMS = struct.Struct("<8Q7i2fi")  # LinearParams
_ROWS_OFFSET = 64


class End(IntEnum):
    """What becomes of the product; the END_ constants of `kernels/linear_params.cuh`."""

    STORE = 0
    SWIGLU = 1
    RESIDUAL = 2
    GELU = 3
    ADD = 4


@dataclass(frozen=True, kw_only=True)
class LinearRequest:
    """One product with its end. Pointers are device addresses (0: none), strides count elements."""

    end: End
    dtype: str  # "bfloat16" or "float16"
    capability: tuple[int, int]
    multiprocessors: int
    rows: int | Symbol
    rows_min: int = 1  # of a symbol: the range that this launch will serve
    rows_max: int = 0
    features: int  # true count; of SWIGLU gate and up together
    depth: int  # true count
    weights: int
    input: int
    input_stride: int
    output: int = 0
    output_stride: int = 0
    bias: int = 0
    square_sums: int = 0  # of the norm before; 0: no norm
    norm_width: int = 0  # true columns of that norm; 0: depth
    epsilon: float = 0.0
    residual: int = 0
    residual_stride: int = 0
    next_gain: int = 0
    next_square_sums: int = 0

    @property
    def padded_depth(self) -> int:
        """What the kernel sums over."""
        return -(-self.depth // DEPTH_STEP) * DEPTH_STEP

    @property
    def feature_tiles(self) -> int:
        """Packed tiles along the features."""
        return -(-self.features // TILE_FEATURES)

    @property
    def most_rows(self) -> int:
        """The largest number of rows that the launch will see."""
        return self.rows_max if isinstance(self.rows, Symbol) else self.rows

    def params(self) -> bytes:
        """The `LinearParams` struct; rows are 0 where a symbol gives them."""
        width = self.norm_width or self.depth
        return _PARAMS.pack(
            *(self.weights, self.input, self.bias, self.square_sums),
            *(self.residual, self.next_gain, self.next_square_sums, self.output),
            0 if isinstance(self.rows, Symbol) else self.rows,
            *(self.features, self.padded_depth, -(-width // TILE_FEATURES)),
            *(self.input_stride, self.residual_stride, self.output_stride),
            *(1.0 / width, self.epsilon, 0),
        )

    def fields(self) -> tuple[Field, ...]:
        """The fields of the struct that a symbol patches."""
        return (Field(_ROWS_OFFSET, self.rows),) if isinstance(self.rows, Symbol) else ()
