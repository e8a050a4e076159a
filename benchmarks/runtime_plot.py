"""Step time and real-time factor against the number of voices, with limits and peers; needs matplotlib."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Row

Points = dict[int, float]


def series(rows: Sequence[Row], pattern: str) -> dict[str, Points]:
    """By name ("soprano_cupy", "limit" and each peer), values against the batch, which is the pattern's group."""
    found = sorted((int(match[1]), row) for row in rows if (match := re.fullmatch(pattern, row.case)))
    lines: dict[str, Points] = {}
    for batch, row in found:
        values = {"soprano_cupy": row.value, "limit": row.limit, **row.peer}
        for name, value in values.items():
            if value is not None:
                lines.setdefault(name, {})[batch] = value
    return lines


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write the picture; its kind is the file name's ending."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    draw(left, series(rows, r"step/B(\d+)/ctx\d+"), "one step of all voices, microseconds")
    draw(right, series(rows, r"(?:voice|throughput)/B(\d+)"), "text to samples, times real time")
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw(axis: Any, lines: dict[str, Points], title: str) -> None:
    """Each line over the batches that it has; the limit dotted."""
    for name, points in lines.items():
        axis.plot(list(points), list(points.values()), "k:" if name == "limit" else "o-", label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("voices")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    if lines:
        axis.legend()
