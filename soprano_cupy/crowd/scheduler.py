"""Who speaks next and who hears what: the queue, the running sentences, deadlines, cancellation, delivery in order.

Pure logic: time is passed in, devices are asked by `driver.py`. All methods may be called from any thread. Futures are
settled outside of the lock (`flush`), since whoever waits for them may call anything.
"""

from __future__ import annotations

import heapq
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import Busy, Closed, DeviceError
from ..generation import Request
from .fair_queue import FairQueue
from .job import Job, Sentence, Wish
from .speech import Speech
from .teller import Teller

if TYPE_CHECKING:
    from .driver import Driver

logger = logging.getLogger(__name__)

MAX_SENTENCES = 100_000  # that wait; a single request may have more
MAX_FAULTS = 2  # failures of devices that a sentence survives
RESERVED = 8  # one slot in so many is not for requests that have all the others
TOKENS_EACH = 2.0  # new tokens for each of a prompt's, until that has been seen
MEMORY = 0.02  # of that ratio: the weight of the newest sentence


class Scheduler:
    """Requests on their way through one or several drivers."""

    new_speech: Callable[..., Any] = Speech  # called with what drops it, and the type of its samples

    def __init__(self, max_queue: int = 1024) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)  # there is something to do, or a driver came or went
        self._max_queue = max_queue
        self._queue = FairQueue()
        self._jobs: dict[Speech, Job] = {}
        self._deadlines: list[tuple[float, int, weakref.ref[Job]]] = []  # which keep no sound until they pass
        self._running: dict[Driver, set[Sentence]] = {}
        self._dropped: dict[Driver, list[Sentence]] = {}
        self.teller = Teller()  # a thread that may be started, else futures are told by those who make them end
        self._order = 0
        self._waiting_jobs = self._waiting_sentences = 0
        self._tokens_each = TOKENS_EACH
        self._refusal: Exception | None = None

    # -- for those who ask --------------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[Request], wish: Wish, now: float) -> Speech:
        """Queue a request of at least one sentence. `Busy`, `Closed`, or the error that took the last device."""
        with self.lock:
            if self._refusal is not None:
                raise type(self._refusal)(str(self._refusal))
            if self._waiting_jobs >= self._max_queue:
                raise Busy(f"{self._waiting_jobs} requests are waiting already (max_queue); try again later")
            if self._waiting_sentences and self._waiting_sentences + len(requests) > MAX_SENTENCES:
                raise Busy(f"{self._waiting_sentences} sentences are waiting already; try again later")
            self._order += 1
            speech: Speech = self.new_speech(self.cancelled, np.int16 if wish.pcm else np.float32)
            job = Job(speech, requests, wish, self._order, now)
            self._jobs[speech] = job
            self._waiting_jobs += 1
            self._waiting_sentences += len(requests)
            if job.deadline is not None:
                heapq.heappush(self._deadlines, (job.deadline, job.order, weakref.ref(job)))
            self._queue.push(job)
            self.changed.notify_all()
        return speech

    def cancelled(self, speech: Speech) -> None:
        """A request is wanted no more."""
        with self.lock:
            job = self._jobs.get(speech)
            if job is not None:
                self._end(job, None)
        self.flush()

    def close(self, error: Exception | None = None) -> None:
        """Take nothing more; what is not done fails. error: why, where it was not meant."""
        with self.lock:
            self._refusal = error or self._refusal or Closed("the voice has been closed; make another one")
            unfinished = error or Closed("the voice was closed before this was spoken")
            for job in list(self._jobs.values()):
                self._end(job, unfinished)
            self.changed.notify_all()
        self.flush()

    def refuse(self) -> None:
        """Take nothing more; what has been submitted goes on."""
        with self.lock:
            self._refusal = self._refusal or Closed("the voice has been closed; make another one")

    def expire(self, now: float) -> None:
        """End what has passed its deadline."""
        with self.lock:
            while self._deadlines and self._deadlines[0][0] <= now:
                job = heapq.heappop(self._deadlines)[2]()
                if job is not None and not job.over:
                    self._end(job, job.wish.not_met())
        self.flush()

    def next_deadline(self) -> float | None:
        """The earliest deadline of what is not done."""
        with self.lock:
            while self._deadlines and ((job := self._deadlines[0][2]()) is None or job.over):
                heapq.heappop(self._deadlines)
            return self._deadlines[0][0] if self._deadlines else None

    def flush(self) -> None:
        """Have the futures told that have ended; never called with the lock held."""
        self.teller.flush()

    @property
    def unfinished(self) -> int:
        """Requests that are not done."""
        return len(self._jobs)

    @property
    def waiting_requests(self) -> int:
        """Requests of which nothing has begun."""
        return self._waiting_jobs

    @property
    def refusal(self) -> Exception | None:
        """Why nothing is taken any more."""
        return self._refusal

    @property
    def waiting(self) -> int:
        """Sentences that wait for a slot."""
        return self._waiting_sentences

    # -- for drivers --------------------------------------------------------------------------------------------------

    def join(self, driver: Driver) -> None:
        """A driver takes sentences from now on."""
        with self.lock:
            self._running[driver], self._dropped[driver] = set(), []
            self.changed.notify_all()

    def leave(self, driver: Driver, error: BaseException) -> None:
        """A driver failed: its sentences are begun again, or fail where that has happened too often."""
        with self.lock:
            lost = self._running.pop(driver, set())
            self._dropped.pop(driver, None)
            for sentence in sorted(lost, key=lambda s: (s.job.order, s.index), reverse=True):
                self._fault(sentence, error)
            self.changed.notify_all()
        self.flush()

    def admit(self, driver: Driver, room: int, rows: int, now: float, least: int = 1) -> list[Sentence]:
        """Sentences for up to `room` slots whose prompts have up to `rows` tokens together, or one of any length.

        None where fewer than `least` could be admitted now, prompts' lengths aside.
        """
        chosen: list[Sentence] = []
        with self.lock:
            if driver not in self._running:
                return chosen
            room = min(room, self._fair_room(driver))
            most = self._most_of_one()
            if least > 1 and (room < least or self._queue.ready(most, least) < least):
                return chosen
            blocked: set[Job] = set()
            while len(chosen) < room and len(self._queue):
                job = self._queue.choose(now, blocked)
                if job is None:
                    break
                length = len(job.waiting[0].request.ids)
                if len(job.running) >= most:
                    blocked.add(job)
                elif chosen and length > rows:
                    break
                else:
                    rows -= length
                    chosen.append(self._take(job, driver))
        return chosen

    def dropped(self, driver: Driver) -> list[Sentence]:
        """Sentences on a driver that are wanted no more; each is told once."""
        with self.lock:
            gone = self._dropped.get(driver, [])
            if gone:
                self._dropped[driver] = []
            return gone

    def pressing(self, now: float) -> bool:
        """Whether somebody waits who would soon hear silence."""
        with self.lock:
            return self._queue.pressing(now)

    def deliver(self, driver: Driver, sentence: Sentence, samples: np.ndarray, *, ends: bool, now: float) -> None:
        """Audio of a sentence. What comes from a driver that has it no longer goes nowhere. `flush` afterwards."""
        with self.lock:
            if sentence.driver is not driver:
                return
            job = sentence.job
            skipped = min(len(samples), sentence.skip)
            sentence.skip -= skipped
            samples = samples[skipped:]
            sentence.heard += len(samples)
            if len(samples):
                if sentence.index == job.next:
                    job.emit(samples, now)
                else:
                    sentence.chunks.append(samples)
            if ends:
                self._release(sentence)
                sentence.done = True
                job.hear_on(now)
                if job.all_heard:
                    self._end(job, None)
                elif job.waiting and job.wish.stream:
                    self._queue.push(job)  # it may run dry earlier than was thought

    def made(self, sentence: Sentence, tokens: int) -> None:
        """A sentence has come to its end after so many tokens."""
        with self.lock:
            ratio = tokens / max(1, len(sentence.request.ids))
            self._tokens_each += MEMORY * (ratio - self._tokens_each)

    def again(self, driver: Driver, sentence: Sentence) -> None:
        """A stuck sentence is to be made with another seed."""
        with self.lock:
            if sentence.driver is driver:
                sentence.attempt += 1
                self._requeue(sentence)

    def fault(self, driver: Driver, sentence: Sentence, error: BaseException) -> None:
        """A sentence could not be made: begin it again, or fail if that has happened too often. `flush` afterwards."""
        with self.lock:
            if sentence.driver is driver:
                self._fault(sentence, error)

    def fail(self, driver: Driver, sentence: Sentence, error: BaseException) -> None:
        """A sentence cannot be made. `flush` afterwards."""
        with self.lock:
            if sentence.driver is driver:
                self._end(sentence.job, error)

    # -- inside the lock ----------------------------------------------------------------------------------------------

    def _fair_room(self, driver: Driver) -> int:
        """How many more sentences a driver may take so that none has much more to do than another."""
        others = [len(held) / other.slots for other, held in self._running.items() if other is not driver]
        if not others:
            return driver.slots
        behind = sum(others) / len(others) * driver.slots - len(self._running[driver])
        idle_elsewhere = any(load < 1 for load in others)
        share = -(-self._waiting_sentences // (len(others) + 1))
        return max(0, int(behind) + share) if idle_elsewhere else driver.slots

    def _most_of_one(self) -> int:
        """Slots that one request may hold."""
        slots = sum(driver.slots for driver in self._running)
        return max(1, slots - max(1, slots // RESERVED))

    def _take(self, job: Job, driver: Driver) -> Sentence:
        sentence = job.waiting.popleft()
        self._waiting_sentences -= 1
        if not job.begun:
            job.begun = True
            self._waiting_jobs -= 1
        sentence.driver = driver
        sentence.expected = len(sentence.request.ids) * self._tokens_each
        job.ahead += sentence.expected
        job.running.add(sentence)
        self._running[driver].add(sentence)
        self._queue.charge(job, sentence.expected)
        return sentence

    def _release(self, sentence: Sentence) -> None:
        """A sentence is not on its driver any more."""
        driver, sentence.driver = sentence.driver, None
        sentence.job.running.discard(sentence)
        if driver is not None:
            self._running.get(driver, set()).discard(sentence)

    def _requeue(self, sentence: Sentence) -> None:
        self._release(sentence)
        job = sentence.job
        if job.over:
            return
        job.ahead -= sentence.expected
        sentence.expected = 0.0
        job.waiting.appendleft(sentence)
        self._waiting_sentences += 1
        self._queue.push(job)
        self.changed.notify_all()

    def _fault(self, sentence: Sentence, error: BaseException) -> None:
        sentence.faults += 1
        sentence.skip = sentence.heard
        if sentence.faults > MAX_FAULTS:
            self._end(sentence.job, _typed(error))
        else:
            self._requeue(sentence)

    def _end(self, job: Job, error: BaseException | None) -> None:
        """A job is over: done, failed, or cancelled."""
        if job.over:
            return
        job.over = True
        del self._jobs[job.speech]
        self._queue.discard(job)
        self._waiting_sentences -= len(job.waiting)
        job.waiting.clear()
        if not job.begun:
            self._waiting_jobs -= 1
        for sentence in list(job.running):
            driver = sentence.driver
            self._release(sentence)
            if driver in self._dropped:
                self._dropped[driver].append(sentence)
        self.teller.tell(job.speech, error)
        job.forget()
        self.changed.notify_all()


def _typed(error: BaseException) -> BaseException:
    """A fresh error of the package for one request; several share the cause."""
    if isinstance(error, MemoryError):
        text = "the device ran out of memory; use a smaller max_batch or close other programs that use it"
    else:
        text = str(error) or type(error).__name__
    fresh = DeviceError(text)
    fresh.__cause__ = error
    return fresh
