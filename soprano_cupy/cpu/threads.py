"""How many threads the engine computes with."""

from __future__ import annotations

import os
from pathlib import Path

from .. import settings
from . import _engine

MAX_THREADS = 256  # of the engine's team
CGROUP = Path("/sys/fs/cgroup")


def available_threads() -> int:
    """Cores that this process may use: its affinity, held to the container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(CGROUP)
    return max(1, min(cores, MAX_THREADS if quota is None else round(quota)))


def cpu_quota(cgroup: Path) -> float | None:
    """The CPUs' worth of time that a control group grants (version 2, then version 1), None without a limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text()
        except OSError:
            return None
    try:
        return float(quota) / float(period) if float(quota) > 0 and float(period) > 0 else None
    except ValueError:  # "max"
        return None


def wanted_threads() -> int:
    """`SOPRANO_THREADS`, else the available cores; `ParameterError` for a setting that is no number of threads."""
    return min(settings.threads() or available_threads(), MAX_THREADS)


def use_wanted_threads() -> int:
    """Size the engine's team as wanted; returns its size."""
    return int(_engine.set_threads(wanted_threads()))
