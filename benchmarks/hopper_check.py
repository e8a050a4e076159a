"""Step-by-step check of the Hopper prefill kernel on a GPU of compute capability 9.0, then its times.

    python benchmarks/hopper_check.py [--only copy,products,small,sweep,split,repeat,time] [--tune]

Each stage prints one line per case and rests on those before it, so the first FAIL says what is wrong:
  copy      tensor maps, the swizzle in shared memory and zero fill, byte for byte
  products  S = Q K^T (both operands in shared memory) and O = P V (P in registers, V transposed), one tile
  small     the whole kernel on a few tiles, error against float64
  sweep     shapes, groups, masks, dtypes, ragged batches, NaN beyond the keys in use
  split     the same with 2 and 4 blocks to a tile, merged through the cluster's shared memory
  repeat    many launches, bit-identical
  time      microseconds and TFLOP/s; --tune also tries other tiles and grids
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from soprano_cupy.attention import hopper
from soprano_cupy.attention.arguments import check
from soprano_cupy.attention.problem import Problem, kernel_ready, pack_params
from soprano_cupy.cuda.compiler import compile_options, find_nvrtc
from soprano_cupy.cuda.module import Kernel, device_facts, load
from soprano_cupy.cuda.source import joined_source

STAGES = ("copy", "products", "small", "sweep", "split", "repeat", "time")
failures: list[str] = []


@dataclass(frozen=True)
class Case:
    """One attention call; q_lens makes it packed (with kv_lens: on a cache of `keys` tokens)."""

    batch: int = 1
    tokens: int = 128
    keys: int = 128
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 128
    dtype: str = "bfloat16"
    causal: bool = True
    q_lens: tuple[int, ...] | None = None
    kv_lens: tuple[int, ...] | None = None

    def __str__(self) -> str:
        shape = f"B{self.batch} S{self.tokens} L{self.keys}" if self.q_lens is None else f"packed {self.q_lens}"
        kv = "" if self.kv_lens is None else f" kv {self.kv_lens} of {self.keys}"
        mask = "causal" if self.causal else "full"
        return f"{shape}{kv} heads {self.heads}/{self.kv_heads} D{self.head_dim} {self.dtype} {mask}"


def report(stage: str, name: str, good: bool, detail: str) -> None:
    print(f"{'ok  ' if good else 'FAIL'} {stage:9s} {name}: {detail}", flush=True)
    if not good:
        failures.append(f"{stage}: {name}")


def random_array(shape: Sequence[int], dtype: str, seed: int) -> Any:
    """Standard normal values rounded to the 16-bit type, on the GPU."""
    import cupy as cp
    import ml_dtypes

    host = np.random.default_rng(seed).standard_normal(tuple(shape), np.float32)
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(np.float16)
    return cp.asarray(host.astype(kind).view(np.uint16)).view(kind)


def widen(array: Any) -> np.ndarray:
    """A 16-bit GPU array as float64 on the host."""
    values: np.ndarray = array.view(np.uint16).get().view(array.dtype).astype(np.float64)
    return values


def inputs(case: Case, seed: int = 0) -> dict[str, Any]:
    """Arguments of `check`; what lies beyond the keys in use is NaN."""
    dim = case.head_dim
    arguments: dict[str, Any] = {"causal": case.causal}
    if case.q_lens is None:
        q_shape: tuple[int, ...] = (case.batch, case.tokens, case.heads, dim)
        kv_shape: tuple[int, ...] = (case.batch, case.keys, case.kv_heads, dim)
    else:
        total = sum(case.q_lens)
        q_shape = (total, case.heads, dim)
        kv_shape = (
            (total, case.kv_heads, dim) if case.kv_lens is None else (len(case.q_lens), case.keys, case.kv_heads, dim)
        )
        arguments["cu_seqlens"] = np.concatenate([[0], np.cumsum(case.q_lens)])
    q = random_array(q_shape, case.dtype, seed)
    k, v = (random_array(kv_shape, case.dtype, seed + i) for i in (1, 2))
    if case.kv_lens is not None:
        arguments["kv_lengths"] = np.asarray(case.kv_lens)
        for i, length in enumerate(case.kv_lens):
            k.view(np.uint16)[i, length:] = 0x7FFF  # NaN in both types
            v.view(np.uint16)[i, length:] = 0x7FFF
    return {"q": q, "k": k, "v": v, **arguments}


def sequences(case: Case, problem: Problem) -> Iterator[tuple[Any, Any]]:
    """Index of each sequence's queries and of its keys."""
    starts = np.concatenate([[0], np.cumsum(case.q_lens or ())]).astype(int)
    for i in range(problem.batch):
        rows: Any = i if case.q_lens is None else slice(starts[i], starts[i + 1])
        length = case.keys if case.kv_lens is None else case.kv_lens[i]
        yield rows, rows if problem.form == "packed" else (i, slice(0, length))


def reference(case: Case, problem: Problem, rounded: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, ...]:
    """Output and log-sum-exp in float64; `rounded` is applied to the weights and to the output."""
    q, k, v = widen(problem.q), widen(problem.k), widen(problem.v)
    out = np.zeros(q.shape)
    lse = np.full((case.heads, problem.total_q), -np.inf)
    at = 0
    for rows, keys in sequences(case, problem):
        qs, ks, vs = q[rows], np.repeat(k[keys], problem.group, 1), np.repeat(v[keys], problem.group, 1)
        s = qs.transpose(1, 0, 2) @ ks.transpose(1, 2, 0) * problem.scale  # (heads, queries, keys)
        if case.causal:
            hidden = np.arange(len(ks)) > np.arange(len(qs))[:, None] + len(ks) - len(qs)
            s[:, hidden] = -np.inf
        top = np.maximum(s.max(-1, keepdims=True), -1e300)
        p = np.exp(s - top)
        total = p.sum(-1, keepdims=True)
        mixed = rounded(p) @ vs.transpose(1, 0, 2) / np.where(total == 0, 1, total)
        out[rows] = rounded(mixed.transpose(1, 0, 2))
        with np.errstate(divide="ignore"):
            lse[:, at : at + len(qs)] = (top + np.log(total))[..., 0]
        at += len(qs)
    return out, lse


@lru_cache(maxsize=1)
def expected(case: Case) -> tuple[Problem, np.ndarray, np.ndarray, np.ndarray]:
    """The problem; output and log-sum-exp in float64; output with weights and output rounded to 16 bits."""
    problem = kernel_ready(check(**inputs(case)))
    want, want_lse = reference(case, problem, lambda x: x)
    kind = problem.q.dtype
    plain, _ = reference(case, problem, lambda x: x.astype(np.float32).astype(kind).astype(np.float64))
    return problem, want, want_lse, plain


class Launch:
    """The kernel bound to one problem."""

    def __init__(
        self, problem: Problem, blocks: int | None = None, splits: int = 1, edits: Sequence[tuple[str, str]] = ()
    ) -> None:
        import cupy as cp

        self.problem = problem
        facts = device_facts(problem.q.device.id)
        plan = hopper.plan(problem, facts.compute_capability, facts.multiprocessors, splits=splits)
        if plan is None:
            raise SystemExit(hopper.refusal(problem, facts.compute_capability))
        self.plan = plan
        if edits:  # a variant of the source, to measure
            self.kernel = compiled(hopper.FUNCTION, problem, edits)
        else:
            self.kernel = load(plan.source, plan.kernel, plan.defines, problem.q.device.id, specific=True)
        self.out = cp.full(problem.q.shape, 0x7FFF, np.uint16).view(problem.q.dtype)
        self.lse = cp.full((problem.num_heads, problem.total_q), np.nan, np.float32)
        self.arguments = (pack_params(problem, self.out, lse=self.lse), *hopper.extra_arguments(problem))
        assert isinstance(plan.grid, hopper.TileGrid)
        tiles = plan.grid.tiles(problem.batch, problem.seqlen_q, problem.num_heads, problem.num_kv_heads)
        self.blocks = min(tiles, blocks or tiles) if splits == 1 else tiles * splits

    def __call__(self) -> None:
        self.kernel((self.blocks,), (self.plan.threads,), self.arguments, self.plan.shared_memory_bytes)


def compiled(function: str, problem: Problem, edits: Sequence[tuple[str, str]] = (), extra: str = "") -> Kernel:
    """A function of the kernel file with `edits` (old text, new text) made and `extra` text behind it."""
    import cupy as cp

    text = joined_source(hopper.SOURCE)
    for old, new in edits:
        if old not in text:
            raise SystemExit(f"the kernel has no text {old!r} to replace")
        text = text.replace(old, new)
    binary = find_nvrtc().compile(text + extra, hopper.SOURCE, compile_options("sm_90a", hopper.defines(problem)))
    module = cp.cuda.function.Module()
    module.load(binary.cubin)
    return Kernel(module, module.get_function(function))


def probe(name: str, problem: Problem) -> Callable[..., None]:
    """A probe kernel for this problem's constants, as a function of its arguments."""
    import cupy as cp

    kernel = compiled(name, problem, extra=(Path(__file__).parent / "hopper_probes.cu").read_text())
    tiles = hopper.TILES[problem.head_dim]

    def launch(*arguments: Any) -> None:
        kernel((1,), (tiles.consumers * 128,), arguments, tiles.shared_bytes(problem.head_dim))
        cp.cuda.get_current_stream().synchronize()

    return launch


def swizzled(tile: np.ndarray) -> np.ndarray:
    """A tile (rows, D) of 16-bit words as shared memory holds it: panels of 128-byte rows, 16-byte chunks permuted."""
    rows, dim = tile.shape
    chunks = tile.reshape(rows, dim // 64, 8, 8).transpose(1, 0, 2, 3)  # panel, row, chunk, word
    out = np.empty_like(chunks)
    row = np.arange(rows)[:, None]
    out[:, row, np.arange(8)[None] ^ (row & 7)] = chunks
    words: np.ndarray = out.reshape(-1)
    return words


def check_copy() -> None:
    import cupy as cp

    for dim, heads, kv_heads in ((128, 4, 1), (128, 8, 2), (64, 4, 4), (64, 64, 1)):
        case = Case(batch=2, tokens=150, keys=200, heads=heads, kv_heads=kv_heads, head_dim=dim)
        problem = kernel_ready(check(**inputs(case)))
        q_words, k_words = (a.view(np.uint16).get() for a in (problem.q, problem.k))
        rows, group = hopper.TILES[dim].rows, problem.group
        launch = probe("probe_copy", problem)
        maps = hopper.extra_arguments(problem)
        q_got, k_got = cp.zeros(rows * dim, np.uint16), cp.zeros(128 * dim, np.uint16)
        tokens = rows // group
        for kv_head, token, batch, key in ((0, 0, 0, 0), (kv_heads - 1, 140, 1, 100)):
            head = kv_head * group
            args = [np.int32(x) for x in (head, token, batch, key, kv_head)]
            launch(maps[0], maps[1], q_got, k_got, *args)
            q_tile = np.zeros((rows, dim), np.uint16)
            part = q_words[batch, token : token + tokens, head : head + group].reshape(-1, dim)
            q_tile[: len(part)] = part
            k_tile = np.zeros((128, dim), np.uint16)
            part = k_words[batch, key : key + 128, kv_head]
            k_tile[: len(part)] = part
            wrong_q = int((q_got.get() != swizzled(q_tile)).sum())
            wrong_k = int((k_got.get() != swizzled(k_tile)).sum())
            report("copy", f"D{dim} heads {heads}/{kv_heads} token {token} key {key}", wrong_q + wrong_k == 0,
                   f"wrong words: q {wrong_q}/{q_tile.size}, k {wrong_k}/{k_tile.size}")  # fmt: skip


def check_products() -> None:
    import cupy as cp

    for dim, dtype in ((128, "bfloat16"), (64, "bfloat16"), (128, "float16"), (64, "float16")):
        case = Case(tokens=128, heads=4, head_dim=dim, dtype=dtype)
        problem = kernel_ready(check(**inputs(case)))
        rows = hopper.TILES[dim].rows
        weights = random_array((rows, 128), dtype, 5)
        scores, outputs = cp.zeros((rows, 128), np.float32), cp.zeros((rows, dim), np.float32)
        exact = cp.asarray(widen(weights).astype(np.float32))
        probe("probe_products", problem)(*hopper.extra_arguments(problem), exact, scores, outputs)
        q, k, v = (widen(a) for a in (problem.q, problem.k, problem.v))
        want_s = q[0].reshape(-1, dim)[:rows] @ k[0, :, 0].T
        want_o = widen(weights) @ v[0, :, 0]
        for name, got, want in (("S = Q K^T", scores.get(), want_s), ("O = P V", outputs.get(), want_o)):
            error = np.abs(got - want)
            worst = np.unravel_index(np.nanargmax(np.where(np.isnan(error), np.inf, error)), error.shape)
            share = float((~(error < 1e-3)).mean())
            report("products", f"{name} D{dim} {dtype}", share == 0,
                   f"max error {error.max():.2e} at {tuple(map(int, worst))}, wrong {share:.1%}")  # fmt: skip


def check_case(stage: str, case: Case, blocks: int | None = None, splits: int = 1) -> None:
    """Error against float64 at most twice that of the same sums with weights and output rounded to 16 bits."""
    import cupy as cp

    problem, want, want_lse, plain = expected(case)
    launch = Launch(problem, blocks, splits)
    launch()
    cp.cuda.get_current_stream().synchronize()
    got, lse = widen(launch.out), launch.lse.get().astype(np.float64)
    error, allowed = np.abs(got - want), np.abs(plain - want)
    finite = np.isfinite(want_lse)
    lse_error = np.abs(lse[finite] - want_lse[finite]).max(initial=0)
    same_empty = bool(np.array_equal(np.isneginf(lse), ~finite))
    top, mean = error.max() / max(allowed.max(), 1e-9), error.mean() / max(allowed.mean(), 1e-12)
    good = bool(top <= 2 and mean <= 1.5 and lse_error < 1e-4 and same_empty)
    grid = ("" if blocks is None else f" grid {blocks}") + ("" if splits == 1 else f" splits {splits}")
    detail = f"max {error.max():.2e} = {top:.2f} x plain, mean {mean:.2f} x, lse {lse_error:.1e}"
    if not good:
        bad = ~(error <= 2 * allowed.max())
        where = [tuple(int(i) for i in row) for row in np.argwhere(bad)[:3]]
        detail += f"; {bad.mean():.1%} of outputs wrong, first at {where}; empty rows agree: {same_empty}"
    report(stage, str(case) + grid, good, detail)


def check_cases(stage: str, cases: Iterable[Case], grids: Sequence[tuple[int | None, int]]) -> None:
    """Every case on every (blocks, splits)."""
    for case in cases:
        for blocks, splits in grids:
            if case.head_dim % (32 * splits) == 0:
                check_case(stage, case, blocks, splits)


def small_cases() -> Iterator[Case]:
    yield Case(tokens=32, keys=128, causal=False)  # one tile, one block
    yield Case(tokens=32, keys=32, causal=True)  # one partial block
    yield Case(tokens=32, keys=256, causal=False)  # the step that overlaps, once
    yield Case(tokens=128, keys=128)
    yield Case(tokens=384, keys=384)


def sweep_cases() -> Iterator[Case]:
    base = Case(batch=2, tokens=300, keys=300)
    for dtype in ("bfloat16", "float16"):
        for dim in (64, 128):
            for causal in (True, False):
                yield replace(base, dtype=dtype, head_dim=dim, causal=causal)
    for tokens, keys in ((1, 1), (1, 700), (127, 127), (129, 129), (33, 500), (500, 33), (1, 129), (1025, 1025)):
        yield replace(base, tokens=tokens, keys=keys)
        yield replace(base, tokens=tokens, keys=keys, causal=False, head_dim=64)
    for heads, kv_heads in ((1, 1), (2, 2), (16, 2), (8, 4), (64, 1), (128, 1), (32, 16)):
        yield replace(base, heads=heads, kv_heads=kv_heads, batch=1)
        yield replace(base, heads=heads, kv_heads=kv_heads, head_dim=64, causal=False)
    yield replace(base, kv_lens=(1, 299))
    yield replace(base, batch=4, tokens=100, keys=400, kv_lens=(400, 129, 128, 127))
    yield replace(base, batch=3, tokens=200, keys=512, kv_lens=(150, 200, 511), causal=False)
    for lens in ((5, 300, 128, 1, 77), (256, 256), (1, 1, 1), (640, 31, 33)):
        yield replace(base, q_lens=lens)
        yield replace(base, q_lens=lens, heads=8, kv_heads=2, head_dim=64, causal=False)
    yield replace(base, q_lens=(40, 200, 3), kv_lens=(130, 200, 600), keys=640)
    yield replace(base, q_lens=(300, 7), kv_lens=(100, 390), keys=400, heads=8, kv_heads=2)


def check_repeat() -> None:
    import cupy as cp

    case = Case(batch=4, tokens=1500, keys=1500)
    for blocks, splits in ((None, 1), (132, 1), (None, 2), (None, 4)):
        launch = Launch(kernel_ready(check(**inputs(case))), blocks, splits)
        launch()
        first, first_lse = launch.out.view(np.uint16).copy(), launch.lse.copy()
        different = 0
        for _ in range(200):
            launch.out.view(np.uint16).fill(0x7FFF)
            launch()
            different += int((launch.out.view(np.uint16) != first).any() or (launch.lse != first_lse).any())
        cp.cuda.get_current_stream().synchronize()
        report("repeat", f"{case} grid {launch.blocks}", different == 0, f"{different} of 200 launches differ")


def microseconds(launch: Callable[[], None], repeats: int) -> float:
    """Median time of one launch over graphs of `repeats` launches."""
    import cupy as cp

    launch()
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        launch()
        stream.synchronize()
        stream.begin_capture()
        for _ in range(repeats):
            launch()
        graph = stream.end_capture()
        times = []
        for _ in range(12):
            start, end = cp.cuda.Event(), cp.cuda.Event()
            start.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            times.append(cp.cuda.get_elapsed_time(start, end) * 1e3 / repeats)
    return float(np.median(times[2:]))


def time_case(
    case: Case, blocks: int | None, label: str = "", splits: int = 1, edits: Sequence[tuple[str, str]] = ()
) -> None:
    launch = Launch(kernel_ready(check(**inputs(case))), blocks, splits, edits)
    flops = 4 * case.batch * case.heads * case.tokens * case.keys * case.head_dim / (2 if case.causal else 1)
    repeats = max(2, min(40, int(5e12 / flops)))
    us = microseconds(launch, repeats)
    print(f"time      {case} grid {launch.blocks} {label}: {us:.1f} us, {flops / us / 1e6:.0f} TFLOP/s", flush=True)


def run_times(tune: bool) -> None:
    shapes = [(8, 1024), (1, 1024), (1, 2048), (1, 4096), (1, 8192), (1, 16384)]
    sms = device_facts(0).multiprocessors
    for batch, tokens in shapes:
        case = Case(batch=batch, tokens=tokens, keys=tokens)
        time_case(case, None, "one tile a block")
        time_case(case, sms, "persistent")
        for splits in (2, 4) if batch * tokens <= 8192 else ():
            time_case(case, None, f"splits {splits}", splits)
    for case in (
        Case(tokens=16384, keys=16384, causal=False),
        Case(tokens=16384, keys=16384, head_dim=64),
        Case(tokens=16384, keys=16384, dtype="float16"),
        Case(tokens=8192, keys=8192, heads=16, kv_heads=16),
    ):
        time_case(case, sms)
    if tune:
        tune_variants(sms)


def tune_variants(sms: int) -> None:
    """Other tiles, and the kernel with one idea taken out."""
    kept = dict(hopper.TILES)
    tiles = hopper.Tiles
    no_turns = (("TAKE_TURNS = CONSUMERS > 1", "TAKE_TURNS = false"),)
    no_exponentials = (("exp2_fast(fmaf(s[", "(fmaf(s["),)  # wrong results: what the exponentials cost
    for dim, variant, edits, label in (
        (128, tiles(2, 2, 232, 40, 0), (), "threshold 0"),
        (128, tiles(2, 2, 232, 40, 8), no_turns, "no turns"),
        (128, tiles(2, 3, 232, 40, 8), (), "3 stages"),
        (128, tiles(2, 2, 232, 40, 8), no_exponentials, "no exponentials"),
        (64, tiles(2, 2, 232, 40, 0), (), "threshold 0"),
        (64, tiles(2, 2, 232, 40, 8), no_turns, "no turns"),
        (64, tiles(2, 4, 232, 40, 8), (), "4 stages"),
        (64, tiles(3, 2, 160, 32, 8), (), "3 consumers"),
        (64, tiles(3, 2, 160, 32, 8), no_turns, "3 consumers, no turns"),
    ):
        hopper.TILES[dim] = variant
        for tokens in (4096, 16384):
            time_case(Case(tokens=tokens, keys=tokens, head_dim=dim), sms, label, 1, edits)
        hopper.TILES.update(kept)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(STAGES), help="stages to run, comma-separated")
    parser.add_argument("--tune", action="store_true", help="time other tiles too")
    options = parser.parse_args()
    facts = device_facts(0)
    print(f"{facts.name}, {facts.multiprocessors} multiprocessors, NVRTC {find_nvrtc().version}", flush=True)
    checks: dict[str, Callable[[], None]] = {
        "copy": check_copy,
        "products": check_products,
        "small": lambda: check_cases("small", small_cases(), ((None, 1),)),
        "sweep": lambda: check_cases("sweep", sweep_cases(), ((None, 1), (3, 1))),  # also 3 persistent blocks
        "split": lambda: check_cases("split", (*small_cases(), *sweep_cases()), ((None, 2), (None, 4))),
        "repeat": check_repeat,
        "time": lambda: run_times(options.tune),
    }
    for stage in options.only.split(","):
        checks[stage]()
        if failures and stage in ("copy", "products", "small"):
            break  # the later stages would only repeat it
    print(f"{len(failures)} failures" + "".join(f"\n  {name}" for name in failures))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
