"""What a device's process hands on of a request: its samples, by way of the ring, and its end."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import DeviceError
from . import processes_messages as say
from .driver import NOT_FINITE
from .processes_channel import Channel
from .processes_ring import RingWriter

LARGEST_PIECE = 4  # a piece is at most one of so many parts of the ring


class Relay:
    """A request here, in the place of a `Speech`: hands on what it is given."""

    __slots__ = ("_channel", "_over", "cancelled", "first_audio_s", "wanted")

    def __init__(
        self, channel: AudioChannel, wanted: say.Speak, over: Callable[[int, BaseException | None], bool]
    ) -> None:
        self.wanted, self.cancelled = wanted, False
        self.first_audio_s: float | None = None
        self._channel, self._over = channel, over

    def add_chunk(self, samples: np.ndarray) -> None:
        self._channel.post((self.wanted.number, samples))

    def settle(self, error: BaseException | None) -> None:
        if self.cancelled:
            return
        if not self._over(self.wanted.number, error):
            self._channel.wake()
            return
        ended = say.Ended(self.wanted.number, None, False)
        if error is not None:
            cause = error.__cause__  # of those that tell of a failed device
            of_device = isinstance(error, DeviceError) and cause is not None and not _not_finite(cause)
            ended = say.Ended(self.wanted.number, say.packed(error), of_device)
        self._channel.post(ended)


class AudioChannel(Channel):
    """A channel whose samples travel through the ring; what finds no room there waits, and all behind it."""

    def __init__(self, connection: socket.socket, ring: RingWriter) -> None:
        super().__init__(connection)
        self._ring, self._full = ring, False

    @property
    def pending(self) -> bool:
        return bool(self._posted) and not self._full

    def freed(self, place: int) -> None:
        """Everything in the ring before this place has been read."""
        self._ring.freed(place)
        self._full = False

    def take(self) -> list[Any]:
        taken: list[Any] = []
        posted = self._posted
        while posted:
            message = posted[0]
            if type(message) is tuple:  # samples
                number, samples = message
                most = self._ring.size // LARGEST_PIECE // samples.itemsize
                place = self._ring.put(samples[:most])
                if place is None:
                    self._full = True
                    break
                taken.append(say.Sound(number, place, min(len(samples), most), samples.dtype.str))
                if len(samples) > most:
                    posted[0] = (number, samples[most:])
                    continue
            else:
                taken.append(message)
            posted.popleft()
        self._ring.flush()
        return taken


def _not_finite(error: BaseException) -> bool:
    return str(error) == NOT_FINITE
