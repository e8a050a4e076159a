"""A progress line on a terminal's stderr; nothing at all in a pipe."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable
from types import TracebackType

from .console import draw_bar

BAR_CELLS = 24
REDRAW_SECONDS = 0.1

State = Callable[[], "tuple[float | None, str]"]  # share done, 0 to 1 (None: unknown), and what to say about it


def on_terminal() -> bool:
    """Whether stderr is a terminal that can take a line away again."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") != "dumb"


def bar(share: float | None, text: str) -> str:
    """`[#####.....] text`, cut to the terminal's width; without the cells when the share is unknown."""
    cells = ""
    if share is not None:
        full = round(min(max(share, 0.0), 1.0) * BAR_CELLS)
        cells = f"[{'#' * full}{'.' * (BAR_CELLS - full)}] "
    return f"{cells}{text}"[: shutil.get_terminal_size().columns - 1]


class Progress:
    """Draws `state()` ten times a second while the context lasts; state: share done and a text."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True) if on_terminal() else None

    def __enter__(self) -> Progress:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._end.set()
            self._thread.join()
            draw_bar("")

    def _run(self) -> None:
        while not self._end.wait(REDRAW_SECONDS):
            draw_bar(bar(*self._state()))
