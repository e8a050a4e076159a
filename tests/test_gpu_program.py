"""Programs from planned launches: kernels built once and side by side, packed, described; and why that may not work."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from fake_driver import STREAM, FakeDriver, builder, launch

from soprano_cupy.cuda import compiler, module
from soprano_cupy.cuda.module import DeviceFacts
from soprano_cupy.errors import DeviceError
from soprano_cupy.gpu import program
from soprano_cupy.gpu.launch import Blocks, Launch, Symbol

HOPPER, AMPERE = (9, 0), (8, 0)
KERNEL = 'struct Params { int rows, scale; };\nextern "C" __global__ void NAME(const Params params) { (void)params; }\n'


class FakeKernel:
    """What `module.load` gives."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer
        self.shared_bytes = module.DEFAULT_SHARED_BYTES

    def allow_shared_bytes(self, shared_bytes: int) -> None:
        if shared_bytes > 227 * 1024:
            raise RuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        self.shared_bytes = max(self.shared_bytes, shared_bytes)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FakeDriver]:
    return builder(tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture
def fake(build: Callable[..., FakeDriver], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """A stand-in for libcuda, and a GPU of compute capability 9.0 that loads any kernel of 16 bytes of parameters."""
    driver = pytest.importorskip("soprano_cupy.gpu._driver", reason="the extension module is not built")
    built = build()
    built.reset()
    driver._use_library(str(built.path))
    monkeypatch.setattr(program, "on_device", lambda device: nullcontext())
    monkeypatch.setattr(program, "device_facts", lambda device: DeviceFacts(device, "GPU", HOPPER, 132))
    built.takes(list(range(1, 20)), [launch()] * 19)
    yield built
    driver._use_library(None)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[Any, ...], FakeKernel]:
    """The kernels that have been loaded, by what they were asked for with."""
    loaded: dict[tuple[Any, ...], FakeKernel] = {}
    lock = threading.Lock()

    def load(source: str, name: str, defines: Any, device: int, *, specific: bool) -> FakeKernel:
        key = (source, name, defines, device, specific)
        with lock:
            assert key not in loaded, "asked for twice"
            loaded[key] = FakeKernel(len(loaded) + 1)
            return loaded[key]

    monkeypatch.setattr(program, "load", load)
    return loaded


def test_kernels_are_loaded_once(fake: FakeDriver, kernels: dict[tuple[Any, ...], FakeKernel]) -> None:
    launches = [
        launch(kernel="a", defines=(("N", 1),)),
        launch(kernel="b", defines=(("N", 1),)),
        launch(kernel="a", defines=(("N", 2),)),
        launch(kernel="a", defines=(("N", 1),), specific=True),
        launch(kernel="a", defines=(("N", 1),), grid=(Blocks(Symbol.ROWS, 8), 1, 1)),
    ]
    built = program.load_program(launches, 3)
    assert set(kernels) == {
        ("test.cu", "a", (("N", 1),), 3, False),
        ("test.cu", "b", (("N", 1),), 3, False),
        ("test.cu", "a", (("N", 2),), 3, False),
        ("test.cu", "a", (("N", 1),), 3, True),
    }
    assert (len(built), built.names) == (5, ("a", "b", "a", "a", "a"))
    built.run(STREAM, rows=17)
    pointers = {key[1:3] + key[4:]: kernel.pointer for key, kernel in kernels.items()}
    expected = [pointers[one.kernel, one.defines, one.specific] for one in launches]
    assert [record.function for record in fake.records()] == expected
    assert [record.grid[0] for record in fake.records()] == [1, 1, 1, 1, 3]


def test_shared_memory_and_clusters_are_asked_for(fake: FakeDriver, kernels: dict[tuple[Any, ...], FakeKernel]) -> None:
    big, small = (launch(kernel="k", shared_bytes=n) for n in (100_000, 60_000))
    large_clusters = launch(kernel="c", grid=(16, 1, 1), cluster=16)
    portable_clusters = launch(kernel="d", grid=(16, 1, 1), cluster=8)
    program.load_program([big, small, large_clusters, portable_clusters], 0)
    shared = {name: kernel.shared_bytes for (_, name, *_), kernel in kernels.items()}
    assert shared == {"k": 100_000, "c": 48 * 1024, "d": 48 * 1024}
    allowed = {name: fake.library.fake_get_attribute(kernel.pointer, 14) for (_, name, *_), kernel in kernels.items()}
    assert allowed == {"k": 0, "c": 1, "d": 0}


def test_too_much_shared_memory_is_a_clear_error(fake: FakeDriver, kernels: dict[tuple[Any, ...], FakeKernel]) -> None:
    with pytest.raises(DeviceError, match="greedy needs 240000 bytes of shared memory a block, more than this GPU has"):
        program.load_program([launch(kernel="greedy", shared_bytes=240_000)], 0)


@pytest.mark.parametrize(
    ("capability", "version", "expected"),
    [(HOPPER, 12030, True), (HOPPER, 12020, False), ((12, 0), 13000, True), ((8, 9), 13000, False)],
)
def test_programmatic_launches_need_gpu_and_driver(
    fake: FakeDriver,
    kernels: dict[tuple[Any, ...], FakeKernel],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    version: int,
    expected: bool,
) -> None:
    monkeypatch.setattr(program, "device_facts", lambda device: DeviceFacts(device, "GPU", capability, 132))
    fake.set_number("version", version)
    assert program.has_programmatic_launches(0) is expected
    program.load_program([launch(), launch(programmatic=False)], 0).run(STREAM)
    assert [record.programmatic for record in fake.records()] == [int(expected), 0]


def test_a_program_keeps_its_kernels(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []

    class Watched(FakeKernel):
        def __del__(self) -> None:
            alive.remove(self.pointer)

    def load(*arguments: Any, **options: Any) -> Watched:
        alive.append(1)
        return Watched(1)

    monkeypatch.setattr(program, "load", load)
    built = program.load_program([launch()], 0)
    assert alive == [1]
    del built
    assert alive == []


def test_a_kernel_that_does_not_build(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(source: str, name: str, *arguments: Any, **options: Any) -> FakeKernel:
        if name == "b":
            raise DeviceError("b.cu does not compile")
        return FakeKernel(1)

    monkeypatch.setattr(program, "load", load)
    with pytest.raises(DeviceError, match=r"b\.cu does not compile"):
        program.load_program([launch(kernel=name) for name in "abc"], 0)


def test_why_the_driver_cannot_be_used(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from soprano_cupy import gpu
    from soprano_cupy.gpu import _driver

    assert program.driver_problem() is None
    _driver._use_library(str(tmp_path / "nothing.so"))
    assert "cannot be opened" in (program.driver_problem() or "")
    with pytest.raises(DeviceError, match="the GPU engine cannot run: the NVIDIA driver cannot be opened"):
        program.load_program([launch()], 0)
    monkeypatch.delattr(gpu, "_driver")
    monkeypatch.setitem(sys.modules, "soprano_cupy.gpu._driver", None)
    assert "install again where there is a C compiler" in (program.driver_problem() or "")


def test_descriptions() -> None:
    layer = [
        launch(kernel="qkv", grid=(48, 1, 1), threads=256, shared_bytes=1024, defines=(("DEPTH", 512), ("ROWS", 8))),
        launch(kernel="attend", grid=(Blocks(Symbol.ROWS, 16, 3), Blocks(Symbol.LONGEST, 1, 1, 2), 1), cluster=4),
    ]
    last = launch(kernel="sample", cooperative=True, grid=(Blocks(Symbol.SPARE, 8), 1, 1))
    assert program.describe_program([*layer * 17, last]) == [
        " 17 x qkv: 48 x 1 x 1 blocks of 256 threads, 1024 bytes shared, DEPTH=512 ROWS=8",
        " 17 x attend: ceil(rows*3/16) x 2*longest x 1 blocks of 32 threads, 0 bytes shared, clusters of 4",
        "  1 x sample: ceil(spare/8) x 1 x 1 blocks of 32 threads, 0 bytes shared, cooperative",
    ]


# ---- building ----


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kernels named like their files, and an empty cache."""
    monkeypatch.setenv("SOPRANO_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(module, "joined_source", lambda name: KERNEL.replace("NAME", name.removesuffix(".cu")))


def planned(name: str, **changes: Any) -> Launch:
    return launch(source=f"{name}.cu", kernel=name, **changes)


def test_building_ahead(sources: None, tmp_path: Path) -> None:
    try:
        compiler.find_nvrtc()
    except DeviceError as error:
        pytest.skip(str(error))
    launches = [planned("a"), planned("b"), planned("a", defines=(("N", 1),)), planned("a", grid=(2, 1, 1))]
    assert program.compile_program(launches, AMPERE) == 3
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kernels").iterdir()}
    assert len(written) == 3
    assert program.compile_program(launches, AMPERE) == 3  # found, not built again
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kernels").iterdir()} == written
    assert program.compile_program([planned("a", specific=True)], HOPPER) == 1
    assert len(list((tmp_path / "kernels").iterdir())) == 4
    with pytest.raises(DeviceError, match=r"not-a-name\.cu does not compile"):
        program.compile_program([planned("a"), planned("not-a-name")], AMPERE)


def test_different_modules_are_loaded_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two loads wait for each other inside: one after the other they would not get past it. The same one loads once."""
    together = threading.Barrier(2)
    loads: list[str] = []

    def load(function: str, source: str, *arguments: Any) -> str:
        loads.append(source)
        together.wait(timeout=20)
        return source

    monkeypatch.setattr(module, "_load", load)
    monkeypatch.setattr(module, "_kernels", {})
    results: dict[int, Any] = {}

    def ask(number: int, source: str) -> None:
        results[number] = module.load(source, "function", (), 0)

    threads = [threading.Thread(target=ask, args=(i, f"{i % 2}.cu")) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(loads) == ["0.cu", "1.cu"]
    assert results == {i: f"{i % 2}.cu" for i in range(6)}
