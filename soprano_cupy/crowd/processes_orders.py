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
        self._urgent: deque[tuple[Item, int]] = deque()
        self._others: deque[tuple[Item, int]] = deque()
        self._run = 0  # urgent ones in a row

    def put(self, item: Item, size: int, *, urgent: bool) -> None:
        with self._some:
            (self._urgent if urgent else self._others).append((item, size))
            self._some.notify()

    def take(self, room: int) -> list[Item]:
        """The next ones, once there is one, as many as have a size of up to `room` together; at least one."""
        taken: list[Item] = []
        with self._some:
            while not self._urgent and not self._others:
                self._some.wait()
            while self._urgent or self._others:
                urgent = bool(self._urgent) and (self._run < URGENT_RUN or not self._others)
                queue = self._urgent if urgent else self._others
                item, size = queue[0]
                room -= size
                if taken and room < 0:
                    break
                queue.popleft()
                taken.append(item)
                self._run = self._run + 1 if urgent else 0
        return taken
