"""All compiled forms that a class of calls can ask for: what to prebuild, and what to test-compile."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from ..cuda.module import DeviceFacts
from .flash import PATHS, plan_for
from .launch import LaunchPlan
from .probe import ShapeClass
from .problem import Problem

# Sizes on both sides of every rule by which the planners choose tiles and splits.
_BATCHES = (1, 8, 64, 512)
_QUERIES = (1, 2, 4, 8, 16, 17, 64, 256, 1024, 2048, 4096, 16384)
_KEYS = (64, 1024, 16384)

# Streaming multiprocessors of one GPU of each architecture: tile choice depends on how many there are to fill.
MULTIPROCESSORS = {70: 80, 75: 40, 80: 108, 86: 84, 87: 16, 89: 128, 90: 132, 100: 148, 103: 148, 120: 170, 121: 48}
_UNKNOWN_MULTIPROCESSORS = 108


def architecture_facts(number: int) -> DeviceFacts:
    """A GPU of compute capability `number` (86 for 8.6), for planning without one."""
    return DeviceFacts(0, f"sm_{number}", divmod(number, 10), MULTIPROCESSORS.get(number, _UNKNOWN_MULTIPROCESSORS))


def sizes_only(shape: ShapeClass, batch: int, queries: int, keys: int) -> Problem:
    """A dense problem without arrays, which is all that planning needs."""
    return Problem(
        form="dense",
        q=None,
        k=None,
        v=None,
        cu_seqlens=None,
        kv_lengths=None,
        query_starts=None,
        key_lengths=None,
        device=shape.device,
        dtype=shape.dtype,
        causal=shape.causal,
        scale=1.0,
        batch=batch,
        total_q=batch * queries,
        seqlen_q=queries,
        seqlen_k=keys,
        num_heads=shape.group,
        num_kv_heads=1,
        head_dim=shape.head_dim,
    )


def variants(shape: ShapeClass, facts: DeviceFacts) -> Iterator[tuple[str, LaunchPlan]]:
    """(path, plan) for every distinct compilation that calls of the class come to on such a GPU."""
    seen = set()
    for batch, queries, keys in product(_BATCHES, _QUERIES, _KEYS):
        problem = sizes_only(shape, batch, queries, max(queries, keys))
        for path in PATHS:
            plan = plan_for(path, problem, facts)
            if plan is not None and (plan.source, plan.defines) not in seen:
                seen.add((plan.source, plan.defines))
                yield path, plan
