"""The launcher on a stand-in for libcuda: packing, patching, grids, attributes, errors, threads."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
from fake_driver import CONTEXT, STREAM, FakeDriver, Record, builder, launch, use

from soprano_cupy.errors import DeviceError, ParameterError
from soprano_cupy.gpu.launch import Blocks, Field, Launch, Symbol

driver = pytest.importorskip("soprano_cupy.gpu._driver", reason="the extension module is not built")

MAX_GRID_X, MAX_GRID_YZ = 2**31 - 1, 65_535


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FakeDriver]:
    return builder(tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture
def fake(build: Callable[..., FakeDriver]) -> Iterator[FakeDriver]:
    yield from use(build())


@pytest.fixture
def old(build: Callable[..., FakeDriver]) -> Iterator[FakeDriver]:
    """A driver from before CUDA 11.8."""
    yield from use(build("OLD_DRIVER"))


def program(fake: FakeDriver, *launches: Launch, programmatic: bool = False) -> Any:
    functions = list(range(1, len(launches) + 1))
    fake.takes(functions, list(launches))
    return driver.Program(launches, functions, programmatic=programmatic)


def params(record: Record, nbytes: int) -> bytes:
    return bytes(record.params)[:nbytes]


def sizes(record: Record) -> tuple[int, ...]:
    return (*record.grid, *record.block, record.shared)


# ---- the library ----


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    driver._use_library(str(tmp_path / "nothing.so"))
    try:
        assert re.search(r"cannot be opened \(.*nothing\.so: .*\); check that nvidia-smi works", driver.problem())
        with pytest.raises(DeviceError, match=r"nothing\.so"):
            driver.driver_version()
        with pytest.raises(DeviceError, match=r"nothing\.so"):
            driver.Program([launch()], [1])
    finally:
        driver._use_library(None)


def test_a_library_without_an_entry_is_too_old(build: Callable[..., FakeDriver]) -> None:
    driver._use_library(str(build("BROKEN_DRIVER").path))
    try:
        assert "too old" in driver.problem()
        assert "it has no cuMemcpyAsync" in driver.problem()
    finally:
        driver._use_library(None)


def test_versions(fake: FakeDriver) -> None:
    assert driver.problem() is None
    assert driver.driver_version() == 12040
    assert driver.launches_with_attributes()


def test_an_old_driver_launches_without_attributes(old: FakeDriver) -> None:
    assert driver.problem() is None
    assert not driver.launches_with_attributes()
    built = program(
        old, launch(grid=(5, 6, 7), threads=96, shared_bytes=1234, params=bytes(range(16))), programmatic=True
    )
    built.run(STREAM)
    (record,) = old.records()
    assert sizes(record) == (5, 6, 7, 96, 1, 1, 1234)
    assert (record.function, record.stream, record.extended, record.programmatic) == (1, STREAM, 0, 0)
    with pytest.raises(DeviceError, match="newer NVIDIA driver"):
        program(old, launch(grid=(4, 1, 1), cluster=4))
    with pytest.raises(DeviceError, match="newer NVIDIA driver"):
        program(old, launch(cooperative=True))
    with pytest.raises(DeviceError, match="does not know clusters"):
        driver.max_active_clusters(1, (8, 1, 1), 128, 0, 4)
    with driver.Graph(STREAM) as graph:
        built.run(STREAM)
    assert (graph.nodes, graph.programmatic_edges) == (1, None)


# ---- programs ----


def test_a_launch_arrives_as_it_was_packed(fake: FakeDriver) -> None:
    built = program(fake, launch(grid=(3, 2, 1), threads=256, shared_bytes=70_000, params=bytes(range(100))))
    built.run(STREAM)
    (record,) = fake.records()
    assert sizes(record) == (3, 2, 1, 256, 1, 1, 70_000)
    assert params(record, 100) == bytes(range(100))
    assert (record.function, record.stream, record.extended) == (1, STREAM, 1)
    assert (record.cluster, record.cooperative, record.programmatic) == (1, 0, 0)


def test_parameters_are_aligned_and_apart(fake: FakeDriver) -> None:
    lengths = (4, 64, 65, 200, 128, 1, 0)
    launches = [launch(params=bytes([i + 1]) * length) for i, length in enumerate(lengths)]
    program(fake, *launches).run(STREAM)
    records = fake.records()
    assert [record.address % 64 for record in records] == [0] * len(lengths)
    assert [params(record, n) for record, n in zip(records, lengths, strict=True)] == [one.params for one in launches]
    ends = [record.address + n for record, n in zip(records, lengths, strict=True)]
    assert all(end <= after.address for end, after in zip(ends, records[1:], strict=False))


@pytest.mark.parametrize(
    ("rule", "symbols", "blocks"),
    [
        (Blocks(Symbol.ROWS, 16), (1,), 1),
        (Blocks(Symbol.ROWS, 16), (16,), 1),
        (Blocks(Symbol.ROWS, 16), (17,), 2),
        (Blocks(Symbol.ROWS, 16), (0,), 1),
        (Blocks(Symbol.SEQUENCES, 1), (9, 5), 5),
        (Blocks(Symbol.LONGEST, 64, 4), (9, 5, 33), 3),
        (Blocks(Symbol.SPARE, 2, 3, 7), (0, 0, 0, 5), 56),
        (Blocks(Symbol.SPARE, 2, 3, 7), (0, 0, 0, 0), 7),
        (Blocks(Symbol.ROWS, 2**31 - 1, 2**31 - 1), (2**31 - 1,), 2**31 - 1),
    ],
)
def test_grids_follow_symbols(fake: FakeDriver, rule: Blocks, symbols: tuple[int, ...], blocks: int) -> None:
    built = program(fake, launch(grid=(rule, 3, 1)), launch(grid=(2, 1, 4)))
    built.run(STREAM, *symbols)
    assert [tuple(record.grid) for record in fake.records()] == [(blocks, 3, 1), (2, 1, 4)]
    assert built.grids(*symbols) == [(blocks, 3, 1), (2, 1, 4)]


def test_every_axis_follows(fake: FakeDriver) -> None:
    grid = (Blocks(Symbol.ROWS, 4), Blocks(Symbol.SEQUENCES, 1), Blocks(Symbol.LONGEST, 10))
    assert program(fake, launch(grid=grid)).grids(rows=9, sequences=7, longest=31) == [(3, 7, 4)]


def test_fields_are_patched_at_each_run(fake: FakeDriver) -> None:
    fields = (Field(4, Symbol.ROWS), Field(12, Symbol.LONGEST), Field(0, Symbol.SPARE))
    built = program(fake, launch(params=b"\xee" * 20, fields=fields), launch(params=b"\x11" * 8))
    for rows, longest, spare in ((7, 5, 3), (7, 5, 3), (1, 0, 2**31 - 1)):
        built.run(STREAM, rows=rows, sequences=99, longest=longest, spare=spare)
        patched, untouched = fake.records()[-2:]
        expected = np.frombuffer(b"\xee" * 20, np.int32).copy()
        expected[[1, 3, 0]] = rows, longest, spare
        assert params(patched, 20) == expected.tobytes()
        assert params(untouched, 8) == b"\x11" * 8


def test_attributes(fake: FakeDriver) -> None:
    launches = [
        launch(),
        launch(programmatic=False),
        launch(grid=(8, 2, 1), cluster=4),
        launch(cooperative=True, programmatic=False),
        launch(grid=(16, 1, 1), cluster=16, cooperative=True),
    ]
    program(fake, *launches, programmatic=True).run(STREAM)
    seen = [(record.programmatic, record.cluster, record.cooperative) for record in fake.records()]
    assert seen == [(1, 1, 0), (0, 1, 0), (1, 4, 0), (0, 1, 1), (1, 16, 1)]
    program(fake, *launches, programmatic=False).run(STREAM)
    assert [record.programmatic for record in fake.records()[5:]] == [0] * 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": 0}, "blocks of 0 threads"),
        ({"threads": 1025}, "blocks of 1025 threads"),
        ({"shared_bytes": -1}, "-1 bytes of shared memory"),
        ({"grid": (0, 1, 1)}, "0 blocks along x"),
        ({"grid": (1, MAX_GRID_YZ + 1, 1)}, "65536 blocks along y"),
        ({"grid": (1, 1, -1)}, "-1 blocks along z"),
        ({"grid": (MAX_GRID_X + 1, 1, 1)}, "2147483648 blocks along x"),
        ({"grid": (1, 1)}, "2 dimensions"),
        ({"grid": (6, 1, 1), "cluster": 4}, "6 blocks along x"),
        ({"grid": (Blocks(Symbol.ROWS, 0), 1, 1)}, "cannot follow"),
        ({"grid": (Blocks(Symbol.ROWS, 1, 2**31), 1, 1)}, "cannot follow"),
        ({"grid": (Blocks(4, 1), 1, 1)}, "the symbol 4"),  # type: ignore[arg-type]
        ({"cluster": 0}, "clusters of 0"),
        ({"cluster": 17}, "clusters of 17"),
        ({"fields": (Field(13, Symbol.ROWS),)}, "at byte 13"),
        ({"fields": (Field(16, Symbol.ROWS),)}, "at byte 16"),
        ({"fields": (Field(-4, Symbol.ROWS),)}, "at byte -4"),
        ({"fields": (Field(0, 4),)}, "for the symbol 4"),  # type: ignore[arg-type]
    ],
)
def test_impossible_launches_are_refused(fake: FakeDriver, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError, match=rf"launch 1 \(test\).*{message}"):
        program(fake, launch(), launch(**changes))


def test_functions_and_launches_belong_together(fake: FakeDriver) -> None:
    with pytest.raises(ParameterError, match="0 launches with 0 functions"):
        driver.Program([], [])
    with pytest.raises(ParameterError, match="1 launches with 2 functions"):
        driver.Program([launch()], [1, 2])
    with pytest.raises(ParameterError, match="has no function"):
        driver.Program([launch()], [0])
    fake.takes([1], [launch(params=bytes(24))])
    with pytest.raises(ParameterError, match="16 bytes of parameters where the kernel takes 24"):
        driver.Program([launch()], [1])


def test_a_run_beyond_the_limits_launches_nothing(fake: FakeDriver) -> None:
    built = program(fake, launch(grid=(1, Blocks(Symbol.ROWS, 1), 1), fields=(Field(0, Symbol.ROWS),)))
    built.run(STREAM, rows=5)
    with pytest.raises(
        ParameterError, match=r"launch 0 \(test\).*symbols 65536, 0, 0, 0: it would have 65536 blocks along y"
    ):
        built.run(STREAM, rows=65_536)
    assert len(fake.records()) == 1
    built.run(STREAM, rows=65_535)
    assert tuple(fake.records()[1].grid) == (1, 65_535, 1)
    assert params(fake.records()[1], 4) == (65_535).to_bytes(4, "little")
    for symbols in ((-1,), (2**31,), (0, 0, 0, -5)):
        with pytest.raises(ParameterError, match="each is 0 to 2147483647"):
            built.run(STREAM, *symbols)
    huge = program(fake, launch(grid=(Blocks(Symbol.ROWS, 1, 2**31 - 1, 2**31 - 1), 1, 1)))
    with pytest.raises(ParameterError, match="it would have 9223372036854775807 blocks along x"):
        huge.run(STREAM, rows=2**31 - 1)
    clusters = program(fake, launch(grid=(Blocks(Symbol.ROWS, 1), 1, 1), cluster=4))
    with pytest.raises(ParameterError, match="6 blocks along x, which is no whole number of clusters of 4"):
        clusters.run(STREAM, rows=6)
    clusters.run(STREAM, rows=8)


def test_an_error_names_its_launch(fake: FakeDriver) -> None:
    built = program(fake, *(launch(kernel=name) for name in ("first", "second", "third")))
    fake.fail("cuLaunchKernelEx", 700, skip=1)
    expected = r"launch 1 of 3 \(second\) failed \(CUDA_ERROR_ILLEGAL_ADDRESS, an illegal memory access.*start again"
    with pytest.raises(DeviceError, match=expected) as caught:
        built.run(STREAM)
    assert caught.value.sticky
    assert len(fake.records()) == 1  # nothing after the error
    fake.fail("cuLaunchKernelEx", 701)
    with pytest.raises(DeviceError, match=r"launch 0 of 3 \(first\) failed \(CUDA error 701\)") as caught:
        built.run(STREAM)
    assert not caught.value.sticky
    built.run(STREAM)
    assert len(fake.records()) == 4


def test_a_checked_run_waits_after_each_launch(fake: FakeDriver) -> None:
    built = program(fake, launch(kernel="first"), launch(kernel="second"))
    built.run(STREAM)
    assert fake.calls("cuStreamSynchronize") == 0
    built.run(STREAM, checked=True)
    assert fake.calls("cuStreamSynchronize") == 2
    fake.fail("cuStreamSynchronize", 700)
    with pytest.raises(DeviceError, match=r"launch 0 of 2 \(first\)"):
        built.run(STREAM, checked=True)


def test_a_profile_has_a_time_for_each_launch(fake: FakeDriver) -> None:
    grid = (Blocks(Symbol.ROWS, 2), 1, 1)
    built = program(fake, launch(kernel="first", grid=grid), launch(kernel="second"))
    assert built.profile(STREAM, rows=5) == [("first", 1500.0), ("second", 1500.0)]
    assert [record.grid[0] for record in fake.records()] == [3, 1]
    assert fake.calls("cuEventRecord") == 3
    fake.fail("cuLaunchKernelEx", 700, skip=1)
    with pytest.raises(DeviceError, match=r"launch 1 of 2 \(second\)"):
        built.profile(STREAM)
    with pytest.raises(ParameterError, match="each is 0 to"):
        built.profile(STREAM, rows=-1)
    built.run(STREAM)  # the turn was given back
    assert fake.number("events") == 0


def test_a_context_is_needed_once_and_brought_along(fake: FakeDriver) -> None:
    fake.enter(0)
    with pytest.raises(DeviceError, match=r"cupy\.cuda\.Device\(n\)\.use"):
        program(fake, launch())
    fake.enter(CONTEXT)
    built = program(fake, launch())
    fake.enter(0xBEEF)  # of another device
    built.run(STREAM)
    assert fake.records()[0].context == CONTEXT
    assert fake.context() == 0xBEEF
    fake.fail("cuCtxPushCurrent_v2", 709)
    with pytest.raises(DeviceError, match="entering its context failed") as caught:
        built.run(STREAM)
    assert caught.value.sticky
    in_thread = threading.Thread(target=built.run, args=(STREAM,))  # which has no context at all
    in_thread.start()
    in_thread.join()
    assert [record.context for record in fake.records()] == [CONTEXT, CONTEXT]


def test_the_gil_is_released(fake: FakeDriver) -> None:
    """The launch goes on only when another Python thread has run meanwhile."""
    built = program(fake, launch())
    fake.library.fake_close_gate()
    opener = threading.Thread(target=fake.library.fake_open_gate)
    running = threading.Thread(target=built.run, args=(STREAM,))
    running.start()
    opener.start()
    running.join()
    opener.join()
    assert fake.number("gate_timed_out") == 0
    assert len(fake.records()) == 1


def test_threads_do_not_mix_their_symbols(fake: FakeDriver) -> None:
    """Two threads on one program and two on programs of their own: grid and field of each launch belong together."""
    rule, fields = (Blocks(Symbol.ROWS, 1), 1, 1), (Field(0, Symbol.ROWS), Field(8, Symbol.ROWS))
    shared, own = (program(fake, *[launch(grid=rule, fields=fields)] * 3) for _ in range(2))
    failures: list[BaseException] = []

    def work(built: Any, first: int) -> None:
        try:
            for rows in range(first, first + 100):
                built.run(STREAM + first, rows=rows)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=args) for args in ((shared, 1), (shared, 1001), (own, 2001))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    records = fake.records()
    assert len(records) == 900
    for record in records:
        values = np.frombuffer(params(record, 16), np.int32)
        assert values[0] == values[2] == record.grid[0]
        assert record.stream - STREAM <= record.grid[0] < record.stream - STREAM + 100


# ---- the process ----


def run_python(program: str, *arguments: str) -> tuple[str, str]:
    """What a fresh interpreter, in the tests' folder, prints and complains about."""
    command = [sys.executable, "-c", program, *arguments]
    folder = Path(__file__).parent
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=command_line.environment(), check=False
    )
    return done.stdout, done.stderr


AT_EXIT = """
import sys
from fake_driver import STREAM, FakeDriver, launch
from soprano_cupy.gpu import _driver as driver
from pathlib import Path
from typing import Any
fake = FakeDriver(Path(sys.argv[1]))
driver._use_library(sys.argv[1])
fake.takes([1], [launch()])
graph = driver.Graph.capture(STREAM, [(driver.Program([launch()], [1]),)])
memory, event = driver.MappedMemory(64), driver.Event()
import atexit
atexit._run_exitfuncs()
del graph, memory, event
print(fake.number("executables"), fake.number("host_blocks"), fake.number("events"))
"""


def test_nothing_is_freed_when_the_process_ends(fake: FakeDriver) -> None:
    """The driver may be gone by then, and takes everything with it anyway."""
    assert run_python(AT_EXIT, str(fake.path)) == ("1 1 1\n", "")


def test_importing_opens_no_library() -> None:
    program = "from soprano_cupy.gpu import _driver; print('libcuda' in open('/proc/self/maps').read())"
    assert run_python(program) == ("False\n", "")
