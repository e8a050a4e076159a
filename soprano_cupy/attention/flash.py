"""The flash kernels on a GPU: which of them serves a call, and its launch.

Three paths: `decode` (up to 16 queries a sequence, keys split over blocks), `hopper` (long prefill on compute
capability 9.0) and `prefill` (everything else). Each has variants, compiled for sizes it is good at; a variant's
first use runs the tiny case of `probe` through it and compares with float64.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..cuda.module import DeviceFacts, Kernel, build, device_facts, load
from ..device import cuda_index, cuda_problem, to_host
from ..errors import DeviceError
from . import decode, hopper, prefill
from .arguments import capturing, check
from .launch import LaunchPlan
from .probe import Case, PathError, ShapeClass, compare, explain, is_sticky, lost_gpu, tiny_case
from .problem import Array, Problem, kernel_ready, pack_params

PATHS = ("decode", "prefill", "hopper")
OLDEST_CAPABILITY = (7, 0)
HEAD_DIMS = (32, 64, 128)
DTYPES = ("float16", "bfloat16", "float32")

# Scores (query heads times queries times keys) from which on the Hopper kernel beats the prefill kernel. On an H200:
# 12.2 against 14.3 us for 1,024 tokens and 12.6 against 17.4 for 8 x 512, but 9.4 against 7.3 for 512 and 9.1 against
# 8.6 for 8 x 256, where filling its pipelines takes longer than the products.
HOPPER_MIN_SCORES = 1 << 22


def run(problem: Problem, paths: Sequence[str], lse: Array | None = None) -> Array:
    """Attention of a checked problem on its GPU by the best of `paths`; nothing is waited for.

    lse: (Hq, total_q) float32, to be filled with the natural-log sums of exponentials.
    Raises `PathError` when a kernel does not compile, load, launch, or give the right result at its first use;
    `MemoryError` when the result does not fit; `DeviceError` when the GPU is lost, or when a first use falls into
    the capture of a CUDA graph.
    """
    import cupy

    facts = device_facts(cuda_index(problem.device))
    path, plan = choose(problem, paths, facts)
    with cupy.cuda.Device(facts.index):
        first_use = (facts.index, plan.source, plan.defines) not in _verified
        if first_use and capturing():
            raise DeviceError(
                f"attention was not yet run for {ShapeClass.of(problem)} at this size: run it before capturing a graph"
            )
        try:
            if first_use:
                _verify(path, plan, problem, facts)
            return launch(path, plan, problem, facts, lse)
        except (MemoryError, PathError):
            raise
        except Exception as error:
            if is_sticky(error):
                raise lost_gpu(error) from error
            raise PathError(path, explain(error)) from error


def choose(problem: Problem, paths: Sequence[str], facts: DeviceFacts) -> tuple[str, LaunchPlan]:
    """The path for a call and its plan; `DeviceError` when none of `paths` serves it."""
    for path in ("decode", "hopper", "prefill"):
        if path not in paths or (path == "hopper" and _scores(problem) < HOPPER_MIN_SCORES):
            continue
        plan = plan_for(path, problem, facts)
        if plan is not None:
            return path, plan
    raise DeviceError(f"no flash kernel serves {problem.batch} sequences of {problem.seqlen_q} queries; use standard")


def _scores(problem: Problem) -> int:
    """Scores before masking, by the longest sequence of keys in use."""
    keys = problem.seqlen_k if problem.key_lengths is None else int(problem.key_lengths.max())
    return problem.total_q * problem.num_heads * keys


def plan_for(path: str, problem: Problem, facts: DeviceFacts) -> LaunchPlan | None:
    """How one path would run a call; None when it cannot."""
    if path == "hopper":
        return hopper.plan(problem, facts.compute_capability, facts.multiprocessors)
    if path == "decode":
        return decode.plan(
            compute_capability=facts.capability,
            dtype=problem.dtype,
            head_dim=problem.head_dim,
            group=problem.group,
            causal=problem.causal,
            batch=problem.batch,
            seqlen_q=problem.seqlen_q,
            seqlen_k=problem.seqlen_k,
            num_kv_heads=problem.num_kv_heads,
            multiprocessors=facts.multiprocessors,
        )
    return prefill.plan(
        compute_capability=facts.capability,
        dtype=problem.dtype,
        head_dim=problem.head_dim,
        group=problem.group,
        causal=problem.causal,
        params_info=problem,
        multiprocessors=facts.multiprocessors,
    )


def launch(path: str, plan: LaunchPlan, problem: Problem, facts: DeviceFacts, lse: Array | None = None) -> Array:
    """Run a problem by one plan on the current device, which is the problem's; the result is under way."""
    import cupy

    problem = kernel_ready(problem)
    kernel = _kernel(path, plan, facts)
    out = cupy.empty(problem.q.shape, problem.q.dtype)
    workspace = _workspace(facts.index, plan.workspace_bytes)
    params = pack_params(problem, out, lse=lse, workspace=workspace, splits=plan.splits)
    extra: tuple[Any, ...] = hopper.extra_arguments(problem) if path == "hopper" else ()
    grid = plan.grid(
        batch=problem.batch,
        seqlen_q=problem.seqlen_q,
        num_heads=problem.num_heads,
        num_kv_heads=problem.num_kv_heads,
    )
    kernel(grid, (plan.threads,), (params, *extra), plan.shared_memory_bytes)
    return out


def _kernel(path: str, plan: LaunchPlan, facts: DeviceFacts) -> Kernel:
    return load(plan.source, plan.kernel, plan.defines, facts.index, specific=path == "hopper")


_workspaces: dict[tuple[int, int, bool], list[Array]] = {}


def _workspace(device: int, size_bytes: int) -> Array | None:
    """Scratch for the current stream, its counters zeroed once; the kernels leave it fit for the stream's next launch.

    Graphs have scratch apart from direct launches, which may overlap with a replay. It is never freed, since a graph
    may be replayed at any time; two graphs captured on one stream must not be replayed at the same time.
    """
    import cupy

    if size_bytes == 0:
        return None
    key = (device, int(cupy.cuda.get_current_stream().ptr), capturing())
    kept = _workspaces.setdefault(key, [])
    if not kept or kept[-1].nbytes < size_bytes:
        if not key[-1]:
            kept.clear()
        scratch = cupy.empty((size_bytes,), np.uint8)
        scratch[: decode.ARRIVAL_BYTES].fill(0)  # a memset, which a graph repeats at every replay
        kept.append(scratch)
    return kept[-1]


def release_workspaces() -> None:
    """Give up the scratch of direct launches, once their work is done. That of graphs stays."""
    for key in [key for key in _workspaces if not key[-1]]:
        del _workspaces[key]


_verified: set[tuple[int, str, tuple[tuple[str, int], ...]]] = set()
_lock = threading.Lock()


def _verify(path: str, plan: LaunchPlan, problem: Problem, facts: DeviceFacts) -> None:
    """Compare a variant with float64, on one thread at a time."""
    shape = ShapeClass.of(problem)
    with _lock:
        case = tiny_case(path, shape, problem.seqlen_q)
        result = attend(path, shape, case, plan)
        reason = compare(path, shape, case, result)
        if reason is not None:
            raise PathError(path, reason)
        _verified.add((facts.index, plan.source, plan.defines))


def attend(path: str, shape: ShapeClass, case: Case, plan: LaunchPlan | None = None) -> np.ndarray:
    """A case by one path, or one compiled variant of it, from host arrays to a host array."""
    import cupy

    facts = device_facts(cuda_index(shape.device))
    with cupy.cuda.Device(facts.index):
        arrays = [cupy.asarray(array) for array in (case.q, case.k, case.v)]
        problem = check(*arrays, causal=shape.causal, kv_lengths=case.kv_lengths, cu_seqlens=case.cu_seqlens)
        own = plan_for(path, problem, facts)
        if plan is None:
            plan = own
        elif path == "decode" and own is not None:  # its grid and scratch follow the sizes
            plan = replace(own, defines=plan.defines, shared_memory_bytes=plan.shared_memory_bytes)
        assert plan is not None
        return to_host(launch(path, plan, problem, facts))


class FlashBackend:
    """The steps of a probe (`probe.Backend`) on a real GPU."""

    def facts(self, device: str) -> DeviceFacts:
        reason = cuda_problem()
        if reason is not None:
            raise DeviceError(reason)
        return device_facts(cuda_index(device))

    def refusal(self, shape: ShapeClass, facts: DeviceFacts) -> str | None:
        if facts.capability < OLDEST_CAPABILITY:
            return "the flash kernels need compute capability 7.0, and {} has {}.{}".format(
                facts.name, *facts.capability
            )
        if shape.dtype not in DTYPES:
            return f"the flash kernels take {', '.join(DTYPES)}, not {shape.dtype}"
        if shape.head_dim not in HEAD_DIMS:
            return f"the flash kernels take head_dim {', '.join(map(str, HEAD_DIMS))}, not {shape.head_dim}"
        return None

    def paths(self, shape: ShapeClass, facts: DeviceFacts) -> tuple[str, ...]:
        return tuple(path for path in PATHS if self._plan(path, shape, facts) is not None)

    def compile(self, path: str, shape: ShapeClass, facts: DeviceFacts) -> None:
        plan = self._plan(path, shape, facts)
        assert plan is not None
        build(plan.source, plan.defines, facts.capability, specific=path == "hopper")

    def attend(self, path: str, shape: ShapeClass, case: Case) -> np.ndarray:
        return attend(path, shape, case)

    def _plan(self, path: str, shape: ShapeClass, facts: DeviceFacts) -> LaunchPlan | None:
        """The plan of the path's tiny case, as a host problem."""
        case = tiny_case(path, shape)
        problem = check(
            case.q, case.k, case.v, causal=shape.causal, kv_lengths=case.kv_lengths, cu_seqlens=case.cu_seqlens
        )
        return plan_for(path, problem, facts)
