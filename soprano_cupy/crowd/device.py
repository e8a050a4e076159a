"""What a device must offer so that a crowd can speak on it.

A device has slots. A sentence is admitted into a free one, advances by one token a step together with all others, and
its states become audio in pieces. Everything is asked for ahead and nothing is waited for but in `advance` and `wait`:
what has happened is read from `report`, which may be a step late.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from ..generation import Request

# Of a slot, as `gpu/slots.py` has them.
RUNNING, STOP, LENGTH, STUCK, FAILED = range(5)


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


@dataclass
class Report:
    """What has happened. The arrays have an element for each slot and may be written to by later reports."""

    counts: np.ndarray  # integers: tokens drawn so far, the end token included
    status: np.ndarray  # integers: RUNNING, STOP, LENGTH, STUCK or FAILED
    stuck: np.ndarray  # bool: the loop check has found the voice stuck
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

    def report(self) -> Report:
        """What has happened by now; does not wait."""

    def tokens(self, slot: int, count: int) -> np.ndarray:
        """The first tokens of a slot, int32 (count,), of those reported."""

    def wait(self, seconds: float) -> None:
        """Wait until something may have happened, at most so long."""

    def close(self) -> None:
        """Give everything back. May be called in any state, even after an error; raises nothing."""
