"""The wgmma linear kernel on a GPU of compute capability 9.0: every variant and end against float64; repeatability."""

from __future__ import annotations

from typing import Any

import pytest
from hopper_products import Case, Product, launched

from soprano_cupy.cuda.module import device_facts
from soprano_cupy.device import cuda_problem
from soprano_cupy.gpu import linear_hopper
from soprano_cupy.gpu.linear import End
from soprano_cupy.gpu.linear_hopper import CANDIDATES, Variant

pytestmark = pytest.mark.gpu

# Sizes of the model and odd ones: rows, features and depths off every tile.
CASES = [
    Case(End.STORE, 128, 64, 128),
    Case(End.STORE, 768, 512, 333, norm=True, spare=40),
    Case(End.STORE, 2050, 768, 700, "float16", bias=True),
    Case(End.STORE, 1030, 200, 777, "float16", norm=True, skew=3),
    Case(End.SWIGLU, 4608, 512, 333, norm=True, spare=40),
    Case(End.SWIGLU, 392, 136, 257, "float16"),
    Case(End.RESIDUAL, 512, 512, 333, spare=40),
    Case(End.RESIDUAL, 512, 2304, 129),
    Case(End.RESIDUAL, 200, 328, 513, "float16", norm=True),
    Case(End.GELU, 2304, 768, 1111, "float16", bias=True, spare=3),
    Case(End.GELU, 200, 72, 300, bias=True),
    Case(End.ADD, 768, 2304, 1111, "float16", bias=True, spare=3),
]


@pytest.fixture(scope="module")
def cp() -> Any:
    problem = cuda_problem()
    if problem is not None:
        pytest.skip(problem)
    if device_facts(0).capability != linear_hopper.CAPABILITY:
        pytest.skip("wgmma needs a GPU of compute capability 9.0")
    import cupy

    return cupy


@pytest.fixture(scope="module")
def products(cp: Any) -> dict[Case, Product]:
    return {case: Product(case, seed) for seed, case in enumerate(CASES)}


def run(product: Product, variant: Variant, blocks: int | None = None) -> list[Any]:
    product.reset()
    launched(product, variant, blocks=blocks)()
    return [array.copy() for array in (product.output, product.residual, product.next_sums)]


def same(left: list[Any], right: list[Any]) -> bool:
    return all(bool((a.view("uint8") == b.view("uint8")).all()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("variant", CANDIDATES, ids=str)
def test_matches_float64_and_repeats(products, case, variant):
    """Within the bound of float32 sums and one rounding of the result, and the same bits in any number of blocks."""
    if not linear_hopper.serves(variant, products[case].request()):
        pytest.skip("not for this variant")
    product = products[case]
    first = run(product, variant)
    errors = product.errors()
    assert max(errors.values()) <= 1, errors
    for blocks in (1, 7, None) if variant.splits == 1 else (None, None):  # clusters have one tile each
        assert same(first, run(product, variant, blocks)), f"other bits with {blocks} blocks"


@pytest.mark.parametrize(
    "case",
    [
        Case(End.STORE, 8192, 512, 2048, norm=True),
        Case(End.SWIGLU, 4608, 512, 2048, norm=True),
        Case(End.RESIDUAL, 512, 2304, 2048),
        Case(End.GELU, 2304, 768, 8192, "float16", bias=True),
        Case(End.ADD, 768, 2304, 16384, "float16", bias=True),
        Case(End.STORE, 2050, 768, 8192, "float16", bias=True),
    ],
    ids=str,
)
def test_real_sizes(cp, case):
    """What the planner picks, at the sizes of full batches, many times over."""
    product = Product(case)
    variant = linear_hopper.choose(product.request())
    first = run(product, variant)
    errors = product.errors()
    assert max(errors.values()) <= 1, errors
    for _ in range(20):
        assert same(first, run(product, variant))


def test_rows_do_not_depend_on_the_rows_beside_them(cp):
    """A variant gives a row the same bits in a launch of few rows as in one of many."""
    variant = CANDIDATES[0]
    many, few = (Product(Case(End.SWIGLU, 4608, 512, rows, norm=True), 3) for rows in (512, 200))
    few.input[...] = many.input[:200]
    few.square_sums[...] = many.square_sums[:200]
    few.packed[0][...] = many.packed[0]
    assert bool((run(few, variant)[0] == run(many, variant)[0][:200]).all())
