"""Every way in which the flash kernels can fail, injected: each ends in standard attention, with one warning."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from soprano_cupy import attention as package
from soprano_cupy.attention import AttentionChoice, dispatch, flash, select_attention, standard, standard_attention
from soprano_cupy.attention.probe import Case, PathError, Prober, ShapeClass, Verdict, compare, is_sticky, tiny_case
from soprano_cupy.attention.variants import sizes_only
from soprano_cupy.cuda.module import DeviceFacts
from soprano_cupy.device import cuda_problem
from soprano_cupy.errors import AttentionUnavailable, DeviceError, ParameterError

FACTS = DeviceFacts(0, "Test GPU", (9, 0), 132)
SHAPE = ShapeClass("cuda:0", "float16", 64, 4, True)


class Working:
    """A backend whose kernels work: they are standard attention on the host."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.attended: list[str] = []

    def facts(self, device: str) -> DeviceFacts:
        return FACTS

    def refusal(self, shape: ShapeClass, facts: DeviceFacts) -> str | None:
        return flash.FlashBackend().refusal(shape, facts)

    def paths(self, shape: ShapeClass, facts: DeviceFacts) -> tuple[str, ...]:
        return ("decode", "prefill", "hopper")

    def compile(self, path: str, shape: ShapeClass, facts: DeviceFacts) -> None:
        self.compiled.append(path)

    def attend(self, path: str, shape: ShapeClass, case: Case) -> np.ndarray:
        self.attended.append(path)
        return standard_attention(
            case.q, case.k, case.v, causal=shape.causal, kv_lengths=case.kv_lengths, cu_seqlens=case.cu_seqlens
        )


def failing(step: str, error: Exception, path: str | None = None) -> Working:
    """A backend that fails in one step, for one path or for all."""
    backend = Working()
    inner: Callable[..., Any] = getattr(backend, step)

    def fail(*arguments: Any) -> Any:
        if path is None or arguments[0] == path:
            raise error
        return inner(*arguments)

    setattr(backend, step, fail)
    return backend


def wrong(change: Callable[[np.ndarray], np.ndarray]) -> Working:
    backend = Working()
    inner = backend.attend
    backend.attend = lambda *arguments: change(inner(*arguments))  # type: ignore[method-assign]
    return backend


def one_outlier(result: np.ndarray) -> np.ndarray:
    result[-1, -1, -1] += 0.1
    return result


def one_nan(result: np.ndarray) -> np.ndarray:
    result[0, 0, 0] = np.nan
    return result


FAILURES: dict[str, tuple[Working, str]] = {
    "no CuPy": (failing("facts", DeviceError("CuPy is not installed; install it")), "CuPy is not installed"),
    "no GPU": (failing("facts", DeviceError("no NVIDIA GPU is visible; check")), "no NVIDIA GPU is visible"),
    "driver": (failing("facts", RuntimeError("cudaErrorInsufficientDriver: too old")), "RuntimeError: cudaErrorIns"),
    "no NVRTC": (failing("compile", DeviceError("NVRTC was not found; install it")), "NVRTC was not found"),
    "compile error": (failing("compile", DeviceError("x.cu does not compile"), "prefill"), "x.cu does not compile"),
    "launch error": (
        failing("attend", RuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument"), "decode"),
        "RuntimeError: CUDA_ERROR_INVALID_VALUE: invalid argument",
    ),
    "out of memory": (failing("attend", MemoryError("out of memory allocating 5 bytes")), "out of GPU memory .*free"),
    "bug": (failing("attend", KeyError("oops")), "KeyError: 'oops'"),
    "wrong result": (wrong(one_outlier), "the decode kernel gave a wrong result .*error 0.1.*doctor"),
    "NaN": (wrong(one_nan), "the decode kernel gave a wrong result .*error nan"),
    "transposed heads": (wrong(lambda result: result[:, ::-1]), "the decode kernel gave a wrong result"),
}


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Put a backend in place of the real one, in a fresh prober."""
    monkeypatch.delenv("SOPRANO_ATTENTION", raising=False)
    return lambda backend: monkeypatch.setattr(dispatch, "prober", Prober(backend))


def select(mode: str = "auto", **changes: Any) -> AttentionChoice:
    return select_attention(mode, **{"device": "cuda:0", "dtype": "float16", "head_dim": 64, **changes})


@pytest.mark.parametrize("name", FAILURES)
def test_each_failure_falls_back_with_one_warning(name: str, use: Any, caplog: pytest.LogCaptureFixture) -> None:
    backend, reason = FAILURES[name]
    use(backend)
    first, second = select(), select()
    assert first.name == second.name == "standard"
    assert first.function is standard_attention
    assert_matches(reason, first.reason)
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert_matches(r"flash attention is off for cuda:0, float16, head_dim 64.*" + reason, warnings[0].getMessage())
    assert "standard attention is used instead" in warnings[0].getMessage()


@pytest.mark.parametrize("name", FAILURES)
def test_each_failure_raises_when_flash_was_asked_for(name: str, use: Any, caplog: pytest.LogCaptureFixture) -> None:
    backend, reason = FAILURES[name]
    use(backend)
    with pytest.raises(AttentionUnavailable, match="flash attention cannot be used for cuda:0.*" + reason):
        select("flash")
    assert caplog.records == []


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text


def test_working_kernels_are_chosen_and_tried_once(use: Any, caplog: pytest.LogCaptureFixture) -> None:
    backend = Working()
    use(backend)
    for mode in ("auto", "flash", "auto"):
        choice = select(mode)
        assert choice.name == "flash"
        assert choice.reason == "flash kernels (decode, prefill, hopper) work on Test GPU"
    assert sorted(backend.compiled) == ["decode", "hopper", "prefill"]
    assert backend.attended == ["decode", "prefill", "hopper"]
    assert caplog.records == []
    assert select("standard").name == "standard"


def test_the_hopper_kernel_may_fail_alone(use: Any, caplog: pytest.LogCaptureFixture) -> None:
    use(failing("attend", RuntimeError("CUDA_ERROR_INVALID_VALUE"), "hopper"))
    choice = select()
    assert choice.name == "flash"
    assert choice.reason == "flash kernels (decode, prefill) work on Test GPU"
    assert len(caplog.records) == 1
    assert "the hopper attention kernel is off" in caplog.text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float64"}, "the flash kernels take float16, bfloat16, float32, not float64"),
        ({"head_dim": 80}, "the flash kernels take head_dim 32, 64, 128, not 80"),
    ],
)
def test_classes_that_the_kernels_do_not_serve(use: Any, changes: Any, reason: str) -> None:
    use(Working())
    assert select(**changes).reason == reason
    with pytest.raises(AttentionUnavailable, match=reason):
        select("flash", **changes)
    assert select().name == "flash"  # another class is not touched


def test_an_old_gpu_is_refused(use: Any) -> None:
    backend = Working()
    backend.facts = lambda device: replace(FACTS, capability=(6, 1))  # type: ignore[method-assign]
    use(backend)
    assert select().reason == "the flash kernels need compute capability 7.0, and Test GPU has 6.1"


STICKY = [
    "cudaErrorIllegalAddress: an illegal memory access was encountered",
    "CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered",
    "CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure",
    "CUDA_ERROR_MISALIGNED_ADDRESS: misaligned address",
]


@pytest.mark.parametrize("message", STICKY)
def test_a_lost_gpu_is_said_so(use: Any, message: str) -> None:
    use(failing("attend", RuntimeError(message)))
    with pytest.raises(DeviceError, match=r"cannot recover from .*start again with SOPRANO_ATTENTION=standard"):
        select()


def test_other_errors_are_not_sticky() -> None:
    assert not is_sticky(RuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument"))
    assert not is_sticky(MemoryError("cudaErrorIllegalAddress"))
    assert not is_sticky(ValueError("illegal address"))


def test_the_cpu_has_no_flash(caplog: pytest.LogCaptureFixture) -> None:
    choice = select_attention()
    assert (choice.name, choice.function) == ("standard", standard_attention)
    assert choice.reason == "the CPU has no flash kernels; matmul-softmax is used"
    assert caplog.records == []
    with pytest.raises(AttentionUnavailable, match="the CPU has no flash kernels"):
        select_attention("flash")
    q = np.zeros((1, 2, 4, 64), np.float32)
    with pytest.raises(AttentionUnavailable, match="the CPU has no flash kernels"):
        package.flash_attention(q, q, q)


def test_the_environment_speaks_where_the_argument_does_not(use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use(Working())
    monkeypatch.setenv("SOPRANO_ATTENTION", "standard")
    assert select().name == "standard"
    assert select("flash").name == "flash"
    monkeypatch.setenv("SOPRANO_ATTENTION", "flash")
    with pytest.raises(AttentionUnavailable):
        select_attention(device="cpu")
    q = np.zeros((1, 2, 4, 64), np.float32)
    with pytest.raises(AttentionUnavailable):
        package.attention(q, q, q)
    monkeypatch.setenv("SOPRANO_ATTENTION", "fast")
    with pytest.raises(ParameterError, match="SOPRANO_ATTENTION = 'fast'"):
        select()


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("attention = 'quick'", {"mode": "quick"}),
        ("device = 'gpu'", {"device": "gpu"}),
        ("dtype = 'int8'", {"dtype": "int8"}),
        ("head_dim = 0", {"head_dim": 0}),
        ("num_kv_heads = 3 must divide num_heads = 4", {"num_kv_heads": 3}),
        ("num_heads = 4.0", {"num_heads": 4.0}),
    ],
)
def test_bad_choices(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=message):
        select(**changes)


def test_this_machine_without_a_gpu_says_why() -> None:
    """The real backend, unless there is a GPU."""
    if cuda_problem() is None:
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError, match=r"CuPy|GPU"):
        flash.FlashBackend().facts("cuda:0")


@pytest.fixture
def on_gpu(use: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Calls whose arrays count as lying on cuda:0, with `flash.run` doing or raising what the test says."""
    real_check, real_run = dispatch.check, standard.run
    monkeypatch.setattr(dispatch, "check", lambda *args, **kwds: replace(real_check(*args, **kwds), device="cuda:0"))
    monkeypatch.setattr(dispatch, "capturing", lambda: False)
    monkeypatch.setattr(standard, "run", lambda problem: real_run(replace(problem, device="cpu")))
    use(Working())

    def prepare(error: Exception | None, failing_path: str = "decode") -> None:
        def run(problem: Any, paths: tuple[str, ...]) -> np.ndarray:
            if error is not None and failing_path in paths:
                raise error
            return np.full(problem.q.shape, 7, problem.q.dtype)

        monkeypatch.setattr(flash, "run", run)

    return prepare


Q, K = np.ones((1, 2, 4, 64), np.float16), np.ones((1, 3, 1, 64), np.float16)


def test_calls_go_to_the_kernels(on_gpu: Any) -> None:
    on_gpu(None)
    for function in (package.attention, package.flash_attention, dispatch.best_attention, select().function):
        assert (function(Q, K, K) == 7).all()


def test_a_later_failure_drops_the_class_once(on_gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    on_gpu(PathError("decode", "RuntimeError: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"))
    for _ in range(2):
        assert (package.attention(Q, K, K) == 1).all()
    assert len(caplog.records) == 1
    assert "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES; standard attention is used" in caplog.text
    assert select().name == "standard"
    with pytest.raises(AttentionUnavailable, match="LAUNCH_OUT_OF_RESOURCES"):
        package.flash_attention(Q, K, K)


def test_flash_raises_a_later_failure(on_gpu: Any) -> None:
    on_gpu(PathError("prefill", "NVRTC refused"))
    with pytest.raises(AttentionUnavailable, match="NVRTC refused"):
        package.flash_attention(Q, K, K)


def test_the_hopper_kernel_may_fail_later(on_gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    on_gpu(PathError("hopper", "the driver refused a tensor map"), failing_path="hopper")
    for _ in range(2):
        assert (package.attention(Q, K, K) == 7).all()
    assert len(caplog.records) == 1
    assert "the hopper attention kernel is off" in caplog.text
    assert select().name == "flash"


@pytest.mark.parametrize("function", [package.attention, package.flash_attention])
@pytest.mark.parametrize("error", [MemoryError("out of memory"), DeviceError("the GPU stopped")])
def test_memory_and_lost_gpus_surface(on_gpu: Any, function: Any, error: Exception) -> None:
    """Standard attention needs more memory than flash, so out of memory is no reason to change over."""
    on_gpu(error)
    with pytest.raises(type(error), match=str(error)):
        function(Q, K, K)
    on_gpu(None)
    assert (function(Q, K, K) == 7).all()


def test_masks_are_classes_of_their_own(on_gpu: Any) -> None:
    on_gpu(None)
    package.attention(Q, K, K, causal=False)
    known = [dispatch.prober.known(replace(SHAPE, causal=causal)) for causal in (True, False)]
    assert known == [None, Verdict(True, "flash kernels (decode, prefill, hopper) work on Test GPU", known[1].paths)]


def test_a_new_class_cannot_be_tried_while_a_graph_is_captured(on_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(None)
    monkeypatch.setattr(dispatch, "capturing", lambda: True)
    with pytest.raises(DeviceError, match="call it once before capturing a CUDA graph"):
        package.attention(Q, K, K)
    select()
    assert (package.attention(Q, K, K) == 7).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [32, 128])
def test_the_tiny_case_allows_rounding_and_nothing_else(dtype: str, head_dim: int) -> None:
    """A kernel that rounds its weights to the storage type passes; the largest error of one wrong key does not."""
    shape = replace(SHAPE, dtype=dtype, head_dim=head_dim)
    for path in ("decode", "prefill"):
        case = tiny_case(path, shape)
        storage = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
        exact = standard_attention(
            *(array.astype(np.float64) for array in (case.q, case.k, case.v)),
            kv_lengths=case.kv_lengths,
            cu_seqlens=case.cu_seqlens,
        )
        assert compare(path, shape, case, exact.astype(storage)) is None
        short = standard_attention(case.q, case.k, case.v, kv_lengths=case.kv_lengths - 1, cu_seqlens=case.cu_seqlens)
        assert compare(path, shape, case, short) is not None


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "path"),
    [
        (1, 1, 1024, "decode"),
        (512, 16, 1024, "decode"),
        (1, 17, 17, "prefill"),
        (1, 512, 512, "prefill"),
        (1, 1024, 1024, "hopper"),
        (8, 256, 256, "prefill"),
        (8, 512, 512, "hopper"),
    ],
)
def test_which_kernel_serves_a_call(batch: int, queries: int, keys: int, path: str) -> None:
    """Measured on an H200; without the Hopper kernel, prefill takes its place."""
    shape = replace(SHAPE, dtype="bfloat16", head_dim=128)
    problem = replace(sizes_only(shape, batch, queries, keys), device="cuda:0")
    assert flash.choose(problem, flash.PATHS, FACTS)[0] == path
    assert flash.choose(problem, ("decode", "prefill"), FACTS)[0] == path.replace("hopper", "prefill")
    with pytest.raises(DeviceError, match="no flash kernel serves"):
        flash.choose(problem, (), FACTS)


def test_the_length_in_use_decides_not_the_capacity() -> None:
    shape = replace(SHAPE, dtype="bfloat16", head_dim=128)
    problem = sizes_only(shape, 8, 100, 1024)
    assert flash.choose(problem, flash.PATHS, FACTS)[0] == "prefill"
    assert flash.choose(replace(problem, batch=16, total_q=1600), flash.PATHS, FACTS)[0] == "hopper"
    in_use = replace(problem, batch=16, total_q=1600, key_lengths=np.full(16, 100))
    assert flash.choose(in_use, flash.PATHS, FACTS)[0] == "prefill"
