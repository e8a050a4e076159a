"""The linear kernels on a GPU at the model's sizes: every shape that could serve, against float64, and repeatable."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from linear_reference import Array, LinearCase, assert_as_expected

from soprano_cupy.cuda.module import DeviceFacts, device_facts, load
from soprano_cupy.device import cuda_problem
from soprano_cupy.gpu.launch import Launch
from soprano_cupy.gpu.linear import End, plan_shape, problem_of
from soprano_cupy.gpu.linear_shapes import Shape, best_shape, shapes

pytestmark = pytest.mark.gpu

ROWS = (1, 2, 3, 8, 9, 16, 17, 31, 64, 65, 127, 512, 1000, 8192)
EVERY_SHAPE_AT = (3, 17, 65, 512)
PRODUCTS: dict[str, tuple[End, int, int, bool, bool]] = {  # end, features, depth, norm, bias
    "qkv": (End.STORE, 768, 512, True, False),
    "o": (End.RESIDUAL, 512, 512, False, False),
    "gate_up": (End.SWIGLU, 4608, 512, True, False),
    "down": (End.RESIDUAL, 512, 2304, False, False),
    "head": (End.STORE, 8192, 512, True, False),
    "widen": (End.GELU, 2304, 768, False, True),
    "narrow": (End.ADD, 768, 2304, False, True),
    "spectrum": (End.STORE, 2050, 768, False, True),
}


@pytest.fixture(scope="module")
def cp() -> Any:
    problem = cuda_problem()
    if problem is not None:
        pytest.skip(problem)
    import cupy

    return cupy


@pytest.fixture(scope="module")
def facts(cp: Any) -> DeviceFacts:
    return device_facts(0)


class OnGpu:
    """A case's arrays on the device. 16-bit ones travel as bits."""

    def __init__(self, cp: Any, case: LinearCase) -> None:
        self.case = case
        self._cupy = cp
        self._arrays = {name: cp.asarray(self._bits(array)) for name, array in case.arrays.items()}
        if case.in_place:
            self._arrays["output"] = self._arrays["residual"]

    @staticmethod
    def _bits(array: Array) -> Array:
        return np.ascontiguousarray(array).view(np.uint16) if array.itemsize == 2 else array

    @property
    def addresses(self) -> dict[str, int]:
        return {name: array.data.ptr for name, array in self._arrays.items()}

    def reset(self) -> None:
        """Every array as it was made."""
        for name, array in self._arrays.items():
            array.set(self._bits(self.case.arrays[name]))

    def run(self, launch: Launch) -> None:
        kernel = load(launch.source, launch.kernel, launch.defines, 0, specific=launch.specific)
        params = np.frombuffer(launch.params, np.dtype([("bytes", np.uint64, len(launch.params) // 8)]))
        kernel(launch.grid, (launch.threads, 1, 1), (params,), shared_bytes=launch.shared_bytes)
        self._cupy.cuda.get_current_stream().synchronize()

    def read(self, name: str) -> Array:
        return self._arrays[name].get().view(self.case.arrays[name].dtype)


def make_case(product: str, rows: int, dtype: str) -> LinearCase:
    end, features, depth, norm, bias = PRODUCTS[product]
    return LinearCase(end, rows, features, depth, dtype=dtype, norm=norm, bias=bias, in_place=end is End.ADD)


def usable_dtype(facts: DeviceFacts, dtype: str) -> str:
    if facts.capability < ((8, 0) if dtype == "bfloat16" else (7, 5)):
        pytest.skip(f"{dtype} products need a newer GPU than compute capability {facts.capability}")
    return dtype


def some_rows(rows: int) -> Array:
    """Rows to compare: the first and the last few, and some between."""
    return np.unique(
        np.concatenate([np.arange(min(rows, 33)), np.arange(0, rows, 97), np.arange(max(0, rows - 33), rows)])
    )


def check(cp: Any, facts: DeviceFacts, case: LinearCase, chosen: list[Shape] | None) -> None:
    """Runs the case in the shapes (the planner's own choice: None), twice each."""
    gpu, rows = OnGpu(cp, case), some_rows(case.rows)
    request = case.request(gpu.addresses, facts.capability, facts.multiprocessors)
    expected = case.expected(rows)
    for shape in chosen or [best_shape(problem_of(request), case.rows, case.rows)]:
        launch = plan_shape(request, shape)
        bits = []
        for _ in range(2):
            gpu.reset()
            gpu.run(launch)
            bits.append({name: gpu.read(name).view(np.uint8) for name in expected})
        assert_as_expected(case, expected, gpu.read, rows)
        for name in expected:
            np.testing.assert_array_equal(bits[0][name], bits[1][name], f"{name} is not the same twice in {shape}")


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_the_planned_kernel_is_within_the_bound(cp: Any, facts: DeviceFacts, product: str, rows: int) -> None:
    dtype = "float16" if facts.capability < (8, 0) else "bfloat16"
    check(cp, facts, make_case(product, rows, usable_dtype(facts, dtype)), None)


@pytest.mark.parametrize("rows", EVERY_SHAPE_AT)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_shape_is_within_the_bound(cp: Any, facts: DeviceFacts, product: str, dtype: str, rows: int) -> None:
    case = make_case(product, rows, usable_dtype(facts, dtype))
    request = case.request({"weights": 16, "input": 16, "output": 16}, facts.capability, facts.multiprocessors)
    check(cp, facts, case, list(shapes(problem_of(request))))


@pytest.mark.parametrize(
    "case",
    [
        LinearCase(End.STORE, 77, 2050, 768, norm=True, bias=True, padding=1, dtype="float16"),
        LinearCase(End.STORE, 5, 97, 40, norm=True, dtype="float16"),
        LinearCase(End.RESIDUAL, 70, 40, 120, padding=24, dtype="float16"),
        LinearCase(End.SWIGLU, 19, 2 * 100, 40, norm=True, padding=28, dtype="float16"),
    ],
    ids=str,
)
def test_odd_sizes(cp: Any, facts: DeviceFacts, case: LinearCase) -> None:
    request = case.request({"weights": 16, "input": 16, "output": 16}, facts.capability, facts.multiprocessors)
    check(cp, facts, case, list(shapes(problem_of(request))))


def test_few_rows_have_the_same_bits_alone_and_in_company(cp: Any, facts: DeviceFacts) -> None:
    """The form for one voice and those for more add in the same order."""
    alone, company = (make_case("down", rows, "float16") for rows in (1, 32))
    results = []
    for case in (alone, company):
        gpu = OnGpu(cp, case)
        request = case.request(gpu.addresses, facts.capability, facts.multiprocessors)
        for shape in shapes(problem_of(request)):
            if shape.kernel == "linear_rows":
                gpu.reset()
                gpu.run(plan_shape(request, shape))
                results.append([gpu.read(name)[0].view(np.uint8) for name in case.expected(np.arange(1))])
    assert len(results) > 3
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(ours, theirs)
