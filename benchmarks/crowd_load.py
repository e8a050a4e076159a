"""Texts for a crowd that always has enough to do, and how much it makes meanwhile."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.random_text import sentences
from soprano_cupy.config import SAMPLE_RATE_HZ
from soprano_cupy.crowd.crowd import Crowd
from soprano_cupy.crowd.processes import ProcessCrowd
from soprano_cupy.sampling import SamplingParams

TOKENS, SMOKE_TOKENS = (40, 200), (6, 20)  # of a sentence
REPEATS = 3  # measurements in a row
SETTLE_S = 10.0


class Texts:
    """Texts and their parameters, drawn at random, the same for all who ask."""

    def __init__(self, *, smoke: bool) -> None:
        self._texts, self._random = sentences(4096, seed=3), random.Random(5)
        self._tokens = SMOKE_TOKENS if smoke else TOKENS

    @property
    def mean_tokens(self) -> float:
        return sum(self._tokens) / 2

    def draw(self) -> tuple[str, SamplingParams]:
        tokens, seed = self._random.randint(*self._tokens), self._random.getrandbits(32)
        return self._random.choice(self._texts), SamplingParams(temperature=0.3, seed=seed, max_new_tokens=tokens)


@dataclass(frozen=True)
class Mark:
    """What has been made until a moment, and at what cost."""

    at_s: float
    processor_s: float  # of all threads of this process
    samples: int
    requests: int


class Load:
    """Requests on their way, as many as `most`, while the block runs; raises at its end what went wrong with one.

    submit: submits the next one, and returns what holds its samples once it is done.
    """

    def __init__(self, submit: Callable[[], Future[Any]], most: int) -> None:
        self._submit, self._room = submit, threading.Semaphore(most)
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._feeder = threading.Thread(target=self._feed, name="benchmark-load")
        self._samples = self._requests = 0
        self._failures: list[BaseException] = []

    def __enter__(self) -> Load:
        self._feeder.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        self._room.release()
        self._feeder.join()
        if kind is None:
            self._check()

    def marks(self, seconds: float, times: int) -> list[Mark]:
        """A mark now, and one after each of so many measurements in a row."""
        found = [self._mark()]
        for _ in range(times):
            time.sleep(seconds)
            self._check()
            found.append(self._mark())
        return found

    def settle(self, requests: int) -> None:
        """Wait until so many requests are done, `SETTLE_S` seconds at most."""
        end = time.perf_counter() + SETTLE_S
        while self._mark().requests < requests and time.perf_counter() < end:
            time.sleep(0.01)
            self._check()

    def _mark(self) -> Mark:
        with self._lock:
            return Mark(time.perf_counter(), time.process_time(), self._samples, self._requests)

    def _check(self) -> None:
        with self._lock:
            if self._failures:
                raise self._failures[0]

    def _feed(self) -> None:
        """Submit as long as there is room."""
        try:
            while True:
                self._room.acquire()
                if self._stop.is_set():
                    return
                self._submit().add_done_callback(self._done)
        except BaseException as error:
            self._fail(error)

    def _done(self, speech: Future[Any]) -> None:
        try:
            count = len(speech.result())
        except BaseException as error:
            self._fail(error)
            return
        with self._lock:
            self._samples += count
            self._requests += 1
        self._room.release()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failures.append(error)


def speeds(marks: Sequence[Mark]) -> list[float]:
    """Seconds of sound in a second, between each mark and the next."""
    return [(b.samples - a.samples) / SAMPLE_RATE_HZ / (b.at_s - a.at_s) for a, b in pairwise(marks)]


def host_us(marks: Sequence[Mark]) -> list[float]:
    """Microseconds of processor time that this process took for a request, between each mark and the next."""
    return [1e6 * (b.processor_s - a.processor_s) / max(1, b.requests - a.requests) for a, b in pairwise(marks)]


def drain(crowd: Crowd | ProcessCrowd) -> None:
    """Wait until a crowd, of one process or of several, has nothing left to do."""
    work = crowd.scheduler if isinstance(crowd, Crowd) else crowd
    while work.unfinished:
        time.sleep(0.005)
