"""The persistent kernel as a model's way to speak for one voice or a few: whether it is taken, made ready, given up.

Which way a request takes depends on the request, the GPU and the settings alone, never on what happens beside it, so
that it has the same bits every time. The one exception is a kernel that failed: from then on the process does without.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING

from ..errors import DeviceError
from ..generation import Request
from .persistent_choice import reason_against, reason_for

if TYPE_CHECKING:
    from ..cuda.module import DeviceFacts
    from .persistent import PersistentDecoder

logger = logging.getLogger(__name__)

TOLD = ((1, False), (1, True), (2, False), (4, False), (8, False))  # (voices, drawn) that `describe` tells of


class PersistentPath:
    """Decides for one model on one GPU. Any thread may ask.

    setting: auto, 0 or 1. The kernel for one voice is built, and the weights are packed for it, by a thread of its own
    from `prepare` on; the first request that wants it waits for that. Other numbers of voices follow when they are
    first asked for, as the graph path's own kernels do.
    """

    def __init__(self, decoder: PersistentDecoder, facts: DeviceFacts, setting: str) -> None:
        self._decoder, self._facts, self.setting = decoder, facts, setting
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._decided: dict[tuple[int, bool], bool] = {}
        self.users = 0  # calls under way that take this path

    @property
    def decoder(self) -> PersistentDecoder:
        """What launches the kernel."""
        return self._decoder

    @property
    def nbytes(self) -> int:
        """GPU memory of what the kernel needs beside the model."""
        return self._decoder.nbytes

    @property
    def failure(self) -> str | None:
        """Why this process does without the kernel, once it has failed."""
        return self._failure

    def use(self, setting: str) -> None:
        """Another setting from the next call on, to measure both ways with one model."""
        self.setting, self._decided = setting, {}
        self.prepare()

    def prepare(self) -> None:
        """Begin to make ready what one voice needs; returns at once."""
        if self._thread is None and self._wanted(1, False) is None:
            self._thread = threading.Thread(target=self._make_ready, name="soprano-persistent")
            self._thread.start()

    def problem(self, voices: int, *, drawn: bool) -> str | None:
        """Why the graph path takes so many voices, as one line; None when this one does. May compile and wait.

        drawn: any of their tokens are drawn, not greedy.
        """
        self._wait()
        return self._wanted(voices, drawn) or self._examined(voices)

    def takes(self, requests: Sequence[Request]) -> bool:
        """Whether these requests, together, go this way; for each kind, what is decided and why is logged once."""
        kind = len(requests), any(request.params.temperature > 0 for request in requests)
        taken = self._decided.get(kind)
        if taken is None:
            reason = self.problem(kind[0], drawn=kind[1])
            logger.info("%s", self._line(*kind, reason))
            self._decided[kind] = taken = reason is None
        return taken and self._failure is None

    def fail(self, error: Exception) -> None:
        """The kernel went wrong: this process does without it from now on."""
        with self._lock:
            first, self._failure = self._failure is None, self._failure or str(error)
        if first:
            logger.warning("the persistent decode kernel is off from now on, graphs take over: %s", error)

    def describe(self) -> list[str]:
        """What computes the tokens of one voice and of a few, and why, in a line each. Compiles for one voice alone."""
        lines = []
        for voices, drawn in TOLD:
            reason = self.problem(voices, drawn=drawn) if voices == 1 else self._wanted(voices, drawn)
            lines.append(self._line(voices, drawn, reason))
        return lines if self.setting != "0" and self._failure is None else lines[:1]

    def enter(self) -> None:
        """A call begins that takes this path."""
        with self._lock:
            self.users += 1

    def leave(self) -> None:
        """It is over."""
        with self._lock:
            self.users -= 1

    # ---- within ----

    def _wanted(self, voices: int, drawn: bool) -> str | None:
        return self._failure or reason_against(self.setting, self._facts.capability, voices, drawn)

    def _line(self, voices: int, drawn: bool, reason: str | None) -> str:
        who = f"{voices} voice{'s' if voices > 1 else ''}, {'drawn' if drawn else 'greedy'}"
        if reason is not None:
            return f"{who}: a graph for each token ({reason})"
        reason = reason_for(self.setting, self._facts.capability, voices, drawn)
        return f"{who}: the persistent kernel ({reason})"

    def _examined(self, voices: int) -> str | None:
        """The kernel's own answer; one that cannot be had counts as no."""
        try:
            return self._decoder.problem(voices)
        except (DeviceError, MemoryError) as error:
            self._raise_sticky(error)
            self.fail(error)
            return self._failure

    def _make_ready(self) -> None:
        """In a thread of its own: the kernel for one voice, and the weights in its order."""
        try:
            if self._decoder.problem(1) is None:
                self._decoder.prepare(1)
        except CancelledError:  # there are no weights, which somebody else tells
            return
        except Exception as error:  # whatever it is, there is another way
            self.fail(error)

    def _wait(self) -> None:
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    @staticmethod
    def _raise_sticky(error: Exception) -> None:
        if getattr(error, "sticky", False):
            raise error
