"""How long a crowd's GPU had nothing to do for the language model, because the host had asked for nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from soprano_cupy.crowd.device import Device, Entry


class Waits:
    """GPU times between what a device's steps and prefills leave and what comes next, in order of the stream."""

    def __init__(self) -> None:
        self._spans: list[tuple[Any, Any]] = []  # events around each piece of work

    def share(self) -> float | None:
        """Of the time from the first work to the last, what lay between works; None where there was no work."""
        if len(self._spans) < 2:
            return None
        self._spans[-1][1].synchronize()
        pairs = zip(self._spans, self._spans[1:], strict=False)
        idle = sum(begin.elapsed_ms(end) for (_, end), (begin, _) in pairs)
        return float(idle / self._spans[-1][1].elapsed_ms(self._spans[0][0]))

    @contextmanager
    def of(self, device: Device) -> Iterator[Waits]:
        """Measure while the block runs. device: a `GpuDevice`; with any other, nothing is found."""
        from soprano_cupy.gpu.crowd_device import GpuDevice

        if not isinstance(device, GpuDevice):
            yield self
            return
        steps = device._steps
        graph, enter = steps._graph, steps.enter

        def timed_graph(rows: int) -> _Timed:
            return _Timed(graph(rows), self._spans)

        def timed_enter(entries: Sequence[Entry]) -> None:
            _timed(self._spans, steps.stream.ptr, lambda: enter(entries))

        with mock.patch.object(steps, "_graph", timed_graph), mock.patch.object(steps, "enter", timed_enter):
            yield self


class _Timed:
    """A graph between two events."""

    def __init__(self, graph: Any, spans: list[tuple[Any, Any]]) -> None:
        self._graph, self._spans = graph, spans

    def launch(self, stream: int) -> None:
        _timed(self._spans, stream, lambda: self._graph.launch(stream))


def _timed(spans: list[tuple[Any, Any]], stream: int, work: Callable[[], None]) -> None:
    from soprano_cupy.gpu.program import Event

    begin, end = Event(timing=True), Event(timing=True)
    begin.record(stream)
    work()
    end.record(stream)
    spans.append((begin, end))
