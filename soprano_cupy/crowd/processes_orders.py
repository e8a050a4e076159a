"""Texts that wait to be prepared in a device's process, and who is next: streams, but not for ever."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

from .fair_queue import URGENT_RUN

Item = TypeVar("Item")


class Orders(Generic[Item]):
    """A queue of which those that are heard as they are made come first, a few times in a row at most."""

    def __init__(self) -> None:
        self._some = threading.Condition()
        self._urgent: deque[Item] = deque()
        self._others: deque[Item] = deque()
        self._run = 0  # urgent ones in a row

    def put(self, item: Item, *, urgent: bool) -> None:
        with self._some:
            (self._urgent if urgent else self._others).append(item)
            self._some.notify()

    def get(self) -> Item:
        """The next one, once there is one."""
        with self._some:
            while not self._urgent and not self._others:
                self._some.wait()
            if self._urgent and (self._run < URGENT_RUN or not self._others):
                self._run += 1
                return self._urgent.popleft()
            self._run = 0
            return self._others.popleft()
