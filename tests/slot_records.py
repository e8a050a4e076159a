"""The record with which one sequence begins."""

from __future__ import annotations

from typing import Any

import numpy as np

from soprano_cupy.generation import Request
from soprano_cupy.gpu._tables import write_slot_states
from soprano_cupy.gpu.slots import SLOT_STATE


def slot_state(request: Request, capacity: int, *, give_up: bool = False) -> Any:
    """A `SLOT_STATE` scalar: behind its prompt, before its first token. capacity: tokens of a slot."""
    records = np.zeros(1, SLOT_STATE)
    write_slot_states(records, [request], [give_up], capacity)
    return records[0]
