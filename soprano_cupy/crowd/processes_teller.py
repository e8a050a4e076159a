"""The thread that tells futures of their end: whoever waits for them may do anything then, for any time."""

from __future__ import annotations

import threading
from collections import deque
from queue import SimpleQueue

from .speech import Speech


class Teller(threading.Thread):
    """Settles what it is given, in order, until `stop`."""

    def __init__(self) -> None:
        super().__init__(name="soprano-answers", daemon=True)
        self._ended: deque[tuple[Speech, BaseException | None]] = deque()
        self._wake: SimpleQueue[bool] = SimpleQueue()
        self._woken = False

    def tell(self, speech: Speech, error: BaseException | None) -> None:
        """Settle this after the next `flush`."""
        self._ended.append((speech, error))

    def flush(self) -> None:
        """Settle soon what there is: once for many, since waking a thread costs more than telling a future."""
        if self._ended and not self._woken:
            self._woken = True
            self._wake.put(True)

    def stop(self) -> None:
        """End, once all has been told that was given by now."""
        self._wake.put(False)
        if self.is_alive() and self is not threading.current_thread():
            self.join()

    def run(self) -> None:
        going = True
        while going:
            going = self._wake.get()
            self._woken = False
            while self._ended:
                speech, error = self._ended.popleft()
                speech.settle(error)
