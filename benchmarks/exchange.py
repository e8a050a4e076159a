"""How fast thread blocks can hand each other the results of a layer: exchanges alone, and whole layers of candidates.

    python benchmarks/exchange.py [--only words,layers] [--seconds 8] [--out FILE]

Every candidate runs in a process of its own: one that fails or hangs (a watchdog ends every wait of its kernels) leaves
the others alone. A layer counts only after its result agrees with NumPy in float64 with the same 16-bit roundings.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, Row, machine_facts, timing, write_results
from benchmarks.exchange_model import Model, bf16_bits, stream_of
from soprano_cupy.gpu import persistent_schedule as schedule

if TYPE_CHECKING:
    from soprano_cupy.cuda.module import Kernel
    from soprano_cupy.gpu._driver import Program

LAYERS = 17
CONTEXT = 256
STREAM_BYTES = 151e6  # of all weights, the head included: the limit is this over the memory's rate
POSITION = CONTEXT - 1
# Largest error of the residual stream behind so many layers, over its rms. A sum that is off by one bit turns a
# rounding to 16 bits over; behind a few layers no rounding is the reference's any more, and the error is that of
# bfloat16 itself: about 2^-9 for each of four roundings a layer, times three or four for the largest of 512.
TOLERANCES = {1: 2e-3, 2: 1e-2, LAYERS: 6e-2}
SHARED_LIMIT = 232_448  # bytes of a block on compute capability 9.0


@dataclass(frozen=True)
class Candidate:
    """A way to run whole layers, with the prediction that was written down before it ran."""

    name: str
    clusters: int
    ranks: int
    dim_parts: int
    transport: int  # 0 clusters, 1 one group through global memory
    word_bytes: int  # of the latter; 0: plain stores and a barrier of the grid
    predicted: float  # microseconds of a layer

    @property
    def shape(self) -> schedule.Shape:
        return schedule.Shape(512, 4, 1, 128, 2304, 8192, self.clusters, self.ranks, self.dim_parts)


CANDIDATES = (
    Candidate("4 clusters of 16", 4, 16, 1, 0, 0, 4.0),
    Candidate("4 clusters of 16, dims in 2", 4, 16, 2, 0, 0, 3.9),
    Candidate("4 clusters of 16, dims in 4", 4, 16, 4, 0, 0, 3.9),
    Candidate("2 clusters of 16", 2, 16, 1, 0, 0, 4.7),
    Candidate("1 cluster of 16", 1, 16, 1, 0, 0, 5.8),
    Candidate("4 clusters of 8", 4, 8, 1, 0, 0, 4.5),
    Candidate("2 clusters of 8", 2, 8, 1, 0, 0, 6.0),
    Candidate("flat, 16 blocks, 8-byte words", 1, 16, 4, 1, 8, 7.5),
    Candidate("flat, 16 blocks, 16-byte words", 1, 16, 4, 1, 16, 7.3),
    Candidate("flat, 32 blocks, 8-byte words", 1, 32, 4, 1, 8, 7.2),
    Candidate("flat, 32 blocks, 16-byte words", 1, 32, 4, 1, 16, 7.0),
    Candidate("flat, 48 blocks, 16-byte words", 1, 48, 4, 1, 16, 7.3),
    Candidate("flat, 64 blocks, 8-byte words", 1, 64, 4, 1, 8, 7.8),
    Candidate("flat, 64 blocks, 16-byte words", 1, 64, 4, 1, 16, 7.6),
    Candidate("flat, 96 blocks, 16-byte words", 1, 96, 4, 1, 16, 8.3),
    Candidate("flat, 128 blocks, 16-byte words", 1, 128, 4, 1, 16, 8.8),
    Candidate("grid barrier, 32 blocks", 1, 32, 4, 1, 0, 7.5),
    Candidate("grid barrier, 64 blocks", 1, 64, 4, 1, 0, 7.8),
    Candidate("grid barrier, 128 blocks", 1, 128, 4, 1, 0, 8.5),
)

# (kind, blocks, word bytes) -> microseconds of an exchange
WORD_CASES = [
    ("gather", blocks, size, words)
    for words in (512, 768)
    for blocks in (16, 32, 48, 64, 96, 128)
    for size in (8, 16)
]  # fmt: skip
WORD_PREDICTED = {16: 0.80, 32: 0.85, 48: 0.95, 64: 1.05, 96: 1.2, 128: 1.35}


# ---- whole layers ----


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest error, over the rms of what is expected."""
    return float(np.abs(got - expected).max() / np.sqrt((expected**2).mean()))


POINTS = (
    "layer begins", "hidden here", "QKV product", "block", "sent", "QKV here", "attention", "block", "sent",
    "shares here", "merged", "O product", "block", "sum over clusters", "sent", "hidden here", "gate and up",
    "block and norm", "sent", "gated here", "down product", "block", "sum over clusters", "sent",
)  # fmt: skip


def show_profile(run: Callable[[int], float], words: Any, blocks: int) -> list[tuple[str, float, float]]:
    """Cycles between the points of a layer: mean and largest over blocks and runs."""
    rows = []
    for _ in range(20):
        run(5)
        marks = words.view(np.uint32)[2 << 19 :][: blocks * 32].get().reshape(blocks, 32)[:, : len(POINTS)]
        rows.append(np.diff(marks.astype(np.int64), axis=1))
    cycles = np.concatenate(rows) & 0xFFFFFFFF
    return [
        (name, float(np.median(cycles[:, i])), float(np.quantile(cycles[:, i], 0.95)))
        for i, name in enumerate(POINTS[1:])
    ]


def run_candidate(
    candidate: Candidate, seconds: float, profile: bool = False, more: Sequence[str] = (), check: bool = True
) -> dict[str, Any]:
    """Check and time one candidate, or profile it; in a process of its own. more: further constants, as NAME=VALUE."""
    import cupy

    from soprano_cupy.cuda.module import device_facts
    from soprano_cupy.gpu import _driver
    from soprano_cupy.gpu.launch import Launch
    from soprano_cupy.gpu.program import on_device

    s = candidate.shape
    shared_bytes = s.shared_bytes()
    if shared_bytes > SHARED_LIMIT:
        return {"name": candidate.name, "skipped": f"a block would need {shared_bytes} bytes of shared memory"}
    defines = (
        *s.defines(), ("DTYPE_BF16", 1), ("TRANSPORT", candidate.transport),
        ("WORD_BYTES", candidate.word_bytes),
        *((("PROFILE", 1),) if profile else ()), *((name, int(value)) for name, value in (m.split("=") for m in more)),
    )  # fmt: skip
    model = Model.random(s, LAYERS, CONTEXT)
    expected = {depth: model.reference(s, POSITION, depth) for depth in TOLERANCES if check}
    with on_device(0):
        kernel = load_kernel("experiments/layers.cu", "layers", defines, shared_bytes)
        cluster = s.ranks if candidate.transport == 0 else 1
        room = co_resident(kernel, s.blocks, shared_bytes, cluster)
        if room is not None:
            return {"name": candidate.name, "skipped": room}
        stream, stream_bytes = stream_of(model, s)
        half = s.head_dim // 2
        angles = np.arange(CONTEXT)[:, None] * 10000.0 ** (-np.arange(half) / half)
        rope = cupy.asarray(np.stack((np.cos(angles), np.sin(angles)), -1).astype(np.float32))
        keys, values = (cupy.asarray(bf16_bits(a)) for a in (model.keys, model.values))
        keys[:, POSITION:] = 0x7FC0
        values[:, POSITION:] = 0x7FC0  # the newest token's must come from the kernel
        gains, head_gains = cupy.asarray(model.gains), cupy.asarray(model.head_gains)
        # behind the last layer the next round begins: its norm is the first layer's
        gains[LAYERS, 0] = gains[0, 0]
        source, output = cupy.asarray(model.input), cupy.full(s.hidden, cupy.nan, cupy.float32)
        words, error = cupy.zeros(1 << 20, cupy.uint64), cupy.zeros(4, cupy.uint32)
        stream_handle = cupy.cuda.Stream(non_blocking=True)

        def program(rounds: int, layers: int) -> Program:
            params = np.zeros(1, PARAMS)
            for name, value in {
                "stream": stream.data.ptr, "gains": gains.data.ptr, "head_gains": head_gains.data.ptr,
                "rope": rope.data.ptr, "keys": keys.data.ptr, "values": values.data.ptr, "words": words.data.ptr,
                "error": error.data.ptr, "stream_bytes": stream_bytes, "layer_elements": keys[0].size, "layers": layers,
                "epsilon": 1e-6, "input": source.data.ptr, "output": output.data.ptr, "rounds": rounds,
                "position": POSITION,
            }.items():  # fmt: skip
                params[name] = value
            launch = Launch(
                "experiments/layers.cu", "layers", defines, (s.blocks, 1, 1), schedule.THREADS, shared_bytes,
                params.tobytes(), cluster=cluster, programmatic=False,
            )  # fmt: skip
            return _driver.Program([launch], [kernel.pointer], keep=kernel)

        programs: dict[tuple[int, int], Program] = {}

        def run(rounds: int, layers: int = LAYERS) -> float:
            if (rounds, layers) not in programs:
                programs[rounds, layers] = program(rounds, layers)
            with stream_handle:
                words.fill(0)
                start, end = cupy.cuda.Event(), cupy.cuda.Event()
                start.record()
                programs[rounds, layers].run(stream_handle.ptr)
                end.record()
                end.synchronize()
            if int(error[0]):
                raise RuntimeError(f"the watchdog ended wait {int(error[0])}")
            return float(cupy.cuda.get_elapsed_time(start, end)) * 1000

        errors: dict[int, float] = {}
        for depth, tolerance in TOLERANCES.items() if check else ():
            output.fill(cupy.nan)
            cupy.cuda.get_current_stream().synchronize()
            run(1, depth)
            errors[depth] = distance(output.get().astype(np.float64), expected[depth])
            if not errors[depth] < tolerance:
                return {"name": candidate.name, "wrong": errors}
        bits = [run(3) and output.get().tobytes() for _ in range(20)]
        if check and len(set(bits)) != 1:
            return {"name": candidate.name, "wrong": "not the same bits in every run"}
        if profile:
            return {"name": candidate.name, "profile": show_profile(run, words, s.blocks)}
        run(40)
        samples: list[float] = []
        begun = time.perf_counter()
        while len(samples) < 20 or (time.perf_counter() - begun < seconds and len(samples) < 200):
            short, long = run(15), run(75)
            samples.append((long - short) / (60 * LAYERS))
        t = timing(samples)
        facts = _driver.function_facts(kernel.pointer)
        return {
            "name": candidate.name, "us": t.median, "p99": t.p99, "repeats": t.repeats, "errors": errors,
            "registers": facts.registers, "local_bytes": facts.local_bytes, "sms": device_facts(0).multiprocessors,
        }  # fmt: skip


PARAMS = np.dtype(
    {
        "names": ["stream", "gains", "head_gains", "rope", "keys", "values", "words", "error", "stream_bytes",
                  "layer_elements", "layers", "epsilon", "input", "output", "rounds", "position"],
        "formats": ["u8"] * 8 + ["i8", "i8", "i4", "f4", "u8", "u8", "i4", "i4"],
    }
)  # fmt: skip


def load_kernel(source: str, name: str, defines: tuple[tuple[str, int], ...], shared_bytes: int) -> Kernel:
    """Compiled, on the device, and allowed its shared memory and any cluster."""
    from soprano_cupy.cuda.module import load
    from soprano_cupy.gpu import _driver

    kernel = load(source, name, defines, 0)
    _driver.set_shared_bytes(kernel.pointer, shared_bytes)
    _driver.allow_large_clusters(kernel.pointer)
    return kernel


def co_resident(kernel: Kernel, blocks: int, shared_bytes: int, cluster: int) -> str | None:
    """Why the blocks would not all run at once; None when they do."""
    from soprano_cupy.cuda.module import device_facts
    from soprano_cupy.gpu import _driver

    if cluster > 1:
        fit = _driver.max_active_clusters(kernel.pointer, (blocks, 1, 1), schedule.THREADS, shared_bytes, cluster)
        return None if fit * cluster >= blocks else f"only {fit} clusters of {cluster} run at once"
    each = _driver.max_active_blocks(kernel.pointer, schedule.THREADS, shared_bytes)
    fit = each * device_facts(0).multiprocessors
    return None if fit >= blocks else f"only {fit} blocks run at once"


# ---- exchanges alone ----

WORDS_PARAMS = np.dtype({"names": ["words", "error", "output", "rounds"], "formats": ["u8", "u8", "u8", "i8"]})


def run_words(case: tuple[str, int, int, int], seconds: float) -> dict[str, Any]:
    """Time one exchange: every block makes its part of `words` floats from all of those of the round before."""
    import cupy

    from soprano_cupy.gpu import _driver
    from soprano_cupy.gpu.launch import Launch
    from soprano_cupy.gpu.program import on_device

    kind, blocks, size, count = case
    name = f"{kind} of {count} floats, {blocks} blocks, {size}-byte words"
    defines = (("DTYPE_BF16", 1), ("BLOCKS", blocks), ("WORD_BYTES", size), ("COUNT", count), ("HELD", 1))
    with on_device(0):
        kernel = load_kernel("experiments/words.cu", "words", defines, 200 * 1024)
        room = co_resident(kernel, blocks, 200 * 1024, 1)
        if room is not None:
            return {"name": name, "skipped": room}
        words, error = cupy.zeros(1 << 16, cupy.uint64), cupy.zeros(4, cupy.uint32)
        output = cupy.zeros((blocks, count), cupy.float32)
        stream = cupy.cuda.Stream(non_blocking=True)

        def run(rounds: int) -> float:
            params = np.zeros(1, WORDS_PARAMS)
            for field, value in {
                "words": words.data.ptr, "error": error.data.ptr, "output": output.data.ptr, "rounds": rounds,
            }.items():  # fmt: skip
                params[field] = value
            launch = Launch("experiments/words.cu", "words", defines, (blocks, 1, 1), 256, 200 * 1024, params.tobytes(),
                            programmatic=False)  # fmt: skip
            program = _driver.Program([launch], [kernel.pointer], keep=kernel)
            with stream:
                words.fill(0)
                output.fill(cupy.nan)
                start, end = cupy.cuda.Event(), cupy.cuda.Event()
                start.record()
                program.run(stream.ptr)
                end.record()
                end.synchronize()
            if int(error[0]):
                raise RuntimeError(f"the watchdog ended wait {int(error[0])}")
            return float(cupy.cuda.get_elapsed_time(start, end)) * 1000

        run(100)
        expected = (np.arange(count) % 8 + 100).astype(np.float32)
        if not (output.get() == expected).all():
            return {"name": name, "wrong": output.get()[:, :4].tolist()}
        samples: list[float] = []
        begun = time.perf_counter()
        while len(samples) < 10 or (time.perf_counter() - begun < seconds / 4 and len(samples) < 50):
            short, long = run(500), run(4500)
            samples.append((long - short) / 4000)
        t = timing(samples)
        return {"name": name, "us": t.median, "p99": t.p99, "repeats": t.repeats}


# ---- all of them ----


def in_process(what: str, index: int, seconds: float, more: Sequence[str] = ()) -> dict[str, Any]:
    """Run one case in a process of its own; what it says, or why it failed."""
    command = [sys.executable, __file__, "--one", what, str(index), "--seconds", str(seconds), *more]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": "no end after 90 s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if lines:
        return dict(json.loads(lines[-1]))
    return {"failed": " | ".join((done.stderr.strip().splitlines() or ["no output"])[-3:])}


def show(name: str, result: dict[str, Any], predicted: float) -> None:
    if "us" in result:
        extra = {k: v for k, v in result.items() if k in ("errors", "registers", "local_bytes")}
        said = f"{result['us']:7.3f} us (p99 {result['p99']:.3f}), predicted {predicted:.2f}  {extra or ''}"
    else:
        said = "  ".join(f"{key}: {value}" for key, value in result.items() if key != "name")
    sys.stdout.write(f"{name:46s} {said}\n")
    sys.stdout.flush()


def profiles(match: str, more: Sequence[str]) -> None:
    """Where the cycles of a layer go, of the candidates that match."""
    for index, candidate in enumerate(CANDIDATES):
        if match not in candidate.name or candidate.transport:
            continue
        result = in_process("profile", index, 1.0, more)
        sys.stdout.write(f"{candidate.name}: {result if 'profile' not in result else ''}\n")
        for name, median, high in result.get("profile", []):
            sys.stdout.write(f"    {name:20s} {median:7.0f} cycles (95% {high:.0f})\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="layers,words")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--match", default="")
    parser.add_argument("--one", nargs=2)
    parser.add_argument("--define", action="append", default=[], metavar="NAME=VALUE", help="a constant of the kernels")
    parser.add_argument("--unchecked", action="store_true", help="time what computes wrong numbers: for ablations")
    arguments = parser.parse_args()
    more = [f"--define={define}" for define in arguments.define] + ["--unchecked"] * arguments.unchecked
    if arguments.one:
        what, index = arguments.one[0], int(arguments.one[1])
        try:
            result = (
                run_candidate(
                    CANDIDATES[index], arguments.seconds, what == "profile", arguments.define, not arguments.unchecked
                )
                if what in ("layers", "profile")
                else run_words(WORD_CASES[index], arguments.seconds)
            )
        except Exception as error:
            traceback.print_exc()
            result = {"failed": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(result) + "\n")
        return
    rows, checks = [], 0
    for what in arguments.only.split(","):
        if what == "profile":
            profiles(arguments.match, more)
            continue
        cases: tuple[Any, ...] = CANDIDATES if what == "layers" else tuple(WORD_CASES)
        for index, case in enumerate(cases):
            name = (
                case.name if what == "layers" else f"gather of {case[3]} floats, {case[1]} blocks, {case[2]}-byte words"
            )
            if arguments.match not in name:
                continue
            result = in_process(what, index, arguments.seconds, more)
            predicted = case.predicted if what == "layers" else WORD_PREDICTED[case[1]]
            show(name, result, predicted)
            if "us" in result:
                checks += 1
                unit = "us a layer" if what == "layers" else "us an exchange"
                peer = {"predicted": predicted}
                rows.append(Row(name, result["us"], unit, result["repeats"], p99=result["p99"], peer=peer))
    facts = machine_facts(gpu=True)
    write_results(arguments.out or RESULTS / f"{facts['machine']}-exchange.json", "exchange", facts, {}, rows, checks)


if __name__ == "__main__":
    main()
