"""The wgmma kernel's own source on the CPU: its ring, barriers, layouts and ends against float64, with NaN all around.

The hardware is that of `kernels/emulation/hopper.cuh`; tensor maps are plain records of what the planner asks for.
"""

from __future__ import annotations

import dataclasses
import struct

import emulation
import numpy as np
import pytest
from linear_reference import LinearCase, assert_as_expected

from soprano_cupy.gpu import linear_hopper
from soprano_cupy.gpu.launch import Launch
from soprano_cupy.gpu.linear import End
from soprano_cupy.gpu.linear_hopper import Variant

ONE = Variant(groups=1, warpgroups=1, products=1, rows=64, stages=3, blocks=2)
WIDE = Variant(groups=1, warpgroups=1, products=2, rows=64, stages=2)
PAIR = Variant(groups=1, warpgroups=2, products=1, rows=128, stages=2)
TURNS = Variant(groups=2, warpgroups=1, products=1, rows=96, stages=3)
WIDE_TURNS = Variant(groups=2, warpgroups=1, products=2, rows=128, stages=4)
SPLIT = Variant(groups=1, warpgroups=1, products=1, rows=64, stages=3, splits=4)
SPLIT_8 = Variant(groups=1, warpgroups=1, products=1, rows=64, stages=2, splits=8)
SPLIT_PAIR = Variant(groups=1, warpgroups=2, products=1, rows=64, stages=2, splits=2)
ROWS_256 = Variant(groups=1, warpgroups=1, products=1, rows=256, stages=2)

# Each on two multiprocessors: a block has several tiles, or none.
CASES: list[tuple[LinearCase, Variant]] = [
    (LinearCase(End.STORE, 130, 150, 100, norm=True, padding=1), ONE),
    (LinearCase(End.STORE, 300, 90, 190, dtype="float16", bias=True, padding=2), TURNS),
    (LinearCase(End.SWIGLU, 150, 2 * 104, 200, norm=True), ONE),
    (LinearCase(End.SWIGLU, 261, 2 * 72, 130, dtype="float16"), WIDE_TURNS),
    (LinearCase(End.RESIDUAL, 135, 68, 320, padding=4), ONE),
    (LinearCase(End.RESIDUAL, 140, 200, 130, norm=True), WIDE),
    (LinearCase(End.RESIDUAL, 150, 140, 128), WIDE_TURNS),
    (LinearCase(End.GELU, 200, 144, 130, dtype="float16", bias=True, padding=8), PAIR),
    (LinearCase(End.GELU, 270, 160, 70, bias=True), ROWS_256),
    (LinearCase(End.ADD, 270, 136, 200, dtype="float16", bias=True, in_place=True), WIDE_TURNS),
    (LinearCase(End.RESIDUAL, 130, 90, 380, norm=True, padding=2), SPLIT),
    (LinearCase(End.SWIGLU, 135, 2 * 72, 200, norm=True), SPLIT_PAIR),
    (LinearCase(End.STORE, 140, 150, 130, dtype="float16", bias=True), SPLIT_PAIR),
    (LinearCase(End.ADD, 300, 140, 64, dtype="float16", bias=True, padding=4), TURNS),
    (LinearCase(End.RESIDUAL, 70, 72, 600, norm=True), SPLIT_8),
]


def record(
    address: int,
    dtype: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzled: bool = True,
) -> np.ndarray:
    """A tensor map as the emulated machine takes it; arguments as of `hopper.encode`."""
    fill = (1,) * (3 - len(shape))
    packed = struct.pack("<Q6q4i", address, *shape, *fill, 2, *strides, *(0 for _ in fill), *box, *fill, int(swizzled))
    return np.frombuffer(packed.ljust(128, b"\0"), np.uint8)


@pytest.fixture(autouse=True)
def emulated_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_hopper, "driver_encodes", lambda: True)
    monkeypatch.setattr(linear_hopper, "encode", record)


def plan(case: LinearCase, variant: Variant) -> Launch:
    addresses = {name: array.ctypes.data for name, array in case.arrays.items()}
    launch = linear_hopper.plan(case.request(addresses, (9, 0), multiprocessors=2), variant)
    assert launch is not None, linear_hopper.refusal(case.request(addresses, (9, 0)))
    return launch


def run(case: LinearCase, variant: Variant, blocks: int = 0, **sabotage: int) -> None:
    """Launches the kernel; it may touch the rows in use and nothing else."""
    launch = plan(case, variant)
    written = {"output", *(("residual", "next_square_sums") if case.end is End.RESIDUAL else ())}
    shared = {"weights", "bias", "next_gain"}
    buffers = [
        emulation.Buffer(array if name in shared else array[: case.rows], writable=name in written)
        for name, array in case.arrays.items()
    ]
    emulation.build("emulation/linear_hopper.cu", dict(launch.defines), 900).launch(
        launch.kernel, launch.params, grid=(blocks or launch.grid[0], 1, 1), threads=launch.threads,
        shared_bytes=launch.shared_bytes, buffers=buffers, cluster=launch.cluster, **sabotage,
    )  # fmt: skip


@pytest.mark.parametrize(("case", "variant"), CASES, ids=[f"{v}-{c}" for c, v in CASES])
def test_every_end_is_within_the_bound(case: LinearCase, variant: Variant) -> None:
    expected = case.expected()
    run(case, variant)
    assert_as_expected(case, expected, lambda name: case.arrays[name])


def output_of(case: LinearCase, variant: Variant, **how: int) -> np.ndarray:
    """The bits of the output's rows in use."""
    fresh = dataclasses.replace(case)  # arrays are made anew
    run(fresh, variant, **how)
    return fresh.arrays["output"][: case.rows].view(np.uint8)


def test_neither_the_number_of_blocks_nor_the_order_of_threads_matters() -> None:
    case, variant = CASES[6]
    first = output_of(case, variant)
    for how in ({"blocks": 1}, {"blocks": 5}, {"reverse": 1}):
        np.testing.assert_array_equal(output_of(case, variant, **how), first)


@pytest.mark.parametrize(
    ("chosen", "fault", "index", "reverse"),
    [
        (4, "skip_wait", 0, 0),  # the first stage
        (4, "skip_wait", 3, 0),  # a stage that is used again
        (4, "skip_warp_barrier", 1, 0),  # between writing and reading a warp's staging area
        (4, "skip_barrier", 0, 1),  # until the barriers are ready
        (7, "skip_barrier", 2, 0),  # between writing and reading a warpgroup's staging area
    ],
)
def test_a_wait_that_is_missing_is_noticed(chosen: int, fault: str, index: int, reverse: int) -> None:
    case, variant = CASES[chosen]
    with pytest.raises(emulation.EmulationError, match=r"race|deadlock|no mbarrier|more arrivals"):
        run(dataclasses.replace(case), variant, reverse=reverse, **{fault: index})
