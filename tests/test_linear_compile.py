"""The linear kernels compile for every architecture, without spills and within their registers; no GPU needed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from compiling import MULTIPROCESSORS, REGISTERS, case_name, registers_without_spills

from soprano_cupy.cuda.compiler import Nvrtc
from soprano_cupy.gpu import linear
from soprano_cupy.gpu.launch import Launch
from soprano_cupy.gpu.linear import DTYPE_DEFINES, End, LinearShape, problem_of
from soprano_cupy.gpu.linear_shapes import best_shape, tiles_of

LANGUAGE_MODEL = (
    LinearShape(End.STORE, 768, 512, norm=True),
    LinearShape(End.RESIDUAL, 512, 512),
    LinearShape(End.SWIGLU, 4608, 512, norm=True),
    LinearShape(End.RESIDUAL, 512, 2304),
    LinearShape(End.STORE, 8192, 512, norm=True),
)
DECODER = (
    LinearShape(End.GELU, 2304, 768),
    LinearShape(End.ADD, 768, 2304),
    LinearShape(End.STORE, 2050, 768),
)
PRODUCTS = (*LANGUAGE_MODEL, *DECODER)


def launch_in(shape: linear.Shape, product: LinearShape, dtype: str, capability: tuple[int, int]) -> Launch:
    request = linear.sample_request(product, dtype, capability, 132, shape.rows)
    return linear.plan_shape(request, shape)


def cases() -> Iterator[tuple[int, Launch]]:
    """On 9.0 every tile with every end and what one voice uses; elsewhere what one voice and a prompt use, in turns."""
    for number, multiprocessors in MULTIPROCESSORS.items():
        capability, dtype = (number // 10, number % 10), "float16" if number < 80 else "bfloat16"
        chosen = {}
        for product, rows in ((p, r) for p in PRODUCTS for r in (1, 12, 30, 300, 3000)):
            request = linear.sample_request(product, dtype, capability, multiprocessors, rows)
            launch = linear.plan_shape(request, best_shape(problem_of(request), rows, rows))
            chosen[launch.source, launch.defines] = launch
            if number == 90 and rows == 1:
                for tile in tiles_of(problem_of(request)):
                    whole = launch_in(tile, product, dtype, capability)
                    chosen[whole.source, whole.defines] = whole
        for i, launch in enumerate(chosen.values()):
            if number == 90 or i % (2 if number == 75 else 5) == 0:
                yield number, launch


CASES = list(cases())


@pytest.mark.parametrize(("number", "launch"), CASES, ids=[case_name(*case) for case in CASES])
def test_compiles_within_its_registers(nvrtc: Nvrtc, number: int, launch: Launch) -> None:
    if number not in nvrtc.architectures:
        pytest.skip("NVRTC {}.{} does not compile for sm_{}".format(*nvrtc.version, number))
    (registers,) = registers_without_spills(nvrtc, number, launch)  # one kernel in each file
    assert registers <= register_ceiling(launch)


def register_ceiling(launch: Launch) -> int:
    """What each thread may use: of tiles, for the blocks that are to share a multiprocessor; of rows, for 1,024 threads
    on it when one voice speaks, else for 512."""
    constants = dict(launch.defines)
    if launch.source == "linear_tiles.cu":
        return min(255, REGISTERS // launch.threads // constants["MIN_BLOCKS"] // 8 * 8)
    one_voice = constants["COLUMNS"] * constants["FEATURE_TILES"] == 1 and constants["DEPTH"] <= 512
    return 64 if one_voice else 128


def test_a_voice_needs_few_kernels() -> None:
    """A cold start compiles them all."""
    for dtype, capability in (("bfloat16", (8, 9)), ("float16", (7, 5))):
        decode = list(linear.variants(LANGUAGE_MODEL, dtype, capability, 128, [1]))
        prompt = list(linear.variants(LANGUAGE_MODEL, dtype, capability, 128, [64]))
        decoder = list(linear.variants(DECODER, dtype, capability, 128, [36]))
        assert [len(group) for group in (decode, prompt, decoder)] <= [5, 5, 3]
        assert DTYPE_DEFINES[dtype] in dict(decode[0].defines)
