"""The persistent decode kernel's plan: who computes what, the order of the weights, sizes, the compiler's report."""

from __future__ import annotations

import re
from dataclasses import replace

import emulation
import numpy as np
import pytest
from persistent_host import gather_on_host

from soprano_cupy.cuda.compiler import compile_options, find_nvrtc
from soprano_cupy.cuda.source import joined_source
from soprano_cupy.errors import DeviceError
from soprano_cupy.gpu import persistent
from soprano_cupy.gpu.packing import interleave_gate_up, pack_linear, unpack_linear
from soprano_cupy.gpu.persistent_schedule import (
    BLOCK_BYTES,
    OUTSIDE,
    Shape,
    head_products,
    layer_products,
    qkv_tile,
    share,
)  # fmt: skip
from soprano_cupy.gpu.persistent_weights import pack_persistent, plan_gather
from soprano_cupy.gpu.weights import Layer
from soprano_cupy.testing import SOPRANO_1_1_80M

LIMIT = persistent.SHARED_BYTES[9, 0]
BIG = [Shape.of(SOPRANO_1_1_80M, *grid) for grid in persistent.GRIDS[:4]]
SMALL = [
    Shape(64, 4, 1, 32, 160, 200, 2, 2), Shape(96, 6, 2, 64, 200, 333, 2, 6, 2), Shape(80, 4, 4, 32, 72, 64, 4, 2),
    Shape(64, 4, 2, 32, 160, 250, 1, 4),
]  # fmt: skip


@pytest.mark.parametrize("shape", [*BIG, *SMALL], ids=str)
def test_everything_is_computed_once(shape: Shape) -> None:
    """Every tile and step of O, gate and up, down and the head by one block; of QKV, the keys by each cluster."""
    work: dict[str, list[tuple[int, int]]] = {name: [] for name in ("qkv", "o", "gate_up", "down", "head")}
    for block in range(shape.blocks):
        products = layer_products(shape, block // shape.ranks, block % shape.ranks) + head_products(shape, block)
        for product in products:
            work[product.matrix] += [(tile, step) for tile in product.tiles for step in product.steps]
    sizes = {
        "o": (shape.hidden_tiles, shape.heads * shape.head_dim // 16), "head": (shape.head_tiles, shape.hidden_tiles),
        "gate_up": (shape.channels // 8, shape.hidden_tiles), "down": (shape.hidden_tiles, shape.channels // 16),
    }  # fmt: skip
    for name, (tiles, steps) in sizes.items():
        assert sorted(work[name]) == [(tile, step) for tile in range(tiles) for step in range(steps)], name
    queries = shape.heads * shape.head_dim // 16
    times: dict[int, int] = {}
    for tile, _ in work["qkv"]:
        times[tile] = times.get(tile, 0) + 1
    assert all(times[tile] == shape.hidden_tiles for tile in range(queries))
    assert sorted(times) == list(range(queries + 2 * shape.kv_heads * shape.head_dim // 16))
    sharing = shape.clusters * shape.local_kv // shape.kv_heads
    assert all(count == shape.hidden_tiles * sharing for tile, count in times.items() if tile >= queries)


def test_tiles_of_a_cluster() -> None:
    """Six heads on two key-value heads in two clusters: each gets its own queries and the key head they read."""
    shape = Shape(96, 6, 2, 32, 96, 64, 2, 3)
    assert [qkv_tile(shape, 1, t) for t in range(shape.qkv_tiles)] == [6, 7, 8, 9, 10, 11, 14, 15, 18, 19]
    assert [list(share(7, rank, 3)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5, 6]]


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_streams(shape: Shape) -> None:
    """Every block's stream, read as the kernel reads it, gives the products of the matrices."""
    rng = np.random.default_rng(1)
    q_size, kv_size, f = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.intermediate

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.integers(-8, 9, (rows, columns)).astype(np.float16)

    def norm(size: int) -> np.ndarray:
        return rng.standard_normal(size).astype(np.float32)

    plain = [
        {"qkv": matrix(q_size + 2 * kv_size, shape.hidden), "o": matrix(shape.hidden, q_size),
         "gate_up": interleave_gate_up(matrix(f, shape.hidden), matrix(f, shape.hidden), np),
         "down": matrix(shape.hidden, f)}
        for _ in range(2)
    ]  # fmt: skip
    layers = [
        Layer(norm(shape.hidden), pack_linear(m["qkv"], np), norm(shape.head_dim), norm(shape.head_dim),
              pack_linear(m["o"], np), norm(shape.hidden), pack_linear(m["gate_up"], np), pack_linear(m["down"], np))
        for m in plain
    ]  # fmt: skip
    head = matrix(shape.vocab, shape.hidden)
    packed = pack_persistent(shape, layers, pack_linear(head, np), norm(shape.hidden), np, gather_on_host)
    assert (packed.gains[1, 1] == layers[1].post_attention_norm).all()
    assert (packed.head_gains[1, 0] == layers[1].q_norm).all()
    for block in range(shape.blocks):
        at = 0
        for matrices in [*plain, {"head": head}]:
            products = head_products(shape, block) if "head" in matrices else layer_products(
                shape, block // shape.ranks, block % shape.ranks)  # fmt: skip
            for product in products:
                begin = at
                at += product.blocks
                for t, tile in enumerate(product.tiles):
                    for k, step in enumerate(product.steps):
                        bits = packed.stream[block].reshape(-1, BLOCK_BYTES)[begin + t * len(product.steps) + k]
                        assert (block_of(bits) == part(matrices[product.matrix], tile, step)).all()
        assert at * BLOCK_BYTES <= packed.stream_bytes


def test_blocks_are_gathered() -> None:
    """The kernel beside NumPy: blocks of several matrices in any order, some twice, zeros among them."""
    rng = np.random.default_rng(2)
    matrices = [rng.integers(0, 1 << 16, 256 * count).astype(np.uint16) for count in (3, 1, 7)]
    order = rng.integers(-1, 11, 37)
    order[:2] = OUTSIDE, 10
    addresses = [m.ctypes.data + BLOCK_BYTES * np.arange(m.nbytes // BLOCK_BYTES, dtype=np.uint64) for m in matrices]
    sources = np.concatenate([*addresses, np.zeros(1, np.uint64)])[order]
    target = emulation.poisoned((len(order), BLOCK_BYTES // 4), np.float32).view(np.uint32)
    launch = plan_gather(sources.ctypes.data, target.ctypes.data, len(order), "bfloat16")
    emulation.build(launch.source, dict(launch.defines)).launch(
        launch.kernel, launch.params, grid=[d for d in launch.grid if isinstance(d, int)], threads=launch.threads,
        shared_bytes=0,
        buffers=[emulation.Buffer(target, True), *(emulation.Buffer(array, False) for array in (sources, *matrices))],
    )  # fmt: skip
    assert (target == gather_on_host(matrices, order)).all()
    assert not target[0].any()


def block_of(bits: np.ndarray) -> np.ndarray:
    """16 x 16 weights of 512 packed bytes."""
    wide = np.concatenate([bits.view(np.float16), np.zeros(3 * 256, np.float16)])
    return unpack_linear(wide, 16, 64, np)[:, :16]


def part(matrix: np.ndarray, tile: int, step: int) -> np.ndarray:
    found = np.zeros((16, 16), np.float16)
    inside = matrix[tile * 16 : tile * 16 + 16, step * 16 : step * 16 + 16]
    found[: inside.shape[0], : inside.shape[1]] = inside
    return found


def test_what_fits() -> None:
    """A layer's weights of a block lie in its shared memory: on 64 multiprocessors, and for up to four voices."""
    for voices, fits in ((1, True), (2, True), (4, True), (8, False)):
        shape = Shape.of(SOPRANO_1_1_80M, 4, 16, 2 if voices < 8 else 1, voices)
        assert shape.problem() is None
        assert (persistent.shared_bytes(shape) <= LIMIT) == fits
    assert sum(BIG[0].room_bytes()) == 2 * (2 * 16 * 512 + 2 * 16 * 128 + 5 * 16 * 512 + 2 * 16 * 576)
    for shape in BIG[2:]:
        assert persistent.shared_bytes(shape) > LIMIT


def test_refusals() -> None:
    base = Shape(512, 4, 1, 128, 2304, 8192, 4, 16)
    assert base.problem() is None
    for change, word in (
        ({"clusters": 3}, "clusters"), ({"hidden": 520}, "hidden"), ({"head_dim": 80}, "80 dimensions"),
        ({"ranks": 6, "clusters": 1}, "ranks"), ({"intermediate": 64}, "64 channels"), ({"dim_parts": 8}, "dimensions"),
        ({"heads": 6, "kv_heads": 2, "clusters": 3, "ranks": 3}, "groups"),
    ):  # fmt: skip
        problem = replace(base, **change).problem()
        assert problem is not None, change
        assert word in problem, problem
    for code in persistent.WAITS:
        assert isinstance(persistent.stalled(code), DeviceError)


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("sm_90", "bfloat16"), ("sm_90", "float16"), ("sm_100", "bfloat16")]
)
def test_compiles(architecture: str, dtype: str) -> None:
    """For newer architectures too; without spills where it has been tuned."""
    nvrtc = find_nvrtc()
    if int(architecture[3:]) not in nvrtc.architectures:
        pytest.skip(f"NVRTC {nvrtc.version} does not know {architecture}")
    shape = BIG[0]
    defines = persistent.kernel_defines(shape, dtype)
    binary = nvrtc.compile(joined_source(persistent.SOURCE), persistent.SOURCE, compile_options(architecture, defines))
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", binary.log)]
    assert registers
    assert max(registers) <= 168  # of ten warps, three share the 16,384 registers of a quarter of a multiprocessor
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill stores", binary.log)]
    assert spills
    if architecture == "sm_90":
        assert max(spills) == 0
