"""The thread that tells futures of their end: whoever waits for them may do anything then, for any time."""

from __future__ import annotations

import threading
from collections import deque
from queue import SimpleQueue

from .speech import Speech


class Teller(threading.Thread):
    """Settles what it is given, in order, from `start` to `stop`; before and after that, those do who `flush`."""

    def __init__(self) -> None:
        super().__init__(name="soprano-answers", daemon=True)
        self._ended: deque[tuple[Speech, BaseException | None]] = deque()
        self._wake: SimpleQueue[bool] = SimpleQueue()  # False: there is no more
        self._going = self._woken = False

    def tell(self, speech: Speech, error: BaseException | None) -> None:
        """Settle this after the next `flush`; called with any lock held."""
        self._ended.append((speech, error))

    def flush(self) -> None:
        """Settle soon what there is: once for many, since waking a thread costs more than telling a future.

        Never called with a lock held that those might want who wait for the futures.
        """
        if not self._ended:
            return
        if not self._going:
            self._settle()
        elif not self._woken:
            self._woken = True
            self._wake.put(True)

    def stop(self) -> None:
        """End the thread, once all has been told that was given by now."""
        self._wake.put(False)
        if self.is_alive() and self is not threading.current_thread():
            self.join()

    def run(self) -> None:
        self._going = True
        while self._wake.get():
            self._woken = False
            self._settle()
        self._going = False
        self._settle()  # what came while it was seen that somebody tells

    def _settle(self) -> None:
        while True:
            try:
                speech, error = self._ended.popleft()
            except IndexError:
                return
            speech.settle(error)
