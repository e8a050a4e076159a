"""Graphs, events and mapped memory on a stand-in for libcuda."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from fake_driver import STREAM, FakeDriver, builder, launch, use

from soprano_cupy.errors import DeviceError, ParameterError
from soprano_cupy.gpu.launch import Blocks, Launch, Symbol

driver = pytest.importorskip("soprano_cupy.gpu._driver", reason="the extension module is not built")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FakeDriver]:
    return builder(tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture
def fake(build: Callable[..., FakeDriver]) -> Iterator[FakeDriver]:
    yield from use(build())


def program(fake: FakeDriver, *launches: Launch, programmatic: bool = False) -> Any:
    functions = list(range(1, len(launches) + 1))
    fake.takes(functions, list(launches))
    return driver.Program(launches, functions, programmatic=programmatic)


# ---- graphs ----


def test_a_graph_of_programs(fake: FakeDriver) -> None:
    first = program(fake, launch(), launch(), launch(), programmatic=True)
    second = program(fake, launch(grid=(Blocks(Symbol.ROWS, 1), 1, 1)))
    graph = driver.Graph.capture(STREAM, [(first,), (second, 5), (second, 6)])
    assert (graph.nodes, graph.programmatic_edges) == (5, 2)
    assert [record.captured for record in fake.records()] == [1] * 5
    assert [record.grid[0] for record in fake.records()] == [1, 1, 1, 5, 6]
    assert (fake.number("graphs"), fake.number("executables"), fake.capturing()) == (0, 1, False)
    graph.upload(STREAM)
    graph.launch(STREAM)
    graph.launch(STREAM, times=3)
    assert (fake.calls("cuGraphUpload"), fake.calls("cuGraphLaunch")) == (1, 4)
    fake.fail("cuGraphLaunch", 700, skip=1)
    with pytest.raises(DeviceError, match="launching a graph of 5 nodes failed"):
        graph.launch(STREAM, times=5)
    assert fake.calls("cuGraphLaunch") == 6
    del graph
    assert fake.number("executables") == 0


@pytest.mark.parametrize(
    "entry", ["cuStreamEndCapture", "cuGraphGetNodes", "cuGraphGetEdges_v2", "cuGraphInstantiateWithFlags"]
)
def test_a_graph_that_cannot_be_made_leaves_nothing(fake: FakeDriver, entry: str) -> None:
    built = program(fake, launch())
    fake.fail(entry, 901)
    with pytest.raises(DeviceError, match=r"CUDA error 901.*nothing else may use the stream"):
        driver.Graph.capture(STREAM, [(built,)])
    assert (fake.number("graphs"), fake.number("executables")) == (0, 0)


def test_a_failing_launch_ends_the_capture(fake: FakeDriver) -> None:
    built = program(fake, launch(kernel="first"), launch(kernel="second"))
    fake.fail("cuLaunchKernelEx", 1, skip=1)
    with pytest.raises(DeviceError, match=r"launch 1 of 2 \(second\)"):
        driver.Graph.capture(STREAM, [(built,)])
    assert not fake.capturing()
    assert (fake.number("graphs"), fake.number("executables")) == (0, 0)
    assert driver.Graph.capture(STREAM, [(built,)]).nodes == 2  # the stream can be captured again


def test_any_exception_ends_the_capture(fake: FakeDriver) -> None:
    built = program(fake, launch())
    graph = driver.Graph(STREAM)
    with pytest.raises(ZeroDivisionError), graph:
        built.run(STREAM, rows=1 // 0)
    assert not fake.capturing()
    assert fake.number("graphs") == 0
    with pytest.raises(ParameterError, match="has not been captured"):
        graph.launch(STREAM)
    with pytest.raises(ParameterError, match="each is 0 to"):
        driver.Graph.capture(STREAM, [(built, -1)])
    assert not fake.capturing()


def test_graphs_are_captured_once_on_a_stream_of_their_own(fake: FakeDriver) -> None:
    for stream in (0, 1):
        with pytest.raises(ParameterError, match="default stream"):
            driver.Graph(stream)
    with driver.Graph(STREAM) as graph:
        program(fake, launch()).run(STREAM)
    with pytest.raises(ParameterError, match="captured once"), graph:
        pass
    fake.fail("cuStreamBeginCapture_v2", 900)
    with pytest.raises(DeviceError, match="beginning a capture failed"), driver.Graph(STREAM):
        raise AssertionError("not reached")


def test_a_graph_keeps_its_programs(fake: FakeDriver) -> None:
    class Module:
        alive = True

        def __del__(self) -> None:
            Module.alive = False

    fake.takes([1], [launch()])
    graph = driver.Graph.capture(STREAM, [(driver.Program([launch()], [1], keep=(Module(),)),)])
    assert Module.alive
    del graph
    assert not Module.alive


# ---- events, functions, copies ----


def test_events(fake: FakeDriver) -> None:
    start, end = driver.Event(timing=True), driver.Event(timing=True)
    start.record(STREAM)
    end.record(STREAM)
    end.hold(STREAM)
    assert end.done()
    assert end.wait(30)
    fake.set_number("stream_status", 600)
    assert not end.done()
    assert not end.wait(0)
    assert not end.wait(0.002)
    threading.Timer(0.02, fake.set_number, ("stream_status", 0)).start()
    assert end.wait(30)
    fake.set_number("stream_status", 719)
    with pytest.raises(DeviceError, match="CUDA error 719") as caught:
        end.done()
    assert caught.value.sticky
    with pytest.raises(DeviceError, match="CUDA error 719"):
        end.wait(1)
    assert end.elapsed_ms(start) == 1.5
    with pytest.raises(DeviceError, match="CUDA error 400"):
        driver.Event(blocking=True).elapsed_ms(start)
    waiter = threading.Thread(target=end.synchronize)  # in the event's context
    waiter.start()
    waiter.join()
    assert fake.calls("cuEventSynchronize") == 1
    fake.fail("cuEventSynchronize", 702)
    with pytest.raises(DeviceError, match="CUDA error 702"):
        end.synchronize()
    del start, end
    assert fake.number("events") == 0


def test_functions(fake: FakeDriver) -> None:
    assert driver.function_facts(3) == (3004, 3003, 3001, 3008, 3000)
    driver.set_shared_bytes(3, 90_000)
    driver.allow_large_clusters(3)
    assert [fake.library.fake_get_attribute(3, attribute) for attribute in (8, 14)] == [90_000, 1]
    assert driver.max_active_blocks(3, 128, 65_536) == 15
    assert driver.max_active_clusters(3, (64, 1, 1), 128, 1000, 4) == 16 + 128 + 1000
    fake.fail("cuFuncSetAttribute", 1)
    with pytest.raises(DeviceError, match="asking for 999999 bytes of shared memory a block failed"):
        driver.set_shared_bytes(3, 999_999)


def test_copies_and_waiting(fake: FakeDriver) -> None:
    source, target = np.arange(10, dtype=np.int32), np.zeros(10, np.int32)
    driver.copy(target.ctypes.data, source.ctypes.data, 40, STREAM)
    assert target.tolist() == list(range(10))
    others = [np.zeros(4, np.int32), np.zeros(6, np.int32)]
    driver.copy_on_host(
        [(others[0].ctypes.data, source.ctypes.data, 16), (others[1].ctypes.data, source.ctypes.data + 16, 24)]
    )
    assert np.concatenate(others).tolist() == list(range(10))
    driver.copy_on_host([])
    driver.synchronize(STREAM)
    fake.fail("cuStreamSynchronize", 700)
    with pytest.raises(DeviceError, match="waiting for the GPU failed"):
        driver.synchronize(STREAM)


# ---- mapped memory ----


def test_mapped_memory_is_zeroed_and_shared(fake: FakeDriver) -> None:
    memory = driver.MappedMemory(1000)
    words = np.frombuffer(memory, np.int32)
    assert len(memory) == memory.nbytes == words.nbytes == 1000
    assert not words.any()
    assert memory.device == memory.host + 2**56
    words[3] = 7
    assert bytes(memory.view()[12:16]) == b"\x07\0\0\0"
    del memory
    assert fake.number("host_blocks") == 1  # the array keeps it
    del words
    assert fake.number("host_blocks") == 0
    with pytest.raises(ParameterError, match="cannot have 0 bytes"):
        driver.MappedMemory(0)
    fake.fail("cuMemHostAlloc", 2)
    with pytest.raises(DeviceError, match=r"allocating 64 bytes.*CUDA_ERROR_OUT_OF_MEMORY.*smaller batch"):
        driver.MappedMemory(64)
    fake.fail("cuMemHostGetDevicePointer_v2", 1)
    with pytest.raises(DeviceError, match="allocating 64 bytes"):
        driver.MappedMemory(64)
    assert fake.number("host_blocks") == 0


@pytest.mark.parametrize(
    ("nbytes", "holds", "value", "arrived"),
    [
        (4, 5, 5, True),
        (4, 6, 5, True),
        (4, 4, 5, False),
        (4, 3, 2**32 - 2, True),  # a counter that wrapped around
        (4, 2**32 - 2, 3, False),
        (8, 2**40, 2**40, True),
        (8, 2**40, 2**40 + 1, False),
        (8, 3, 2**64 - 2, True),
    ],
)
def test_a_word_reaches_a_value(fake: FakeDriver, nbytes: int, holds: int, value: int, arrived: bool) -> None:
    memory = driver.MappedMemory(64)
    np.frombuffer(memory, f"u{nbytes}")[2] = holds
    if arrived:
        assert memory.wait(2 * nbytes, value, STREAM, nbytes=nbytes) == holds
        assert fake.calls("cuStreamQuery") == 0
    else:
        with pytest.raises(DeviceError, match=f"the GPU is done, but word 2 holds {holds} where {value} was awaited"):
            memory.wait(2 * nbytes, value, STREAM, nbytes=nbytes)


def test_a_word_changes(fake: FakeDriver) -> None:
    memory = driver.MappedMemory(64)
    words = np.frombuffer(memory, np.uint32)
    words[1] = 9
    assert memory.wait(4, 10, STREAM, changed=True) == 9
    with pytest.raises(DeviceError, match="word 1 holds 9 where 9 was to change"):
        memory.wait(4, 9, STREAM, changed=True)


def test_a_write_during_the_wait_is_seen(fake: FakeDriver) -> None:
    """The wait, hot or asleep, goes on while Python writes: it holds no GIL."""
    memory = driver.MappedMemory(64)
    words = np.frombuffer(memory, np.uint32)
    fake.set_number("stream_status", 600)
    for value, delay_s, spin_s in ((1, 0.0, 0.5), (2, 0.03, 0.0), (3, 0.06, 50e-6)):
        writer = threading.Timer(delay_s, words.__setitem__, (5, value))
        writer.start()
        assert memory.wait(20, value, STREAM, spin_s=spin_s) == value
        writer.join()


def test_waits_end_with_an_error(fake: FakeDriver) -> None:
    memory = driver.MappedMemory(64)
    fake.set_number("stream_status", 600)
    with pytest.raises(DeviceError, match=r"has not answered within 0\.03 s"):
        memory.wait(0, 1, STREAM, timeout_s=0.03)
    fake.fail("cuStreamQuery", 700, skip=1)
    with pytest.raises(DeviceError, match="the GPU's work failed \\(CUDA_ERROR_ILLEGAL_ADDRESS") as caught:
        memory.wait(0, 1, STREAM)
    assert caught.value.sticky


def test_a_wait_can_be_interrupted(fake: FakeDriver) -> None:
    memory = driver.MappedMemory(64)
    fake.set_number("stream_status", 600)

    def interrupt(*_: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.03)
        with pytest.raises(InterruptedError):
            memory.wait(0, 1, STREAM)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("offset", "nbytes", "value"),
    [(2, 4, 0), (64, 4, 0), (-4, 4, 0), (60, 8, 0), (4, 8, 0), (0, 2, 0), (0, 4, 2**32), (0, 4, -1)],
)
def test_words_that_do_not_exist(fake: FakeDriver, offset: int, nbytes: int, value: int) -> None:
    memory = driver.MappedMemory(64)
    with pytest.raises(ParameterError):
        memory.wait(offset, value, STREAM, nbytes=nbytes)
