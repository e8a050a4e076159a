"""The host side from a call to a launch, with the kernels themselves run on the emulated machine: no GPU, no CuPy.

The probe, the planners, the parameter record, the scratch and the launch are the real ones; arrays are NumPy's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import emulation
import ml_dtypes
import numpy as np
import pytest
from attention_reference import assert_accurate, plain, reference

from soprano_cupy.attention import flash
from soprano_cupy.attention.arguments import check
from soprano_cupy.attention.launch import LaunchPlan
from soprano_cupy.attention.probe import PathError, Prober, ShapeClass
from soprano_cupy.attention.problem import PARAMS_DTYPE
from soprano_cupy.cuda.module import DeviceFacts

FACTS = DeviceFacts(0, "emulated GPU", (8, 0), 4)
SHAPES = [
    ShapeClass("cuda:0", "bfloat16", 64, 4, True),
    ShapeClass("cuda:0", "float16", 32, 3, False),
    ShapeClass("cuda:0", "float32", 32, 2, True),
]


class EmulatedKernel:
    """Stands in for a loaded kernel; the record's bytes go to the machine as they would to the driver."""

    def __init__(self, plan: LaunchPlan) -> None:
        self._plan = plan
        self._library = emulation.build(plan.source, dict(plan.defines))

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...], shared: int) -> None:
        (record,) = arguments
        assert record.dtype == PARAMS_DTYPE
        params = emulation.AttentionParams.from_buffer_copy(record.tobytes())
        self._library.launch(self._plan.kernel, params, grid=grid, threads=block[0], shared_bytes=shared)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """CuPy's few functions that a launch uses, on NumPy, and kernels from the emulated machine."""
    stream = SimpleNamespace(ptr=0, is_capturing=lambda: False)
    cupy: Any = ModuleType("cupy")
    cupy.empty = lambda shape, dtype: emulation.poisoned(shape, dtype)
    cupy.zeros, cupy.asarray = np.zeros, np.asarray
    cupy.cuda = SimpleNamespace(get_current_stream=lambda: stream, Device=lambda index: nullcontext())
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(flash, "device_facts", lambda index: FACTS)
    monkeypatch.setattr(flash, "_kernel", lambda path, plan, facts: EmulatedKernel(plan))
    monkeypatch.setattr(flash, "_verified", set())
    monkeypatch.setattr(flash, "_workspaces", {})
    return stream


class Backend(flash.FlashBackend):
    """The real steps, but for asking a driver what GPU there is and loading a binary."""

    def facts(self, device: str) -> DeviceFacts:
        return FACTS

    def compile(self, path: str, shape: ShapeClass, facts: DeviceFacts) -> None:
        pass


def draw(*shape: int, dtype: Any, seed: int = 0) -> np.ndarray:
    array = emulation.poisoned(shape, dtype)
    array[...] = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    return array


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_probe_finds_working_kernels(shape: ShapeClass) -> None:
    verdict = Prober(Backend()).verdict(shape)
    assert verdict.usable, verdict.reason
    assert verdict.paths == ("decode", "prefill")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [[1, 1], [4, 2], [33, 70]])
def test_the_call_forms(queries: list[int], causal: bool) -> None:
    """Packed on itself, on a cache with NaN beyond the keys in use, and dense; through decode and prefill."""
    dtype, starts, used = ml_dtypes.bfloat16, np.cumsum([0, *queries]), np.array([80, 150])
    q = draw(starts[-1], 8, 64, dtype=dtype)
    cache = emulation.poisoned((2, 3, 160, 2, 64), dtype)
    for i, length in enumerate(used):
        for part in range(2):
            cache[part, i + 1, :length] = draw(length, 2, 64, dtype=dtype, seed=2 * i + part)
    k, v = cache[:, 1:]

    out = flash.run(check(q, k, v, causal=causal, kv_lengths=used, cu_seqlens=starts), ("decode", "prefill"))
    names: dict[str, Any] = {"causal": causal, "kv_lengths": used, "cu_seqlens_q": starts}
    assert_accurate(out, reference(q, k, v, **names)[0], plain(q, k, v, **names))

    rows = draw(starts[-1], 2, 64, dtype=dtype, seed=9)
    out = flash.run(check(q, rows, rows, causal=causal, cu_seqlens=starts), ("decode", "prefill"))
    names = {"causal": causal, "cu_seqlens_q": starts, "cu_seqlens_k": starts}
    assert_accurate(out, reference(q, rows, rows, **names)[0], plain(q, rows, rows, **names))

    if queries[0] == queries[1]:
        dense = q.reshape(2, queries[0], 8, 64)
        out = flash.run(check(dense, k, v, causal=causal, kv_lengths=used), ("decode", "prefill"))
        names = {"causal": causal, "kv_lengths": used}
        assert_accurate(out, reference(dense, k, v, **names)[0], plain(dense, k, v, **names))


@pytest.mark.parametrize("path", ["decode", "prefill"])
def test_log_sum_exp(path: str) -> None:
    dtype = ml_dtypes.bfloat16
    q, k, v = (draw(2, tokens, heads, 64, dtype=dtype) for tokens, heads in ((3, 4), (90, 1), (90, 1)))
    problem = check(q, k, v)
    lse = np.full((4, 6), np.nan, np.float32)
    plan = flash.plan_for(path, problem, FACTS)
    assert plan is not None
    flash.launch(path, plan, problem, FACTS, lse)
    np.testing.assert_allclose(lse, reference(q, k, v, causal=True)[1], rtol=0, atol=1e-4)


def spoil(field: str, value: Any) -> Callable[..., np.ndarray]:
    """`pack_params` with one field wrong, as a fault of the host side."""
    real = flash.pack_params

    def pack(*arguments: Any, **options: Any) -> np.ndarray:
        params = real(*arguments, **options)
        params[field] = value
        return params

    return pack


@pytest.mark.parametrize(
    ("field", "value"), [("scale_log2", 0.25), ("k_head_stride", 0), ("kv_lengths", 0), ("seqlen_k", 64), ("k", None)]
)
def test_a_wrong_launch_is_found_by_the_probe(field: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each field that decides the result; `k` reads another array's memory."""
    other = draw(2, 200, 2, 64, dtype=ml_dtypes.bfloat16, seed=7)
    wrong = other.ctypes.data if value is None else value
    monkeypatch.setattr(flash, "pack_params", spoil(field, wrong))
    verdict = Prober(Backend()).verdict(SHAPES[0])
    assert not verdict.usable
    assert "gave a wrong result on a small case" in verdict.reason


def test_a_variant_is_compared_at_its_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = draw(1, 2, 4, 64, dtype=ml_dtypes.bfloat16), draw(1, 9, 1, 64, dtype=ml_dtypes.bfloat16)
    problem = check(q, k, k)
    launches = []
    real = flash.launch
    monkeypatch.setattr(flash, "launch", lambda *arguments: launches.append(arguments[2].batch) or real(*arguments))
    flash.run(problem, ("decode", "prefill"))
    flash.run(problem, ("decode", "prefill"))
    assert launches == [2, 1, 1]  # the tiny case has two sequences
    monkeypatch.setattr(flash, "_verified", set())
    monkeypatch.setattr(flash, "pack_params", spoil("scale_log2", 1.0))
    with pytest.raises(PathError, match="the decode kernel gave a wrong result"):
        flash.run(problem, ("decode", "prefill"))


def test_what_is_compared_is_the_variant_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of one block of keys, where the tiny case by itself would have two stages."""
    q, k = draw(1, 2, 4, 64, dtype=ml_dtypes.bfloat16), draw(1, 9, 1, 64, dtype=ml_dtypes.bfloat16)
    plans = []
    real = flash.launch
    monkeypatch.setattr(flash, "launch", lambda *arguments: plans.append(arguments[1]) or real(*arguments))
    flash.run(check(q, k, k), ("decode",))
    assert [dict(plan.defines)["STAGES"] for plan in plans] == [1, 1]
    longer = draw(1, 80, 1, 64, dtype=ml_dtypes.bfloat16)
    flash.run(check(q, longer, longer), ("decode",))
    assert [dict(plan.defines)["STAGES"] for plan in plans[2:]] == [2, 2]
    assert plans[2].shared_memory_bytes == plans[3].shared_memory_bytes > plans[0].shared_memory_bytes


def test_scratch_is_kept_for_each_stream_and_grows(machine: Any) -> None:
    first = flash._workspace(0, 100)
    assert flash._workspace(0, 0) is None
    assert first is not None
    assert flash._workspace(0, 60) is first
    assert (first == 0).all()
    grown = flash._workspace(0, 200)
    assert grown is not None
    assert grown.nbytes == 200
    machine.ptr = 8
    assert flash._workspace(0, 100) is not grown
    machine.is_capturing = lambda: True
    captured = flash._workspace(0, 100)
    assert captured is not flash._workspace(0, 200)
    flash.release_workspaces()
    assert [len(kept) for kept in flash._workspaces.values()] == [2]  # a graph may be replayed at any time


def test_a_first_use_inside_a_capture_is_refused(machine: Any) -> None:
    q = draw(1, 2, 4, 64, dtype=ml_dtypes.bfloat16)
    problem = replace(check(q, q, q), device="cuda:0")
    machine.is_capturing = lambda: True
    with pytest.raises(flash.DeviceError, match="run it before capturing a graph"):
        flash.run(problem, ("decode", "prefill"))
