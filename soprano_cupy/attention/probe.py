"""Whether the flash kernels work for a class of calls, found out once: built, launched and checked.

A class is (device, dtype, head_dim, query heads per KV head, causal). For each, every kernel that would serve it
runs a tiny case whose unused keys hold NaN, and the result is compared with float64.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from ..cuda.module import DeviceFacts
from ..errors import DeviceError, SopranoError
from .problem import Problem
from .standard import standard_attention

log = logging.getLogger(__name__)

REQUIRED_PATHS = ("decode", "prefill")  # the Hopper kernel is a faster prefill; the class works without it
_STICKY = (  # CUDA errors after which every further call in the process fails
    "illegaladdress",
    "illegalinstruction",
    "invalidaddressspace",
    "invalidpc",
    "misalignedaddress",
    "hardwarestackerror",
    "launchfail",
    "launchtimeout",
    "cudaerrorassert",
    "eccuncorrectable",
)


@dataclass(frozen=True)
class ShapeClass:
    """What a verdict holds for."""

    device: str
    dtype: str
    head_dim: int
    group: int
    causal: bool

    @classmethod
    def of(cls, problem: Problem) -> ShapeClass:
        return cls(problem.device, problem.dtype, problem.head_dim, problem.group, problem.causal)

    def __str__(self) -> str:
        mask = "" if self.causal else ", not causal"
        return f"{self.device}, {self.dtype}, head_dim {self.head_dim}, {self.group} query heads per KV head{mask}"


@dataclass(frozen=True)
class Verdict:
    """usable: the flash kernels serve the class, by these paths; reason: one line either way."""

    usable: bool
    reason: str
    paths: tuple[str, ...] = ()


class PathError(Exception):
    """A kernel failed where its class was thought to work."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path = path


@dataclass(frozen=True)
class Case:
    """A small call of packed queries on a cache, in host arrays of the class's dtype."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    kv_lengths: np.ndarray
    cu_seqlens: np.ndarray


class Backend(Protocol):
    """The steps of a probe; `flash.FlashBackend` takes them on a GPU, tests replace single ones."""

    def facts(self, device: str) -> DeviceFacts:
        """`DeviceError` when CuPy or the GPU is missing."""

    def refusal(self, shape: ShapeClass, facts: DeviceFacts) -> str | None:
        """Why the kernels cannot serve the class by design; None when they can."""

    def paths(self, shape: ShapeClass, facts: DeviceFacts) -> tuple[str, ...]:
        """The kernels that would serve it."""

    def compile(self, path: str, shape: ShapeClass, facts: DeviceFacts) -> None:
        """Build one kernel; `DeviceError` when NVRTC is missing or refuses."""

    def attend(self, path: str, shape: ShapeClass, case: Case) -> np.ndarray:
        """Run a case by one kernel, wait for it and return the result on the host."""


class Prober:
    """Verdicts of one backend, each reached once."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._verdicts: dict[ShapeClass, Verdict] = {}
        self._warned: set[ShapeClass] = set()
        self._lock = threading.RLock()

    def known(self, shape: ShapeClass) -> Verdict | None:
        """The verdict, if it has been reached."""
        return self._verdicts.get(shape)

    def verdict(self, shape: ShapeClass) -> Verdict:
        """The verdict, after trying the kernels when the class is new. A lost GPU raises `DeviceError`."""
        with self._lock:
            if shape not in self._verdicts:
                self._verdicts[shape] = self._try(shape)
            return self._verdicts[shape]

    def warn(self, shape: ShapeClass) -> None:
        """Log, once for each class, that standard attention takes the place of flash, and why."""
        with self._lock:
            if shape not in self._warned:
                self._warned.add(shape)
                reason = self._verdicts[shape].reason
                log.warning("flash attention is off for %s: %s; standard attention is used instead", shape, reason)

    def fail(self, shape: ShapeClass, error: PathError) -> Verdict:
        """Drop a kernel that failed after the probe, and the class with it unless another can stand in."""
        with self._lock:
            verdict = self._verdicts[shape]
            if not verdict.usable or error.path not in verdict.paths:  # another thread was first
                return verdict
            if error.path in REQUIRED_PATHS:
                verdict = Verdict(False, str(error))
            else:
                verdict = replace(verdict, paths=tuple(path for path in verdict.paths if path != error.path))
                _warn_path(error.path, shape, str(error))
            self._verdicts[shape] = verdict
            return verdict

    def _try(self, shape: ShapeClass) -> Verdict:
        try:
            facts = self._backend.facts(shape.device)
            reason = self._backend.refusal(shape, facts)
            if reason is not None:
                return Verdict(False, reason)
            paths = self._backend.paths(shape, facts)
        except Exception as error:
            return Verdict(False, explain(error))
        failures = self._compile(shape, facts, paths)
        for path in paths:
            if path not in failures:
                failure = self._check(path, shape)
                if failure is not None:
                    failures[path] = failure
        lost = [failures[path] for path in REQUIRED_PATHS if path in failures]
        if lost:
            return Verdict(False, lost[0])
        for path, failure in failures.items():
            log.warning(
                "the %s attention kernel is off for %s: %s; a slower flash kernel is used", path, shape, failure
            )
        working = tuple(path for path in paths if path not in failures)
        return Verdict(True, f"flash kernels ({', '.join(working)}) work on {facts.name}", working)

    def _compile(self, shape: ShapeClass, facts: DeviceFacts, paths: Sequence[str]) -> dict[str, str]:
        """Build all kernels at once (the compiler runs outside the GIL); the failures by path."""

        def build(path: str) -> str | None:
            return _failure(lambda: self._backend.compile(path, shape, facts))

        with ThreadPoolExecutor(max_workers=len(paths)) as pool:
            results = dict(zip(paths, pool.map(build, paths), strict=True))
        return {path: reason for path, reason in results.items() if reason is not None}

    def _check(self, path: str, shape: ShapeClass) -> str | None:
        """Run the path's tiny case; why it failed, or None."""
        case = tiny_case(path, shape)
        result: list[np.ndarray] = []
        reason = _failure(lambda: result.append(self._backend.attend(path, shape, case)))
        return reason if reason is not None else compare(path, shape, case, result[0])


def _failure(step: Callable[[], object]) -> str | None:
    """Take a step; why it failed, in one line, or None. A CUDA error that ends the context is raised."""
    try:
        step()
    except Exception as error:
        if is_sticky(error):
            raise lost_gpu(error) from error
        return explain(error)
    return None


def tiny_case(path: str, shape: ShapeClass, queries: int = 1) -> Case:
    """Two sequences that are no multiple of any tile, two KV heads, NaN in the unused keys.

    queries: of the longer sequence, for decode, whose variants differ by it.
    """
    rng = np.random.default_rng(0)
    heads, dim = 2, shape.head_dim
    dtype = _numpy_dtype(shape.dtype)
    first, second = (max(1, queries - 1), queries) if path == "decode" else (37, 70)
    lengths = np.array([70, 133])

    def draw(*size: int) -> np.ndarray:
        return rng.standard_normal(size).astype(np.float32).astype(dtype)

    q = draw(first + second, heads * shape.group, dim)
    k, v = draw(2, 150, heads, dim), draw(2, 150, heads, dim)
    for i, length in enumerate(lengths):
        k[i, length:] = v[i, length:] = np.nan
    return Case(q, k, v, lengths, np.array([0, first, first + second]))


def compare(path: str, shape: ShapeClass, case: Case, result: np.ndarray) -> str | None:
    """Compare with float64: why the result is wrong, or None.

    With unit roundoff u of the storage type, rounding the weights to it moves the result by at most u max|v|, and
    rounding the result by as much. Scores in float32 carry an error of head_dim * 2**-24 * |q| |k| scale at worst,
    which the weights take on as a relative error; base-2 exponentials add a few units in the last place.
    """
    wide = [array.astype(np.float64) for array in (case.q, case.k, case.v)]
    lengths, starts = case.kv_lengths, case.cu_seqlens
    expected = standard_attention(*wide, causal=shape.causal, kv_lengths=lengths, cu_seqlens=starts)
    largest = float(np.nanmax(np.abs(wide[2])))
    roundoff = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(shape.dtype, 2.0**-24)
    norms = [float(np.nanmax(np.linalg.norm(array, axis=-1))) for array in wide[:2]]
    score_error = 2.0**-24 * shape.head_dim * norms[0] * norms[1] / shape.head_dim**0.5
    allowed = largest * (2 * roundoff + 2 * score_error + 2.0**-20)
    error = float(np.abs(result.astype(np.float64) - expected).max())
    if error <= allowed:  # False for NaN
        return None
    return (
        f"the {path} kernel gave a wrong result on a small case (error {error:.2g}, at most {allowed:.2g} expected); "
        "please report it with the output of soprano-cupy doctor"
    )


def _numpy_dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        import ml_dtypes

        name = ml_dtypes.bfloat16
    return np.dtype(name)


def explain(error: BaseException) -> str:
    """One line about a failure: ours as it is, others with their type."""
    line = (str(error).splitlines() or [""])[0].strip()
    if isinstance(error, SopranoError):
        return line
    if isinstance(error, MemoryError):
        return f"out of GPU memory ({line}); free some, or use a smaller batch"
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def is_sticky(error: BaseException) -> bool:
    """Whether a CUDA error has ended the GPU context: nothing works on it any more in this process."""
    text = str(error).replace("_", "").replace(" ", "").lower()
    return isinstance(error, RuntimeError) and "cuda" in text and any(name in text for name in _STICKY)


def lost_gpu(error: BaseException) -> DeviceError:
    """The error for a context that is gone."""
    return DeviceError(
        f"the GPU stopped with an error that this process cannot recover from ({explain(error)}); "
        "start again with SOPRANO_ATTENTION=standard, and please report it"
    )


def _warn_path(path: str, shape: ShapeClass, reason: str) -> None:
    log.warning("the %s attention kernel is off for %s: %s; a slower flash kernel is used instead", path, shape, reason)
