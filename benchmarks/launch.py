"""What a kernel launch costs on one GPU: host time of programs and graphs, GPU time between dependent kernels.

    python benchmarks/launch.py [--out FILE]

A program has 100 launches of a kernel that adds one to a counter, each dependent on the one before; the counter is
checked before anything is timed. Rows, in microseconds: host/* is one launch (or one launch of the whole graph) as the
calling thread sees it, with the GPU idle before; gpu/* is one node on the GPU, by events around all of them. `pdl` rows
are programmatic dependent launches. 1 block, or one block for each multiprocessor.
"""

from __future__ import annotations

import argparse
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, Row, Timing, machine_facts, timing, write_results
from soprano_cupy.cuda.compiler import architecture_for, compile_options, find_nvrtc
from soprano_cupy.cuda.module import DeviceFacts, device_facts
from soprano_cupy.errors import SopranoError
from soprano_cupy.gpu.launch import Launch
from soprano_cupy.gpu.program import Event, Graph, Program, driver_problem, has_programmatic_launches, on_device

NODES = 100
THREADS = 128
REPEATS = 200
SOURCE = """
struct Params { unsigned* counter; };

extern "C" __global__ void advance(const __grid_constant__ Params params) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    if (blockIdx.x == 0 && threadIdx.x == 0) __stcg(params.counter, __ldcg(params.counter) + 1);
}
"""
RAW = 'extern "C" __global__ void advance(unsigned* counter) { if (threadIdx.x == 0) *counter += 1; }'


class Bench:
    """The kernel on a device, a stream, and the counter that shows that every launch ran in its turn."""

    def __init__(self, facts: DeviceFacts) -> None:
        import cupy

        self.facts, self.checks = facts, 0
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.counter = cupy.zeros(1, cupy.uint32)
        nvrtc = find_nvrtc()
        architecture = f"sm_{architecture_for(facts.capability, nvrtc.architectures)}"
        self.module = cupy.cuda.function.Module()
        self.module.load(nvrtc.compile(SOURCE, "advance.cu", compile_options(architecture)).cubin)
        self.function = self.module.get_function("advance").ptr
        cupy.cuda.get_current_stream().synchronize()

    def program(self, blocks: int, programmatic: bool) -> Program:
        params = struct.pack("<Q", self.counter.data.ptr)
        step = Launch("advance.cu", "advance", (), (blocks, 1, 1), THREADS, 0, params, programmatic=programmatic)
        return Program([step] * NODES, [self.function] * NODES, programmatic=programmatic, keep=(self.module,))

    def check(self, call: Callable[[], object], expected: int) -> None:
        """One call advances the counter by as much as it should."""
        before = int(self.counter.get()[0])
        call()
        self.stream.synchronize()
        advanced = int(self.counter.get()[0]) - before
        if advanced != expected:
            raise SystemExit(f"a call advanced the counter by {advanced} where {expected} was expected")
        self.checks += 1

    def host(self, call: Callable[[], object], parts: int = 1) -> Timing:
        """Host microseconds of a call, on an idle GPU, divided into parts."""
        samples = []
        for _ in range(REPEATS):
            self.stream.synchronize()
            start = time.perf_counter()
            call()
            samples.append((time.perf_counter() - start) * 1e6 / parts)
        self.stream.synchronize()
        return timing(samples[REPEATS // 10 :])

    def gpu(self, call: Callable[[], object], parts: int) -> Timing:
        """GPU microseconds of a call between two events, divided into parts."""
        start, end = Event(timing=True), Event(timing=True)
        samples = []
        for _ in range(REPEATS):
            start.record(self.stream.ptr)
            call()
            end.record(self.stream.ptr)
            end.synchronize()
            samples.append(end.elapsed_ms(start) * 1e3 / parts)
        return timing(samples[REPEATS // 10 :])


def measure(bench: Bench) -> Iterator[Row]:
    """Every row, each checked first."""
    for programmatic in (False, True) if has_programmatic_launches(bench.facts.index) else (False,):
        kind = "pdl" if programmatic else "plain"
        for blocks in (1, bench.facts.multiprocessors):
            yield from _measure_kind(bench, kind, programmatic, blocks)
    yield _raw_kernel(bench)


def _measure_kind(bench: Bench, kind: str, programmatic: bool, blocks: int) -> Iterator[Row]:
    program = bench.program(blocks, programmatic)
    stream = bench.stream.ptr
    graph = Graph.capture(stream, [(program,)])
    graph.upload(stream)

    def run() -> None:
        program.run(stream)

    def replay() -> None:
        graph.launch(stream)

    bench.check(run, NODES)
    bench.check(replay, NODES)
    if programmatic and graph.programmatic_edges != NODES - 1:
        raise SystemExit(f"{graph.programmatic_edges} edges of the graph are programmatic instead of {NODES - 1}")
    if blocks == 1:
        yield _row(f"host/program/{kind}/launch", bench.host(run, NODES))
        yield _row(f"host/graph/{kind}/{NODES}_nodes", bench.host(replay))
    yield _row(f"gpu/program/{kind}/{blocks}_blocks/node", bench.gpu(run, NODES))
    yield _row(f"gpu/graph/{kind}/{blocks}_blocks/node", bench.gpu(replay, NODES))


def _raw_kernel(bench: Bench) -> Row:
    """CuPy's own way to launch, for comparison."""
    import cupy

    kernel = cupy.RawKernel(RAW, "advance")
    arguments: tuple[Any, ...] = (bench.counter,)

    def run() -> None:
        for _ in range(NODES):
            kernel((1,), (THREADS,), arguments)

    with bench.stream:
        bench.check(run, NODES)
        return _row("host/cupy_raw_kernel/launch", bench.host(run, NODES))


def _row(case: str, measured: Timing) -> Row:
    row = Row(case, measured.median, "us", measured.repeats, measured.p99)
    sys.stdout.write(f"{case:<40} {row.value:8.3f} us   p99 {measured.p99:8.3f}   best {measured.best:8.3f}\n")
    sys.stdout.flush()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result file (benchmarks/results/<gpu>-launch.json)")
    options = parser.parse_args()
    problem = driver_problem()
    if problem is not None:
        raise SystemExit(problem)
    with on_device(0):
        facts = machine_facts(gpu=True)
        bench = Bench(device_facts(0))
        rows = list(measure(bench))
    write_results(options.out or RESULTS / f"{facts['machine']}-launch.json", "launch", facts, {}, rows, bench.checks)


if __name__ == "__main__":
    try:
        main()
    except SopranoError as error:
        raise SystemExit(str(error)) from error
