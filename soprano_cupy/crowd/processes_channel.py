"""Messages between two processes over a pair of sockets: many of them in one piece, sent by a thread of its own.

Any thread may post; one thread exchanges. It sleeps in `poll` and is woken only when it sleeps, so that under load a
post costs no call of the system, and what has been posted since the last exchange travels together. Exchanges keep a
distance: who is alone is not delayed, in a crowd five hundred wakings a second are enough.
"""

from __future__ import annotations

import os
import pickle
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

LENGTH = struct.Struct("<I")
MOST_READ = 1 << 18  # bytes of one read
PAUSE_S = 0.002  # from one exchange to the next: waking costs more than what there is to do


class Channel:
    """One end of a connection to a process that is trusted: messages are pickled tuples."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._posted: deque[Any] = deque()
        self._out, self._in = bytearray(), bytearray()
        self._lock = threading.Lock()
        self._bell: int | None = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._awake = True
        self._ended = False
        self._exchanged = 0.0  # when
        self._poll = select.poll()
        self._poll.register(self._bell, select.POLLIN)

    # -- any thread ---------------------------------------------------------------------------------------------------

    def post(self, message: Any) -> None:
        """Send a message soon; to an end that has gone, never."""
        self._posted.append(message)
        self.wake()

    def wake(self) -> None:
        """Let the exchanging thread look."""
        if self._awake:
            return
        with self._lock:  # the bell of a closed channel may be another file by now
            self._awake = True
            if self._bell is not None:
                os.eventfd_write(self._bell, 1)

    # -- the thread that exchanges ------------------------------------------------------------------------------------

    def exchange(self, seconds: float) -> list[Any]:
        """Send what there is and return what has come, after `seconds` at most. `EOFError`: the other end is gone."""
        time.sleep(max(0.0, self._exchanged + PAUSE_S - time.monotonic()))
        self._send()
        self._awake = False
        wait = 0.0 if self.pending or self._ended else seconds
        self._poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._out else 0))
        rung = [file for file, _ in self._poll.poll(1000 * wait)]
        self._awake, self._exchanged = True, time.monotonic()
        if self._bell in rung:
            os.eventfd_read(self._bell)
        self._read()
        messages = self._complete()
        if self._ended and not messages:
            raise EOFError("the other process has ended")
        self._send()
        return messages

    @property
    def pending(self) -> bool:
        """Whether something posted could be sent now."""
        return bool(self._posted)

    def take(self) -> list[Any]:
        """The messages to be sent next."""
        posted, taken = self._posted, []
        while posted:
            taken.append(posted.popleft())
        return taken

    def close(self) -> None:
        with self._lock:
            self._awake = True  # for ever
            bell, self._bell = self._bell, None
        if bell is not None:
            os.close(bell)
        self._socket.close()

    def _send(self) -> None:
        if self.pending and not self._out:  # not before the last piece has gone: it may wait, and more comes together
            data = pickle.dumps(self.take(), pickle.HIGHEST_PROTOCOL)
            self._out += LENGTH.pack(len(data)) + data
        try:
            while self._out:
                del self._out[: self._socket.send(self._out)]
        except BlockingIOError:
            return
        except OSError:  # gone; what it has sent before is still read
            self._out.clear()
            self._posted.clear()

    def _read(self) -> None:
        try:
            while data := self._socket.recv(MOST_READ):
                self._in += data
                if len(data) < MOST_READ:
                    return
            self._ended = True
        except BlockingIOError:
            return
        except OSError:
            self._ended = True

    def _complete(self) -> list[Any]:
        """The messages that have come whole."""
        messages: list[Any] = []
        place, buffer = 0, self._in
        while len(buffer) - place >= LENGTH.size:
            (length,) = LENGTH.unpack_from(buffer, place)
            end = place + LENGTH.size + length
            if len(buffer) < end:
                break
            with memoryview(buffer) as view:
                received: Sequence[Any] = pickle.loads(view[place + LENGTH.size : end])
            messages.extend(received)
            place = end
        if place:
            del buffer[:place]
        return messages
