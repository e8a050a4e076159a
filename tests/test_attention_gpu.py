"""The flash kernels on a GPU: accuracy against float64, every call form, isolation, repeatability, memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from attention_reference import assert_accurate, plain, reference

from soprano_cupy.attention import attention, flash, flash_attention, select_attention, standard_attention
from soprano_cupy.attention.arguments import check
from soprano_cupy.cuda.module import DeviceFacts, device_facts
from soprano_cupy.device import cuda_problem
from soprano_cupy.errors import ParameterError

pytestmark = pytest.mark.gpu

PATHS = ("decode", "prefill", "hopper")
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


@pytest.fixture(scope="module")
def cp() -> Any:
    problem = cuda_problem()
    if problem is not None:
        pytest.skip(problem)
    import cupy

    return cupy


@pytest.fixture
def facts(cp: Any) -> DeviceFacts:
    return device_facts(0)


@dataclass(frozen=True)
class Call:
    """Host arrays of one call; unused keys hold NaN."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    causal: bool
    kv_lengths: np.ndarray | None = None
    cu_seqlens: np.ndarray | None = None

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        return reference(self.q, self.k, self.v, **self._names())

    def baseline(self) -> np.ndarray:
        return plain(self.q, self.k, self.v, **self._names())

    def _names(self) -> dict[str, Any]:
        packed_keys = self.cu_seqlens if self.k.ndim == 3 else None
        return {
            "causal": self.causal,
            "kv_lengths": self.kv_lengths,
            "cu_seqlens_q": self.cu_seqlens,
            "cu_seqlens_k": packed_keys,
        }

    def on_gpu(self, cp: Any) -> tuple[tuple[Any, Any, Any], dict[str, Any]]:
        arrays = (cp.asarray(self.q), cp.asarray(self.k), cp.asarray(self.v))
        return arrays, {"causal": self.causal, "kv_lengths": self.kv_lengths, "cu_seqlens": self.cu_seqlens}


def draw(*shape: int, dtype: str, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, *shape])
    return rng.standard_normal(shape).astype(np.float32).astype(DTYPES[dtype])


def dense(batch: int, queries: int, keys: int, *, dtype: str = "bfloat16", head_dim: int = 128, heads: int = 4,
          kv_heads: int = 1, causal: bool = True, lengths: list[int] | None = None) -> Call:  # fmt: skip
    q = draw(batch, queries, heads, head_dim, dtype=dtype)
    k, v = (draw(batch, keys, kv_heads, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    return _with_lengths(Call(q, k, v, causal), lengths)


def ragged(queries: list[int], *, keys: int | None = None, lengths: list[int] | None = None, dtype: str = "bfloat16",
           head_dim: int = 128, heads: int = 4, kv_heads: int = 1, causal: bool = True) -> Call:  # fmt: skip
    """Packed queries; self-attention, or on a cache of `keys` tokens a sequence."""
    starts = np.cumsum([0, *queries])
    shape = (starts[-1], kv_heads, head_dim) if keys is None else (len(queries), keys, kv_heads, head_dim)
    q = draw(starts[-1], heads, head_dim, dtype=dtype)
    k, v = (draw(*shape, dtype=dtype, seed=seed) for seed in (1, 2))
    return _with_lengths(Call(q, k, v, causal, cu_seqlens=starts), lengths)


def _with_lengths(call: Call, lengths: list[int] | None) -> Call:
    if lengths is None:
        return call
    for i, length in enumerate(lengths):
        call.k[i, length:] = call.v[i, length:] = np.nan
    return Call(call.q, call.k, call.v, call.causal, np.array(lengths), call.cu_seqlens)


def by_path(cp: Any, facts: DeviceFacts, path: str, call: Call) -> tuple[np.ndarray, np.ndarray]:
    """One kernel's result and log-sum-exp, whatever the dispatch would choose."""
    arrays, options = call.on_gpu(cp)
    problem = check(*arrays, **options)
    plan = flash.plan_for(path, problem, facts)
    if plan is None:
        pytest.skip(f"the {path} kernel does not serve this call on {facts.name}")
    lse = cp.full((problem.num_heads, problem.total_q), np.nan, np.float32)
    out = flash.launch(path, plan, problem, facts, lse)
    return out.get(), lse.get()


def assert_right(call: Call, out: np.ndarray, lse: np.ndarray | None = None) -> None:
    expected, expected_lse = call.expected()
    assert_accurate(out, expected, call.baseline())
    if lse is not None:
        seen = np.isfinite(expected_lse)
        assert (lse[~seen] == -np.inf).all()
        # scores carry float32's error of a dot product, far below 1e-4 for these sizes
        np.testing.assert_allclose(lse[seen], expected_lse[seen], rtol=0, atol=1e-4)


LENGTH_PAIRS = [(1, 1), (5, 5), (16, 64), (63, 63), (64, 65), (127, 300), (129, 129), (40, 7), (333, 1000), (700, 700)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), LENGTH_PAIRS)
def test_lengths_on_and_off_the_tiles(
    cp: Any, facts: DeviceFacts, path: str, queries: int, keys: int, causal: bool
) -> None:
    call = dense(2, queries, keys, causal=causal)
    assert_right(call, *by_path(cp, facts, path, call))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (4, 2), (8, 1), (12, 2)])
def test_types_and_heads(
    cp: Any, facts: DeviceFacts, path: str, dtype: str, head_dim: int, heads: int, kv_heads: int
) -> None:
    sizes = {"dtype": dtype, "head_dim": head_dim, "heads": heads, "kv_heads": kv_heads}
    queries = 3 if path == "decode" else 150
    call = dense(2, queries, 150, lengths=[150, 131], **sizes)
    assert_right(call, *by_path(cp, facts, path, call))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("causal", [True, False])
def test_ragged_batches(cp: Any, facts: DeviceFacts, path: str, causal: bool) -> None:
    queries = [1, 16, 2, 7] if path == "decode" else [1, 130, 64, 277]
    for call in (
        ragged(queries, causal=causal),
        ragged(queries, keys=300, causal=causal),
        ragged(queries, keys=300, lengths=[1, 299, 40, 300], causal=causal),
    ):
        assert_right(call, *by_path(cp, facts, path, call))


@pytest.mark.parametrize("queries", [1, 2, 3, 8, 15, 16])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 129, 511, 1023, 1024, 5000])
def test_decode_lengths(cp: Any, facts: DeviceFacts, queries: int, length: int) -> None:
    call = dense(3, queries, max(length, 64), lengths=[length, max(1, length // 2), 1])
    assert_right(call, *by_path(cp, facts, "decode", call))


@pytest.mark.parametrize("path", PATHS)
def test_slices_of_a_real_cache(cp: Any, facts: DeviceFacts, path: str) -> None:
    """(layers, slots, capacity, Hkv, D), everything but the keys in use NaN, and never copied."""
    lengths = [70, 200, 1]
    call = ragged([1] * 3 if path == "decode" else [70, 33, 1], keys=200, lengths=lengths, kv_heads=2)
    caches = [cp.full((4, 5, 512, 2, 128), np.nan, ml_dtypes.bfloat16) for _ in range(2)]
    for cache, values in zip(caches, (call.k, call.v), strict=True):
        for i, length in enumerate(lengths):
            cache[2, i, :length] = cp.asarray(values[i, :length])
    k, v = (cache[2, :3] for cache in caches)
    problem = check(cp.asarray(call.q), k, v, kv_lengths=call.kv_lengths, cu_seqlens=call.cu_seqlens)
    assert flash.kernel_ready(problem).k is k
    plan = flash.plan_for(path, problem, facts)
    if plan is None:
        pytest.skip(f"no {path} kernel on {facts.name}")
    assert_right(call, flash.launch(path, plan, problem, facts).get())


def test_arrays_that_must_be_copied(cp: Any) -> None:
    call = dense(2, 40, 40, head_dim=64)
    (q, k, v), _ = call.on_gpu(cp)
    column_major = cp.asarray(np.asfortranarray(call.k.view(np.uint16))).view(ml_dtypes.bfloat16)
    shifted = cp.zeros(v.size + 1, v.dtype)[1:].reshape(v.shape)
    shifted[...] = v
    expected = flash_attention(q, k, v)
    assert (flash_attention(q, column_major, shifted).view(np.uint16) == expected.view(np.uint16)).all()


@pytest.mark.parametrize("path", PATHS)
def test_a_thousand_launches_are_bit_identical(cp: Any, facts: DeviceFacts, path: str) -> None:
    call = dense(1, 1, 4000) if path == "decode" else dense(2, 300, 300)
    arrays, options = call.on_gpu(cp)
    problem = check(*arrays, **options)
    plan = flash.plan_for(path, problem, facts)
    if plan is None:
        pytest.skip(f"no {path} kernel on {facts.name}")
    first = flash.launch(path, plan, problem, facts).view(np.uint16)
    different = cp.zeros((), np.int64)
    for _ in range(1000):
        different += (flash.launch(path, plan, problem, facts).view(np.uint16) != first).sum()
    assert int(different) == 0


def test_decode_does_not_depend_on_the_batch(cp: Any, facts: DeviceFacts) -> None:
    """The same bits alone, among 1 to 200 neighbours, and in any slot."""
    lengths = np.random.default_rng(0).integers(1, 1025, 200)
    call = dense(200, 1, 1024, lengths=lengths.tolist())
    (q, k, v), _ = call.on_gpu(cp)
    together = flash_attention(q, k, v, kv_lengths=lengths).get().view(np.uint16)
    for batch in (1, 2, 7, 64, 133):
        part = flash_attention(q[:batch], k[:batch], v[:batch], kv_lengths=lengths[:batch]).get().view(np.uint16)
        np.testing.assert_array_equal(part, together[:batch])
    order = np.random.default_rng(1).permutation(200)
    index = cp.asarray(order)
    shuffled = flash_attention(*(array[index] for array in (q, k, v)), kv_lengths=lengths[order]).get().view(np.uint16)
    np.testing.assert_array_equal(shuffled, together[order])


def test_131072_tokens_in_under_1_gb(cp: Any) -> None:
    """Rows from the whole length against float64; one head's scores would take 69 GB in float32."""
    tokens = 131_072
    if cp.cuda.runtime.memGetInfo()[0] < 3 << 30:
        pytest.skip("less than 3 GB of GPU memory is free")
    q, k, v = (
        cp.random.standard_normal((1, tokens, heads, 128), dtype=np.float32).astype(ml_dtypes.bfloat16)
        for heads in (4, 1, 1)
    )
    flash_attention(q[:, :2000], k[:, :2000], v[:, :2000])  # compiled and checked outside the measurement
    pool = cp.cuda.MemoryPool()
    with cp.cuda.using_allocator(pool.malloc):
        out = flash_attention(q, k, v)
        cp.cuda.get_current_stream().synchronize()
        assert pool.total_bytes() - out.nbytes < 1 << 30
    for row in (0, 1, 127, 128, 70_000, tokens - 1):
        seen = slice(0, row + 1)
        call = Call(q[:, row : row + 1].get(), k[:, seen].get(), v[:, seen].get(), True)
        assert_accurate(out[:, row : row + 1].get(), call.expected()[0], call.baseline())


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_standard_attention_on_the_gpu(cp: Any, dtype: str) -> None:
    kinds = {**DTYPES, "float64": np.float64}
    for call in (
        dense(2, 33, 70, lengths=[70, 40], kv_heads=2, dtype="float32"),
        dense(3, 1, 70, lengths=[1, 40, 70], dtype="float32"),
        dense(2, 70, 70, dtype="float32", causal=False),
        ragged([5, 64, 1], dtype="float32"),
        ragged([5, 64, 1], keys=80, lengths=[9, 80, 3], kv_heads=2, dtype="float32"),
    ):
        cast = [array.astype(kinds[dtype]) for array in (call.q, call.k, call.v)]
        call = Call(*cast, call.causal, call.kv_lengths, call.cu_seqlens)
        arrays, options = call.on_gpu(cp)
        assert_right(call, standard_attention(*arrays, **options).get())


def test_attention_chooses_flash_and_agrees(cp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOPRANO_ATTENTION", raising=False)
    choice = select_attention(device="cuda:0", dtype="bfloat16")
    assert choice.name == "flash", choice.reason
    for call in (dense(2, 1, 300), dense(2, 300, 300), ragged([1, 200, 3], keys=256, lengths=[7, 256, 90])):
        arrays, options = call.on_gpu(cp)
        out = choice.function(*arrays, **options)
        assert_right(call, out.get())
        assert (attention(*arrays, **options).view(np.uint16) == out.view(np.uint16)).all()


def test_lengths_may_live_on_the_gpu(cp: Any) -> None:
    call = ragged([3, 40], keys=64, lengths=[20, 64])
    arrays, options = call.on_gpu(cp)
    on_device = {**options, "kv_lengths": cp.asarray(call.kv_lengths), "cu_seqlens": cp.asarray(call.cu_seqlens)}
    assert (attention(*arrays, **on_device).view(np.uint16) == attention(*arrays, **options).view(np.uint16)).all()
    with pytest.raises(ParameterError, match=r"kv_lengths\[0\] = 65"):
        attention(*arrays, **{**on_device, "kv_lengths": cp.asarray([65, 64])})


def test_calls_inside_a_cuda_graph(cp: Any) -> None:
    """Lengths on the GPU are read by the replay, not by the capture."""
    (q, k, v), _ = dense(3, 1, 256).on_gpu(cp)
    lengths = cp.asarray([256, 100, 1], np.int32)
    expected = attention(q, k, v, kv_lengths=lengths).get().view(np.uint16)
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        attention(q, k, v, kv_lengths=lengths)
        stream.synchronize()
        stream.begin_capture()
        out = attention(q, k, v, kv_lengths=lengths)
        with pytest.raises(ParameterError, match="kv_lengths must be on cuda:0 while a CUDA graph is captured"):
            attention(q, k, v, kv_lengths=[256, 100, 1])
        graph = stream.end_capture()
        graph.launch()
        stream.synchronize()
        np.testing.assert_array_equal(out.get().view(np.uint16), expected)
        lengths[...] = cp.asarray([1, 256, 33], np.int32)
        graph.launch()
        stream.synchronize()
        again = attention(q, k, v, kv_lengths=lengths)
        assert (again.view(np.uint16) == out.view(np.uint16)).all()


def test_out_of_memory_surfaces_and_passes(cp: Any) -> None:
    (q, k, v), _ = dense(2, 64, 64).on_gpu(cp)
    expected = attention(q, k, v)
    pool = cp.cuda.MemoryPool()
    pool.set_limit(1024)
    with cp.cuda.using_allocator(pool.malloc), pytest.raises(MemoryError):
        attention(q, k, v)
    assert (attention(q, k, v).view(np.uint16) == expected.view(np.uint16)).all()
    assert select_attention(device="cuda:0", dtype="bfloat16").name == "flash"


def bad_calls(cp: Any) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    q, k = cp.zeros((2, 3, 4, 64), np.float16), cp.zeros((2, 5, 1, 64), np.float16)
    yield "k is on cpu and q on cuda:0", (q, k.get(), k), {}
    yield "v has dtype float32 and q float16", (q, k, k.astype(np.float32)), {}
    yield "k has 3 heads", (q, cp.zeros((2, 5, 3, 64), np.float16), cp.zeros((2, 5, 3, 64), np.float16)), {}
    yield r"kv_lengths\[1\] = 6 must be from 1 to 5", (q, k, k), {"kv_lengths": cp.asarray([5, 6])}
    yield r"kv_lengths\[0\] = 0 must be from 1 to 5", (q, k, k), {"kv_lengths": [0, 5]}
    yield r"cu_seqlens\[1\] = 9", (q.reshape(6, 4, 64), k, k), {"cu_seqlens": cp.asarray([0, 9, 6])}
    yield "k has head_dim 32", (q, k[..., :32], k[..., :32]), {}


def test_bad_input_is_named_before_anything_is_launched(cp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(*arguments: Any) -> None:
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(flash, "run", launched)
    for message, arrays, options in bad_calls(cp):
        for function in (attention, flash_attention):
            with pytest.raises(ParameterError, match=message):
                function(*arrays, **options)
