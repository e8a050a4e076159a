"""Cases of a decode step's attention, for the emulated machine and for a GPU alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import emulation
import ml_dtypes
import numpy as np

from soprano_cupy.gpu import step

Array = np.ndarray[Any, Any]
ELEMENTS: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
EPSILON = 1e-6


def filled(seed: int, shape: Sequence[int], dtype: Any = np.float32, scale: float = 1.0) -> Array:
    """Normal random numbers in memory that is NaN all around."""
    array = emulation.poisoned(shape, dtype)
    array[...] = (scale * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)
    return array


def rope_table(positions: int, head_dim: int) -> Array:
    """(positions, head_dim / 2, 2) float32: cosines and sines."""
    angles = np.arange(positions)[:, None] * 10_000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    table = emulation.poisoned((positions, head_dim // 2, 2), np.float32)
    table[...] = np.stack((np.cos(angles), np.sin(angles)), -1)
    return table


@dataclass(frozen=True)
class StepCase:
    """Rows of a decode step: row r is the token at positions[r] of slot slot_of_row[r]; -1: none.

    A slot's content depends on its position alone, whatever slot or row it is in.
    """

    positions: tuple[int, ...]
    slot_of_row: tuple[int, ...]
    dtype: str = "bfloat16"
    head_dim: int = 128
    group: int = 4
    kv_heads: int = 1
    capacity: int = 272

    @property
    def rows(self) -> int:
        return len(self.positions)

    @property
    def slots(self) -> int:
        return max(self.slot_of_row) + 1

    @property
    def q_heads(self) -> int:
        return self.group * self.kv_heads

    @cached_property
    def sizes(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype, "rows": self.rows, "num_heads": self.q_heads, "num_kv_heads": self.kv_heads,
            "head_dim": self.head_dim, "epsilon": EPSILON, "capacity": self.capacity,
        }  # fmt: skip

    def inputs(self) -> dict[str, Array]:
        """What both ways of computing it read; the cache up to each position."""
        kind = ELEMENTS[self.dtype]
        cache = (self.slots, self.capacity, self.kv_heads, self.head_dim)
        arrays = {
            "qkv": emulation.poisoned((self.rows, (self.q_heads + 2 * self.kv_heads) * self.head_dim), np.float32),
            "q_gain": filled(1, (self.head_dim,)), "k_gain": filled(2, (self.head_dim,)),
            "rope": rope_table(self.capacity, self.head_dim),
            "keys": emulation.poisoned(cache, kind), "values": emulation.poisoned(cache, kind),
        }  # fmt: skip
        for row, (position, slot) in enumerate(zip(self.positions, self.slot_of_row, strict=True)):
            if slot < 0:
                continue
            arrays["qkv"][row] = filled(3 * position + 5, arrays["qkv"].shape[1:])
            arrays["keys"][slot, :position] = filled(3 * position + 3, (position, *cache[2:]), kind)
            arrays["values"][slot, :position] = filled(3 * position + 4, (position, *cache[2:]), kind)
        return arrays

    def slot_records(self) -> Array:
        records = emulation.poisoned((self.slots * 16,), np.float32).view(step.SLOT_STATE)
        for position, slot in zip(self.positions, self.slot_of_row, strict=True):
            if slot >= 0:
                records[slot]["position"] = position
        return records


def step_arrays(case: StepCase, workspace_bytes: int, stride: int) -> dict[str, Array]:
    """The arrays of `plan_attention_step`; the workspace's counters are zero, the rest of it NaN."""
    slot_of_row = emulation.poisoned((case.rows,), np.float32).view(np.int32)
    slot_of_row[:] = case.slot_of_row
    workspace = emulation.poisoned((max(4, workspace_bytes // 4),), np.float32)
    workspace[: 16_384 // 4] = 0
    return {
        **case.inputs(), "attended": emulation.poisoned((case.rows, stride), ELEMENTS[case.dtype]),
        "slot_of_row": slot_of_row, "slots": case.slot_records(), "workspace": workspace,
    }  # fmt: skip


LATER_LINES = 113 * 128 + 5  # more than the blocks that ask for them have threads


def plan_with_later_weights(later: int, **sizes: Any) -> Any:
    """Ranges of `later` are asked for meanwhile."""
    return step.plan_attention_step(ahead=((later, LATER_LINES * 128 + 100), (later + 256, 128), (later, 0)), **sizes)


def run_step(case: StepCase, machine: Any, shape: Any = None, *, ahead: bool = False) -> tuple[Array, Array, Array]:
    """(attended, keys, values) of the decode step's kernel; attended (rows, q_heads, head_dim). ahead: later weights
    are asked for meanwhile."""
    sizes = {name: value for name, value in case.sizes.items() if name != "epsilon"}
    wanted = step.attention_step_workspace_bytes(
        capability=machine.capability, multiprocessors=machine.multiprocessors, **sizes
    )
    width = case.q_heads * case.head_dim
    stride = width + 64
    arrays = step_arrays(case, max(wanted, _bytes_of(shape, case)), stride)
    if ahead:
        arrays["later"] = emulation.poisoned((LATER_LINES * 32 + 25,), np.float32)
    machine.run(
        plan_with_later_weights if ahead else step.plan_attention_step, arrays,
        {"attended", "keys", "values", "workspace"}, attended_stride=stride, shape=shape, **case.sizes,
    )  # fmt: skip
    assert not arrays["workspace"][: min(len(arrays["workspace"]), 4096)].view(np.uint32)[:4096].any() or (
        len(arrays["workspace"]) <= 4
    ), "the counters are not back at zero"
    beyond = arrays["attended"][:, width:].view(np.uint16)
    assert (beyond == beyond.flat[0]).all(), "columns beyond the heads were written"
    attended = arrays["attended"][:, :width].reshape(case.rows, case.q_heads, case.head_dim)
    return attended, arrays["keys"], arrays["values"]


def _bytes_of(shape: Any, case: StepCase) -> int:
    if shape is None or shape.cluster > 1:
        return 16
    return 16_384 + case.rows * case.kv_heads * shape.row_groups * shape.most_splits * int(shape.tile.state_bytes)


def run_separately(case: StepCase, machine: Any) -> tuple[Array, Array, Array]:
    """The same by qkv_finish and attention_decode, one after the other."""
    arrays = case.inputs()
    tables = {
        name: emulation.poisoned((case.rows,), np.float32).view(np.int32) for name in ("row_slots", "row_positions")
    }
    tables["row_slots"][:], tables["row_positions"][:] = case.slot_of_row, case.positions
    queries = emulation.poisoned((case.rows, case.q_heads, case.head_dim), ELEMENTS[case.dtype])
    machine.run(
        step.plan_qkv_finish, {**arrays, **tables, "queries": queries}, {"queries", "keys", "values"}, **case.sizes
    )
    return queries, arrays["keys"], arrays["values"]
