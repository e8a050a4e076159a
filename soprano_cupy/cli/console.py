"""What the command line says and where: results on stdout, everything else on stderr.

Every failure of stdout becomes an `OutputError`, or stays a `BrokenPipeError` when its reader has gone.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TextIO

from ..errors import OutputError

PROGRAM = "soprano-cupy"


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived; raised where the program is, so that nothing is left half-written."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def echo(line: str = "") -> None:
    """One line of a command's result, on stdout at once."""
    stream = _stdout()
    with _stdout_errors():
        encoding = stream.encoding or "utf-8"
        stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()


def flush_stdout() -> None:
    """Send what others have printed, so that its failure is noticed while it can be told."""
    if sys.stdout is not None:
        with _stdout_errors():
            sys.stdout.flush()


def write_bytes(data: bytes) -> None:
    """Audio on stdout at once; `OutputError` when that is a terminal, closed or full."""
    stream = _stdout()
    if stream.isatty():
        raise OutputError("audio is not written to a terminal; add > speech.wav or pipe it into a player")
    with _stdout_errors():
        stream.flush()
        stream.buffer.write(data)
        stream.buffer.flush()


def say(line: str) -> None:
    """One line about the run, on stderr; a stderr that cannot be written to changes nothing."""
    with _stderr_lock, contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{_clear_bar()}{line}\n")
        sys.stderr.flush()


def complain(message: str) -> None:
    """The one line that explains a failure."""
    say(f"{PROGRAM}: {one_line(message)}")


def one_line(text: str) -> str:
    """Without line breaks and without characters that would steer a terminal."""
    joined = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in joined)


def abandon_stdout() -> None:
    """Let what is still buffered for stdout go nowhere, so that the interpreter's exit stays quiet."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def usable_streams() -> Iterator[None]:
    """Stand-ins for closed standard streams.

    Their numbers are taken first, or the next file to be opened would become the program's stdout.
    """
    if None in (sys.stdin, sys.stdout, sys.stderr):
        while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(handle)
    before = sys.stderr
    if before is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        yield
    finally:
        if before is None:
            sys.stderr.close()
            sys.stderr = before


@contextlib.contextmanager
def terminations() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into `Terminated`, unless they are ignored or this is not the main thread."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Terminated(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def log_to_stderr(level: int) -> Iterator[None]:
    """Show the package's log as plain lines on stderr."""
    logger = logging.getLogger("soprano_cupy")
    handler, before = _LineHandler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextlib.contextmanager
def log_only_success() -> Iterator[None]:
    """Keep log lines back until the block has succeeded: a failure is told in one line alone."""
    global _held
    before, lines = _held, list[str]()
    _held = lines
    try:
        yield
    finally:
        _held = before
    for line in lines:
        say(line)


class _LineHandler(logging.Handler):
    """One line a record; warnings are named as such."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = one_line(record.getMessage())
        except Exception:
            self.handleError(record)
            return
        line = f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text
        if _held is None:
            say(line)
        else:
            _held.append(line)


_held: list[str] | None = None


def _stdout() -> TextIO:
    if sys.stdout is None:
        raise OutputError("standard output is closed; name a file with -o or open it again")
    return sys.stdout


@contextlib.contextmanager
def _stdout_errors() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        abandon_stdout()
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full; free some space" if full else f"{error.strerror or error}; redirect it elsewhere"
        raise OutputError(f"cannot write to standard output: {why}") from error


_stderr_lock = threading.RLock()
_bar_shown = False


def draw_bar(text: str) -> None:
    """Replace the progress line on the terminal by `text`; an empty text takes it away."""
    global _bar_shown
    with _stderr_lock, contextlib.suppress(OSError, ValueError):
        sys.stderr.write(_clear_bar() + text)
        sys.stderr.flush()
        _bar_shown = bool(text)


def _clear_bar() -> str:
    """What takes a progress line away before something else is written."""
    global _bar_shown
    if not _bar_shown:
        return ""
    _bar_shown = False
    return "\r\x1b[K"
