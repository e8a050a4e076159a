"""What the tests of compiled kernels share: names of cases, and what NVRTC's log says."""

from __future__ import annotations

import re

from soprano_cupy.cuda.compiler import Nvrtc, compile_options
from soprano_cupy.cuda.source import joined_source
from soprano_cupy.gpu.launch import Launch

MULTIPROCESSORS = {75: 40, 80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}  # of a GPU of each architecture
REGISTERS = 65_536  # of one multiprocessor
_WARNINGS = re.compile(r"warning", re.IGNORECASE)
_OLD_ARCHITECTURE = "Architectures prior to '<compute/sm>_75' are deprecated"
_USED = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def case_name(number: int, launch: Launch) -> str:
    constants = ",".join(f"{name}={value}" for name, value in launch.defines)
    return f"sm_{number}-{launch.source.removesuffix('.cu')}-{constants}"


def registers_without_spills(nvrtc: Nvrtc, number: int, launch: Launch) -> list[int]:
    """Registers of each kernel in the launch's module, which compiles without spills, stack frames and warnings."""
    source = joined_source(launch.source)
    log = nvrtc.compile(source, launch.source, compile_options(f"sm_{number}", launch.defines)).log
    frames = _SPILLS.findall(log)
    assert frames, log
    assert set(frames) == {("0", "0", "0")}, log
    assert not [line for line in log.splitlines() if _WARNINGS.search(line) and _OLD_ARCHITECTURE not in line], log
    return [int(count) for count in _USED.findall(log)]
