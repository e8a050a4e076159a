"""The launcher on a GPU: symbols, programmatic chains, graphs, mapped memory, clusters, faults."""

from __future__ import annotations

import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest

from soprano_cupy.cuda import module
from soprano_cupy.cuda.module import device_facts
from soprano_cupy.errors import DeviceError, ParameterError
from soprano_cupy.gpu import program
from soprano_cupy.gpu.launch import Blocks, Field, Launch, Symbol

pytestmark = pytest.mark.gpu

THREADS = 128
ROWS = 1000

SOURCE = """
struct ChainParams {
    const int* source;
    int* target;  // source * 3 + add
    int rows, add;
    long long delay;  // clock cycles before the result is written
};

__device__ void depend(bool launch) {
#if __CUDA_ARCH__ >= 900
    if (launch) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    else asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

extern "C" __global__ void chain(const __grid_constant__ ChainParams params) {
    depend(true);
    depend(false);
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const long long start = clock64();
    while (clock64() - start < params.delay) {}
    if (i < params.rows) params.target[i] = __ldcg(params.source + i) * 3 + params.add;
}

struct WordParams {
    unsigned* word;  // of mapped memory; incremented by one thread, after `payload`
    int* payload;
    int value, pad;
};

extern "C" __global__ void write_word(const __grid_constant__ WordParams params) {
    *(volatile int*)params.payload = params.value;
    __threadfence_system();
    *(volatile unsigned*)params.word = *(volatile unsigned*)params.word + 1;
}

struct ClusterParams {
    int* out;  // (blocks, 2): rank in the cluster, blocks of the cluster
};

extern "C" __global__ void clusters(const __grid_constant__ ClusterParams params) {
#if __CUDA_ARCH__ >= 900
    unsigned rank, size;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    extern __shared__ int shared[];
    shared[threadIdx.x] = rank;
    if (threadIdx.x == 0) {
        params.out[2 * blockIdx.x] = shared[0];
        params.out[2 * blockIdx.x + 1] = size;
    }
#endif
}

extern "C" __global__ void fault(const __grid_constant__ ClusterParams params) { params.out[blockIdx.x] = 1; }
"""


@pytest.fixture(scope="module")
def cp() -> Any:
    import cupy

    problem = program.driver_problem()
    if problem is not None:
        pytest.skip(problem)
    return cupy


@pytest.fixture(autouse=True)
def _source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOPRANO_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(module, "joined_source", lambda name: SOURCE)


@pytest.fixture
def stream(cp: Any) -> Iterator[Any]:
    with cp.cuda.Stream(non_blocking=True) as stream:
        yield stream
        stream.synchronize()


def launch(kernel: str, params: bytes, **changes: Any) -> Launch:
    return replace(Launch("launcher_test.cu", kernel, (), (1, 1, 1), THREADS, 0, params), **changes)


def chain(source: Any, target: Any, add: int, *, delay: int = 0, rows: int = ROWS) -> Launch:
    """target = source * 3 + add, for as many rows as a run says."""
    params = struct.pack("<QQiiq", source.data.ptr, target.data.ptr, rows, add, delay)
    return launch("chain", params, grid=(Blocks(Symbol.ROWS, THREADS), 1, 1), fields=(Field(16, Symbol.ROWS),))


def test_rows_of_a_run(cp: Any, stream: Any) -> None:
    source, target = cp.arange(ROWS, dtype=np.int32), cp.empty(ROWS, np.int32)
    built = program.load_program([chain(source, target, 5)], 0)
    for rows in (1, 127, 128, 129, 1000, 0):
        target.fill(-1)
        built.run(stream.ptr, rows=rows)
        expected = np.full(ROWS, -1)
        expected[:rows] = np.arange(rows) * 3 + 5
        assert np.array_equal(target.get(), expected)
    with pytest.raises(ParameterError, match="bytes of parameters where the kernel takes 32"):
        program.load_program([launch("chain", bytes(24))], 0)


def test_a_programmatic_chain(cp: Any, stream: Any) -> None:
    """Each kernel begins before the one before it is done, and still reads what that one writes late."""
    values = [cp.arange(ROWS, dtype=np.int32), *(cp.empty(ROWS, np.int32) for _ in range(3))]
    delays = (20_000, 10_000, 0)
    steps = [chain(values[i], values[i + 1], i, delay=delays[i]) for i in range(3)]
    built = program.load_program(steps, 0)
    expected = (((np.arange(ROWS) * 3) * 3 + 1) * 3 + 2).astype(np.int32)
    for _ in range(100):
        values[3].fill(-1)
        built.run(stream.ptr, rows=ROWS)
        assert np.array_equal(values[3].get(), expected)


@pytest.mark.parametrize("filled", [False, True], ids=["first", "after_memset"])
def test_a_graph_of_fifty(cp: Any, stream: Any, filled: bool) -> None:
    """Fifty launches back and forth; `filled` puts a node before them that is no kernel."""
    from soprano_cupy.gpu._driver import Graph

    a, b = cp.zeros(ROWS, np.int32), cp.zeros(ROWS, np.int32)
    built = program.load_program([chain(a, b, 1), chain(b, a, 2)] * 25, 0)
    stream.synchronize()
    with Graph(stream.ptr) as graph:
        if filled:
            a.data.memset_async(0, a.nbytes, stream)
        built.run(stream.ptr, rows=ROWS)
    assert graph.nodes == 50 + filled
    if program.has_programmatic_launches(0):
        assert graph.programmatic_edges == 49
    graph.upload(stream.ptr)
    value = 0
    for _ in range(20):
        graph.launch(stream.ptr, times=2)
        value = 0 if filled else value  # before the second launch
        for i in range(50 if filled else 100):
            value = (value * 3 + 1 + i % 2) % 2**32
        assert np.array_equal(a.get().view(np.uint32), np.full(ROWS, value, np.uint32))


def test_a_failed_capture_leaves_the_stream_usable(cp: Any, stream: Any) -> None:
    from soprano_cupy.gpu._driver import Graph

    source, target = cp.arange(ROWS, dtype=np.int32), cp.empty(ROWS, np.int32)
    built = program.load_program([chain(source, target, 7)], 0)
    too_cooperative = program.load_program([replace(chain(source, target, 0), cooperative=True, programmatic=False)], 0)
    with pytest.raises(ParameterError):
        Graph.capture(stream.ptr, [(built, ROWS), (built, -1)])
    with pytest.raises(DeviceError, match=r"launch 0 of 1 \(chain\)") as caught:
        too_cooperative.run(stream.ptr, rows=THREADS * 2_000_000)
    assert not caught.value.sticky
    graph = Graph.capture(stream.ptr, [(built, ROWS)])
    graph.launch(stream.ptr)
    assert np.array_equal(target.get(), np.arange(ROWS) * 3 + 7)


def test_mapped_memory_is_awaited(cp: Any, stream: Any) -> None:
    from soprano_cupy.gpu._driver import MappedMemory

    memory = MappedMemory(64)
    words = np.frombuffer(memory.view(), np.int32)
    nothing = cp.zeros(1, np.int32)
    busy = chain(nothing, nothing, 0, delay=200_000, rows=1)
    for count in range(1, 101):
        word = launch("write_word", struct.pack("<QQii", memory.device, memory.device + 8, 1000 + count, 0), threads=1)
        program.load_program([busy, replace(word, programmatic=False)], 0).run(stream.ptr, rows=1)
        assert memory.wait(0, count, stream.ptr) == count
        assert words[2] == 1000 + count
    stream.synchronize()
    with pytest.raises(DeviceError, match="word 0 holds 100 where 101 was awaited"):
        memory.wait(0, 101, stream.ptr)
    assert np.array_equal(words[3:], np.zeros(13))


@pytest.mark.parametrize("cluster", [2, 8, 16])
def test_clusters(cp: Any, stream: Any, cluster: int) -> None:
    from soprano_cupy.gpu._driver import max_active_clusters

    if device_facts(0).capability < (9, 0):
        pytest.skip("clusters need compute capability 9.0")
    out = cp.full((32, 2), -1, np.int32)
    step = launch("clusters", struct.pack("<Q", out.data.ptr), grid=(32, 1, 1), cluster=cluster, shared_bytes=60_000)
    built = program.load_program([replace(step, programmatic=False)], 0)  # it does not wait for what filled `out`
    built.run(stream.ptr)
    assert out[:, 0].get().tolist() == [rank for _ in range(32 // cluster) for rank in range(cluster)]
    assert set(out[:, 1].get().tolist()) == {cluster}
    function = module.load("launcher_test.cu", "clusters", (), 0).pointer
    assert max_active_clusters(function, (32, 1, 1), THREADS, 60_000, cluster) >= 1


def test_facts_of_a_function(cp: Any) -> None:
    from soprano_cupy.gpu._driver import function_facts, max_active_blocks

    with program.on_device(0):
        function = module.load("launcher_test.cu", "chain", (), 0).pointer
        facts = function_facts(function)
        assert 8 <= facts.registers <= 64
        assert (facts.local_bytes, facts.static_shared_bytes, facts.max_threads) == (0, 0, 1024)
        assert 8 <= max_active_blocks(function, THREADS) <= 16


def test_events_and_threads(cp: Any, stream: Any) -> None:
    """A thread that has never used the GPU runs a program, and an event orders another stream behind it."""
    from soprano_cupy.gpu._driver import Event, copy

    source, target, copied = cp.arange(ROWS, dtype=np.int32), cp.zeros(ROWS, np.int32), cp.zeros(ROWS, np.int32)
    built = program.load_program([chain(source, target, 9, delay=1_000_000)], 0)
    start, end = Event(timing=True), Event(timing=True)
    other = cp.cuda.Stream(non_blocking=True)
    stream.synchronize()

    def work() -> None:
        start.record(stream.ptr)
        built.run(stream.ptr, rows=ROWS)
        end.record(stream.ptr)
        end.hold(other.ptr)
        end.synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    copy(copied.data.ptr, target.data.ptr, target.nbytes, other.ptr)
    other.synchronize()
    assert end.done()
    assert end.elapsed_ms(start) > 0.1  # a million cycles
    assert [(name, us > 100) for name, us in built.profile(stream.ptr, rows=ROWS)] == [("chain", True)]
    assert np.array_equal(copied.get(), np.arange(ROWS) * 3 + 9)


FAULT = """
import struct, cupy
from test_gpu_driver_device import SOURCE, launch
from soprano_cupy.cuda import module
from soprano_cupy.errors import DeviceError
from soprano_cupy.gpu import program
from soprano_cupy.gpu._driver import MappedMemory

module.joined_source = lambda name: SOURCE
stream = cupy.cuda.Stream(non_blocking=True)
memory = MappedMemory(64)
built = program.load_program([launch("fault", struct.pack("<Q", 16))], 0)
built.run(stream.ptr)
for call in (lambda: memory.wait(0, 1, stream.ptr), lambda: built.run(stream.ptr, checked=True)):
    try:
        call()
    except DeviceError as error:
        print(error.sticky, "CUDA_ERROR_ILLEGAL_ADDRESS" in str(error))
"""


def test_a_fault_is_an_error_and_not_a_hang(cp: Any) -> None:
    """In a process of its own, whose GPU context it ends."""
    done = subprocess.run(
        [sys.executable, "-c", FAULT],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent,
        env=command_line.environment(),
        check=False,
    )
    assert done.stdout == "True True\nTrue True\n", done.stderr
