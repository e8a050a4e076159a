"""What the front process and those of the devices say to each other."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import errors
from ..errors import DeviceError, SopranoError
from ..generation import Request
from ..sampling import SamplingParams
from .job import Wish

# -- to a device's process --


class Setup(NamedTuple):
    """The first message: what opens the voice, as "module:function", and what that is called with."""

    opener: str
    options: dict[str, Any]
    log_level: int


class Speak(NamedTuple):
    """A request: a text, or sentences that have been prepared; submitted when `time.monotonic()` said so."""

    number: int
    what: str | list[Request]
    params: SamplingParams | None
    wish: Wish
    submitted: float


class Cancel(NamedTuple):
    number: int


class Freed(NamedTuple):
    """Everything in the ring before this place has been read."""

    place: int


class Close(NamedTuple):
    """Stop and end."""


# -- from a device's process --


class Ready(NamedTuple):
    """It can speak."""

    name: str
    slots: int
    most_prompt: int
    nbytes: int  # of a GPU's memory, weights aside
    pid: int


class Sound(NamedTuple):
    """Samples of a request, in the ring."""

    number: int
    place: int
    length: int  # samples
    dtype: str


class Ended(NamedTuple):
    """A request is done, or failed. device_failed: nothing is wrong with the request itself."""

    number: int
    error: tuple[str, str] | None
    device_failed: bool


class State(NamedTuple):
    """Requests that had come by then, and those of them of which nothing had begun; also a sign of life."""

    received: int
    waiting: int


class Failed(NamedTuple):
    """It cannot speak any more, or never could; it ends."""

    error: tuple[str, str]


class Log(NamedTuple):
    level: int
    logger: str
    text: str


def packed(error: BaseException) -> tuple[str, str]:
    """An error that can travel: its type and what it says."""
    return type(error).__name__, str(error) or type(error).__name__


def unpacked(error: tuple[str, str]) -> SopranoError:
    """The same error here; one that is not the package's own is a `DeviceError` that names it."""
    name, text = error
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, SopranoError):
        return kind(text)
    return DeviceError(f"{name}: {text}")
