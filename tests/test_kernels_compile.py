"""Every attention kernel compiles for every architecture, without spills and within its registers; no GPU needed.

SOPRANO_COMPILE_ALL=1 compiles everything. Without it, the published model's class (head_dim 128, causal) is compiled
whole for every architecture and dtype; of the other head sizes and masks every second variant is, so that each tile,
dtype and architecture still appears. The Hopper kernel has a test file of its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import product

import pytest

from soprano_cupy.attention.launch import LaunchPlan
from soprano_cupy.attention.probe import ShapeClass
from soprano_cupy.attention.variants import architecture_facts, variants
from soprano_cupy.cuda.compiler import Nvrtc, compile_options
from soprano_cupy.cuda.source import joined_source

ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
DTYPES = ("float16", "bfloat16", "float32")
HEAD_DIMS = (32, 64, 128)
EVERYTHING = bool(os.environ.get("SOPRANO_COMPILE_ALL"))

REGISTERS = 65_536  # of one multiprocessor
WARNINGS = re.compile(r"warning|C7510|serializ", re.IGNORECASE)
OLD_ARCHITECTURE = "Architectures prior to '<compute/sm>_75' are deprecated"
USED = re.compile(r"Used (\d+) registers")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def cases() -> Iterator[tuple[str, LaunchPlan]]:
    """(architecture, plan) of what is compiled."""
    for i, number in enumerate(ARCHITECTURES):
        for j, (dtype, head_dim, causal) in enumerate(product(DTYPES, HEAD_DIMS, (True, False))):
            shape = ShapeClass("cuda:0", dtype, head_dim, 4, causal)
            for k, (path, plan) in enumerate(variants(shape, architecture_facts(number))):
                whole = head_dim == 128 and causal and dtype != "float32"
                if EVERYTHING or (path != "hopper" and (whole or (i + j + k) % 4 == 0)):
                    yield f"sm_{number}{'a' if path == 'hopper' else ''}", plan


def case_name(architecture: str, plan: LaunchPlan) -> str:
    constants = ",".join(f"{name}={value}" for name, value in plan.defines)
    return f"{architecture}-{plan.source.removesuffix('.cu')}-{constants}"


CASES = list(cases())


@pytest.mark.parametrize(("architecture", "plan"), CASES, ids=[case_name(*case) for case in CASES])
def test_compiles_within_its_registers(nvrtc: Nvrtc, architecture: str, plan: LaunchPlan) -> None:
    if int(architecture[3:].rstrip("a")) not in nvrtc.architectures:
        pytest.skip("NVRTC {}.{} does not compile for {}".format(*nvrtc.version, architecture))
    log = nvrtc.compile(joined_source(plan.source), plan.source, compile_options(architecture, plan.defines)).log
    (registers,), (frame,) = USED.findall(log), SPILLS.findall(log)  # one kernel in each file
    assert frame == ("0", "0", "0"), log
    assert int(registers) <= register_ceiling(plan), log
    assert not [line for line in log.splitlines() if WARNINGS.search(line) and OLD_ARCHITECTURE not in line], log


def register_ceiling(plan: LaunchPlan) -> int:
    """What each thread may use for the intended number of warps to fit a multiprocessor; 255 is the machine's limit."""
    return min(255, REGISTERS // 32 // resident_warps(plan) // 8 * 8)


def resident_warps(plan: LaunchPlan) -> int:
    """Warps that a multiprocessor must hold at once."""
    constants = dict(plan.defines)
    if plan.source == "attention_decode.cu":
        return TENSOR_CORE_DECODE_WARPS[constants["TILE_ROWS"]] if "tensor cores" in plan.description else 10
    return max(8, plan.threads // 32) if "MIN_BLOCKS" not in constants else plan.threads // 32 * constants["MIN_BLOCKS"]


# By TILE_ROWS: enough loads under way to hide the memory's latency; the most rows need the registers more.
TENSOR_CORE_DECODE_WARPS = {8: 16, 16: 12, 32: 8}
