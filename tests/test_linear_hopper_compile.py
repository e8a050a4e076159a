"""The wgmma linear kernel where there is no GPU: it compiles for sm_90a without spills or serialised products, and its
layouts agree with a model of the hardware's."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from soprano_cupy.cuda.compiler import Binary, Nvrtc, compile_options
from soprano_cupy.cuda.source import joined_source
from soprano_cupy.gpu import linear_hopper
from soprano_cupy.gpu.launch import Symbol
from soprano_cupy.gpu.linear import End, LinearRequest
from soprano_cupy.gpu.linear_hopper import CANDIDATES, Variant
from soprano_cupy.gpu.packing import pack_linear

MULTIPROCESSOR_SHARED = 228 * 1024
BLOCK_RESERVED = 1024  # of each block, besides
REGISTER_FILE = 65_536
SMALL, SQUARE, SQUARE_TURNS, LARGE = (
    next(variant for variant in CANDIDATES if str(variant).startswith(name))
    for name in ("64x64 g1 w1", "128x128 g1 w2", "128x128 g2 w1", "128x256 g1 w2")
)
WARNINGS = re.compile(r"warning|C75\d\d|serializ|Potential Performance Loss", re.IGNORECASE)


def request(**changes: object) -> LinearRequest:
    base = LinearRequest(
        end=End.STORE, dtype="bfloat16", capability=(9, 0), multiprocessors=132, rows=512, features=768, depth=512,
        weights=1 << 20, input=2 << 20, input_stride=512, output=3 << 20, output_stride=768, square_sums=4 << 20,
    )  # fmt: skip
    return replace(base, **changes)


def compile_variant(nvrtc: Nvrtc, variant: Variant, wanted: LinearRequest, extra: str = "") -> Binary:
    text = joined_source(linear_hopper.SOURCE) + extra
    return nvrtc.compile(text, linear_hopper.SOURCE, compile_options("sm_90a", (*wanted.defines, *variant.defines)))


# Products of the language model and of the decoder: end, features, depth, type, and the address of the norm's sums.
PRODUCTS = [
    (End.STORE, 768, 512, "bfloat16", 4 << 20), (End.RESIDUAL, 512, 512, "bfloat16", 0),
    (End.SWIGLU, 4608, 512, "bfloat16", 4 << 20), (End.RESIDUAL, 512, 2304, "bfloat16", 0),
    (End.STORE, 8192, 512, "bfloat16", 4 << 20), (End.GELU, 2304, 768, "float16", 0),
    (End.ADD, 768, 2304, "float16", 0), (End.STORE, 2050, 768, "float16", 0),
]  # fmt: skip
ROWS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def wanted_of(variant: Variant) -> list[LinearRequest]:
    """The products for which the planner picks this variant, one of each end, and a store whatever it picks."""
    found = {End.STORE: request()}
    for end, features, depth, dtype, sums in PRODUCTS:
        for rows in ROWS:
            stride = features // 2 if end is End.SWIGLU else features
            wanted = request(end=end, dtype=dtype, rows=rows, features=features, depth=depth, square_sums=sums,
                             input_stride=depth, output_stride=stride, residual_stride=stride)  # fmt: skip
            if linear_hopper.choose(wanted) == variant:
                found[end] = wanted
    return list(found.values())


@pytest.mark.parametrize("variant", CANDIDATES, ids=str)
def test_compiles_without_spills_or_serialised_products(nvrtc, variant):
    for wanted in wanted_of(variant):
        log = compile_variant(nvrtc, variant, wanted).log
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in log, f"{wanted.end.name}: {log}"
        assert not WARNINGS.findall(log), f"{wanted.end.name}: {log}"
        registers = int(re.search(r"Used (\d+) registers", log)[1])
        assert registers <= REGISTER_FILE // (variant.threads * variant.blocks)
        if variant.consumer_registers:  # moved from what a launch grants
            granted = (variant.consumers + 1) * registers
            assert variant.consumers * variant.consumer_registers + variant.producer_registers <= granted


def test_resources_fit_the_chip():
    for variant in CANDIDATES:
        assert variant.blocks * (variant.shared_bytes + BLOCK_RESERVED) <= MULTIPROCESSOR_SHARED, str(variant)
        assert variant.blocks * variant.threads <= 2048
        for registers in (variant.consumer_registers, variant.producer_registers):
            assert registers % 8 == 0


def test_the_host_knows_the_kernels_sizes(nvrtc):
    for variant in CANDIDATES[::4]:
        checks = (
            f"static_assert(sizeof(LinearHopperParams) == {len(linear_hopper.plan(request()).params)});\n"
            f"static_assert(BLOCK_FEATURES == {variant.features} && THREADS == {variant.threads});\n"
            f"static_assert(WEIGHT_BYTES + INPUT_BYTES == {variant.stage_bytes});\n"
            f"static_assert(STAGING_BYTES == {linear_hopper.STAGING_BYTES});\n"
            "static_assert(Shared(1).barriers + 8 * (2 * STAGES + 2 * FACTOR_SLOTS) - 1 <= "
            f"{variant.shared_bytes});\n"
        )
        assert compile_variant(nvrtc, variant, request(), checks).cubin


# ---- layouts ----


def fragment(lane: int, word: int) -> list[tuple[int, int]]:
    """(row, column) of the two elements that a lane passes as word 0 to 3 of the A operand (PTX ISA, wgmma m64k16,
    within the 16 rows of its warp)."""
    row, column = lane // 4 + 8 * (word % 2), 2 * (lane % 4) + 8 * (word // 2)
    return [(row, column), (row, column + 1)]


def test_packed_weights_are_the_left_operand():
    """A lane's 16 bytes of a packed tile, at the address that the kernel reads, are its words of the operand."""
    variant = CANDIDATES[-1]
    features, depth = 2 * variant.features, 128
    weights = np.arange(features * depth, dtype=np.uint16).reshape(features, depth)  # all different
    packed = pack_linear(weights, np)
    step, block = 1, 1
    # what the tensor map brings: boxes of (packed tiles of a block, 4, 256)
    tiles = packed.reshape(features // 16, depth // 16, 256)
    stage = tiles[block * variant.features // 16 :][: variant.features // 16, 4 * step : 4 * step + 4].reshape(-1)
    for member in range(variant.warpgroups):
        for warp in range(4):
            for product in range(variant.products):
                tile = (member * 4 + warp) * variant.products + product
                for k in range(4):
                    for lane in range(32):
                        at = (tile * 2048 + k * 512 + lane * 16) // 2
                        for word in range(4):
                            for half, (row, column) in enumerate(fragment(lane, word)):
                                want = weights[block * variant.features + tile * 16 + row, step * 64 + k * 16 + column]
                                assert stage[at + 2 * word + half] == want


def test_float_staging_meets_no_bank_twice():
    for j in range(4):
        for v in range(4):
            banks = {
                ((8 * j + v % 2 + 2 * (lane % 4)) * 80 + lane // 4 * 4 + v // 2 * 32) // 4 % 32 for lane in range(32)
            }
            assert len(banks) == 32
    rows = [lane // 8 + 4 * (lane // 4 % 2) for lane in range(32)]
    assert sorted((row, lane % 4) for lane, row in enumerate(rows)) == [(r, q) for r in range(8) for q in range(4)]
    for eight in range(0, 32, 8):  # 16-byte accesses go eight lanes at a time
        banks = {
            (rows[lane] * 80 + lane % 4 * 16) // 4 % 32 + word for lane in range(eight, eight + 8) for word in range(4)
        }
        assert len(banks) == 32


@pytest.mark.parametrize("chunks", [4, 8, 16])
def test_element_staging_is_a_permutation_without_conflicts(nvrtc, chunks):
    """16-byte places of rows of 4, 8 and 16 chunks; eight rows of a matrix, and eight neighbours of a row, spread."""

    def place(row: int, chunk: int) -> int:
        if chunks == 4:
            return row // 2 * 128 + ((row % 2 * 4 + (chunk ^ (row // 2 & 3))) << 4)
        return row * chunks * 16 + ((chunk ^ (row & 7)) << 4)

    rows = 8192 // (16 * chunks)
    places = [place(row, chunk) for row in range(rows) for chunk in range(chunks)]
    assert sorted(places) == list(range(0, 8192, 16))
    for first in range(0, rows, 8):
        for chunk in range(chunks):
            assert len({place(row, chunk) // 16 % 8 for row in range(first, first + 8)}) == 8
    for first in range(0, len(places), 8):
        assert len({at // 16 % 8 for at in places[first : first + 8]}) == 8
    variant, end = {
        4: (SMALL, End.SWIGLU), 8: (SMALL, End.GELU), 16: (SQUARE_TURNS, End.GELU),
    }[chunks]  # fmt: skip
    checks = "".join(
        f"static_assert(staged_chunk({row}, {chunk}) == {place(row, chunk)} && CHUNKS_A_ROW == {chunks});\n"
        for row, chunk in ((0, 1), (3, 2), (13, 3), (30, chunks - 1))
    )
    assert compile_variant(nvrtc, variant, request(end=end, square_sums=0), checks).cubin


# ---- host side ----


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"capability": (8, 9)}, "needs compute capability 9.0, not 8.9"),
        ({"capability": (10, 0)}, "not 10.0"),
        ({"rows": 32}, "32 rows are fewer"),
        ({"input_stride": 516}, "multiples of 16 bytes"),
        ({"end": End.RESIDUAL, "residual": 8 << 20, "residual_stride": 770}, "residual's rows"),
        ({"end": End.GELU, "output_stride": 772}, "multiples of 8 elements"),
    ],
)
def test_refusals_say_why(changes, reason):
    assert reason in linear_hopper.refusal(request(**changes))
    assert linear_hopper.plan(request(**changes)) is None


@pytest.mark.parametrize(
    ("changes", "variant", "blocks"),
    [
        ({}, SMALL, 12 * 8),
        ({"rows": 2048, "features": 8192}, SMALL, 264),
        ({"rows": 2048, "features": 8192}, LARGE, 132),
        ({"rows": 130, "features": 80}, SQUARE, 1 * 2),
        ({"rows": Symbol.ROWS, "rows_min": 100, "rows_max": 300}, SMALL, 12 * 5),
    ],
)
def test_the_grid_is_the_tiles_or_what_fits(changes, variant, blocks):
    launch = linear_hopper.plan(request(**changes), variant)
    assert launch.cluster == variant.splits
    assert launch.grid == (blocks, 1, 1)
    assert (launch.threads, launch.shared_bytes, launch.specific) == (variant.threads, variant.shared_bytes, True)


def test_tensor_maps_describe_the_arrays(monkeypatch):
    calls = []

    def record(*arguments: object, **named: object) -> np.ndarray:
        calls.append((arguments, named))
        return np.full(128, len(calls), np.uint8)

    monkeypatch.setattr(linear_hopper, "driver_encodes", lambda: True)
    monkeypatch.setattr(linear_hopper, "encode", record)
    wanted = request(depth=200, input_stride=256, rows=Symbol.ROWS, rows_min=1, rows_max=300, features=770)
    launch = linear_hopper.plan(wanted, SQUARE)
    # columns past the true depth are outside the input's map; weights are padded to 49 tiles of 256 columns
    assert calls[0] == ((2 << 20, "bfloat16", (200, 300), (512,), (64, 128)), {})
    assert calls[1] == ((1 << 20, "bfloat16", (256, 16, 49), (512, 8192), (256, 4, 8)), {"swizzled": False})
    assert launch.params[:104] == wanted.params()
    assert launch.params[128:] == bytes([1] * 128 + [2] * 128)
    assert launch.fields == wanted.fields()


def test_maps_are_blank_without_a_driver(monkeypatch):
    monkeypatch.setattr(linear_hopper, "driver_encodes", lambda: False)
    launch = linear_hopper.plan(request())
    assert len(launch.params) == 384
    assert launch.params[128:] == bytes(256)


def test_the_estimate_prefers_full_multiprocessors():
    """Small products get small tiles, large ones tiles that read each byte for many products."""
    small = linear_hopper.choose(request(end=End.RESIDUAL, features=512, depth=2304, rows=256, residual_stride=512))
    large = linear_hopper.choose(request(end=End.GELU, features=2304, depth=768, rows=8192, output_stride=2304))
    assert small.features * small.rows <= 64 * 128
    assert large.features * large.rows >= 128 * 128
