"""Runs the command line in this process with streams of its own, or in a process of its own."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import soprano_cupy
from soprano_cupy.cli import main

PROCESS_SECONDS = 120.0


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode()

    @property
    def only_line(self) -> str:
        """stderr, which must be exactly one line."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


class Terminal(io.TextIOWrapper):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def run(*arguments: object, stdin: bytes = b"", terminals: tuple[str, ...] = ()) -> Outcome:
    """Run `soprano-cupy ARGUMENTS`; terminals: which of stdin, stdout and stderr are to look like one."""
    streams = {"stdin": io.BytesIO(stdin), "stdout": io.BytesIO(), "stderr": io.BytesIO()}
    wrapped = {
        name: (Terminal if name in terminals else io.TextIOWrapper)(data, encoding="utf-8")
        for name, data in streams.items()
    }
    with mock.patch.multiple(sys, **wrapped):
        code = main([str(argument) for argument in arguments])
    wrapped["stdout"].flush()
    wrapped["stderr"].flush()
    return Outcome(code, streams["stdout"].getvalue(), streams["stderr"].getvalue().decode())


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run `python -m soprano_cupy ARGUMENTS` to its end."""
    options = {"capture_output": True, "env": environment(), **options}
    return subprocess.run(command(*arguments), timeout=PROCESS_SECONDS, check=False, **options)


@contextmanager
def started(*arguments: object, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A running `python -m soprano_cupy ARGUMENTS`, which is ended with the context.

    Signals do to it what they do in a terminal, also where these tests run in the background and ignore them.
    """
    options = {"env": environment(), "preexec_fn": heed_signals, **options}
    with subprocess.Popen(command(*arguments), **options) as child:
        try:
            yield child
        finally:
            child.kill()


def heed_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "soprano_cupy", *(str(argument) for argument in arguments)]


def environment(**changes: str) -> dict[str, str]:
    """This process's variables, with which the package that is tested here is found from any folder."""
    package = Path(soprano_cupy.__file__).resolve().parents[1]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return {**inherited, "PYTHONPATH": str(package), **changes}


def quiet_environment(folder: os.PathLike[str]) -> dict[str, str]:
    """Variables that keep a test on the CPU, off the network and out of the user's folders."""
    return {"SOPRANO_DEVICE": "cpu", "SOPRANO_CACHE_DIR": os.fspath(folder), "HF_HUB_OFFLINE": "1"}
