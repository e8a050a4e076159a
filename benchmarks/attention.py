"""Attention on one GPU: ours, matmul-softmax in CuPy, and torch's SDPA where torch is installed, in one run.

    python benchmarks/attention.py [--quick] [--only PART,...] [--out FILE] [--plot FILE.png]

Every result is checked against float64 before it is timed. Times are GPU microseconds of one call inside a replayed
CUDA graph, calls rotating through enough inputs that a cache of keys comes from memory; matmul-softmax, which
cuBLAS in CuPy cannot capture, is launched from Python, and so is ours in the `prefill_eager` rows. The head sizes are
those of Soprano-1.1-80M: 4 query heads, 1 key-value head, head_dim 128, bfloat16, causal.

Rows: prefill/* and decode/* are what `attention` runs; prefill_mma/*, prefill_hopper/* single kernels;
prefill_standard/* matmul-softmax; memory/* long sequences; lm_prefill/* and lm_step/* the 80M language model in array
code with flash attention, and its peer with matmul-softmax, launched from Python; first_use/* seconds from nothing to
checked kernels. limit is the time that this GPU's matrix products or memory alone would take.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
    REPOSITORY,
    RESULTS,
    Row,
    Timing,
    foreign_stream,
    free_memory,
    gpu_limits,
    machine_facts,
    peak_extra_bytes,
    time_eager,
    time_graph,
    write_results,
)
from benchmarks.language_model import LanguageModels
from soprano_cupy.attention import flash, select_attention, standard_attention
from soprano_cupy.attention.arguments import check
from soprano_cupy.attention.dispatch import best_attention
from soprano_cupy.cuda.module import device_facts
from soprano_cupy.errors import SopranoError

HEADS, KV_HEADS, HEAD_DIM = 4, 1, 128
ELEMENT_BYTES = 2
L2_BYTES = 128 << 20  # inputs of one rotation: more than any GPU's L2 cache
PARTS = ("prefill", "decode", "memory", "language_model", "first_use")
MAX_ERROR_RATIO, MEAN_ERROR_RATIO = 2.0, 1.5  # against matmul-softmax in the same precision

PREFILL = [(1, 1 << n) for n in range(4, 15)] + [
    (8, 64),
    (8, 128),
    (8, 256),
    (8, 512),
    (8, 1024),
    (64, 64),
    (64, 256),
    (64, 512),
]
DECODE = [(batch, length) for batch in (1, 8, 64, 512, 1024, 2048) for length in (64, 128, 256, 512, 1024)]
MEMORY = [1024, 4096, 16384, 65536, 131072]
QUICK_PREFILL = [(1, 64), (1, 1024), (1, 4096), (1, 16384), (8, 1024)]
QUICK_DECODE = [(1, 512), (8, 256), (64, 512), (512, 512), (1024, 512)]
QUICK_MEMORY = [131072]
LANGUAGE_MODEL = [("prefill", 64), ("prefill", 256), ("prefill", 1024), ("step", 256), ("step", 1023)]
QUICK_LANGUAGE_MODEL = [("prefill", 256), ("step", 256)]


@dataclass(frozen=True)
class Inputs:
    """`sets` independent calls of one shape: q (sets, B, S, Hq, D), k and v (sets, B, L, Hkv, D)."""

    q: Any
    k: Any
    v: Any

    @classmethod
    def random(cls, batch: int, queries: int, keys: int, most_sets: int) -> Inputs:
        import cupy
        import ml_dtypes

        set_bytes = batch * (2 * queries * HEADS + 2 * keys * KV_HEADS) * HEAD_DIM * ELEMENT_BYTES
        sets = max(2, min(most_sets, -(-L2_BYTES // set_bytes)))

        def draw(tokens: int, heads: int) -> Any:
            out = cupy.empty((sets, batch, tokens, heads, HEAD_DIM), ml_dtypes.bfloat16)
            for i in range(sets):
                out[i] = cupy.random.standard_normal(out.shape[1:], dtype=cupy.float32).astype(out.dtype)
            return out

        return cls(draw(queries, HEADS), draw(keys, KV_HEADS), draw(keys, KV_HEADS))

    def calls(self, function: Callable[..., Any]) -> list[Callable[[], Any]]:
        return [partial(function, self.q[i], self.k[i], self.v[i]) for i in range(len(self.q))]


class Checker:
    """Counts checks; one that fails ends the run, because a wrong result's time means nothing."""

    def __init__(self) -> None:
        self.passed = 0

    def check(self, name: str, function: Callable[..., Any], inputs: Inputs) -> None:
        """The first and last queries of the first and last sequences, against float64 and the same precision."""
        out = function(inputs.q[0], inputs.k[0], inputs.v[0])
        worst = {"error": 0.0, "allowed": 0.0, "mean": 0.0, "mean_allowed": 0.0}
        for part, q, k, v in _slices(inputs, out):
            exact = standard_attention(_wide(q), _wide(k), _wide(v))
            plain = standard_attention(q, k, v)
            rounded = exact.astype(np.float32).astype(part.dtype)
            error, baseline, rounding = (abs(_wide(array) - exact) for array in (part, plain, rounded))
            worst["error"] = max(worst["error"], float(error.max()))
            worst["allowed"] = max(
                worst["allowed"], MAX_ERROR_RATIO * max(float(baseline.max()), float(rounding.max()))
            )
            worst["mean"] = max(worst["mean"], float(error.mean()))
            worst["mean_allowed"] = max(
                worst["mean_allowed"], MEAN_ERROR_RATIO * max(float(baseline.mean()), float(rounding.mean()))
            )
        if not (worst["error"] <= worst["allowed"] and worst["mean"] <= worst["mean_allowed"]):
            raise SystemExit(f"{name}: WRONG RESULT, nothing is written: {worst}")
        self.passed += 1


def _slices(inputs: Inputs, out: Any, tokens: int = 128) -> Iterator[tuple[Any, Any, Any, Any]]:
    """(out, q, k, v) of a few sequences, first and last `tokens` queries with the keys that they see."""
    q, k, v = inputs.q[0], inputs.k[0], inputs.v[0]
    queries, keys = q.shape[1], k.shape[1]
    for b in sorted({0, len(q) // 2, len(q) - 1}):
        last = slice(max(0, queries - tokens), queries)
        yield out[b : b + 1, last], q[b : b + 1, last], k[b : b + 1], v[b : b + 1]
        if queries > tokens and queries == keys:
            first = slice(0, tokens)
            yield out[b : b + 1, first], q[b : b + 1, first], k[b : b + 1, first], v[b : b + 1, first]


def _wide(array: Any) -> Any:
    return array.astype(np.float32).astype(np.float64)


class Torch:
    """torch's scaled_dot_product_attention on the same memory; `backends` is empty where torch is not installed."""

    def __init__(self) -> None:
        self.backends: dict[str, Any] = {}
        self.notes: dict[str, str] = {}
        try:
            import torch
            from torch.nn.attention import SDPBackend
        except ImportError:
            return
        if torch.cuda.is_available():
            self.backends = {"torch_flash": SDPBackend.FLASH_ATTENTION, "torch_cudnn": SDPBackend.CUDNN_ATTENTION}

    def time(self, name: str, inputs: Inputs, *, causal: bool, checked: Any) -> Timing | None:
        """As `time_graph`; None when the back end refuses the call or disagrees with `checked`."""
        import torch
        from torch.nn.attention import sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        tensors = [_as_torch(array).transpose(2, 3) for array in (inputs.q, inputs.k, inputs.v)]  # (sets, B, H, S, D)
        groups = {"enable_gqa": True}

        def call(i: int) -> Any:
            q, k, v = (tensor[i] for tensor in tensors)
            return scaled_dot_product_attention(q, k, v, is_causal=causal, **groups)

        with sdpa_kernel(self.backends[name]):
            try:
                result = call(0)
            except RuntimeError:  # no grouped heads in this back end: repeat them without copying
                groups.clear()
                tensors[1:] = [tensor.expand(-1, -1, HEADS, -1, -1) for tensor in tensors[1:]]
                try:
                    result = call(0)
                except RuntimeError as error:
                    self.notes[name] = str(error).splitlines()[0]
                    return None
            distance = (result.transpose(1, 2).float() - _as_torch(checked).float()).abs().max().item()
            if not distance < 0.1:
                self.notes[name] = f"differs from ours by {distance:.3g}"
                return None
            return self._replayed(torch, [partial(call, i) for i in range(len(inputs.q))])

    @staticmethod
    def _replayed(torch: Any, calls: Sequence[Callable[[], Any]]) -> Timing:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in calls[:3]:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        with torch.cuda.stream(stream), foreign_stream(stream.cuda_stream):
            timing = time_eager(graph.replay, milliseconds=20.0)
        n = len(calls)
        return Timing(timing.median / n, timing.p99 / n, timing.repeats, timing.best / n)


def _as_torch(array: Any) -> Any:
    """A bfloat16 CuPy array as a torch tensor of the same memory."""
    import torch

    return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)


# CuPy's own start is left out: it has a context and an array before the clock starts.
_FIRST_USE = """
import time, cupy
cupy.zeros(1).get()
from soprano_cupy.attention import select_attention
start = time.perf_counter()
select_attention(device="cuda:0", dtype="bfloat16")
print(time.perf_counter() - start)
"""


class Benchmark:
    """The run: rows in the order measured, printed as they come."""

    def __init__(self, limits: dict[str, float]) -> None:
        self.limits = limits
        self.rows: list[Row] = []
        self.checker = Checker()
        self.torch = Torch()
        self.facts = device_facts(0)
        self.models: LanguageModels | None = None

    def prefill(self, batch: int, tokens: int) -> None:
        inputs = Inputs.random(batch, tokens, tokens, most_sets=16)
        case = f"B{batch}/S{tokens}/bf16"
        flops = 4 * HEAD_DIM * HEADS * batch * tokens * (tokens + 1) / 2
        moved = batch * tokens * (2 * HEADS + 2 * KV_HEADS) * HEAD_DIM * ELEMENT_BYTES
        limit = max(flops / self.limits["matmul_tflop_s"], moved / self.limits["copy_tb_s"]) / 1e6
        self.checker.check(f"prefill/{case}", best_attention, inputs)
        checked = best_attention(inputs.q[0], inputs.k[0], inputs.v[0])
        peers = self._peers(inputs, checked, causal=True)
        flash.release_workspaces()
        extra = peak_extra_bytes(inputs.calls(best_attention)[0])
        standard = time_eager(inputs.calls(standard_attention)[0], milliseconds=20.0)
        standard_extra = peak_extra_bytes(inputs.calls(standard_attention)[0])
        ours = time_graph(inputs.calls(best_attention))
        self._add(f"prefill/{case}", ours, limit, {**peers, "standard": standard.median}, extra, flops)
        eager = time_eager(inputs.calls(best_attention)[0], milliseconds=20.0)
        self._add(f"prefill_eager/{case}", eager, None, {"standard": standard.median}, None, flops)
        self._add(f"prefill_standard/{case}", standard, limit, {}, standard_extra, flops)
        for name, path in (("prefill_mma", "prefill"), ("prefill_hopper", "hopper")):
            kernel = self._single_kernel(path, inputs)
            if kernel is not None:
                self.checker.check(f"{name}/{case}", kernel, inputs)
                self._add(f"{name}/{case}", time_graph(inputs.calls(kernel)), limit, {}, None, flops)

    def decode(self, batch: int, length: int) -> None:
        inputs = Inputs.random(batch, 1, length, most_sets=1024)
        case = f"decode/B{batch}/L{length}/bf16"
        moved = batch * (2 * HEADS + 2 * KV_HEADS * length) * HEAD_DIM * ELEMENT_BYTES
        limit = moved / self.limits["copy_tb_s"] / 1e6
        self.checker.check(case, best_attention, inputs)
        checked = best_attention(inputs.q[0], inputs.k[0], inputs.v[0])
        peers = self._peers(inputs, checked, causal=False)
        flash.release_workspaces()
        extra = peak_extra_bytes(inputs.calls(best_attention)[0])
        ours = time_graph(inputs.calls(best_attention))
        standard = time_eager(inputs.calls(standard_attention)[0], milliseconds=10.0)
        self._add(case, ours, limit, {**peers, "standard": standard.median}, extra, moved=moved)

    def memory(self, tokens: int) -> None:
        """Memory beyond inputs and output, and the time, far past where the score matrix fits."""
        inputs = Inputs.random(1, tokens, tokens, most_sets=2)
        self.checker.check(f"memory/S{tokens}", best_attention, inputs)
        call = inputs.calls(best_attention)[0]
        flops = 4 * HEAD_DIM * HEADS * tokens * (tokens + 1) / 2
        limit = flops / self.limits["matmul_tflop_s"] / 1e6
        flash.release_workspaces()
        self._add(f"memory/S{tokens}/bf16", time_eager(call), limit, {}, peak_extra_bytes(call), flops)

    def first_use(self) -> None:
        """Seconds until the kernels of the model's class are built, loaded and checked, in new processes."""
        with tempfile.TemporaryDirectory() as cache:
            for name in ("fresh_cache", "warm_cache"):
                environment = {**os.environ, "SOPRANO_CACHE_DIR": cache, "SOPRANO_ATTENTION": "flash"}
                command = [sys.executable, "-c", _FIRST_USE]
                done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"first_use/{name} failed: {done.stderr.strip().splitlines()[-1:]}")
                self.rows.append(Row(f"first_use/{name}", float(done.stdout), "s", 1))
                sys.stdout.write(f"first_use/{name:24} {float(done.stdout):10.3f} s\n")

    def language_model(self, kind: str, tokens: int) -> None:
        """The whole model's prefill of a prompt, or its step behind a context."""
        if self.models is None:
            self.models = LanguageModels()
        calls = self.models.prefill(tokens) if kind == "prefill" else self.models.step(tokens)
        self.checker.passed += 1
        times = {mode: time_eager(call, milliseconds=400.0) for mode, call in calls.items()}
        case = f"lm_prefill/S{tokens}/bf16" if kind == "prefill" else f"lm_step/B1/ctx{tokens}"
        self._add(case, times["flash"], None, {"standard": times["standard"].median}, None)

    def _peers(self, inputs: Inputs, checked: Any, *, causal: bool) -> dict[str, float]:
        timings = {name: self.torch.time(name, inputs, causal=causal, checked=checked) for name in self.torch.backends}
        return {name: timing.median for name, timing in timings.items() if timing is not None}

    def _single_kernel(self, path: str, inputs: Inputs) -> Callable[..., Any] | None:
        """One kernel whatever the dispatch would choose; None when it does not serve the call."""
        plan = flash.plan_for(path, check(inputs.q[0], inputs.k[0], inputs.v[0]), self.facts)
        if plan is None:
            return None

        def run(q: Any, k: Any, v: Any) -> Any:
            return flash.launch(path, plan, check(q, k, v), self.facts)

        return run

    def _add(
        self,
        case: str,
        time: Timing,
        limit: float | None,
        peer: dict[str, float],
        extra: int | None,
        flops: float = 0.0,
        moved: float = 0.0,
    ) -> None:
        share = None if limit is None else limit / time.median
        self.rows.append(Row(case, time.median, "us", time.repeats, time.p99, limit, share, peer, extra))
        rate = f"{flops / time.median / 1e6:7.1f} TFLOP/s" if flops else f"{moved / time.median / 1e6:7.2f} TB/s   "
        others = "  ".join(f"{name} {value:.1f}" for name, value in peer.items())
        part = "     " if share is None else f"{share:5.0%}"
        memory = "" if extra is None else f"  +{extra / 2**20:.1f} MB"
        sys.stdout.write(f"{case:34} {time.median:10.2f} us {rate} {part}{memory}  {others}\n")
        sys.stdout.flush()


def plot(rows: Sequence[Row], path: Path) -> None:
    """Time and memory against length, one sequence, log-log; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (times, memory) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    single = {_tokens(row): row for row in rows if row.case.startswith("prefill/B1/")}
    times.plot(list(single), [row.value for row in single.values()], "o-", label="soprano_cupy")
    for name in sorted({name for row in single.values() for name in row.peer}):
        points = {tokens: row.peer[name] for tokens, row in single.items() if name in row.peer}
        times.plot(list(points), list(points.values()), "o-", label=name)
    times.plot(list(single), [row.limit or np.nan for row in single.values()], "k:", label="limit of this GPU")
    for prefixes, label in ((("prefill/B1/", "memory/"), "soprano_cupy"), (("prefill_standard/B1/",), "standard")):
        found = sorted((_tokens(row), row.peak_extra_bytes or 0) for row in rows if row.case.startswith(prefixes))
        taken = [(extra + tokens * HEADS * HEAD_DIM * ELEMENT_BYTES) / 2**20 for tokens, extra in found]
        memory.plot([tokens for tokens, _ in found], taken, "o-", label=label)
    for axis, title in ((times, "prefill, microseconds"), (memory, "memory beyond the inputs, MB")):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("tokens")
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    sys.stdout.write(f"wrote {path}\n")


def _tokens(row: Row) -> int:
    """1024 of prefill/B1/S1024/bf16."""
    return int(row.case.split("/S")[1].split("/")[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few cases, under a minute")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, separated by commas")
    parser.add_argument("--out", type=Path, help="result file; benchmarks/results/<gpu>-attention.json by default")
    parser.add_argument("--plot", type=Path, help="also draw time and memory against length to this file")
    options = parser.parse_args()
    try:
        choice = select_attention("flash", device="cuda:0", dtype="bfloat16")
    except SopranoError as error:
        raise SystemExit(str(error)) from error
    facts = machine_facts(gpu=True)
    sys.stdout.write(f"{facts['gpu']}, {choice.reason}\n")
    benchmark = Benchmark(gpu_limits())
    sys.stdout.write("".join(f"{name} {value:.3g}\n" for name, value in benchmark.limits.items()))
    parts: dict[str, tuple[Callable[..., None], list[Any]]] = {
        "prefill": (benchmark.prefill, QUICK_PREFILL if options.quick else PREFILL),
        "decode": (benchmark.decode, QUICK_DECODE if options.quick else DECODE),
        "memory": (benchmark.memory, QUICK_MEMORY if options.quick else MEMORY),
        "language_model": (benchmark.language_model, QUICK_LANGUAGE_MODEL if options.quick else LANGUAGE_MODEL),
        "first_use": (benchmark.first_use, [()]),
    }
    for part in options.only.split(","):
        run, cases = parts[part]
        for case in cases:
            free_memory()
            run(*(case if isinstance(case, tuple) else (case,)))
    for name, note in benchmark.torch.notes.items():
        sys.stdout.write(f"{name} was left out somewhere: {note}\n")
    out = options.out or RESULTS / f"{facts['machine']}-attention.json"
    write_results(out, "attention", facts, benchmark.limits, benchmark.rows, benchmark.checker.passed)
    if options.plot:
        plot(benchmark.rows, options.plot)


if __name__ == "__main__":
    main()
