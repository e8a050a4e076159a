"""What a device must offer so that a crowd can speak on it.

A device has slots. A sentence is admitted into a free one, advances by one token a step together with all others, and
its states become audio in pieces. Everything is asked for ahead and nothing is waited for but in `advance` and `wait`:
what has happened is read from `report`, which may be a step late.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from ..generation import Request

# Of a slot, as `gpu/slots.py` has them.
RUNNING, STOP, LENGTH, STUCK, FAILED = range(5)

# Tokens of which a slot's driver wants to hear: none, however many there are; or none before the sequence's end.
NOT_WATCHED, AT_ITS_END = (1 << 63) - 1, (1 << 63) - 2


class Entry(NamedTuple):
    """A sentence that enters a free slot."""

    slot: int
    request: Request
    give_up: bool  # end as soon as the voice is stuck


class Order(NamedTuple):
    """Audio that is wanted: all that a slot's first `states` states make final, less what earlier orders gave."""

    slot: int
    states: int
    ends: bool  # there will be no further states
    pcm: bool  # as 16-bit integers


class Audio(NamedTuple):
    """What an order gave, maybe nothing. A slot's orders are answered one by one, in their order."""

    slot: int
    samples: np.ndarray  # (n,) float32, or int16 of an order with `pcm`; it keeps no memory of others' samples
    ends: bool


class News(NamedTuple):
    """A slot that is as far as was waited for."""

    slot: int
    tokens: int  # drawn so far, the end token included
    status: int  # RUNNING, STOP, LENGTH, STUCK or FAILED
    stuck: bool  # the loop check has found the voice stuck


@dataclass
class Report:
    """What has happened."""

    news: list[News] = field(default_factory=list)  # by slot
    audio: list[Audio] = field(default_factory=list)  # answered since the last report
    left: list[int] = field(default_factory=list)  # removed slots that can be entered again: no audio comes from them


class Device(Protocol):
    """One device. One thread uses it; whatever it raises, it is closed then and made anew."""

    name: str
    slots: int
    most_prompt: int  # tokens of one prompt
    prompt_rows: int  # tokens of all prompts of one `admit`, or one prompt of any length
    most_entries: int  # sentences of one `admit`
    decode_states: int  # new states of one `decode`, or one sentence of any length

    def admit(self, entries: Sequence[Entry]) -> None:
        """Read the prompts and draw their first tokens, behind the steps asked for so far; these slots count anew."""

    def remove(self, slots: Sequence[int]) -> None:
        """What is in these slots is wanted no more; running ones stop. `Report.left` tells when they are free."""

    def advance(self) -> None:
        """Ask for the next step of all running slots; waits while several steps are under way already."""

    def decode_room(self) -> int:
        """How many calls of `decode` are welcome now."""

    def decode(self, orders: Sequence[Order]) -> None:
        """Begin to make audio."""

    def report(self, watched: array[int]) -> Report:
        """What has happened by now; does not wait.

        watched: (slots,) of 64-bit integers; a slot is news where it has drawn so many tokens, or has ended and is not
        `NOT_WATCHED`, in each report until that is changed.
        """

    def tokens(self, slot: int, count: int) -> np.ndarray:
        """The first tokens of a slot, int32 (count,), of those reported."""

    def wait(self, seconds: float) -> None:
        """Wait until something may have happened, at most so long."""

    def close(self) -> None:
        """Give everything back. May be called in any state, even after an error; raises nothing."""
