"""Throughput of a crowd against its size, and latency against the number of listeners; needs matplotlib."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import Row
from benchmarks.runtime_plot import Points, draw


def throughput_lines(rows: Sequence[Row]) -> dict[str, Points]:
    """By what goes in, times real time against the sentences at once; and the limit."""
    lines: dict[str, Points] = {}
    for row in rows:
        match = re.fullmatch(r"crowd/(throughput|tokens_in)/B(\d+)", row.case)
        if match is None:
            continue
        name = "text in" if match[1] == "throughput" else "token ids in"
        lines.setdefault(name, {})[int(match[2])] = row.value
        if row.limit is not None:
            lines.setdefault("limit", {})[int(match[2])] = row.limit
    return lines


def latency_lines(rows: Sequence[Row]) -> dict[str, Points]:
    """Milliseconds until the first audio and until the end, of half, 95 and 99 of a hundred streams."""
    lines: dict[str, Points] = {}
    for row in rows:
        match = re.fullmatch(r"crowd/live/N(\d+)/(first_audio|finish)", row.case)
        if match is None:
            continue
        name, streams = match[2].replace("_", " "), int(match[1])
        for rank, value in {"p50": row.value, **row.peer}.items():
            lines.setdefault(f"{name}, {rank}", {})[streams] = value
    return lines


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write the picture; its kind is the file name's ending."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    draw(left, throughput_lines(rows), "16-bit samples in host memory, times real time")
    draw(right, latency_lines(rows), "live streams, milliseconds")
    left.set_xlabel("sentences at once")
    right.set_xlabel("listeners at a time")
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
