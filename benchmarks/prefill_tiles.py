"""Times the prefill kernels' tiles on this GPU; the table in soprano_cupy/attention/prefill.py follows from it.

    python benchmarks/prefill_tiles.py [--head-dim 128] [--dtype bfloat16] [--heads 4] [--kv-heads 1] [--full]

First every tile is held to the accuracy rule of tests/attention_reference.py on ragged batches; then each is timed
inside a CUDA graph at lengths from 16 to 16,384. `*` marks the tile that the planner picks, `<` the fastest.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from attention_reference import assert_accurate, plain, reference

from benchmarks.common import time_graph
from soprano_cupy.attention import flash, prefill
from soprano_cupy.attention.arguments import check
from soprano_cupy.attention.launch import LaunchPlan
from soprano_cupy.cuda.module import device_facts

SHAPES = ((1, 16), (1, 64), (1, 128), (1, 256), (1, 512), (1, 1024), (1, 2048), (1, 4096), (1, 8192), (1, 16384),
          (8, 64), (8, 256), (8, 1024), (64, 64), (64, 256), (512, 64))  # fmt: skip
RAGGED = ((1, 65, 300), (17, 130, 64))  # lengths of packed sequences


def tile(
    rows: tuple[int, int], warps_n: int, keys: int, stages: int, q_in_registers: bool, blocks: int
) -> prefill.Tile:
    return prefill.Tile(*rows, warps_n, keys, stages, q_in_registers, blocks, "a candidate")


# Beyond the table: (warps, row tiles) along the rows, warps along the keys, keys, stages, Q in registers, blocks.
CANDIDATES = {
    128: [
        tile((4, 2), 1, 48, 2, False, 2),
        tile((4, 2), 1, 64, 2, False, 2),
        tile((4, 2), 1, 64, 1, False, 2),
        tile((4, 2), 1, 32, 2, False, 2),
        tile((4, 1), 1, 64, 2, True, 2),
        tile((8, 1), 1, 64, 2, True, 1),
        tile((2, 2), 2, 128, 1, False, 2),
        tile((2, 2), 2, 96, 1, False, 2),
        tile((2, 1), 2, 64, 2, True, 2),
        tile((2, 1), 4, 128, 2, True, 1),
        tile((1, 1), 4, 64, 2, True, 2),
        tile((1, 1), 8, 128, 2, True, 1),
    ],
    64: [
        tile((4, 2), 1, 128, 1, True, 2),
        tile((4, 2), 1, 64, 1, True, 2),
        tile((4, 1), 1, 64, 2, True, 2),
        tile((8, 1), 1, 64, 2, True, 1),
        tile((2, 1), 4, 128, 2, True, 1),
        tile((1, 1), 8, 128, 2, True, 1),
    ],
    32: [tile((4, 2), 1, 128, 1, True, 2), tile((2, 1), 4, 128, 2, True, 1), tile((1, 1), 8, 256, 2, True, 1)],
}


def candidates(head_dim: int, capability: tuple[int, int]) -> list[prefill.Tile]:
    """The table's tiles and the candidates that fit this GPU, each shape once."""
    tables = (prefill.WIDE, prefill.BALANCED, prefill.MEDIUM, prefill.NARROW)
    every = [t for table in tables for t in table[head_dim]] + CANDIDATES[head_dim]
    shapes = {label(t): t for t in reversed(every) if t.fits(capability, head_dim)}
    return list(reversed(shapes.values()))


def label(found: prefill.Tile) -> str:
    q = "r" if found.q_in_registers else "s"
    return f"{found.rows}x{found.block_keys} {found.warps_m}/{found.row_tiles}/{found.warps_n} st{found.stages} q{q}"


def random_array(shape: tuple[int, ...], dtype: str, seed: int) -> Any:
    import cupy
    import ml_dtypes

    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    host = np.random.default_rng(seed).standard_normal(shape, np.float32).astype(kind)
    return cupy.asarray(host.view(np.uint16)).view(kind) if kind.itemsize == 2 else cupy.asarray(host)


def on_host(array: Any) -> Any:
    return array.view(np.uint16).get().view(array.dtype) if array.dtype.itemsize == 2 else array.get()


def plan_for(found: prefill.Tile, options: argparse.Namespace) -> LaunchPlan:
    common = (("HEAD_DIM", options.head_dim), ("GROUP", options.heads // options.kv_heads),
              ("CAUSAL", int(not options.full)), (prefill.DTYPE_DEFINES[options.dtype], 1))  # fmt: skip
    return prefill.tensor_core_plan(found, options.head_dim, common)


def check_tile(plan: LaunchPlan, options: argparse.Namespace) -> str:
    """ "ok", or what is wrong."""
    facts = device_facts(0)
    for lengths in RAGGED:
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        heads = (options.heads, options.kv_heads, options.kv_heads)
        q, k, v = (random_array((sum(lengths), n, options.head_dim), options.dtype, i) for i, n in enumerate(heads))
        problem = check(q, k, v, causal=not options.full, cu_seqlens=starts)
        out = on_host(flash.launch("prefill", plan, problem, facts))
        call: dict[str, Any] = {"causal": not options.full, "cu_seqlens_q": starts, "cu_seqlens_k": starts}
        inputs = [on_host(array) for array in (q, k, v)]
        try:
            assert_accurate(out, reference(*inputs, **call)[0], plain(*inputs, **call))
        except AssertionError as error:
            return str(error).splitlines()[0]
    return "ok"


def time_shape(plans: dict[str, LaunchPlan], batch: int, length: int, options: argparse.Namespace) -> None:
    facts = device_facts(0)
    heads = (options.heads, options.kv_heads, options.kv_heads)
    arrays = [random_array((batch, length, n, options.head_dim), options.dtype, i) for i, n in enumerate(heads)]
    problem = check(*arrays, causal=not options.full)
    picked = flash.plan_for("prefill", problem, facts)
    assert picked is not None
    times = {}
    for name, plan in plans.items():
        calls = [lambda plan=plan: flash.launch("prefill", plan, problem, facts)] * (10 if batch * length < 8192 else 2)
        times[name] = time_graph(calls).median
    flops = 4.0 * batch * options.heads * length**2 * options.head_dim / (1 if options.full else 2)
    best = min(times, key=lambda name: times[name])
    print(f"B{batch} S{length}", flush=True)
    for name, us in times.items():
        marks = ("*" if plans[name].defines == picked.defines else " ") + ("<" if name == best else " ")
        print(f"  {marks} {name:28s} {us:9.2f} us {flops / us / 1e6:6.0f} TFLOP/s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, default=128, choices=prefill.HEAD_DIMS)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--full", action="store_true", help="no causal mask")
    parser.add_argument("--check-only", action="store_true")
    options = parser.parse_args()
    facts = device_facts(0)
    plans = {label(found): plan_for(found, options) for found in candidates(options.head_dim, facts.capability)}
    results = {name: check_tile(plan, options) for name, plan in plans.items()}
    for name, result in results.items():
        print(f"{'ok  ' if result == 'ok' else 'FAIL'} {name} {'' if result == 'ok' else result}", flush=True)
    if not options.check_only:
        for batch, length in SHAPES:
            time_shape({n: p for n, p in plans.items() if results[n] == "ok"}, batch, length, options)
    return 0 if all(result == "ok" for result in results.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
