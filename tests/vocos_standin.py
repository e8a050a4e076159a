"""A GPU made of host memory: what `soprano_cupy.gpu.vocos` asks of CuPy and of the driver, so that its host logic runs
anywhere. Kernels run on the emulated machine, products in NumPy; everything is done as soon as it is asked for, except
what a stream is told to do, which happens when somebody waits for it (`lazy`)."""

from __future__ import annotations

import ctypes
import struct
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from emulation import build
from vocos_machine import product

from soprano_cupy.cuda.module import DeviceFacts
from soprano_cupy.gpu import ahead, program, vocos, vocos_slices, vocos_stream
from soprano_cupy.gpu.launch import Blocks, Launch, Symbol
from soprano_cupy.gpu.linear import End, LinearRequest

Work = Callable[[], None]


class Pointer:
    """A place in memory that an array or another pointer keeps alive."""

    def __init__(self, memory: np.ndarray, ptr: int) -> None:
        self.memory, self.ptr = memory, ptr

    def __add__(self, offset: int) -> Pointer:
        return Pointer(self.memory, self.ptr + offset)

    def memset_async(self, value: int, nbytes: int) -> None:
        raw_view(self.ptr, (nbytes,), np.uint8)[:] = value


class DeviceArray(np.ndarray):
    """An array "on the GPU"."""

    @property
    def data(self) -> Any:
        return Pointer(self, self.ctypes.data)


def raw_view(address: int, shape: tuple[int, ...], kind: Any) -> np.ndarray:
    """The memory at an address as an array."""
    nbytes = int(np.prod(shape)) * np.dtype(kind).itemsize
    return np.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), kind).reshape(shape)


class Queues:
    """What streams have been given and not done yet, in one order for all; None: everything is done at once."""

    def __init__(self, lazy: bool) -> None:
        self.waiting: list[Work] | None = [] if lazy else None
        self.copied = 0
        self.runs: list[tuple[int, int, int]] = []

    def give(self, work: Work) -> None:
        if self.waiting is None:
            work()
        else:
            self.waiting.append(work)

    def drain(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()


class StandIn:
    """Everything that is put in place of CuPy, the driver and the loader."""

    def __init__(self, lazy: bool = False) -> None:
        self.queues = Queues(lazy)
        self.memory_bytes: int | None = None  # more than that in one allocation is refused
        self.program_sizes: list[int] = []
        # CuPy's memory pool serves a freed array's memory in stream order: here nothing is freed before the end.
        self.kept: list[np.ndarray] = []

    def install(self, monkeypatch: pytest.MonkeyPatch, multiprocessors: int = 4) -> None:
        monkeypatch.setitem(sys.modules, "cupy", self._cupy())
        driver = types.ModuleType("soprano_cupy.gpu._driver")
        driver.copy = self._copy  # type: ignore[attr-defined]
        driver.synchronize = lambda stream: self.queues.drain()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, driver.__name__, driver)
        facts = DeviceFacts(0, "stand-in", (9, 0), multiprocessors)
        replaced: dict[str, Any] = {
            "Event": self._event(),
            "Graph": Graph,
            "MappedMemory": MappedMemory,
            "load_program": self._load_program,
            "on_device": on_device,
            "driver_problem": lambda: None,
            "device_facts": lambda index: facts,
            "plan_linear": lambda request: request,
            "pack_linear": lambda array, xp: array,
            "module_of": lambda array: None if isinstance(array, DeviceArray) else np,
        }
        for module in (vocos, vocos_slices, vocos_stream):
            for name, value in replaced.items():
                if name in vars(module):
                    monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(ahead, "begin", lambda plan, device: None)  # there is nothing to be loaded
        for name in ("Event", "Graph", "MappedMemory", "load_program", "on_device", "driver_problem"):
            monkeypatch.setitem(vars(program), name, replaced[name])

    def _cupy(self) -> types.ModuleType:
        def on_device_array(values: Any, dtype: Any = None) -> Any:
            if isinstance(values, DeviceArray) and (dtype is None or values.dtype == dtype):
                return values
            self.kept.append(np.array(values, dtype).view(DeviceArray))
            return self.kept[-1]

        def at(shape: tuple[int, ...], dtype: Any, place: Pointer) -> Any:
            array = raw_view(place.ptr, shape, dtype).view(DeviceArray)
            array.owner = place.memory
            return array

        def alloc(nbytes: int) -> Pointer:
            if self.memory_bytes is not None and nbytes > self.memory_bytes:
                raise MemoryError(f"{nbytes} bytes")
            memory = np.full(nbytes + 256, 255, np.uint8)
            return Pointer(memory, memory.ctypes.data + -memory.ctypes.data % 256)

        class Stream:
            def __init__(self, non_blocking: bool = False) -> None:
                self.ptr = 7

            def synchronize(inner) -> None:  # noqa: N805
                self.queues.drain()

        cupy = types.ModuleType("cupy")
        contents: dict[str, Any] = {
            "asarray": on_device_array,
            "ascontiguousarray": lambda a: np.ascontiguousarray(a).view(DeviceArray),
            "empty": lambda shape, dtype: np.full(shape, -1, dtype).view(DeviceArray),
            "ndarray": at,
            "get_default_memory_pool": lambda: types.SimpleNamespace(free_all_blocks=lambda: None),
            "cuda": types.SimpleNamespace(
                alloc=alloc,
                alloc_pinned_memory=bytearray,
                Stream=Stream,
                get_current_stream=Stream,
                runtime=types.SimpleNamespace(deviceSynchronize=self.queues.drain),
            ),
        }
        for name, value in contents.items():
            setattr(cupy, name, value)
        return cupy

    def _event(self) -> type:
        queues = self.queues

        class Event:
            def record(self, stream: int) -> None: ...
            def hold(self, stream: int) -> None: ...
            def synchronize(self) -> None:
                queues.drain()

        return Event

    def _copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self.queues.copied += nbytes
        self.queues.give(lambda: ctypes.memmove(target, source, nbytes) and None)

    def _load_program(self, launches: Sequence[Launch | LinearRequest], device: int) -> Any:
        self.program_sizes.append(len(launches))
        return EmulatedProgram(launches, self.queues)


class MappedMemory:
    def __init__(self, nbytes: int) -> None:
        self._memory = np.zeros(nbytes + 256, np.uint8)
        self.device = self.host = self._memory.ctypes.data + -self._memory.ctypes.data % 256
        start = self.device - self._memory.ctypes.data
        self._bytes = self._memory[start : start + nbytes]

    def view(self) -> memoryview:
        return memoryview(self._bytes)


class Graph:
    """Programs with their symbols, run again by each launch."""

    def __init__(self, steps: Sequence[tuple[Any, ...]]) -> None:
        self._steps = steps

    @classmethod
    def capture(cls, stream: int, steps: Sequence[tuple[Any, ...]]) -> Graph:
        return cls(steps)

    def launch(self, stream: int) -> None:
        for program_, *symbols in self._steps:
            program_.run(stream, *symbols)


@contextmanager
def on_device(device: int) -> Iterator[None]:
    yield


class EmulatedProgram:
    """Launches on the emulated machine, products in NumPy, at whatever addresses they name."""

    def __init__(self, launches: Sequence[Launch | LinearRequest], queues: Queues) -> None:
        self._launches, self._queues = launches, queues

    def run(self, stream: int, rows: int = 0, sequences: int = 0, longest: int = 0) -> None:
        symbols = {Symbol.ROWS: rows, Symbol.SEQUENCES: sequences, Symbol.LONGEST: longest}
        for launch in self._launches:
            if isinstance(launch, LinearRequest):
                assert launch.rows_min <= symbols[Symbol(launch.rows)] <= launch.rows_max
        self._queues.runs.append((rows, sequences, longest))
        self._queues.give(lambda: self._run(symbols))

    def _run(self, symbols: dict[Symbol, int]) -> None:
        for step in self._launches:
            if isinstance(step, LinearRequest):
                self._multiply(step, symbols[Symbol(step.rows)])
                continue
            params = bytearray(step.params)
            for field in step.fields:
                struct.pack_into("<i", params, field.offset, symbols[field.symbol])
            grid = [-(-symbols[s.symbol] // s.of_each) if isinstance(s, Blocks) else s for s in step.grid]
            build(step.source, dict(step.defines)).launch(
                step.kernel, bytes(params), grid=grid, threads=step.threads, shared_bytes=step.shared_bytes
            )

    def _multiply(self, request: LinearRequest, rows: int) -> None:
        matrix = raw_view(request.weights, (request.features, request.depth), np.float16)
        bias = raw_view(request.bias, (request.features,), np.float32)
        result = product(request, rows, matrix, bias, raw_view)
        kind = np.float16 if request.end is End.GELU else np.float32
        if request.end is End.ADD:
            result = raw_view(request.residual, (rows, request.residual_stride), np.float32) + result
        raw_view(request.output, (rows, request.output_stride), kind)[:, : request.features] = result
