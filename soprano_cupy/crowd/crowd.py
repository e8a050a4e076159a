"""The threads of a crowd: one for each device, one that tells futures, and one that sees when a device is silent."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from ..errors import DeviceError, ParameterError
from ..generation import Request
from .device import Device
from .driver import Driver
from .job import Wish
from .scheduler import Scheduler
from .speech import Speech

logger = logging.getLogger(__name__)

Maker = Callable[[], Device]

MAX_FAILURES = 3  # of a device in a row, each soon after the last
SOON_S = 30.0
STALL_S = 120.0  # of one turn; compiling a kernel takes some of it
WATCH_S = 0.5
POLL_S = 0.002
SWITCH_S = 1e-4  # for sys.setswitchinterval where other threads compute: how long they may keep a device's waiting


class Crowd:
    """Speaks requests on one or several devices.

    makers: make a device each, in the thread that is to use it; called again after a failure. A device that fails too
    often, or for good, is taken out; its sentences go to the others. Raises what the makers raise where none succeeds.
    """

    def __init__(self, makers: Sequence[Maker], *, max_queue: int = 1024, stall_s: float = STALL_S) -> None:
        check_queue(max_queue)
        self.scheduler = Scheduler(max_queue)
        self._stall_s, self._closing = stall_s, threading.Lock()
        self._workers = [Worker(self, make, f"soprano-{i}") for i, make in enumerate(makers)]
        self._watch = threading.Thread(target=self._look, name="soprano-watch", daemon=True)
        self.left = threading.Event()  # a worker has ended
        self.scheduler.teller.start()
        for worker in self._workers:
            worker.start()
        for worker in self._workers:
            worker.ready.wait()
        if not self.devices:
            self.close()
            raise next(worker.error for worker in self._workers if worker.error is not None)
        self._watch.start()

    @property
    def devices(self) -> list[Device]:
        """Those that work at present."""
        drivers = [worker.driver for worker in self._workers]
        return [driver.device for driver in drivers if driver is not None]

    def submit(self, requests: Sequence[Request], wish: Wish, submitted: float | None = None) -> Speech:
        """Queue a request. `Busy` where too many wait, `Closed` after `close`, `DeviceError` without a device.

        submitted: what `time.monotonic()` was then, for deadlines; by default now.
        """
        check_lengths(requests, [device.most_prompt for device in self.devices])
        return self.scheduler.submit(requests, wish, time.monotonic() if submitted is None else submitted)

    def close(self, drain_s: float = 0.0) -> None:
        """Take nothing more, wait up to `drain_s` seconds for what there is, and stop; what is left fails: `Closed`."""
        with self._closing:
            self.scheduler.refuse()
            end = time.monotonic() + drain_s
            with self.scheduler.changed:
                while self.scheduler.unfinished and (left := end - time.monotonic()) > 0:
                    self.scheduler.changed.wait(left)
            self.scheduler.close()
            for worker in self._workers:
                worker.stop()
            threads = [*(worker for worker in self._workers if not worker.stuck), self._watch]
            for thread in threads:
                if thread.is_alive() and thread is not threading.current_thread():
                    thread.join()
            self.scheduler.teller.stop()

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def worker_left(self) -> None:
        """A worker will make no device any more."""
        if all(worker.out for worker in self._workers):
            error = next((worker.error for worker in self._workers if worker.error is not None), None)
            self.scheduler.close(None if error is None else DeviceError(f"no device is left: {error}"))

    def _look(self) -> None:
        """Take out devices that answer no more, and end what has passed its deadline meanwhile."""
        changed = self.scheduler.changed
        while not all(worker.out for worker in self._workers):
            with changed:
                if not self.scheduler.unfinished and not all(worker.out for worker in self._workers):
                    changed.wait()
            self.left.wait(WATCH_S)  # not for changes, of which there are thousands a second
            self.left.clear()
            now = time.monotonic()
            self.scheduler.expire(now)
            for worker in self._workers:
                if now - worker.turn_began > self._stall_s:
                    worker.abandon(self._stall_s)


class Worker(threading.Thread):
    """The thread of one device."""

    def __init__(self, crowd: Crowd, make: Maker, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._crowd, self._make = crowd, make
        self._stop_asked = False
        self.ready = threading.Event()
        self.driver: Driver | None = None
        self.error: Exception | None = None
        self.turn_began = float("inf")
        self.out = self.stuck = False

    def stop(self) -> None:
        """End after the present turn."""
        with self._crowd.scheduler.changed:
            self._stop_asked = True
            self._crowd.scheduler.changed.notify_all()

    def abandon(self, seconds: float) -> None:
        """Go on without a thread that is stuck."""
        driver, self.driver = self.driver, None
        if driver is None or self.out:
            return
        self.error = DeviceError(f"{driver.device.name} has not answered for {seconds:g} s and is used no more")
        logger.error("%s", self.error)
        self.out = self.stuck = True
        self._crowd.left.set()
        self._crowd.scheduler.leave(driver, self.error)
        self._crowd.worker_left()

    def run(self) -> None:
        failures, last = 0, float("-inf")
        while not self._stop_asked and not self.out:
            error = self._speak_until_stopped()
            if error is None or self.stuck:  # where it was stuck, others have its work
                break
            self.error = error
            now = time.monotonic()
            failures = failures + 1 if now - last < SOON_S else 1
            last = now
            for_good = getattr(error, "sticky", False) or failures >= MAX_FAILURES or not self.ready.is_set()
            what = "used no more" if for_good else "set up anew"
            logger.error("a device failed (%s: %s); it is %s", type(error).__name__, error, what)
            if for_good:
                break
        self.out = True
        self.ready.set()
        self._crowd.left.set()
        with self._crowd.scheduler.changed:
            self._crowd.scheduler.changed.notify_all()
        if not self._stop_asked:
            self._crowd.worker_left()

    def _speak_until_stopped(self) -> Exception | None:
        """Make the device and speak on it; what it raised. The device is closed then and its sentences are free."""
        scheduler = self._crowd.scheduler
        try:
            device = self._make()
        except Exception as raised:
            return _bare(raised)
        driver = self.driver = Driver(device, scheduler)
        error: Exception | None = None
        try:
            scheduler.join(driver)
            self.ready.set()
            logger.info("%s: %d voices at once", device.name, device.slots)
            self._turns(driver)
        except Exception as raised:
            error = _bare(raised)
        self.turn_began = float("inf")
        self.driver = None
        device.close()
        scheduler.leave(driver, error or DeviceError("the voice was closed"))
        return error

    def _turns(self, driver: Driver) -> None:
        scheduler = self._crowd.scheduler
        while not self._stop_asked and not self.stuck:
            self.turn_began = now = time.monotonic()
            scheduler.expire(now)
            busy = driver.turn(now)
            if busy and not driver.generating:
                driver.device.wait(POLL_S)
            self.turn_began = float("inf")
            if not busy:
                self._rest()

    def _rest(self) -> None:
        """Wait until there is something to do."""
        scheduler = self._crowd.scheduler
        with scheduler.changed:
            if self._stop_asked:
                return
            if scheduler.waiting:  # of which others take the most
                scheduler.changed.wait(POLL_S)
                return
            deadline = scheduler.next_deadline()
            scheduler.changed.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))


def check_queue(max_queue: int) -> None:
    """`ParameterError` where it is no number of requests that may wait."""
    if isinstance(max_queue, bool) or not isinstance(max_queue, int) or max_queue < 1:
        raise ParameterError(f"max_queue = {max_queue!r} must be a whole number of requests, 1 or more")


def check_lengths(requests: Sequence[Request], most_prompts: Sequence[int]) -> None:
    """`ParameterError` where a prompt is too long for any of the devices, which take so many tokens each."""
    most = min(most_prompts, default=None)
    for request in requests:
        if most is not None and len(request.ids) > most:
            raise ParameterError(f"a prompt has {len(request.ids)} tokens; at most {most} fit: split the text")


def _bare(error: Exception) -> Exception:
    """An error without its frames, which would keep a device's memory for as long as somebody keeps the error."""
    if not isinstance(error, (DeviceError, MemoryError, ParameterError)):
        logger.error("%s: %s", type(error).__name__, error, exc_info=error)
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
