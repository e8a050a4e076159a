"""The flash kernels on a GPU: which of them serves a call, and its launch.

Three paths: `decode` (up to 16 queries a sequence, keys split over blocks), `hopper` (long prefill on compute
capability 9.0) and `prefill` (everything else).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..cuda.module import DeviceFacts, build, device_facts, load
from ..device import cuda_index, cuda_problem
from ..errors import DeviceError
from . import hopper
from .arguments import check
from .launch import LaunchPlan
from .probe import Case, ShapeClass, tiny_case
from .problem import Array, Problem, kernel_ready, pack_params

OLDEST_CAPABILITY = (7, 0)
HEAD_DIMS = (32, 64, 128)
DTYPES = ("float16", "bfloat16", "float32")

# The Hopper kernel wins once the products outweigh filling its pipelines.
HOPPER_MIN_QUERIES = 1024


def run(problem: Problem, paths: Sequence[str], lse: Array | None = None) -> Array:
    """Attention of a checked problem on its GPU by the best of `paths`. lse: (Hq, total_q) float32, to be filled."""
    import cupy

    facts = device_facts(cuda_index(problem.device))
    with cupy.cuda.Device(facts.index):
        return launch(choose(problem, paths), problem, facts, lse)


def choose(problem: Problem, paths: Sequence[str]) -> str:
    """The path for a call."""
    if "hopper" in paths and problem.seqlen_q >= HOPPER_MIN_QUERIES:
        return "hopper"
    raise DeviceError("no flash kernel serves this call")


def plan_for(path: str, problem: Problem, facts: DeviceFacts) -> LaunchPlan | None:
    """How one path would run a call; None when it cannot."""
    if path == "hopper":
        return hopper.plan(problem, facts.compute_capability, facts.multiprocessors)
    return None


def launch(path: str, problem: Problem, facts: DeviceFacts, lse: Array | None = None) -> Array:
    """Run a problem by one path on the current device; the result, on its way on the current stream."""
    import cupy

    problem = kernel_ready(problem)
    plan = plan_for(path, problem, facts)
    if plan is None:
        raise DeviceError(f"the {path} kernel cannot serve this call")
    kernel = load(plan.source, plan.kernel, plan.defines, facts.index, specific=path == "hopper")
    out = cupy.empty(problem.q.shape, problem.q.dtype)
    params = pack_params(problem, out, lse=lse)
    extra = hopper.extra_arguments(problem) if path == "hopper" else ()
    grid = plan.grid(
        batch=problem.batch,
        seqlen_q=problem.seqlen_q,
        num_heads=problem.num_heads,
        num_kv_heads=problem.num_kv_heads,
    )
    kernel(grid, (plan.threads,), (params, *extra), plan.shared_memory_bytes)
    return out


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
        return tuple(path for path in ("decode", "prefill", "hopper") if self._plan(path, shape, facts) is not None)

    def compile(self, path: str, shape: ShapeClass, facts: DeviceFacts) -> None:
        plan = self._plan(path, shape, facts)
        assert plan is not None
        build(plan.source, plan.defines, facts.capability, specific=path == "hopper")

    def attend(self, path: str, shape: ShapeClass, case: Case) -> np.ndarray:
        import cupy

        facts = device_facts(cuda_index(shape.device))
        with cupy.cuda.Device(facts.index):
            q, k, v = (cupy.asarray(array) for array in (case.q, case.k, case.v))
            problem = check(q, k, v, causal=shape.causal, kv_lengths=case.kv_lengths, cu_seqlens=case.cu_seqlens)
            return np.asarray(launch(path, problem, facts).get())

    def _plan(self, path: str, shape: ShapeClass, facts: DeviceFacts) -> LaunchPlan | None:
        """The plan of the path's tiny case, which is a host problem of the same sizes."""
        case = tiny_case(path, shape)
        problem = check(
            case.q, case.k, case.v, causal=shape.causal, kv_lengths=case.kv_lengths, cu_seqlens=case.cu_seqlens
        )
        return plan_for(path, problem, facts)
