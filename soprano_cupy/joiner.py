"""Sentences to texts: each text's samples in memory of its own, copied while later sentences are still being made."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

from .cores import available_cores

MOST_THREADS = 8  # new memory comes slowly: a page at a time, to each thread
FROM_SENTENCES = 8  # fewer are copied by the thread that made them
PORTION_BYTES = 8 << 20  # that a thread copies at a time, about


class Joiner:
    """Takes the sentences of several texts in their order, a few at a time.

    sentences: how many each text has. A decoder's samples may lie in page-locked memory that many sentences share; what
    `results` gives shares nothing.
    """

    def __init__(self, sentences: Sequence[int]) -> None:
        self._sentences = list(sentences)
        self._held: list[np.ndarray] = []  # of the text that is not complete
        self._texts: list[np.ndarray] = []  # complete, some still to be filled
        self._copies: list[tuple[np.ndarray, np.ndarray]] = []  # target and source, of the next portion
        self._waiting_bytes = 0
        self._portions: list[Future[None]] = []
        self._pool: ThreadPoolExecutor | None = None
        if sum(sentences) >= FROM_SENTENCES:
            self._pool = ThreadPoolExecutor(min(MOST_THREADS, available_cores()))

    def __enter__(self) -> Joiner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=error is not None)

    def take(self, samples: Sequence[np.ndarray]) -> None:
        """The next sentences; returns at once where there are many in all."""
        for sentence in samples:
            self._held.append(sentence)
            if len(self._held) == self._sentences[len(self._texts)]:
                self._complete(self._held)
                self._held = []

    def results(self) -> list[np.ndarray]:
        """Every text's samples, float32 (n,), in order; all sentences have been taken."""
        assert len(self._texts) == len(self._sentences)
        self._copy()
        for portion in self._portions:
            portion.result()
        return self._texts

    def _complete(self, sentences: Sequence[np.ndarray]) -> None:
        text = np.empty(sum(map(len, sentences)), np.float32)
        self._texts.append(text)
        start = 0
        for sentence in sentences:
            self._copies.append((text[start : start + len(sentence)], sentence))
            start += len(sentence)
            self._waiting_bytes += sentence.nbytes
            if self._waiting_bytes >= PORTION_BYTES:
                self._copy()

    def _copy(self) -> None:
        copies, self._copies, self._waiting_bytes = self._copies, [], 0
        if self._pool is None:
            _copy(copies)
        elif copies:
            self._portions.append(self._pool.submit(_copy, copies))


def _copy(copies: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    for target, source in copies:
        np.copyto(target, source)
