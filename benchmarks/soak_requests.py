"""What a soak asks for: requests drawn at random, and what became of each."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.random_text import sentence
from benchmarks.soak_faults import POISONED_ALWAYS, POISONED_ONCE, poison_of
from soprano_cupy import Closed, DeadlineExceeded, DeviceError, SopranoTTS
from soprano_cupy.crowd.speech import Speech

DEADLINES = (None, None, None, 0.005, 0.05, 0.5, 60.0)


@dataclass(frozen=True)
class Wanted:
    """A text and how it is to be spoken."""

    text: str
    options: dict[str, Any]

    def submit(self, tts: SopranoTTS, **more: Any) -> Speech:
        return tts.submit(self.text, **self.options, **more)

    @property
    def poison(self) -> int:
        return poison_of(self.options["seed"])


def draw(rng: random.Random, longest: int) -> Wanted:
    """A text of a few to `longest` characters, most of them short, with parameters of all kinds."""
    length = min(longest, int(20 * rng.paretovariate(1.2)))
    pieces = []
    while length > 0:
        piece = min(length, rng.randint(20, 200))
        pieces.append(sentence(rng, max(3, piece)))
        length -= piece + 1
    poison = rng.choices((0, POISONED_ALWAYS, POISONED_ONCE), (0.97, 0.01, 0.02))[0]
    options = {
        "stream": rng.random() < 0.5,
        "dtype": rng.choice((np.float32, np.int16)),
        "temperature": rng.choice((0.0, 0.0, 0.3, 0.9)),
        "top_p": rng.choice((0.5, 0.95, 1.0)),
        "repetition_penalty": rng.choice((1.0, 1.2, 1.5)),
        "retries": rng.choice((0, 0, 0, 2)),
        "seed": (poison << 32) | rng.getrandbits(32),
    }
    return Wanted(" ".join(pieces), options)


@dataclass
class Asked:
    """One request on its way: what is known of it when it has ended."""

    wanted: Wanted
    reference: np.ndarray | None  # its samples when it was spoken quietly
    deadline_s: float | None
    told: int = 0  # times that its end was told
    cancel_asked: bool = False


@dataclass
class Tally:
    """What became of all, and what should not have."""

    submitted: int = 0
    answered: int = 0
    compared: int = 0
    cancelled: int = 0
    late: int = 0
    failed: int = 0  # with an error of the package that an injected fault explains
    busy: int = 0
    sound_samples: int = 0
    violations: list[str] = field(default_factory=list)

    @property
    def ended(self) -> int:
        return self.answered + self.cancelled + self.late + self.failed

    def wrong(self, what: str) -> None:
        if len(self.violations) < 50:
            self.violations.append(what)

    def count(self, asked: Asked, speech: Speech) -> None:
        """A request has ended."""
        if asked.told != 1:
            self.wrong(f"a request was told of its end {asked.told} times")
        if speech.cancelled():
            self.cancelled += 1
            if not asked.cancel_asked:
                self.wrong("a request was cancelled that nobody cancelled")
            return
        error = speech.exception(0)
        if error is None:
            self._check(asked, speech.result(0))
        elif isinstance(error, DeadlineExceeded):
            self.late += 1
            if asked.deadline_s is None:
                self.wrong("a request without a deadline passed it")
        else:
            self.failed += 1
            if not isinstance(error, (DeviceError, Closed)):
                self.wrong(f"{type(error).__name__}: {error}")
            if "made to fit" in str(error):  # what is invariant always fits
                self.wrong(f"a stream did not go on as it had begun: {asked.wanted.options}")
            if asked.wanted.poison == POISONED_ALWAYS and "not finite" not in str(error):
                self.wrong(f"a poisoned request failed otherwise: {error}")

    def _check(self, asked: Asked, samples: np.ndarray) -> None:
        self.answered += 1
        self.sound_samples += len(samples)
        if asked.wanted.poison == POISONED_ALWAYS:
            self.wrong("a poisoned request was answered")
        if samples.dtype != asked.wanted.options["dtype"] or not np.isfinite(samples).all():
            self.wrong(f"samples of type {samples.dtype}, or not finite")
        if asked.reference is None:
            return
        self.compared += 1
        if not np.array_equal(samples, asked.reference):
            kind = "a stream" if asked.wanted.options["stream"] else "a request"
            same = "other values" if len(samples) == len(asked.reference) else "another length"
            self.wrong(
                f"{kind} came out otherwise than alone ({same}): {asked.wanted.options}, {asked.wanted.text:.40}"
            )
