"""One device's process as the front sees it: started, listened to, taken out when it dies, started anew."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.spawn import get_executable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DeviceError
from . import processes_messages as say
from .crowd import MAX_FAILURES, SOON_S
from .processes_channel import Channel
from .processes_ring import Ring, RingReader

if TYPE_CHECKING:
    from .processes_ledger import Ledger

logger = logging.getLogger(__name__)

RING_BYTES = 64 << 20  # of samples that the front has not taken yet
LOOK_S = 1.0
END_S = 10.0  # that a process may take to end
START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv.pop()); "
    "from soprano_cupy.crowd.processes_worker import main; main()"
)


@dataclass(frozen=True)
class Post:
    """A device that is to have a process: its name, what opens a voice there (see `processes_messages.Setup`), and what
    is to be different in the environment there."""

    name: str
    opener: str
    options: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)


class Station(threading.Thread):
    """The thread that exchanges messages with one device's process, and starts it.

    `facts`, `load`, `sent` and `ready` are written by the ledger, within its lock.
    """

    def __init__(self, ledger: Ledger, post: Post, index: int, ring_bytes: int = RING_BYTES) -> None:
        super().__init__(name=f"soprano-process-{index}", daemon=True)
        self._ledger, self._post, self._ring_bytes = ledger, post, ring_bytes
        self._channel: Channel | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = 0.0  # when it was asked to end
        self._failure: Exception | None = None  # that the process told, or that the watch found
        self.started = threading.Event()  # it has become ready once, or never will
        self.error: Exception | None = None
        self.facts = say.Ready(post.name, 1, 0, 0, 0)
        self.ready = self.out = False
        self.load = 0.0  # characters of the requests that are there
        self.sent = 0  # requests to the present process
        self.state = say.State(0, 0)
        self.heard_at = float("inf")  # when the process last gave a sign of life

    @property
    def fullness(self) -> float:
        """How much there is to do for each voice."""
        return self.load / self.facts.slots

    @property
    def waiting(self) -> int:
        """Requests there of which nothing has begun, as far as is known."""
        return self.state.waiting + self.sent - self.state.received

    # -- any thread ---------------------------------------------------------------------------------------------------

    def post(self, message: Any) -> None:
        """Send a message to the process; where there is none, to nobody."""
        channel = self._channel
        if channel is not None:
            channel.post(message)

    def stop(self) -> None:
        """Let the process end; the thread ends then."""
        self._closing = time.monotonic()
        self.post(say.Close())

    def kill(self, why: Exception | None = None) -> None:
        """End the process at once."""
        self._failure = self._failure or why
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()

    # -- the thread ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        failures, last = 0, float("-inf")
        while not self._closing:
            self._failure = None
            error = self._serve_until_it_ends()
            if self._closing:
                break
            self.error = error
            now = time.monotonic()
            failures = failures + 1 if now - last < SOON_S else 1
            last = now
            for_good = failures >= MAX_FAILURES or not self.started.is_set()
            what = "used no more" if for_good else "started anew"
            logger.error("%s: its process failed (%s); it is %s", self._post.name, error, what)
            if for_good:
                break
            self._ledger.lost(self, error)
        self.out = True
        self.started.set()
        self._ledger.lost(self, self.error or DeviceError("the voice was closed"))

    def _serve_until_it_ends(self) -> Exception:
        """Start a process and exchange messages with it; why it ended."""
        try:
            ring = self._start_process()
        except OSError as error:
            return DeviceError(f"a process cannot be started: {error}")
        process, channel = self._process, self._channel
        assert process is not None
        assert channel is not None
        told = 0
        try:
            while True:
                messages = channel.exchange(LOOK_S)
                sounds = [message for message in messages if isinstance(message, say.Sound)]
                samples = iter(ring.take((sound.place, sound.length, sound.dtype) for sound in sounds))
                for message in messages:
                    self._take_in(message, samples)
                self._ledger.flush()
                if ring.read != told:
                    told = ring.read
                    channel.post(say.Freed(told))
                if self._failure is not None or (self._closing and time.monotonic() > self._closing + END_S):
                    break
        except EOFError:
            pass
        except Exception as error:  # a bug must leave nobody waiting
            logger.exception("%s: %s", self._post.name, type(error).__name__)
            self._failure = error
        finally:
            self.heard_at = float("inf")
            self._ledger.gone(self)
            self._channel = None
            channel.close()
            code = _ended(process, END_S if self._failure is None else 1.0)
            ring.close()
        return self._failure or DeviceError(f"process {process.pid} {_how(code)}")

    def _start_process(self) -> RingReader:
        python = get_executable()  # a program with Python in it may have said where there is one to start
        if not python:
            raise OSError("it is not known where Python is; tell multiprocessing.set_executable")
        ours, theirs = socket.socketpair()
        file = Ring.create(self._ring_bytes)
        try:
            numbers = [str(number) for number in (theirs.fileno(), file, self._ring_bytes)]
            self._process = subprocess.Popen(
                [os.fsdecode(python), "-c", START, *numbers, json.dumps(sys.path)],
                pass_fds=(theirs.fileno(), file), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                start_new_session=True, env={**os.environ, **self._post.environment},
            )  # fmt: skip
            ring = RingReader(file, self._ring_bytes)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(file)
        channel = Channel(ours)
        level = logging.getLogger("soprano_cupy").getEffectiveLevel()
        channel.post(say.Setup(self._post.opener, self._post.options, level))
        self.heard_at = time.monotonic()
        self._channel = channel
        if self._closing:
            channel.post(say.Close())
        return ring

    def _take_in(self, message: Any, samples: Iterator[np.ndarray]) -> None:
        if isinstance(message, say.Sound):
            self._ledger.heard(self, message.number, next(samples))
        elif isinstance(message, say.Ended):
            self._ledger.ended(self, message)
        elif isinstance(message, say.State):
            self.state, self.heard_at = message, time.monotonic()
        elif isinstance(message, say.Log):
            logging.getLogger(message.logger).log(message.level, "%s: %s", self._post.name, message.text)
        elif isinstance(message, say.Ready):
            logger.info("%s: process %d, %d voices at once", self._post.name, message.pid, message.slots)
            self._ledger.welcome(self, message._replace(name=self._post.name))
            self.started.set()
        elif isinstance(message, say.Failed):
            self._failure = say.unpacked(message.error)


def _ended(process: subprocess.Popen[bytes], seconds: float) -> int:
    """Wait for the end of a process, or bring it about."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
