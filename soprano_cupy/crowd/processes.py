"""Several GPUs: a crowd in a process for each, and a front that hands requests out and audio back.

One Python process cannot keep several GPUs busy: preparing texts and looking after slots share one interpreter lock.
So each device has a process with an ordinary `Crowd` in it, which prepares its own texts; the front sends a request to
the one with the least to do, copies samples out of memory that both have mapped, and looks after queue limits,
deadlines and what is to become of the requests of a process that dies.

    processes.py          the front                        processes_station.py  one process, seen from the front
    processes_worker.py   the process                      processes_messages.py what they say to each other
    processes_channel.py  messages in bunches              processes_ring.py     samples
    processes_orders.py   texts that wait there            processes_ticket.py   a request, seen from the front
    processes_relay.py    what comes back of a request     processes_ledger.py   who has which request
    teller.py             the thread that ends futures     buffers.py            memory that is used again
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Sequence

from ..errors import Closed, DeviceError, ParameterError, TextError
from ..generation import Request
from ..sampling import SamplingParams
from ..text import build_prompts
from . import processes_messages as say
from .crowd import STALL_S, check_lengths, check_queue
from .job import Wish
from .processes_ledger import Ledger
from .processes_station import Post, Station
from .speech import Speech

logger = logging.getLogger(__name__)

WATCH_S = 0.5
SURELY_SPEAKABLE = re.compile("[A-Za-z0-9]")


class ProcessCrowd:
    """Speaks requests in several processes, one for each post. Raises what the first had to say where none can start.

    Must be made where subprocesses can be started; whoever made it may use CUDA or not.
    """

    def __init__(self, posts: Sequence[Post], *, max_queue: int = 1024, stall_s: float = STALL_S) -> None:
        check_queue(max_queue)
        self._stall_s, self._closing = stall_s, threading.Lock()
        ledger = self._ledger = Ledger(max_queue)
        self._stations = ledger.stations = [Station(ledger, post, index) for index, post in enumerate(posts)]
        self._watch = threading.Thread(target=self._look, name="soprano-front", daemon=True)
        for thread in (ledger.teller, *self._stations):
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
        return len(self._ledger.tickets)

    def submit_text(self, text: str, params: SamplingParams, wish: Wish) -> Speech:
        """Queue a text; as `SopranoTTS.submit`. params: with a definite seed."""
        if not isinstance(text, str):
            raise ParameterError(f"text must be a string, not {type(text).__name__}")
        if not SURELY_SPEAKABLE.search(text) and not build_prompts(text):
            raise TextError(f"nothing to speak in {text!r:.60}; give at least one word or number")
        return self._ledger.enter(text, len(text), params, wish)

    def submit(self, requests: Sequence[Request], wish: Wish) -> Speech:
        """Queue sentences that have been prepared; as `Crowd.submit`."""
        check_lengths(requests, [device.most_prompt for device in self.devices])
        return self._ledger.enter(list(requests), sum(len(request.ids) for request in requests), None, wish)

    def close(self, drain_s: float = 0.0) -> None:
        """Take nothing more, wait up to `drain_s` seconds for what there is, and stop; what is left fails: `Closed`.

        No process, thread, open file or shared memory is left then.
        """
        with self._closing:
            end = time.monotonic() + drain_s
            ledger = self._ledger
            with ledger.lock:
                ledger.refusal = ledger.refusal or Closed("the voice has been closed; make another one")
                while ledger.tickets and (left := end - time.monotonic()) > 0:
                    ledger.changed.wait(left)
                ledger.stopped = True
                ledger.changed.notify_all()
            ledger.fail_all(Closed("the voice was closed before this was spoken"))
            for station in self._stations:
                station.stop()
            for thread in (*self._stations, self._watch):
                if thread.is_alive() and thread is not threading.current_thread():
                    thread.join()
            ledger.teller.stop()

    def __enter__(self) -> ProcessCrowd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look(self) -> None:
        """End what has passed its deadline, and processes that give no sign of life."""
        ledger = self._ledger
        while True:
            with ledger.lock:
                if ledger.stopped or all(station.out for station in self._stations):
                    return
                now = time.monotonic()
                at = ledger.expire(now)
                ledger.flush()
                ledger.changed.wait(WATCH_S if at is None else min(WATCH_S, max(0.0, at - now)))
            for station in self._stations:
                if time.monotonic() - station.heard_at > self._stall_s:
                    station.kill(DeviceError(f"has given no sign of life for {self._stall_s:g} s"))
