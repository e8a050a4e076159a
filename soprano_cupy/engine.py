"""From requests to samples: the language model and the decoder working together.

This is the seam that an engine which keeps everything on one device replaces whole; the pipeline knows
nothing beyond `speak` and `stream`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from .config import SAMPLE_RATE_HZ
from .generation import Generation, Request, Step, begin, generate
from .runner import DecoderRunner, DecoderStream, LanguageModelRunner, Take

logger = logging.getLogger(__name__)


@dataclass
class Timings:
    """Where the time of one call went, in seconds, and what it made."""

    text_s: float = 0.0
    language_model_s: float = 0.0
    decoder_s: float = 0.0
    first_audio_s: float | None = None  # streams only: from the call to its first samples
    tokens: int = 0
    samples: int = 0

    @property
    def total_s(self) -> float:
        return self.text_s + self.language_model_s + self.decoder_s

    @property
    def audio_s(self) -> float:
        return self.samples / SAMPLE_RATE_HZ

    @property
    def real_time_factor(self) -> float:
        """Seconds of sound for each second of work: above 1 is faster than it plays."""
        return self.audio_s / self.total_s if self.total_s > 0 else 0.0


class Engine:
    """Runs a `LanguageModelRunner` and a `DecoderRunner`, one after the other.

    Generating the next sentence while the present one is decoded would not help on the CPU. Both work on the same
    cores, and the language model alone is bound by memory, which one core does not exhaust: on two cores (Xeon, AMX),
    128 tokens take 236 ms in int8 and 662 ms in bfloat16 with both cores on one part after the other, but 360 and
    1,360 ms with a core for each.
    """

    def __init__(self, language_model: LanguageModelRunner, decoder: DecoderRunner) -> None:
        self.language_model = language_model
        self.decoder = decoder

    def speak(self, requests: Sequence[Request], retries: int, timings: Timings, take: Take) -> None:
        """Each request's whole audio, float32 (samples,), to `take`, in the requests' order, some at a time."""
        size = self.language_model.batch
        for start in range(0, len(requests), size):
            since = time.perf_counter()
            results = generate(self.language_model, requests[start : start + size], retries=retries)
            timings.language_model_s += time.perf_counter() - since
            timings.tokens += sum(len(r.tokens) for r in results)
            self._decode(results, timings, take)

    def stream(self, request: Request, retries: int, timings: Timings) -> Generator[np.ndarray, None, None]:
        """The request's audio in pieces of any size, as soon as they are final.

        With `retries`, nothing is heard before the whole sentence has passed the loop check: what has been
        played cannot be taken back.
        """
        if retries:
            spoken: list[np.ndarray] = []
            self.speak([request], retries, timings, spoken.extend)
            yield from spoken
            return
        voice: DecoderStream | None = None  # opened while the second token is on its way
        since = time.perf_counter()
        with _closed_at_once(iter(begin(self.language_model, [request]))) as rounds:
            for steps in rounds:
                timings.tokens += 1
                timings.language_model_s += time.perf_counter() - since
                since = time.perf_counter()
                voice = voice or self.decoder.stream()
                state = steps[0].state
                piece = voice.push(state[None]) if state is not None else np.empty(0, np.float32)
                timings.decoder_s += time.perf_counter() - since
                if len(piece):
                    timings.samples += len(piece)
                    yield piece
                since = time.perf_counter()
                if steps[0].finish_reason:
                    _warn(steps[0].finish_reason, steps[0].stuck)
        piece = voice.finish() if voice is not None else np.empty(0, np.float32)
        timings.decoder_s += time.perf_counter() - since
        timings.samples += len(piece)
        if len(piece):
            yield piece

    def _decode(self, results: Sequence[Generation], timings: Timings, take: Take) -> None:
        since = time.perf_counter()
        for result in results:
            _warn(result.finish_reason, result.stuck)
        rest = iter(results)  # whose samples have not been taken

        def take_heard(samples: list[np.ndarray]) -> None:
            for one in samples:
                while not _is_heard(next(rest)):
                    take([np.empty(0, np.float32)])
                timings.samples += len(one)
                take([one])

        self.decoder.decode_in_turn([result.states for result in results if _is_heard(result)], take_heard)
        take([np.empty(0, np.float32) for _ in rest])
        timings.decoder_s += time.perf_counter() - since


@contextmanager
def _closed_at_once(rounds: Iterator[list[Step]]) -> Iterator[Iterator[list[Step]]]:
    """Closes a generator with the one that reads it; some Pythons would leave it until that one is forgotten too."""
    try:
        yield rounds
    finally:
        if isinstance(rounds, Generator):
            rounds.close()


def _is_heard(result: Generation) -> bool:
    """Whether it has samples: a token's lie between its state and the next."""
    return len(result.states) >= 2


def _warn(finish_reason: str, stuck: bool) -> None:
    if stuck:
        logger.warning("a sentence got stuck repeating itself; retries=2 makes it again with another seed")
    elif finish_reason == "length":
        logger.warning("a sentence reached the token limit before its end; it may be cut off or hallucinated")
