"""A device's process: an ordinary crowd on one device, with texts prepared here, behind a channel and a ring.

Beside the crowd's own threads, one prepares texts and submits them, another does so with long texts, which take long,
and a third exchanges messages, copies samples into the ring, and ends the process when the other end of the channel
does, come what may.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any, Protocol

from ..errors import DeviceError
from ..generation import Request
from ..sampling import SamplingParams
from . import processes_messages as say
from .crowd import SWITCH_S, Crowd
from .processes_channel import Channel
from .processes_orders import Orders
from .processes_relay import AudioChannel, Relay
from .processes_ring import RingWriter

LOOK_S = 0.005  # from one look at what waits to the next
LIFE_S = 5.0  # from one sign of life to the next
END_S = 8.0  # that closing may take
EACH = 50  # characters that take as long as what a text costs beside its own
LONG = 4000  # characters of a text that others do not wait for
TOGETHER = 2000  # characters of texts prepared at a time: the interpreter's lock is given away once for all


class Voice(Protocol):
    """What speaks here."""

    crowd: Crowd

    def prepare(self, texts: list[str], params: list[SamplingParams]) -> list[list[Request] | Exception]:
        """Each text's sentences, as the crowd takes them, or what is wrong with it."""


class SopranoVoice:
    """`SopranoTTS` on one device."""

    def __init__(self, **options: Any) -> None:
        from ..pipeline import SopranoTTS

        tts = SopranoTTS(**options)
        crowd = tts._opened()
        assert isinstance(crowd, Crowd)
        self.crowd, self._keep = crowd, tts  # which closes the crowd when it goes
        self.prepare = tts._reader.read_many


class Service:
    """The process's own state, and its three threads."""

    def __init__(self, connection: socket.socket, ring: RingWriter) -> None:
        self._channel = AudioChannel(connection, ring)
        self._setup: queue.SimpleQueue[say.Setup] = queue.SimpleQueue()
        self._orders: tuple[Orders[Relay], Orders[Relay]] = (Orders(), Orders())  # short ones, long ones
        self._relays: dict[int, Relay] = {}
        self._crowd: Crowd | None = None
        self._entry = threading.Lock()
        self._entering: Relay | None = None
        self._received, self._prepared = 0, [0, 0]  # requests, counted by a thread each
        self._told, self._told_at = say.State(0, 0), 0.0
        self._failed = False
        self._parent = os.getppid()

    # -- those that prepare -------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Open the voice and submit what comes; does not return."""
        threading.Thread(target=self._exchange_for_ever, name="soprano-channel", daemon=True).start()
        try:
            voice = self._open(self._setup.get())
        except Exception as error:
            self._fail(error)
            threading.Event().wait()  # until the other end has heard it, and closes the channel
        threading.Thread(target=self._prepare_for_ever, args=(voice, 1), name="soprano-books", daemon=True).start()
        self._prepare_for_ever(voice, 0)

    def _prepare_for_ever(self, voice: Voice, which: int) -> None:
        while True:
            relays = self._orders[which].take(TOGETHER)
            self._prepare(voice, [relay for relay in relays if not relay.cancelled])
            self._prepared[which] += len(relays)

    def _open(self, setup: say.Setup) -> Voice:
        _log_to(self._channel, setup.log_level)
        module, _, name = setup.opener.partition(":")
        voice: Voice = getattr(importlib.import_module(module), name)(**setup.options)
        crowd, device = voice.crowd, voice.crowd.devices[0]
        crowd.scheduler.new_speech = lambda *_: self._entering
        gc.collect()
        gc.freeze()  # the voice stays as long as the process does; nobody need look through it while others wait
        self._crowd = crowd
        nbytes = int(getattr(device, "nbytes", 0))
        self._channel.post(say.Ready(device.name, device.slots, device.most_prompt, nbytes, os.getpid()))
        return voice

    def _prepare(self, voice: Voice, relays: list[Relay]) -> None:
        """Submit these requests; their texts are prepared together."""
        texts = [relay for relay in relays if isinstance(relay.wanted.what, str) and not _late(relay)]
        try:
            prepared = voice.prepare(
                [str(relay.wanted.what) for relay in texts],
                [relay.wanted.params or SamplingParams() for relay in texts],
            )
        except Exception as error:
            prepared = [error] * len(texts)
        of_text = dict(zip(texts, prepared, strict=True))
        for relay in relays:
            self._submit(voice, relay, of_text.get(relay, relay.wanted.what))

    def _submit(self, voice: Voice, relay: Relay, requests: Any) -> None:
        wanted = relay.wanted
        try:
            if _late(relay):
                raise wanted.wish.not_met()
            if isinstance(requests, Exception):
                raise requests
            with self._entry:
                self._entering = relay
                voice.crowd.submit(requests, wanted.wish, wanted.submitted)
        except Exception as error:
            relay.settle(error)
        if relay.cancelled:
            voice.crowd.scheduler.cancelled(relay)  # type: ignore[arg-type]

    # -- the channel's thread -----------------------------------------------------------------------------------------

    def _exchange_for_ever(self) -> None:
        """Exchange messages until there is nobody to exchange them with, and end the process."""
        try:
            while os.getppid() == self._parent:
                self._tell_state()
                for message in self._channel.exchange(LOOK_S if self._told.waiting else LIFE_S):
                    self._handle(message)
                if self._crowd is not None and isinstance(refusal := self._crowd.scheduler.refusal, DeviceError):
                    self._fail(refusal)
            self._end()
        except EOFError:
            self._end()
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _handle(self, message: Any) -> None:
        if isinstance(message, say.Speak):
            relay = self._relays[message.number] = Relay(self._channel, message, self._over)
            self._received += 1
            size = len(message.what) if isinstance(message.what, str) else 0
            self._orders[size > LONG].put(relay, EACH + size, urgent=message.wish.stream)
        elif isinstance(message, say.Freed):
            self._channel.freed(message.place)
        elif isinstance(message, say.Cancel):
            cancelled = self._relays.pop(message.number, None)
            if cancelled is not None:
                cancelled.cancelled = True
                if self._crowd is not None:
                    self._crowd.scheduler.cancelled(cancelled)  # type: ignore[arg-type]
        elif isinstance(message, say.Setup):
            self._setup.put(message)
        else:
            self._end()

    def _over(self, number: int, error: BaseException | None) -> bool:
        """A request has ended; whether that is to be told, as it is not where the device is lost with all of them."""
        self._relays.pop(number, None)
        refusal = None if self._crowd is None else self._crowd.scheduler.refusal
        return not (isinstance(error, DeviceError) and isinstance(refusal, DeviceError))

    def _tell_state(self) -> None:
        """What waits, where that has changed; and from time to time a sign of life."""
        waiting = self._received - sum(self._prepared)
        if self._crowd is not None:
            waiting += self._crowd.scheduler.waiting_requests
        state, now = say.State(self._received, waiting), time.monotonic()
        if state != self._told or now - self._told_at >= LIFE_S:
            self._told, self._told_at = state, now
            self._channel.post(state)

    def _fail(self, error: BaseException) -> None:
        if not self._failed:
            self._failed = True
            self._channel.post(say.Failed(say.packed(error)))

    def _end(self) -> None:
        """Close the crowd and end the process, whatever hangs."""
        alarm = threading.Timer(END_S, os._exit, (1,))
        alarm.daemon = True
        alarm.start()
        if self._crowd is not None:
            with contextlib.suppress(Exception):
                self._crowd.close()
        os._exit(0)


def _late(relay: Relay) -> bool:
    deadline_s = relay.wanted.wish.deadline_s
    return deadline_s is not None and time.monotonic() > relay.wanted.submitted + deadline_s


class _LogHandler(logging.Handler):
    """Hands on what the package logs."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.post(say.Log(record.levelno, record.name, record.getMessage()))


def _log_to(channel: Channel, level: int) -> None:
    logger = logging.getLogger("soprano_cupy")
    logger.handlers, logger.propagate = [_LogHandler(channel)], False
    logger.setLevel(level)


def main() -> None:
    """The process: open files of the channel and of the ring, and the ring's size, are its arguments."""
    connection, ring, size = (int(word) for word in sys.argv[1:4])
    sys.setswitchinterval(SWITCH_S)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever is interrupted ends this too
    writer = RingWriter(ring, size)
    os.close(ring)
    Service(socket.socket(fileno=connection), writer).run()
