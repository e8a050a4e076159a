"""A GPU made of host memory for both networks: `vocos_standin` with graphs and with the language model's products, so
that a crowd's host logic and its tables run with the real kernels on the emulated machine."""

from __future__ import annotations

import ctypes
import math
import sys
import types
from collections.abc import Iterable, Sequence
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import vocos_standin
from emulation import build
from launches import at_sizes
from linear_reference import NORM_SCALE
from vocos_standin import DeviceArray, raw_view

from soprano_cupy.cuda.module import DeviceFacts
from soprano_cupy.gpu import crowd_steps, forward, program, qwen3, weights
from soprano_cupy.gpu.launch import Launch, Symbol
from soprano_cupy.gpu.linear import TILE_FEATURES, End, LinearRequest

FACTS = DeviceFacts(0, "stand-in", (8, 0), 4)
HALF = np.float16


class CrowdStandIn(vocos_standin.StandIn):
    """In place of CuPy, the driver and the loader, for everything that a crowd's device uses."""

    def install(self, monkeypatch: pytest.MonkeyPatch, multiprocessors: int = 4) -> None:
        super().install(monkeypatch, multiprocessors)
        for module in (forward, weights, qwen3):
            for name, value in {
                "device_facts": lambda index: FACTS,
                "plan_linear": lambda request: request,
                "pack_linear": lambda array, xp: array,
                "interleave_gate_up": lambda gate, up, xp: np.concatenate((gate, up)),
                "load_program": self._load_program,
            }.items():
                if name in vars(module):
                    monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(qwen3, "Batch", MagicMock())  # a first one is made with the model
        monkeypatch.setitem(vars(program), "Graph", Graph)
        driver: Any = sys.modules["soprano_cupy.gpu._driver"]
        driver.copy_on_host = lambda parts: [ctypes.memmove(*part) for part in parts]
        monkeypatch.setattr(crowd_steps, "PACK_EVERY", 2)

    def _cupy(self) -> types.ModuleType:
        cupy = super()._cupy()
        stream = cupy.cuda.Stream

        class Stream(stream):  # type: ignore[misc, valid-type]
            def __init__(self, non_blocking: bool = False, priority: int = 0) -> None:
                super().__init__(non_blocking)

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None: ...

        class Device:
            def __init__(self, index: int) -> None: ...
            def use(self) -> None: ...
            def __enter__(self) -> None: ...
            def __exit__(self, *_: object) -> None: ...

        cupy.cuda.Stream, cupy.cuda.Device = Stream, Device
        cupy.cuda.runtime.free = lambda pointer: None
        cupy.zeros = lambda shape, dtype: self._kept(np.zeros(shape, dtype))  # type: ignore[attr-defined]
        cupy.empty = lambda shape, dtype: self._kept(np.full(shape, 77, dtype))  # type: ignore[attr-defined]
        return cupy

    def _kept(self, array: np.ndarray) -> Any:
        self.kept.append(array.view(DeviceArray))
        return self.kept[-1]

    def _event(self) -> type:
        event: Any = super()._event()
        event.done = lambda _: True
        event.wait = lambda _, seconds, spin_s=0.0: True
        return event  # type: ignore[no-any-return]

    def _load_program(self, launches: Sequence[Launch | LinearRequest], device: int) -> Any:
        self.program_sizes.append(len(launches))
        return Program(launches)


class Graph:
    """Programs that run again."""

    def __init__(self, steps: Iterable[tuple[Any, ...]]) -> None:
        self._steps = list(steps)

    @staticmethod
    def capture(stream: int, steps: Iterable[tuple[Any, ...]]) -> Graph:
        return Graph(steps)

    def launch(self, stream: int) -> None:
        for launched, *symbols in self._steps:
            launched.run(stream, *symbols)


class Program:
    """Launches on the emulated machine, products in NumPy, at once."""

    def __init__(self, launches: Sequence[Launch | LinearRequest]) -> None:
        self._launches = launches

    def run(self, stream: int, rows: int = 0, sequences: int = 0, longest: int = 0) -> None:
        symbols = {Symbol.ROWS: rows, Symbol.SEQUENCES: sequences, Symbol.LONGEST: longest}
        for step in self._launches:
            if isinstance(step, LinearRequest):
                count = symbols[Symbol(step.rows)] if isinstance(step.rows, Symbol) else step.rows
                assert 1 <= count <= step.most_rows
                multiply(step, count)
                continue
            params, grid = at_sizes(step, symbols)
            assert step.cluster == 1
            build(step.source, dict(step.defines)).launch(
                step.kernel, params, grid=grid, threads=step.threads, shared_bytes=step.shared_bytes
            )


def multiply(request: LinearRequest, rows: int) -> None:
    """A product with its end in float64, each row by itself, weights as they are before they are packed."""
    inputs = raw_view(request.input, (rows, request.input_stride), HALF)[:, : request.depth].astype(np.float64)
    matrix = raw_view(request.weights, (request.features, request.depth), HALF).astype(np.float64)
    with np.errstate(all="ignore"):
        result = np.array([matrix @ row for row in inputs])
    if request.bias:
        result += raw_view(request.bias, (request.features,), np.float32)
    if request.square_sums:
        sums = raw_view(request.square_sums, (rows, -(-request.depth // TILE_FEATURES)), np.float32).sum(axis=1)
        factor = 1 / np.sqrt(sums.astype(np.float64) / (request.norm_width or request.depth) + request.epsilon)
        result = result * (factor / NORM_SCALE["float16"])[:, None]
    _end(request, rows, result)


def _end(request: LinearRequest, rows: int, result: np.ndarray) -> None:
    columns, kind = request.columns, np.float32 if request.end in (End.STORE, End.ADD) else HALF
    output = raw_view(request.output, (rows, request.output_stride), kind)
    with np.errstate(all="ignore"):
        if request.end is End.SWIGLU:
            gate, up = result[:, :columns], result[:, columns:]
            output[:, :columns] = gate / (1 + np.exp(-gate)) * up
        elif request.end is End.RESIDUAL:
            residual = raw_view(request.residual, (rows, request.residual_stride), np.float32)
            residual[:, :columns] += result
            gain = raw_view(request.next_gain, (columns,), np.float32)
            output[:, :columns] = residual[:, :columns] * gain * NORM_SCALE["float16"]
            tiles = -(-columns // TILE_FEATURES)
            squares = np.zeros((rows, tiles * TILE_FEATURES), np.float32)
            squares[:, :columns] = residual[:, :columns] ** 2
            sums = raw_view(request.next_square_sums, (rows, tiles), np.float32)
            sums[:] = squares.reshape(rows, tiles, TILE_FEATURES).sum(axis=2)
        elif request.end is End.GELU:
            output[:, :columns] = result * 0.5 * (1 + np.vectorize(math.erf)(result / math.sqrt(2)))
        elif request.end is End.ADD:
            output[:, :columns] = raw_view(request.residual, (rows, request.residual_stride), np.float32) + result
        else:
            output[:, :columns] = result
