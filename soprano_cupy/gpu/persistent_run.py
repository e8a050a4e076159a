"""A call's sequences on the persistent kernel: launches, waiting, giving up, and the way back to graphs.

The kernel publishes what graphs publish, in the same places, so a batch reads its progress alike. It works in launches
of some tokens, one behind the other: between two, other threads' voices get their turn, and a stream whose listener
reads no further costs nothing. Where a launch ends makes no difference to the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import DeviceError
from . import step
from ._driver import MappedMemory, synchronize
from .persistent import stalled

if TYPE_CHECKING:
    from .batch import Batch
    from .persistent_path import PersistentPath

# Tokens of a launch; the next one begins some 30 us after its end.
ALONE, SHARED = 64, 16  # of one voice 10 ms and 2.5 ms, for which a second thread's voice may have to wait
REPORT_AT = 8


class PersistentRun:
    """The sequences in slots 0 to count - 1 of a batch whose first tokens have been asked for. One thread uses it.

    The kernel leaves those alone that have ended already, so it is launched right behind the first tokens. Whatever
    goes wrong with it ends with `Batch.go_on`: the graphs continue where it stood.
    """

    def __init__(self, path: PersistentPath, batch: Batch, words: ControlWords, count: int) -> None:
        self._path, self._batch, self._words, self._count = path, batch, words, count
        self._launched = False
        self._end = 1  # tokens of a voice that still runs, once what has been asked for is done
        path.enter()

    def start(self) -> None:
        """Ask for the first tokens behind those of the prompt; nothing is waited for."""
        self._launch()

    def await_change(self, slot: int, word: int, *, whole: bool = False) -> None:
        """Wait until something has happened to a slot whose progress word is `word`, and launch what is due.

        whole: nobody listens yet, so the end of a launch is soon enough.
        """
        try:
            if step.progress_count(word) >= self._end:
                self._await_report()
                self._launch()
            elif whole and not self._words.ended:
                self._await_report()
            else:
                self._batch.await_word(slot, word, listened=not whole)
        except DeviceError as error:
            self._fall_back(error)

    def close(self) -> None:
        """The call is over, or its caller has lost interest: afterwards nothing runs any more that could be stopped."""
        self._path.leave()
        if not self._launched or not self._running():
            return
        self._words.cancel()
        synchronize(self._batch.stream.ptr)
        if self._words.code:
            self._path.fail(stalled(self._words.code))

    # ---- within ----

    def _running(self) -> bool:
        status = step.progress_status(self._batch.progress[: self._count])
        return bool((status == step.RUNNING).any())

    def _await_report(self) -> None:
        self._words.await_report(self._batch.stream.ptr)
        if self._words.code:
            raise stalled(self._words.code)

    def _launch(self) -> None:
        """All sequences, also ended ones: how many there are decides about the bits of each."""
        batch = self._batch
        if self._path.failure is not None:  # by somebody else's launch
            batch.go_on(again=False)
            return
        budget = ALONE if self._path.users == 1 else SHARED
        self._words.reset()
        common = batch.common(budget, cancel=self._words.device, report=self._words.device + REPORT_AT)
        places = [batch.places(slot) for slot in range(self._count)]
        try:
            self._path.decoder.launch(batch.stream.ptr, places, common)
        except (DeviceError, MemoryError) as error:
            if getattr(error, "sticky", False):
                raise
            self._path.fail(error)
            batch.go_on(again=False)
            return
        self._launched = True
        self._end += budget

    def _fall_back(self, error: DeviceError) -> None:
        """A wait has ended in an error: the kernel's own, behind which graphs go on, or another one."""
        code = self._words.code
        if error.sticky or not code:
            raise error
        synchronize(self._batch.stream.ptr)
        self._path.fail(stalled(code))
        self._batch.go_on(again=True)


class ControlWords:
    """Two words of mapped memory: the host's "no more tokens", and the kernel's "ended", with what went wrong."""

    def __init__(self) -> None:
        self._memory = MappedMemory(16)
        self._cancel = np.frombuffer(self._memory.view(), np.uint32)
        self._report = np.frombuffer(self._memory.view(), np.uint64)

    @property
    def device(self) -> int:
        """Address of the cancel word; the report lies `REPORT_AT` bytes behind it."""
        return self._memory.device

    @property
    def ended(self) -> bool:
        return bool(self._report[1])

    @property
    def code(self) -> int:
        """The error of a launch that has ended; 0 where it went well, or has not ended."""
        return max(0, int(self._report[1]) - 1)

    def reset(self) -> None:
        """For the next launch; nothing may be under way."""
        self._report[1] = 0
        self._cancel[0] = 0

    def cancel(self) -> None:
        self._cancel[0] = 1

    def await_report(self, stream: int) -> None:
        self._memory.wait(REPORT_AT, 0, stream, changed=True, nbytes=8)
