"""Whether the persistent kernel takes a few voices, or a graph for each token: the setting, what was measured, and why.

Nothing here needs a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class StepTimes(NamedTuple):
    """Microseconds of a step by either path."""

    graph: float
    persistent: float


Measured = Mapping[tuple[int, bool], StepTimes]  # by (voices, whether their tokens are drawn: not greedy)

# Soprano-1.1-80M's shape in bfloat16, context 256, by compute capability: an H200. `benchmarks/persistent_table.py`
# prints these lines as they should stand.
STEP_US: Mapping[tuple[int, int], Measured] = {
    (9, 0): {
        (1, False): StepTimes(160.6, 117.7),
        (2, False): StepTimes(169.5, 144.9),
        (4, False): StepTimes(180.0, 174.5),
        (1, True): StepTimes(166.0, 133.5),
        (2, True): StepTimes(175.1, 160.7),
        (4, True): StepTimes(185.6, 190.6),
    },
}


def measured_times(capability: tuple[int, int], voices: int, drawn: bool) -> StepTimes | None:
    """The figures for the next number of voices that was measured; greedy ones where there are no others."""
    table = STEP_US.get(capability, {})
    for asked in (drawn, False):
        sizes = sorted(size for size, kind in table if kind == asked and size >= voices)
        if sizes:
            return table[sizes[0], asked]
    return None


def reason_against(setting: str, capability: tuple[int, int], voices: int, drawn: bool) -> str | None:
    """Why the graph path takes so many voices, before the kernel itself is asked; None when it does not.

    setting: auto, 0 or 1, of `settings.persistent`. With 1 the figures do not count.
    """
    if setting == "0":
        return "SOPRANO_PERSISTENT=0"
    if setting == "1":
        return None
    times = measured_times(capability, voices, drawn)
    if times is None:
        return f"not measured for {voices} voices on compute capability {capability[0]}.{capability[1]}"
    if times.persistent >= times.graph:
        return f"faster by measurement, {times.graph:.0f} against {times.persistent:.0f} us"
    return None


def reason_for(setting: str, capability: tuple[int, int], voices: int, drawn: bool) -> str:
    """Why the persistent kernel takes them."""
    if setting == "1":
        return "SOPRANO_PERSISTENT=1"
    times = measured_times(capability, voices, drawn)
    assert times is not None
    return f"faster by measurement, {times.persistent:.0f} against {times.graph:.0f} us"
