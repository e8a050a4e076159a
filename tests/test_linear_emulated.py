"""The linear kernels' own source, run on the CPU: every end against float64, in odd sizes, with NaN all around."""

from __future__ import annotations

import dataclasses

import emulation
import numpy as np
import pytest
from linear_reference import LinearCase, assert_as_expected

from soprano_cupy.gpu.launch import Launch
from soprano_cupy.gpu.linear import End, plan_shape
from soprano_cupy.gpu.linear_shapes import RowsShape, Shape, TilesShape

DIRECT = RowsShape(depth=128, warps=4, columns=1, feature_tiles=1, staged=False)
UNEVEN = RowsShape(depth=192, warps=8, columns=2, feature_tiles=2, staged=False)  # four warps of eight have work for 1
STAGED = RowsShape(depth=320, warps=8, columns=4, feature_tiles=2, staged=True)
TURING = RowsShape(depth=64, warps=4, columns=2, feature_tiles=1, staged=True)
TILES = TilesShape(64, 32, 2, 2, stages=3, min_blocks=1)
WIDE = TilesShape(128, 64, 2, 2, stages=4, min_blocks=1)

CASES: list[tuple[LinearCase, Shape, int]] = [
    (LinearCase(End.STORE, 13, 50, 100, norm=True, padding=1), DIRECT, 800),  # two blocks of rows
    (LinearCase(End.RESIDUAL, 13, 40, 190, padding=4), UNEVEN, 800),
    (LinearCase(End.SWIGLU, 27, 2 * 36, 300, norm=True), STAGED, 800),
    (LinearCase(End.GELU, 15, 33, 60, dtype="float16", bias=True), TURING, 750),
    (LinearCase(End.STORE, 37, 75, 190, norm=True), TILES, 800),
    (LinearCase(End.SWIGLU, 33, 2 * 52, 128, norm=True), TILES, 800),
    (LinearCase(End.RESIDUAL, 67, 140, 320, padding=4), WIDE, 800),
    (LinearCase(End.ADD, 32, 68, 64, bias=True, in_place=True), TILES, 800),
    (LinearCase(End.GELU, 35, 72, 130, dtype="float16", bias=True, padding=4), TILES, 750),
]


def plan(case: LinearCase, shape: Shape, arch: int = 800) -> Launch:
    addresses = {name: array.ctypes.data for name, array in case.arrays.items()}
    return plan_shape(case.request(addresses, (arch // 100, arch // 10 % 10)), shape)


def run(case: LinearCase, shape: Shape, arch: int = 800, **sabotage: int) -> None:
    """Launches the kernel; it may touch the rows in use and nothing else."""
    launch = plan(case, shape, arch)
    written = {"output", *(("residual", "next_square_sums") if case.end is End.RESIDUAL else ())}
    shared = {"weights", "bias", "next_gain"}
    buffers = [
        emulation.Buffer(array if name in shared else array[: case.rows], writable=name in written)
        for name, array in case.arrays.items()
    ]
    grid = [blocks for blocks in launch.grid if isinstance(blocks, int)]
    emulation.build(launch.source, dict(launch.defines), arch).launch(
        launch.kernel, launch.params, grid=grid, threads=launch.threads, shared_bytes=launch.shared_bytes,
        buffers=buffers, **sabotage,
    )  # fmt: skip


@pytest.mark.parametrize(("case", "shape", "arch"), CASES, ids=[f"{type(s).__name__}-{c}" for c, s, _ in CASES])
def test_every_end_is_within_the_bound(case: LinearCase, shape: Shape, arch: int) -> None:
    expected = case.expected()
    run(case, shape, arch)
    assert_as_expected(case, expected, lambda name: case.arrays[name])


def output_of(case: LinearCase, shape: Shape, **sabotage: int) -> np.ndarray:
    """The bits of the output's rows in use."""
    fresh = dataclasses.replace(case)  # arrays are made anew
    run(fresh, shape, **sabotage)
    return fresh.arrays["output"][: case.rows].view(np.uint8)


def test_a_row_has_the_same_bits_in_every_form_of_the_kernel_for_few_rows() -> None:
    case = LinearCase(End.RESIDUAL, 29, 40, 300, padding=4)
    forms = [dataclasses.replace(STAGED, columns=columns, feature_tiles=tiles, staged=columns > 1)
             for columns, tiles in ((4, 2), (2, 1), (1, 1))]  # fmt: skip
    first, *others = (output_of(case, form) for form in forms)
    for other in others:
        np.testing.assert_array_equal(other, first)
    alone = output_of(dataclasses.replace(case, rows=1), forms[-1])
    np.testing.assert_array_equal(alone, first[:1])


def test_the_order_of_threads_does_not_matter() -> None:
    for case, shape in ((LinearCase(End.RESIDUAL, 21, 40, 300, padding=4), STAGED), (CASES[4][0], TILES)):
        np.testing.assert_array_equal(output_of(case, shape, reverse=True), output_of(case, shape))


@pytest.mark.parametrize("fault", ["skip_barrier", "skip_wait", "skip_warp_barrier"])
def test_a_barrier_that_is_missing_is_noticed(fault: str) -> None:
    case = LinearCase(End.SWIGLU, 27, 2 * 36, 300, norm=True)
    with pytest.raises(emulation.EmulationError, match=r"race|in flight"):
        run(case, STAGED, **{fault: 0})
    if fault != "skip_warp_barrier":
        with pytest.raises(emulation.EmulationError, match=r"race|in flight"):
            run(LinearCase(End.STORE, 37, 75, 190, norm=True), TILES, **{fault: 1})
