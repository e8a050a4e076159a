"""Sentences to texts: each text's samples in memory of its own, joined while later sentences are still being made."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

MOST_THREADS = 8  # new memory comes slowly: a page at a time, to each thread
FROM_SENTENCES = 8  # fewer are joined by the thread that made them


class Joiner:
    """Takes the sentences of several texts in their order, a few at a time.

    sentences: how many each text has. A decoder's samples may lie in page-locked memory that many sentences share; what
    `results` gives shares nothing.
    """

    def __init__(self, sentences: Sequence[int]) -> None:
        self._sentences = list(sentences)
        self._held: list[np.ndarray] = []  # of texts that are not complete
        self._texts = 0  # that are
        self._joined: list[Future[list[np.ndarray]] | list[np.ndarray]] = []
        self._pool = ThreadPoolExecutor(_threads()) if sum(sentences) >= FROM_SENTENCES else None

    def __enter__(self) -> Joiner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=error is not None)

    def take(self, samples: Sequence[np.ndarray]) -> None:
        """The next sentences; returns at once where there are many in all."""
        self._held += samples
        complete: list[list[np.ndarray]] = []
        at = 0
        while self._texts < len(self._sentences) and at + self._sentences[self._texts] <= len(self._held):
            complete.append(self._held[at : at + self._sentences[self._texts]])
            at += self._sentences[self._texts]
            self._texts += 1
        del self._held[:at]
        if complete:
            self._joined.append(_join(complete) if self._pool is None else self._pool.submit(_join, complete))

    def results(self) -> list[np.ndarray]:
        """Every text's samples, float32 (n,), in order; all sentences have been taken."""
        assert self._texts == len(self._sentences)
        parts = (part.result() if isinstance(part, Future) else part for part in self._joined)
        return [text for part in parts for text in part]


def _threads() -> int:
    return min(MOST_THREADS, len(os.sched_getaffinity(0)))


def _join(texts: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    return [np.concatenate(sentences) for sentences in texts]
