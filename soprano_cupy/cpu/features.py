"""Which instruction set the engine uses."""

from __future__ import annotations

import os

from ..errors import ParameterError
from ._engine import instruction_sets

ISA_VARIABLE = "SOPRANO_CPU_ISA"


def choose_isa(name: str | None = None) -> tuple[str, str]:
    """The instruction set to use, and why.

    name: one of `instruction_sets()`; by default `SOPRANO_CPU_ISA`, else the best that this processor has. Between
    two sets, float32 and bfloat16 results differ in rounding; on one set they never depend on threads or batch.
    """
    available = instruction_sets()
    reason = "asked for"
    if name is None:
        name, reason = os.environ.get(ISA_VARIABLE) or None, f"set by {ISA_VARIABLE}"
    if name is None:
        return available[-1], "the best this processor has"
    if name not in available:
        raise ParameterError(
            f"instruction set {name!r} is not available here; unset {ISA_VARIABLE} or use one of {', '.join(available)}"
        )
    return name, reason
