"""Plans of linear products: parameters, symbols, refusals, and what the prediction prefers."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import pytest

from soprano_cupy.errors import ParameterError
from soprano_cupy.gpu.launch import Blocks, Field, Symbol
from soprano_cupy.gpu.linear import (
    End,
    LinearRequest,
    LinearShape,
    plan_linear,
    plan_shape,
    problem_of,
    sample_request,
    variants,
)
from soprano_cupy.gpu.linear_shapes import MAX_SHARED_BYTES, RowsShape, TilesShape, best_shape, shapes

AMPERE = (8, 0)


def request(**changes: Any) -> LinearRequest:
    values: dict[str, Any] = {
        "end": End.RESIDUAL, "dtype": "bfloat16", "capability": AMPERE, "multiprocessors": 108, "rows": 3,
        "features": 40, "depth": 100, "weights": 1 << 12, "input": 2 << 12, "input_stride": 128, "output": 3 << 12,
        "output_stride": 64, "residual": 4 << 12, "residual_stride": 68, "next_gain": 5 << 12,
        "next_square_sums": 6 << 12, "square_sums": 7 << 12, "epsilon": 0.5, "norm_width": 80,
    }  # fmt: skip
    return LinearRequest(**{**values, **changes})


def test_the_struct_is_that_of_the_header() -> None:
    values = struct.unpack("<8Q7i2fi", plan_linear(request()).params)
    pointers = (1, 2, 0, 7, 4, 5, 6, 3)  # weights, input, bias, square_sums, residual, gain, sums, output
    assert values[:8] == tuple(n << 12 for n in pointers)
    assert values[8:15] == (3, 40, 128, 5, 128, 68, 64)  # rows, features, padded depth, sums of a row, strides
    assert values[15:17] == (pytest.approx(1 / 80), 0.5)


def test_rows_of_a_symbol_are_patched_and_the_grid_follows_them() -> None:
    launch = plan_linear(request(rows=Symbol.ROWS, rows_min=1, rows_max=8))
    assert launch.fields == (Field(64, Symbol.ROWS),)
    assert struct.unpack_from("<i", launch.params, 64) == (0,)
    assert launch.grid[1:] == (1, 1)
    wide = plan_linear(request(rows=Symbol.SEQUENCES, rows_min=500, rows_max=4000))
    rows = dict(wide.defines)["BLOCK_ROWS"]
    assert wide.grid == (-(-40 // dict(wide.defines)["BLOCK_FEATURES"]), Blocks(Symbol.SEQUENCES, rows), 1)


def test_constants_say_what_the_kernel_must_do() -> None:
    constants = dict(plan_linear(request()).defines)
    assert {name: constants[name] for name in ("DTYPE_BF16", "END", "NORM", "RAGGED")} == {
        "DTYPE_BF16": 1,
        "END": 2,
        "NORM": 1,
        "RAGGED": 1,  # the norm is not of the padded depth
    }
    plain = request(square_sums=0)
    assert dict(plan_linear(plain).defines)["RAGGED"] == 0
    for change in ({"output_stride": 66}, {"residual_stride": 66}, {"features": 38}):
        assert dict(plan_linear(dataclasses.replace(plain, **change)).defines)["RAGGED"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float32"}, "neither bfloat16 nor float16"),
        ({"capability": (7, 5)}, "compute capability"),
        ({"features": 0}, "positive"),
        ({"rows": 0}, "rows 0"),
        ({"rows": Symbol.ROWS}, "rows_min and rows_max"),
        ({"rows": Symbol.ROWS, "rows_min": 9, "rows_max": 8}, "rows_min and rows_max"),
        ({"input_stride": 132}, "multiple of 8"),
        ({"input_stride": 104}, "at least 128"),
        ({"output_stride": 32}, "less than 40 columns"),
        ({"residual_stride": 32}, "less than 40 columns"),
        ({"weights": 0}, "weights, input and output"),
        ({"input": 8}, "16 bytes"),
        ({"residual": 8}, "16 bytes"),
        ({"residual": 0}, "needs a residual"),
        ({"next_gain": 0}, "next_gain"),
        ({"end": End.SWIGLU, "features": 41}, "even number"),
        ({"end": End.SWIGLU, "bias": 16}, "no bias"),
        ({"norm_width": 101}, "norm_width"),
        ({"rows": 1 << 30}, "too many"),
    ],
)
def test_what_no_kernel_takes_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        plan_linear(request(**changes))


@pytest.mark.parametrize("capability", sorted(MAX_SHARED_BYTES))
def test_every_gpu_has_a_shape_for_every_number_of_rows(capability: tuple[int, int]) -> None:
    dtype = "float16" if capability < (8, 0) else "bfloat16"
    for features, depth in ((768, 512), (512, 2304), (8192, 512), (16, 64), (64, 16384)):
        for rows in (1, 7, 8, 9, 64, 500, 100_000):
            product = sample_request(LinearShape(End.RESIDUAL, features, depth), dtype, capability, 60, rows)
            for shape in shapes(problem_of(product)):
                launch = plan_shape(product, shape)
                assert launch.shared_bytes <= MAX_SHARED_BYTES[capability]
                assert launch.shared_bytes % 16 == 0
                assert launch.grid[0] * shape.features >= features
                assert isinstance(launch.grid[1], int)
                assert launch.grid[1] * shape.rows >= rows
                assert launch.threads <= 1024


def test_one_voice_takes_the_kernel_for_few_rows_and_prompts_take_tiles() -> None:
    for features, depth in ((768, 512), (512, 512), (4608, 512), (512, 2304), (8192, 512)):
        product = sample_request(LinearShape(End.STORE, features, depth), "bfloat16", AMPERE, 108, 1)
        problem = problem_of(product)
        few, many = best_shape(problem, 1, 1), best_shape(problem._replace(rows=2000), 2000, 2000)
        assert isinstance(few, RowsShape)
        assert few.columns <= 2  # two staged columns where many blocks would ask for one row
        assert isinstance(many, TilesShape)


def test_a_range_is_served_by_what_is_good_for_all_of_it() -> None:
    product = sample_request(LinearShape(End.STORE, 4608, 512), "bfloat16", AMPERE, 108, 4000)
    problem = problem_of(product)
    chosen = best_shape(problem, 1, 4000)
    regret = max(
        chosen.clocks(problem._replace(rows=rows)) / min(s.clocks(problem._replace(rows=rows)) for s in shapes(problem))
        for rows in (1, 63, 4000)
    )
    assert regret < 4


def test_kernels_are_listed_once() -> None:
    products = (LinearShape(End.STORE, 768, 512, True), LinearShape(End.STORE, 1024, 512, True))
    launches = list(variants(products, "bfloat16", AMPERE, 108, [1, 2, 3]))
    assert len({(launch.source, launch.defines) for launch in launches}) == len(launches)
    assert len(launches) <= 2
