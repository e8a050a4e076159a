"""What `submit` returns: a future of the whole audio, and an iterator of its chunks as they are made."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import asyncio  # at run time only where something waits in an event loop: it takes 4 MB


class Speech(Future[np.ndarray]):
    """A text being spoken: a `concurrent.futures.Future` of its samples (n,), to be waited for as those are.

    `for chunk in speech` and `async for chunk in speech` give the chunks, from the first on, as soon as each is there;
    joined, they are the result. `await speech` gives the result, in any event loop. Whoever leaves a `with` block of it
    cancels what is not done yet. Nothing is lost when nobody listens, and any number may listen.
    """

    def __init__(self, drop: Callable[[Speech], None], dtype: Any = np.float32) -> None:
        super().__init__()
        self._drop, self._dtype = drop, np.dtype(dtype)
        self._chunks: list[np.ndarray] = []
        self._samples = 0  # in all chunks
        self._whole: np.ndarray | None = None  # once somebody wanted it
        self._lock = threading.RLock()
        self._more: threading.Condition | None = None  # of that lock, once somebody waits for chunks
        self._listeners: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._over = False
        self._fate: str | None = None  # "cancelled" or "settled", whichever comes first
        self.first_audio_s: float | None = None  # from submission to its first samples

    # -- as a future ------------------------------------------------------------------------------------------------

    def result(self, timeout: float | None = None) -> np.ndarray:
        """All samples. `TimeoutError` after `timeout` seconds; `CancelledError`; or why it could not be spoken."""
        super().result(timeout)
        with self._lock:
            if self._whole is None:
                joined = len(self._chunks) == 1
                self._whole = self._chunks[0] if joined else np.concatenate([np.empty(0, self._dtype), *self._chunks])
                self._chunks = [self._whole]
            return self._whole

    def cancel(self) -> bool:
        """Stop speaking; False where it is done already. What waits for it gets `CancelledError`."""
        if not self._decide("cancelled"):
            return self._fate == "cancelled"
        super().cancel()
        self.set_running_or_notify_cancel()  # for concurrent.futures.wait and as_completed
        self._drop(self)
        self._end()
        return True

    def __enter__(self) -> Speech:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __await__(self) -> Generator[Any, None, np.ndarray]:
        import asyncio

        return asyncio.wrap_future(self).__await__()

    # -- chunks -----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[np.ndarray]:
        taken = 0
        while True:
            with self._lock:
                while not self._over and self._samples == taken:
                    self._more = self._more or threading.Condition(self._lock)
                    self._more.wait()
                ready = self._from(taken)
            if not ready:
                break
            for chunk in ready:
                taken += len(chunk)
                yield chunk
        super().result()

    async def __aiter__(self) -> AsyncIterator[np.ndarray]:
        import asyncio

        listener = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            self._listeners.add(listener)
        try:
            taken = 0
            while True:
                listener[1].clear()
                with self._lock:
                    ready, over = self._from(taken), self._over
                for chunk in ready:
                    taken += len(chunk)
                    yield chunk
                if not ready:
                    if over:
                        break
                    await listener[1].wait()
        finally:
            with self._lock:
                self._listeners.discard(listener)
        super().result()

    def _from(self, taken: int) -> list[np.ndarray]:
        """The chunks behind the first `taken` samples; they may have been joined meanwhile."""
        ready = []
        for chunk in self._chunks:
            if taken < len(chunk):
                ready.append(chunk[taken:])
            taken = max(0, taken - len(chunk))
        return ready

    # -- for the scheduler --------------------------------------------------------------------------------------------

    def add_chunk(self, samples: np.ndarray) -> None:
        """Further samples, at least one."""
        with self._lock:
            self._chunks.append(samples)
            self._samples += len(samples)
            listeners = self._woken()
        self._tell(listeners)

    def settle(self, error: BaseException | None) -> None:
        """The end, by an error or with all that was added; nothing where there was an end before."""
        if not self._decide("settled"):
            return
        if error is None:
            self.set_result(_NOTHING)
        else:
            self.set_exception(error)
        self._end()

    def _decide(self, fate: str) -> bool:
        """Whether this is the first end that comes."""
        with self._lock:
            first = self._fate is None
            if first:
                self._fate = fate
        return first

    def _end(self) -> None:
        with self._lock:
            self._over = True
            listeners = self._woken()
        self._tell(listeners)

    def _woken(self) -> Sequence[tuple[asyncio.AbstractEventLoop, asyncio.Event]]:
        """Wake the threads that wait for chunks; who is to be told besides, once the lock is given back."""
        if self._more is not None:
            self._more.notify_all()
        return list(self._listeners) if self._listeners else ()

    def _tell(self, listeners: Sequence[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
        for loop, event in listeners:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # the loop has been closed
                with self._lock:
                    self._listeners.discard((loop, event))


_NOTHING: Any = np.empty(0, np.float32)  # what the future itself holds; `result` joins the chunks
