"""Who has which request: where it is sent, what comes back of it, and where it goes when a process dies."""

from __future__ import annotations

import functools
import heapq
import itertools
import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from ..errors import Busy, DeviceError
from ..generation import Request
from ..sampling import SamplingParams
from . import processes_messages as say
from .job import Wish
from .processes_ticket import Ticket
from .scheduler import MAX_FAULTS
from .speech import Speech
from .teller import Teller

if TYPE_CHECKING:
    from .processes_station import Station


class Ledger:
    """The requests of a `ProcessCrowd`. All methods may be called from any thread."""

    def __init__(self, max_queue: int) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)  # an earlier deadline, nothing left to do, or the end
        self.stations: list[Station] = []
        self.tickets: dict[int, Ticket] = {}
        self.refusal: Exception | None = None  # why nothing is taken any more
        self.stopped = False  # nothing is begun anew any more
        self.teller = Teller()
        self._max_queue = max_queue
        self._numbers = itertools.count(1)
        self._homeless: list[Ticket] = []  # while every process is being started anew
        self._deadlines: list[tuple[float, int]] = []

    # -- for the front ------------------------------------------------------------------------------------------------

    def enter(self, what: str | list[Request], size: int, params: SamplingParams | None, wish: Wish) -> Speech:
        """Send a request of `size` characters on its way. `Busy`, `Closed`, or the error that took the last process."""
        now = time.monotonic()
        with self.lock:
            if self.refusal is not None:
                raise type(self.refusal)(str(self.refusal))
            waiting = len(self._homeless) + sum(station.waiting for station in self.stations if station.ready)
            if waiting >= self._max_queue:
                raise Busy(f"{waiting} requests are waiting already (max_queue); try again later")
            number = next(self._numbers)
            speech = Speech(functools.partial(self._cancelled, number), np.int16 if wish.pcm else np.float32)
            ticket = self.tickets[number] = Ticket(speech, say.Speak(number, what, params, wish, now), size)
            if wish.deadline_s is not None:
                heapq.heappush(self._deadlines, (now + wish.deadline_s, number))
                if self._deadlines[0][1] == number:
                    self.changed.notify_all()
            self._place(ticket)
        return speech

    def _cancelled(self, number: int, _: Speech) -> None:
        self.end(number, None, settle=False)

    def expire(self, now: float) -> float | None:
        """End what has passed its deadline; when the next one is."""
        with self.lock:
            while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][1] not in self.tickets):
                _, number = heapq.heappop(self._deadlines)
                ticket = self.tickets.get(number)
                if ticket is not None:
                    self.end(number, ticket.speak.wish.not_met())
            return self._deadlines[0][0] if self._deadlines else None

    # -- for stations, each in its own thread -------------------------------------------------------------------------

    def welcome(self, station: Station, ready: say.Ready) -> None:
        """A process can speak."""
        with self.lock:
            station.facts, station.load, station.sent, station.state = ready, 0.0, 0, say.State(0, 0)
            station.ready = True
            homeless, self._homeless = self._homeless, []
            for ticket in homeless:
                self._place(ticket)

    def heard(self, station: Station, number: int, samples: np.ndarray) -> None:
        """Samples have come."""
        with self.lock:
            ticket = self.tickets.get(number)
            if ticket is None or ticket.station is not station:
                return
            station.load -= ticket.advance(len(samples))
        if not ticket.hear(samples):
            self.end(number, DeviceError(
                "a device failed while a stream was heard, and the rest could not be made to fit; submit it again"
            ))  # fmt: skip

    def ended(self, station: Station, ended: say.Ended) -> None:
        """A request is done, or failed there."""
        ticket = self.tickets.get(ended.number)
        if ticket is None or ticket.station is not station:
            return
        error = None if ended.error is None else say.unpacked(ended.error)
        if error is not None and ended.device_failed and sum(other.ready for other in self.stations) > 1:
            with self.lock:
                if ticket.number not in self.tickets:  # it has been cancelled meanwhile
                    return
                self._leave(ticket)
                if self._again(ticket, besides=station):
                    return
        self.end(ended.number, error)

    def gone(self, station: Station) -> None:
        """A process takes nothing any more."""
        with self.lock:
            station.ready = False

    def lost(self, station: Station, error: Exception) -> None:
        """A process has died: its requests go elsewhere, or fail where that has happened too often."""
        with self.lock:
            there = [ticket for ticket in self.tickets.values() if ticket.station is station]
            failed = []
            for ticket in there:
                self._leave(ticket)
                if not self._again(ticket):
                    failed.append(ticket.number)
            nobody = all(station.out for station in self.stations)
            if nobody and self.refusal is None:
                self.refusal = DeviceError(f"no device is left: {error}")
        for number in failed:
            self.end(number, DeviceError(str(error)))
        self.flush()
        if nobody and isinstance(self.refusal, DeviceError):
            self.fail_all(self.refusal)

    def flush(self) -> None:
        """Tell the futures that have ended."""
        self.teller.flush()

    # -- inside ----------------------------------------------------------------------------------------------------

    def _place(self, ticket: Ticket, besides: Station | None = None) -> None:
        """Send a request to the process with the least to do; to none while all are being started."""
        station: Station | None = None
        for other in self.stations:
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
        if ticket.faults > MAX_FAULTS or self.stopped:
            return False
        self._place(ticket, besides)
        return True

    def _leave(self, ticket: Ticket) -> None:
        if ticket.station is not None:
            ticket.station.load -= ticket.left
            ticket.station = None

    def end(self, number: int, error: BaseException | None, *, settle: bool = True) -> None:
        """A request is over: done, failed, or cancelled."""
        with self.lock:
            ticket = self.tickets.pop(number, None)
            if ticket is None:
                return
            station = ticket.station
            if station is None:
                self._homeless = [other for other in self._homeless if other is not ticket]
            elif error is not None or not settle:
                station.post(say.Cancel(number))
            self._leave(ticket)
            if not self.tickets:
                self.changed.notify_all()
        if settle:
            self.teller.tell(ticket.speech, error)  # once somebody calls `flush`

    def fail_all(self, error: Exception) -> None:
        """Whatever is there fails."""
        for number in list(self.tickets):
            self.end(number, error)
        self.flush()
