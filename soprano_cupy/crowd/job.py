"""A request as the scheduler sees it: its sentences, how far each is, and when its listener would hear silence."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..config import SAMPLE_RATE_HZ, TOKEN_SAMPLES
from ..errors import DeadlineExceeded
from ..generation import Request
from .speech import Speech

if TYPE_CHECKING:
    from .driver import Driver

TOKEN_S = TOKEN_SAMPLES / SAMPLE_RATE_HZ


@dataclass(frozen=True)
class Wish:
    """How a request is to be spoken.

    stream: in pieces as early as possible, else sentence by sentence. pcm: as 16-bit integers. retries: how often a
    stuck sentence is begun again; one that may be is heard only whole. deadline_s: seconds until it must be done.
    """

    stream: bool = False
    pcm: bool = False
    retries: int = 0
    deadline_s: float | None = None

    def not_met(self) -> DeadlineExceeded:
        """What is said where the deadline has passed."""
        return DeadlineExceeded(f"not spoken within {self.deadline_s:g} s (deadline)")


class Sentence:
    """One sequence of a job."""

    __slots__ = (
        "attempt", "chunks", "done", "driver", "expected", "faults", "heard", "heard_tokens", "index", "job", "request",
        "skip",
    )  # fmt: skip

    def __init__(self, job: Job, index: int, request: Request) -> None:
        self.job, self.index, self.request = job, index, request
        self.attempt = 0  # of those that a stuck voice costs
        self.faults = 0  # failures of a device while it was there
        self.driver: Driver | None = None  # where it is being spoken
        self.expected = 0.0  # tokens it was thought to make when it was admitted
        self.chunks: list[np.ndarray] = []  # made before its turn
        self.done = False
        self.heard = 0  # samples made for good: in `chunks` or with the listener
        self.skip = 0  # samples of another attempt that have been heard already
        self.heard_tokens: np.ndarray | None = None  # those that made them


class Job:
    """A request with its sentences in the order in which they are heard."""

    def __init__(self, speech: Speech, requests: Sequence[Request], wish: Wish, order: int, now: float) -> None:
        self.speech, self.wish, self.order = speech, wish, order
        self.sentences = [Sentence(self, i, request) for i, request in enumerate(requests)]
        self.waiting = deque(self.sentences)
        self.running: set[Sentence] = set()
        self.next = 0  # the sentence that is heard next
        self.over = False
        self.begun = False  # some sentence has been admitted
        self.tag = 0.0  # of the fair queue
        self.submitted = now
        self.deadline = None if wish.deadline_s is None else now + wish.deadline_s
        self.first_audio: float | None = None  # when the first samples came
        self.heard_s = 0.0  # audio that the listener has
        self.ahead = 0.0  # tokens expected of the sentences that are running, or done and not heard yet

    def dry_at(self) -> float:
        """When a listener who plays from the first sample on will have heard all that is made or being made."""
        begin = self.submitted if self.first_audio is None else self.first_audio
        return begin + self.heard_s + self.ahead * TOKEN_S

    def audio_ends(self) -> float:
        """When a listener will have heard all that is made."""
        return (self.submitted if self.first_audio is None else self.first_audio) + self.heard_s

    def emit(self, samples: np.ndarray, now: float) -> None:
        """Samples of the sentence whose turn it is."""
        if self.first_audio is None:
            self.first_audio = now
            self.speech.first_audio_s = now - self.submitted
        self.heard_s += len(samples) / SAMPLE_RATE_HZ
        self.speech.add_chunk(samples)

    def hear_on(self, now: float) -> None:
        """Go on to the first sentence that is not done, past those that are."""
        while self.next < len(self.sentences) and self.sentences[self.next].done:
            self.ahead -= self.sentences[self.next].expected
            self.next += 1
            if self.next < len(self.sentences):
                following = self.sentences[self.next]
                for chunk in following.chunks:
                    self.emit(chunk, now)
                following.chunks = []

    def forget(self) -> None:
        """Let go of everything, now that it is over: sentences and job name each other, and old queues name the job."""
        self.sentences = []
        del self.speech

    @property
    def all_heard(self) -> bool:
        return self.next == len(self.sentences)
