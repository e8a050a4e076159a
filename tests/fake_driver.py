"""A stand-in for libcuda (`fake_cuda.c`), built with gcc, that records launches and fails when it is told to."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from soprano_cupy.gpu.launch import Launch

SOURCE = Path(__file__).with_name("fake_cuda.c")
STREAM, CONTEXT = 0x5000, 0xC0


class Record(ctypes.Structure):
    """One kernel launch as the driver saw it."""

    _fields_ = (
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("context", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("cluster", ctypes.c_uint32),
        ("cooperative", ctypes.c_int),
        ("programmatic", ctypes.c_int),
        ("extended", ctypes.c_int),
        ("captured", ctypes.c_int),
        ("params", ctypes.c_uint8 * 256),
    )


class FakeDriver:
    """One built variant, with its state as it was loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.fake_get_context.restype = self.library.fake_capturing.restype = ctypes.c_uint64
        self.reset()

    def reset(self) -> None:
        """Forget everything, and make `CONTEXT` current in this thread."""
        self.library.fake_reset()
        self.enter()

    def enter(self, context: int = CONTEXT) -> None:
        self.library.fake_set_context(ctypes.c_uint64(context))

    def context(self) -> int:
        return int(self.library.fake_get_context())

    def fail(self, name: str, code: int, *, skip: int = 0) -> None:
        """Let the call of an entry that comes after `skip` others return `code`."""
        self.library.fake_fail(name.encode(), skip, code)

    def calls(self, name: str) -> int:
        return int(self.library.fake_calls(name.encode()))

    def number(self, name: str) -> int:
        return ctypes.c_int.in_dll(self.library, f"fake_{name}").value

    def set_number(self, name: str, value: int) -> None:
        ctypes.c_int.in_dll(self.library, f"fake_{name}").value = value

    def capturing(self) -> bool:
        return bool(self.library.fake_capturing())

    def records(self) -> list[Record]:
        every = (Record * 4096).in_dll(self.library, "fake_records")
        return list(every[: self.number("record_count")])

    def takes(self, functions: list[int], launches: list[Launch]) -> None:
        """Tell how many bytes of parameters each function takes."""
        for function, launch in zip(functions, launches, strict=True):
            self.library.fake_set_parameter_bytes(ctypes.c_uint64(function), ctypes.c_uint64(len(launch.params)))


def builder(folder: Path) -> Callable[..., FakeDriver]:
    """Builds variants of the fake in a folder; skips where there is no gcc."""

    def build(*defines: str) -> FakeDriver:
        if shutil.which("gcc") is None:
            pytest.skip("gcc, which builds the stand-in for libcuda, is not installed")
        path = folder / f"fake{''.join(defines)}.so"
        if not path.exists():
            options = ["-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", "-pthread"]
            flags = [f"-D{name}" for name in defines]
            subprocess.run(["gcc", *options, *flags, str(SOURCE), "-o", str(path)], check=True)
        return FakeDriver(path)

    return build


def launch(**changes: Any) -> Launch:
    """A launch that is right, but for the changes."""
    values: dict[str, Any] = {
        "source": "test.cu",
        "kernel": "test",
        "defines": (),
        "grid": (1, 1, 1),
        "threads": 32,
        "shared_bytes": 0,
        "params": bytes(16),
    }
    return Launch(**(values | changes))


def use(fake: FakeDriver) -> Iterator[FakeDriver]:
    """The launcher on this library, as new, for one test."""
    from soprano_cupy.gpu import _driver

    fake.reset()
    _driver._use_library(str(fake.path))
    yield fake
    _driver._use_library(None)
