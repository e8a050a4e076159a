"""The Hopper prefill kernel where there is no GPU: it compiles for sm_90a without spills or serialised products,
and its shared-memory and register layouts agree with a model of the hardware's. On a GPU: benchmarks/hopper_check.py.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from soprano_cupy.attention import hopper
from soprano_cupy.attention.problem import Problem
from soprano_cupy.cuda.compiler import Binary, Nvrtc, compile_options
from soprano_cupy.cuda.source import joined_source
from soprano_cupy.errors import DeviceError

BLOCK_SHARED_LIMIT = 227 * 1024  # of one block on compute capability 9.0
REGISTER_FILE = 65_536
WARNINGS = re.compile(r"warning|C75\d\d|serializ|Potential Performance Loss", re.IGNORECASE)
PANEL_BYTES = hopper.BLOCK_KEYS * 128


def problem(**changes: object) -> Problem:
    base = Problem(
        form="dense", q=None, k=None, v=None, cu_seqlens=None, kv_lengths=None, query_starts=None, key_lengths=None,
        device="cuda:0", dtype="bfloat16", causal=True, scale=1.0, batch=2, total_q=600, seqlen_q=300, seqlen_k=300,
        num_heads=4, num_kv_heads=1, head_dim=128,
    )  # fmt: skip
    return replace(base, **changes)


def compile_kernel(nvrtc: Nvrtc, call: Problem, extra: str = "", splits: int = 1) -> Binary:
    text = joined_source(hopper.SOURCE) + extra
    return nvrtc.compile(text, hopper.SOURCE, compile_options("sm_90a", hopper.defines(call, splits)))


@pytest.mark.parametrize(
    ("head_dim", "dtype", "causal", "heads", "splits"),
    [(dim, dtype, causal, 4, 1) for dim in (64, 128) for dtype in ("bfloat16", "float16") for causal in (True, False)]
    + [(128, "bfloat16", True, 128, 1), (128, "bfloat16", False, 1, 1)]
    + [(64, "bfloat16", True, 4, 2), (128, "bfloat16", True, 4, 2), (128, "float16", False, 4, 4)],
)
def test_compiles_without_spills_or_serialised_products(nvrtc, head_dim, dtype, causal, heads, splits):
    call = problem(head_dim=head_dim, dtype=dtype, causal=causal, num_heads=heads)
    binary = compile_kernel(nvrtc, call, splits=splits)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in binary.log
    assert not WARNINGS.findall(binary.log), binary.log
    registers = int(re.search(r"Used (\d+) registers", binary.log)[1])
    # what a launch grants each thread; setmaxnreg then moves registers from the producer to the consumers
    assert registers == REGISTER_FILE // hopper.TILES[head_dim].threads // 8 * 8
    assert b"attention_prefill_hopper" in binary.cubin


def test_the_compiler_reports_serialised_products(nvrtc):
    """The warning that the test above looks for does reach the log."""
    extra = """
extern "C" __global__ void serialised(float* out, u64 a, u64 b) {
    float d[64];
    for (int i = 0; i < 64; ++i) d[i] = out[i];
    for (int n = 0; n < 4; ++n) {
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        wgmma_shared<true>(d, a, b + n);
        wgmma_commit();
        d[n] += 1.0f;
    }
    wgmma_wait<0>(d);
    for (int i = 0; i < 64; ++i) out[i] = d[i];
}
"""
    assert WARNINGS.search(compile_kernel(nvrtc, problem(), extra).log)


def test_resources_fit_the_chip():
    for head_dim, tiles in hopper.TILES.items():
        assert tiles.shared_bytes(head_dim) <= BLOCK_SHARED_LIMIT
        assert 128 * (tiles.producer_registers + tiles.consumers * tiles.consumer_registers) <= REGISTER_FILE
        assert tiles.threads <= 1024


# ---- shared memory: what a tensor-map copy writes, and what a matrix descriptor reads (PTX ISA, wgmma) ----


def copied_tile(rows: int, columns: int, base: int) -> dict[int, tuple[int, int]]:
    """Byte address of each 16-bit element (row, column) after a copy with the 128-byte swizzle, panel by panel."""
    places = {}
    for row in range(rows):
        for column in range(columns):
            panel, inner = divmod(column, 64)
            chunk, rest = divmod(2 * inner, 16)
            places[base + panel * rows * 128 + row * 128 + 16 * (chunk ^ (row % 8)) + rest] = (row, column)
    return places


def swizzle(address: int) -> int:
    """Address bits 4 to 6 are exclusive-ored with bits 7 to 9."""
    return address ^ (address >> 3 & 0x70)


def fields(descriptor: int) -> tuple[int, int, int]:
    """Start, leading and stride offsets in bytes of a descriptor with the 128-byte swizzle."""
    assert descriptor >> 62 == 1
    assert descriptor >> 49 & 7 == 0  # tiles start on multiples of 1024
    return (descriptor & 0x3FFF) << 4, (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4


def k_major_address(descriptor: int, outer: int, k: int) -> int:
    start, _, stride = fields(descriptor)
    return swizzle(start + outer % 8 * 128 + outer // 8 * stride + 2 * k)


def n_major_address(descriptor: int, n: int, k: int) -> int:
    start, leading, stride = fields(descriptor)
    return swizzle(start + n % 64 * 2 + n // 64 * leading + k % 8 * 128 + k // 8 * stride)


def k_major(address: int) -> int:
    return address >> 4 | 1 << 16 | 64 << 32 | 1 << 62


def n_major(address: int) -> int:
    return address >> 4 | PANEL_BYTES >> 4 << 16 | 64 << 32 | 1 << 62


@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_read_the_right_elements(head_dim):
    """S = Q K^T takes 16 columns a step: row r of warpgroup g is tile row 64 g + r, key n is tile row n."""
    base = 0x8C00
    places = copied_tile(128, head_dim, base)
    for step in range(head_dim // 16):
        offset = step // 4 * (PANEL_BYTES >> 4) + step % 4 * 2
        for k in range(16):
            for outer in range(64):
                for group in range(2):
                    address = k_major_address(k_major(base + group * 64 * 128) + offset, outer, k)
                    assert places[address] == (64 * group + outer, 16 * step + k)
            for key in range(128):
                assert places[k_major_address(k_major(base) + offset, key, k)] == (key, 16 * step + k)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_output_reads_the_right_elements(head_dim):
    """O = P V takes 16 keys a step, columns of V along N."""
    base = 0x10400
    places = copied_tile(128, head_dim, base)
    for step in range(8):
        descriptor = n_major(base) + step * 128
        for k in range(16):
            for n in range(head_dim):
                assert places[n_major_address(descriptor, n, k)] == (16 * step + k, n)


def test_the_kernel_builds_the_modelled_descriptors(nvrtc):
    checks = "".join(
        f"static_assert(descriptor_k_major({address}) == {k_major(address)}ull);\n"
        f"static_assert(descriptor_n_major<{PANEL_BYTES}>({address}) == {n_major(address)}ull);\n"
        f"static_assert(KV_PANEL_BYTES == {PANEL_BYTES} && Q_PANEL_BYTES == {PANEL_BYTES});\n"
        for address in (0x400, 0x8C00, 0x38000)
    )
    assert compile_kernel(nvrtc, problem(), checks).cubin
    with pytest.raises(DeviceError, match="static"):
        compile_kernel(nvrtc, problem(), "static_assert(descriptor_k_major(1024) == 0);\n")


def test_accumulators_are_the_next_products_operand():
    """Lane l, register i of S holds a row and key; packed in pairs they are P's fragments without any exchange."""
    for lane in range(32):
        for pair in range(32):  # p[pair] = (s[2 pair], s[2 pair + 1])
            held = [
                (lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2) for i in (2 * pair, 2 * pair + 1)
            ]
            step, register = divmod(pair, 4)  # operand register 0 to 3 of 16 keys
            row = lane // 4 + 8 * (register % 2)
            first = 16 * step + 8 * (register // 2) + 2 * (lane % 4)
            assert held == [(row, first), (row, first + 1)]


def test_quad_transpose_gives_each_lane_sixteen_bytes_of_a_row():
    words = np.array([[10 * lane + t for t in range(4)] for lane in range(4)])  # word t of lane
    for bit in (1, 2):
        before = words.copy()
        for lane in range(4):
            for low in (t for t in range(4) if not t & bit):
                partner = lane ^ bit  # an upper lane sends its lower word and keeps the upper, and vice versa
                sent = before[partner][low if partner & bit else low | bit]
                words[lane][low if lane & bit else low | bit] = sent
    np.testing.assert_array_equal(words, [[10 * t + lane for t in range(4)] for lane in range(4)])


# ---- host side ----


@pytest.mark.parametrize(
    ("changes", "capability", "reason"),
    [
        ({}, 80, "needs compute capability 9.0, not 8.0"),
        ({}, 100, "not 10.0"),
        ({"dtype": "float32"}, 90, "not float32"),
        ({"head_dim": 32}, 90, "not 32"),
        ({"num_heads": 6, "num_kv_heads": 1}, 90, "6 query heads"),
    ],
)
def test_refusals_say_why(changes, capability, reason):
    assert reason in hopper.refusal(problem(**changes), capability)


def test_serves_groups_that_fill_a_tile():
    served = [heads for heads in range(1, 130) if hopper.refusal(problem(num_heads=heads), 90) is None]
    assert served == [1, 2, 4, 8, 16, 32, 64, 128]


@pytest.mark.parametrize(
    ("sizes", "splits", "blocks"),
    [
        ({}, 1, 10 * 2),  # 300 tokens of 4 heads in tiles of 32 tokens, 2 sequences
        ({"seqlen_q": 1}, 1, 2),
        ({"num_heads": 8, "num_kv_heads": 8, "seqlen_q": 129}, 1, 2 * 8 * 2),
        ({"seqlen_q": 4096}, 1, 132),  # 256 tiles on persistent blocks
        ({"seqlen_q": 16384}, 1, 1024),  # more than two a multiprocessor: one a block
        ({"seqlen_q": 16384}, 2, 1024 * 2),
        ({}, 4, 10 * 2 * 4),
    ],
)
def test_the_grid_covers_every_row(sizes, splits, blocks):
    call = problem(**sizes)
    plan = hopper.plan(call, 90, 132, splits=splits)
    assert (plan.source, plan.kernel, plan.threads) == (hopper.SOURCE, hopper.FUNCTION, 384)
    assert plan.defines == hopper.defines(call, splits)
    assert plan.shared_memory_bytes == hopper.TILES[128].shared_bytes(128)
    sizes = {name: getattr(call, name) for name in ("batch", "seqlen_q", "num_heads", "num_kv_heads")}
    assert plan.grid(**sizes) == (blocks, 1, 1)


@pytest.mark.parametrize(
    ("batch", "tokens", "head_dim", "splits"),
    [(1, 1024, 128, 2), (1, 4096, 128, 2), (1, 16384, 128, 1), (8, 1024, 128, 1), (1, 1024, 64, 2), (1, 100, 128, 1)],
)
def test_keys_are_split_until_the_gpu_is_full(batch, tokens, head_dim, splits):
    call = problem(batch=batch, seqlen_q=tokens, seqlen_k=tokens, head_dim=head_dim)
    assert hopper.choose_splits(call, 132) == splits
    assert ("SPLITS", splits) in hopper.plan(call, 90, 132).defines


def test_no_plan_where_it_refuses():
    assert hopper.plan(problem(dtype="float32"), 90, 132) is None
    assert hopper.plan(problem(), 89, 132) is None


def device_array(shape: tuple[int, ...], strides: tuple[int, ...], address: int = 4096) -> SimpleNamespace:
    return SimpleNamespace(
        shape=shape, strides=strides, dtype=SimpleNamespace(name="bfloat16"), data=SimpleNamespace(ptr=address)
    )


def test_tensor_maps_describe_the_arrays(monkeypatch):
    calls = []
    monkeypatch.setattr(hopper, "encode", lambda *arguments: calls.append(arguments))
    q = device_array((2, 300, 4, 128), (300 * 1024, 1024, 256, 2))
    k = device_array((2, 300, 1, 128), (1 << 20, 512, 4, 2), 8192)  # the stride of its only head means nothing
    hopper.extra_arguments(problem(q=q, k=k, v=k))
    assert calls[0] == (4096, "bfloat16", (128, 4, 300, 2), (256, 1024, 300 * 1024), (64, 4, 32, 1))
    assert calls[1] == (8192, "bfloat16", (128, 300, 1, 2), (512, 256, 1 << 20), (64, 128, 1, 1))
    assert calls[2] == calls[1]


def test_packed_arrays_are_one_batch_entry(monkeypatch):
    calls = []
    monkeypatch.setattr(hopper, "encode", lambda *arguments: calls.append(arguments))
    array = device_array((600, 4, 128), (1024, 256, 2))
    hopper.extra_arguments(problem(form="packed", q=array, k=array, v=array, num_kv_heads=4))
    assert calls[0][2:] == ((128, 4, 600, 1), (256, 1024, 256), (64, 1, 128, 1))
    assert calls[1][2:] == ((128, 600, 4, 1), (1024, 256, 256), (64, 128, 1, 1))


def test_encode_passes_the_record_on_and_reports_a_refusal(monkeypatch):
    def driver(target, data_type, rank, address, shape, strides, box, steps, *modes):
        assert target % 64 == 0
        assert (data_type, rank, address, modes) == (9, 3, 4096, (0, 3, 3, 0))
        assert (list(shape), list(strides), list(box), list(steps)) == ([128, 7, 5], [256, 2048], [64, 7, 1], [1] * 3)
        ctypes.memset(target, 0xAB, 128)
        return status

    status = 0
    monkeypatch.setattr(hopper, "_encode_tiled", lambda: driver)
    hopper.encode.cache_clear()
    record = hopper.encode(4096, "bfloat16", (128, 7, 5), (256, 2048), (64, 7, 1))
    assert record.shape == (1,)
    assert record.tobytes() == b"\xab" * 128
    hopper.encode.cache_clear()
    status = 1
    with pytest.raises(DeviceError, match="refused a tensor map of shape"):
        hopper.encode(4096, "bfloat16", (128, 7, 5), (256, 2048), (64, 7, 1))
    hopper.encode.cache_clear()


def test_a_missing_driver_is_named(monkeypatch):
    def absent(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(hopper.ctypes, "CDLL", absent)
    hopper._encode_tiled.cache_clear()
    with pytest.raises(DeviceError, match=r"libcuda\.so\.1"):
        hopper._encode_tiled()
    hopper._encode_tiled.cache_clear()
