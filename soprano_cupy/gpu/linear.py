"""Plans of y = x Wᵀ with a fused end: which kernel, which tile, which launch.

`LinearRequest` says what is wanted; `plan_linear` answers with a `Launch`. The weights are packed once by `packing.py`;
`kernels/linear_params.cuh` defines the packing, the ends and the parameters.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

from ..errors import ParameterError
from .launch import ANY_ADDRESS, Blocks, Dimension, Field, Launch, Symbol
from .linear_shapes import Problem, Shape, best_shape, ceil_div, measured_shape

TILE_FEATURES = 16  # of one packed tile, and columns of one partial sum of squares
DEPTH_STEP = 64  # depth is padded to a multiple of this

DTYPE_DEFINES = {"float16": "DTYPE_FP16", "bfloat16": "DTYPE_BF16"}

_PARAMS = struct.Struct("<8Q7i2fi")  # LinearParams
_ROWS_OFFSET = 64
_MAX_GRID_YZ = 65_535


def padded(depth: int) -> int:
    """The columns of an array that a product sums over."""
    return ceil_div(depth, DEPTH_STEP) * DEPTH_STEP


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
        return padded(self.depth)

    @property
    def feature_tiles(self) -> int:
        """Packed tiles along the features."""
        return -(-self.features // TILE_FEATURES)

    @property
    def most_rows(self) -> int:
        """The largest number of rows that the launch will see."""
        return self.rows_max if isinstance(self.rows, Symbol) else self.rows

    @property
    def columns(self) -> int:
        """Columns of the output."""
        return self.features // 2 if self.end is End.SWIGLU else self.features

    @property
    def has_norm(self) -> bool:
        return self.square_sums != 0

    @property
    def ragged(self) -> bool:
        """Whether columns or strides are no multiples of 4, or the norm not of the padded depth (`RAGGED`)."""
        if self.has_norm and (self.norm_width or self.depth) != self.padded_depth:
            return True
        strides = [self.output_stride] + [self.residual_stride] * (self.end in (End.RESIDUAL, End.ADD))
        return any(count % 4 for count in (self.columns, *strides))

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        """The constants that every linear kernel takes."""
        return (
            (DTYPE_DEFINES[self.dtype], 1),
            ("END", int(self.end)),
            ("NORM", int(self.has_norm)),
            ("RAGGED", int(self.ragged)),
        )

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


def plan_linear(request: LinearRequest) -> Launch:
    """The launch for a product; `ParameterError` where no kernel can take it."""
    _check(request)
    problem = problem_of(request)
    launch = _plan_hopper(request) if request.capability == (9, 0) and measured_shape(problem) is None else None
    if launch is not None:
        return launch
    least = request.rows_min if isinstance(request.rows, Symbol) else request.rows
    return plan_shape(request, best_shape(problem, least, request.most_rows))


def _plan_hopper(request: LinearRequest) -> Launch | None:
    """The launch of the wgmma kernel, where that one is the better."""
    from . import linear_hopper  # which needs the request

    return linear_hopper.plan(request)


def problem_of(request: LinearRequest) -> Problem:
    """The sizes of a request, at its largest number of rows."""
    return Problem(
        request.capability, request.multiprocessors, request.most_rows, request.feature_tiles, request.padded_depth
    )


def plan_shape(request: LinearRequest, shape: Shape) -> Launch:
    """The launch in a given shape of one of the two mma.sync kernels."""
    most_blocks = ceil_div(request.most_rows, shape.rows)
    symbolic = isinstance(request.rows, Symbol) and most_blocks > 1
    blocks_y: Dimension = Blocks(Symbol(request.rows), shape.rows) if symbolic else most_blocks
    if most_blocks > _MAX_GRID_YZ:
        raise ParameterError(f"{request.most_rows} rows are too many for one launch; divide them")
    return Launch(
        source=shape.source,
        kernel=shape.kernel,
        defines=(*request.defines, *shape.defines),
        grid=(ceil_div(request.feature_tiles * TILE_FEATURES, shape.features), blocks_y, 1),
        threads=shape.threads,
        shared_bytes=shape.shared_bytes,
        params=request.params(),
        fields=request.fields(),
    )


def _check(request: LinearRequest) -> None:
    """Raises `ParameterError` with the first thing that the kernels cannot take."""
    least = (8, 0) if request.dtype == "bfloat16" else (7, 5)
    symbolic = isinstance(request.rows, Symbol)
    strided = request.end in (End.RESIDUAL, End.ADD)
    problems = {
        f"dtype {request.dtype} is neither bfloat16 nor float16": request.dtype not in DTYPE_DEFINES,
        f"{request.dtype} products need compute capability {least}, not {request.capability}": (
            request.capability < least
        ),
        f"features {request.features} and depth {request.depth} must be positive": (
            min(request.features, request.depth) < 1
        ),
        f"rows {request.most_rows} must be positive (a symbol needs rows_min and rows_max)": (
            request.most_rows < 1 or (symbolic and not 1 <= request.rows_min <= request.rows_max)
        ),
        f"input_stride {request.input_stride} must be a multiple of 8 and at least {request.padded_depth}": (
            request.input_stride % 8 != 0 or request.input_stride < request.padded_depth
        ),
        f"output_stride {request.output_stride} is less than {request.columns} columns": (
            request.output_stride < request.columns
        ),
        f"residual_stride {request.residual_stride} is less than {request.columns} columns": (
            strided and request.residual_stride < request.columns
        ),
        "weights, input and output are needed and start at multiples of 16 bytes": any(
            pointer == 0 or pointer % 16 for pointer in (request.weights, request.input, request.output)
        ),
        "bias, square_sums, residual and next_gain start at multiples of 16 bytes": any(
            pointer % 16 for pointer in (request.bias, request.square_sums, request.residual, request.next_gain)
        ),
        f"{request.end.name} needs a residual": strided and request.residual == 0,
        "RESIDUAL needs next_gain and next_square_sums": (
            request.end is End.RESIDUAL and 0 in (request.next_gain, request.next_square_sums)
        ),
        "SWIGLU takes an even number of features and no bias": (
            request.end is End.SWIGLU and (request.features % 2 != 0 or request.bias != 0)
        ),
        f"norm_width {request.norm_width} is more than the {request.depth} columns of the input": (
            request.norm_width > request.depth
        ),
    }
    for problem, there in problems.items():
        if there:
            raise ParameterError(f"linear product: {problem}")


class LinearShape(NamedTuple):
    """A product of a model, as far as its kernels depend on it."""

    end: End
    features: int
    depth: int
    norm: bool = False


def variants(
    products: Iterable[LinearShape],
    dtype: str,
    capability: tuple[int, int],
    multiprocessors: int,
    rows: Iterable[int],
) -> Iterator[Launch]:
    """One launch for each distinct kernel that a model's products take at these numbers of rows; for compiling only."""
    seen = set()
    for product in products:
        for count in rows:
            launch = plan_linear(sample_request(product, dtype, capability, multiprocessors, count))
            key = (launch.source, launch.kernel, launch.defines)
            if key not in seen:
                seen.add(key)
                yield launch


def sample_request(
    product: LinearShape, dtype: str, capability: tuple[int, int], multiprocessors: int, rows: int
) -> LinearRequest:
    """A request for the product with addresses of nothing, to see or compile the kernel that answers it."""
    request = LinearRequest(
        end=product.end,
        dtype=dtype,
        capability=capability,
        multiprocessors=multiprocessors,
        rows=rows,
        features=product.features,
        depth=product.depth,
        weights=ANY_ADDRESS,
        input=ANY_ADDRESS,
        input_stride=padded(product.depth),
        output=ANY_ADDRESS,
        square_sums=ANY_ADDRESS if product.norm else 0,
        residual=ANY_ADDRESS,
        next_gain=ANY_ADDRESS,
        next_square_sums=ANY_ADDRESS,
    )
    stride = ceil_div(request.columns, 4) * 4 if product.end is not End.STORE else request.columns
    return replace(request, output_stride=stride, residual_stride=stride)
