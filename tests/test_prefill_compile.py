"""The prefill kernels compile for every architecture without spilling registers to memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from soprano_cupy.attention import prefill
from soprano_cupy.attention.launch import LaunchPlan
from soprano_cupy.cuda.compiler import Nvrtc, compile_options
from soprano_cupy.cuda.source import joined_source

ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
MAX_REGISTERS = 255


@dataclass(frozen=True)
class Sizes:
    batch: int
    seqlen_q: int
    seqlen_k: int = 1
    num_heads: int = 4
    num_kv_heads: int = 1


# head_dim, queries of one sequence (from few, narrow tiles, to many, wide ones), dtype, group, causal
VARIANTS = (
    (128, 16, "bfloat16", 4, True),
    (128, 2048, "float16", 3, True),
    (128, 65536, "bfloat16", 4, True),
    (128, 65536, "float16", 1, False),
    (128, 65536, "float32", 4, True),
    (64, 65536, "bfloat16", 3, True),
    (64, 65536, "float32", 1, False),
    (32, 2048, "float16", 8, False),
)


def plans(architecture: int) -> dict[str, LaunchPlan]:
    """What one architecture compiles for VARIANTS, each kernel once."""
    found: dict[str, LaunchPlan] = {}
    for head_dim, seqlen, dtype, group, causal in VARIANTS:
        plan = prefill.plan(
            compute_capability=divmod(architecture, 10),
            dtype=dtype,
            head_dim=head_dim,
            group=group,
            causal=causal,
            params_info=Sizes(1, seqlen, num_heads=group),
            multiprocessors=100,
        )
        assert plan is not None
        found[f"{plan.source} {plan.defines}"] = plan
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_variant_spills(architecture: int, nvrtc: Nvrtc) -> None:
    if architecture not in nvrtc.architectures:
        pytest.skip(f"NVRTC {nvrtc.version} does not compile for sm_{architecture}")
    for name, plan in plans(architecture).items():
        options = compile_options(f"sm_{architecture}", plan.defines)
        log = nvrtc.compile(joined_source(plan.source), plan.source, options).log
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
        registers = re.findall(r"Used (\d+) registers", log)
        assert spills == ["0", "0"], f"sm_{architecture} {name} spills {spills} bytes"
        assert len(registers) == 1
        assert int(registers[0]) <= MAX_REGISTERS
        assert not re.search(r"^.*: warning", log.replace("nvrtc: warning: Architectures prior", ""), re.M), log
