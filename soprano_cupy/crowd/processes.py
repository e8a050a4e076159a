"""Several GPUs: a crowd in a process for each, and a front that hands requests out and audio back.

One Python process cannot keep several GPUs busy: preparing texts and looking after slots share one interpreter lock.
So each device has a process with an ordinary `Crowd` in it, which prepares its own texts; the front sends a request to
the one with the least to do, copies samples out of memory that both have mapped, and looks after queue limits,
deadlines and what is to become of the requests of a process that dies.

    processes.py          the front                        processes_station.py  one process, seen from the front
    processes_worker.py   the process                      processes_messages.py what they say to each other
    processes_channel.py  messages in bunches              processes_ring.py     samples
    processes_ticket.py   a request, seen from the front   processes_teller.py   the thread that ends futures
"""

from __future__ import annotations

import functools
import heapq
import itertools
import logging
import re
import threading
import time
from collections.abc import Sequence

import numpy as np

from ..errors import Busy, Closed, DeadlineExceeded, DeviceError, ParameterError, TextError
from ..generation import Request
from ..sampling import SamplingParams
from ..text import build_prompts
from . import processes_messages as say
from .crowd import STALL_S
from .job import Wish
from .processes_ring import RingReader
from .processes_station import Post, Station
from .processes_teller import Teller
from .processes_ticket import Ticket
from .scheduler import MAX_FAULTS
from .speech import Speech

logger = logging.getLogger(__name__)

WATCH_S = 0.5
SURELY_SPEAKABLE = re.compile("[A-Za-z0-9]")


class ProcessCrowd:
    """Speaks requests in several processes, one for each post. Raises what the first had to say where none can start.

    Must be made where subprocesses can be started; whoever made it may use CUDA or not.
    """

    def __init__(self, posts: Sequence[Post], *, max_queue: int = 1024, stall_s: float = STALL_S) -> None:
        if isinstance(max_queue, bool) or not isinstance(max_queue, int) or max_queue < 1:
            raise ParameterError(f"max_queue = {max_queue!r} must be a whole number of requests, 1 or more")
        self._max_queue, self._stall_s = max_queue, stall_s
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # for the watch, and for who waits until all is done
        self._numbers = itertools.count(1)
        self._tickets: dict[int, Ticket] = {}
        self._homeless: list[Ticket] = []  # while every process is being started anew
        self._deadlines: list[tuple[float, int]] = []
        self._refusal: Exception | None = None
        self._closing = threading.Lock()
        self._stopped = False
        self._stations = [Station(self, post, index) for index, post in enumerate(posts)]
        self._watch = threading.Thread(target=self._look, name="soprano-front", daemon=True)
        self._teller = Teller()
        for thread in (self._teller, *self._stations):
            thread.start()
        try:
            for station in self._stations:
                station.started.wait()
        except BaseException:
            self.close()
            raise
        if not self.devices:
            self.close()
            raise next(station.error for station in self._stations if station.error is not None)
        self._watch.start()

    # -- for those who ask --------------------------------------------------------------------------------------------

    @property
    def devices(self) -> list[say.Ready]:
        """Those that work at present."""
        return [station.facts for station in self._stations if station.ready]

    @property
    def pids(self) -> list[int]:
        """Their processes."""
        return [station.facts.pid for station in self._stations if station.ready]

    @property
    def unfinished(self) -> int:
        """Requests that are not done."""
        return len(self._tickets)

    def submit_text(self, text: str, params: SamplingParams, wish: Wish) -> Speech:
        """Queue a text; as `SopranoTTS.submit`. params: with a definite seed."""
        if not isinstance(text, str):
            raise ParameterError(f"text must be a string, not {type(text).__name__}")
        if not SURELY_SPEAKABLE.search(text) and not build_prompts(text):
            raise TextError(f"nothing to speak in {text!r:.60}; give at least one word or number")
        return self._submit(text, len(text), params, wish)

    def submit(self, requests: Sequence[Request], wish: Wish) -> Speech:
        """Queue sentences that have been prepared; as `Crowd.submit`."""
        longest = max(len(request.ids) for request in requests)
        most = min((device.most_prompt for device in self.devices), default=longest)
        if longest > most:
            raise ParameterError(f"a prompt has {longest} tokens; at most {most} fit: split the text")
        return self._submit(list(requests), sum(len(request.ids) for request in requests), None, wish)

    def _submit(self, what: str | list[Request], size: int, params: SamplingParams | None, wish: Wish) -> Speech:
        now = time.monotonic()
        with self._lock:
            if self._refusal is not None:
                raise type(self._refusal)(str(self._refusal))
            waiting = len(self._homeless) + sum(station.waiting for station in self._stations if station.ready)
            if waiting >= self._max_queue:
                raise Busy(f"{waiting} requests are waiting already (max_queue); try again later")
            number = next(self._numbers)
            speech = Speech(functools.partial(self._cancelled, number), np.int16 if wish.pcm else np.float32)
            ticket = self._tickets[number] = Ticket(speech, say.Speak(number, what, params, wish, now), size)
            if wish.deadline_s is not None:
                heapq.heappush(self._deadlines, (now + wish.deadline_s, number))
                if self._deadlines[0][1] == number:
                    self._changed.notify_all()
            self._place(ticket)
        return speech

    def _cancelled(self, number: int, _: Speech) -> None:
        self._end(number, None, settle=False)

    def close(self, drain_s: float = 0.0) -> None:
        """Take nothing more, wait up to `drain_s` seconds for what there is, and stop; what is left fails: `Closed`.

        No process, thread, open file or shared memory is left then.
        """
        with self._closing:
            end = time.monotonic() + drain_s
            with self._lock:
                self._refusal = self._refusal or Closed("the voice has been closed; make another one")
                while self._tickets and (left := end - time.monotonic()) > 0:
                    self._changed.wait(left)
                self._stopped = True
                self._changed.notify_all()
            self._fail_all(Closed("the voice was closed before this was spoken"))
            for station in self._stations:
                station.stop()
            for thread in (*self._stations, self._watch):
                if thread.is_alive() and thread is not threading.current_thread():
                    thread.join()
            self._teller.stop()

    def __enter__(self) -> ProcessCrowd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- for stations, each in its own thread -------------------------------------------------------------------------

    def welcome(self, station: Station, ready: say.Ready) -> None:
        """A process can speak."""
        with self._lock:
            station.facts, station.load, station.sent, station.state = ready, 0.0, 0, say.State(0, 0)
            station.ready = True
            homeless, self._homeless = self._homeless, []
            for ticket in homeless:
                self._place(ticket)

    def heard(self, station: Station, sound: say.Sound, ring: RingReader) -> None:
        """Samples have come."""
        samples = ring.take(sound.place, sound.length, sound.dtype)
        with self._lock:
            ticket = self._tickets.get(sound.number)
            if ticket is None or ticket.station is not station:
                return
            station.load -= ticket.advance(len(samples))
        if not ticket.hear(samples):
            self._end(sound.number, DeviceError(
                "a device failed while a stream was heard, and the rest could not be made to fit; submit it again"
            ))  # fmt: skip

    def ended(self, station: Station, ended: say.Ended) -> None:
        """A request is done, or failed there."""
        ticket = self._tickets.get(ended.number)
        if ticket is None or ticket.station is not station:
            return
        error = None if ended.error is None else say.unpacked(ended.error)
        if error is not None and ended.device_failed and len(self.devices) > 1:
            with self._lock:
                self._leave(ticket)
                if self._again(ticket, besides=station):
                    return
        self._end(ended.number, error)

    def gone(self, station: Station) -> None:
        """A process takes nothing any more."""
        with self._lock:
            station.ready = False

    def lost(self, station: Station, error: Exception) -> None:
        """A process has died: its requests go elsewhere, or fail where that has happened too often."""
        with self._lock:
            there = [ticket for ticket in self._tickets.values() if ticket.station is station]
            failed = []
            for ticket in there:
                self._leave(ticket)
                if not self._again(ticket):
                    failed.append(ticket.number)
            nobody = all(station.out for station in self._stations)
            if nobody and self._refusal is None:
                self._refusal = DeviceError(f"no device is left: {error}")
        for number in failed:
            self._end(number, DeviceError(str(error)))
        self.flush()
        if nobody and isinstance(self._refusal, DeviceError):
            self._fail_all(self._refusal)

    def flush(self) -> None:
        """Tell the futures that have ended."""
        self._teller.flush()

    # -- inside ----------------------------------------------------------------------------------------------------

    def _place(self, ticket: Ticket, besides: Station | None = None) -> None:
        """Send a request to the process with the least to do; to none while all are being started."""
        station: Station | None = None
        for other in self._stations:
            if other.ready and other is not besides and (station is None or other.fullness < station.fullness):
                station = other
        station = station or (besides if besides is not None and besides.ready else None)
        if station is None:
            self._homeless.append(ticket)
            return
        ticket.station = station
        station.load += ticket.left
        station.sent += 1
        station.post(ticket.speak)

    def _again(self, ticket: Ticket, besides: Station | None = None) -> bool:
        """Begin a request anew; False where that has happened too often."""
        ticket.begin_again()
        if ticket.faults > MAX_FAULTS or self._stopped:
            return False
        self._place(ticket, besides)
        return True

    def _leave(self, ticket: Ticket) -> None:
        if ticket.station is not None:
            ticket.station.load -= ticket.left
            ticket.station = None

    def _end(self, number: int, error: BaseException | None, *, settle: bool = True) -> None:
        """A request is over: done, failed, or cancelled."""
        with self._lock:
            ticket = self._tickets.pop(number, None)
            if ticket is None:
                return
            station = ticket.station
            if station is None:
                self._homeless = [other for other in self._homeless if other is not ticket]
            elif error is not None or not settle:
                station.post(say.Cancel(number))
            self._leave(ticket)
            if not self._tickets:
                self._changed.notify_all()
        if settle:
            self._teller.tell(ticket.speech, error)  # once somebody calls `flush`

    def _fail_all(self, error: Exception) -> None:
        for number in list(self._tickets):
            self._end(number, error)
        self.flush()

    def _look(self) -> None:
        """End what has passed its deadline, and processes that give no sign of life."""
        while True:
            late: list[tuple[int, Ticket]] = []
            with self._lock:
                if self._stopped or all(station.out for station in self._stations):
                    return
                now = time.monotonic()
                while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][1] not in self._tickets):
                    _, number = heapq.heappop(self._deadlines)
                    if number in self._tickets:
                        late.append((number, self._tickets[number]))
                if not late:
                    next_at = self._deadlines[0][0] if self._deadlines else now + WATCH_S
                    self._changed.wait(min(WATCH_S, max(0.0, next_at - now)))
            for number, ticket in late:
                deadline_s = ticket.speak.wish.deadline_s
                self._end(number, DeadlineExceeded(f"not spoken within {deadline_s:g} s (deadline)"))
            self.flush()
            for station in self._stations:
                if time.monotonic() - station.heard_at > self._stall_s:
                    station.kill(DeviceError(f"has given no sign of life for {self._stall_s:g} s"))
