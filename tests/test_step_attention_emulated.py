"""A decode step's attention, run on the CPU: bit by bit what its parts give, and its faults are caught."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import emulation
import numpy as np
import pytest
from decode_calls import MANY, NONE, Call
from decode_calls import run as run_decode
from numerics import same_bits
from step_attention import StepCase, run_separately, run_step
from step_machine import Emulated

from soprano_cupy.gpu import attention_step

Array = np.ndarray[Any, Any]
POSITIONS, SLOTS = (0, 1, 62, 63, 64, 127, 128, 200, 256), (3, -1, 0, 5, 1, 7, 4, 2, 6)


def decoded(case: StepCase, queries: Array, keys: Array, values: Array, row: int, arch: int) -> Array:
    """A row by attention_decode.cu, (q_heads, head_dim)."""
    slot = case.slot_of_row[row]
    lengths = np.array([case.positions[row] + 1], np.int32)
    call = Call(queries[row : row + 1, None], keys[slot : slot + 1], values[slot : slot + 1], kv_lengths=lengths)
    return run_decode(call, NONE, arch)[0][0, 0]


def assert_as_separately(case: StepCase, machines: list[Emulated]) -> None:
    """Bit for bit what qkv_finish and attention_decode give, and nothing else written."""
    queries, keys, values = run_separately(case, machines[0])
    live = [row for row, slot in enumerate(case.slot_of_row) if slot >= 0]
    expected = {row: decoded(case, queries, keys, values, row, machines[0].arch) for row in live}
    for machine in machines:
        attended, new_keys, new_values = run_step(case, machine)
        for row in range(case.rows):
            if row in expected:
                assert same_bits(attended[row].copy(), expected[row]), f"position {case.positions[row]}"
            else:
                assert np.isnan(attended[row].astype(np.float32)).all()
        assert same_bits(new_keys, keys)
        assert same_bits(new_values, values)


@pytest.mark.parametrize(
    ("dtype", "arch", "head_dim", "group", "kv_heads"),
    [
        ("bfloat16", 900, 128, 4, 1), ("bfloat16", 800, 64, 3, 2), ("float16", 750, 128, 8, 1),
        ("float16", 900, 32, 40, 1),
    ],
)  # fmt: skip
def test_a_step_has_the_bits_of_its_parts(dtype: str, arch: int, head_dim: int, group: int, kv_heads: int) -> None:
    case = StepCase(POSITIONS, SLOTS, dtype, head_dim, group, kv_heads)
    assert_as_separately(case, [Emulated(arch, MANY), Emulated(arch, NONE)])


def test_every_way_of_sharing_gives_the_same_bits() -> None:
    """Clusters of 2, 4 and 8, the workspace, one block; one stage and two; threads in the other order."""
    case = StepCase(POSITIONS[5:], SLOTS[5:])
    expected = run_step(case, Emulated(800, NONE))[0]
    tile = attention_step.decode.select_tile((9, 0), "bfloat16", 128, 4)
    for splits, cluster, stages in ((2, 2, 2), (4, 4, 1), (8, 8, 2), (3, 1, 2), (5, 1, 1)):
        staged = replace(tile, stages=stages)
        shape = attention_step.AttentionStepShape(staged, 1, splits, cluster, 4, 5)
        for options in ({}, {"reverse": True}):
            machine = Emulated(900 if cluster > 1 else 800, MANY, **options)
            assert same_bits(run_step(case, machine, shape)[0], expected)


@pytest.mark.parametrize("arch", [800, 900])
def test_weights_are_asked_for_meanwhile(arch: int) -> None:
    """Without another bit of the result, and nothing beyond the weights is asked for."""
    case = StepCase(POSITIONS[5:], SLOTS[5:], head_dim=32, group=4)
    machine = Emulated(arch, MANY)
    for one, other in zip(run_step(case, machine, ahead=True), run_step(case, machine), strict=True):
        assert same_bits(one, other)


def test_splits_of_several_blocks() -> None:
    """From 2,049 keys on a split has two blocks."""
    case = StepCase((2047, 2048, 2180), (1, 0, 2), head_dim=32, group=4, capacity=2200)
    assert_as_separately(case, [Emulated(900, MANY), Emulated(800, MANY), Emulated(800, NONE)])


@pytest.mark.parametrize("guess", ["{-1, 0}", "{5, 271}", "{0, 100}"])
def test_a_wrong_guess_costs_time_only(tmp_path: Path, guess: str) -> None:
    """Slot and position read before the kernels before are done may be those of an earlier step."""
    text = "    guessed.settle(params, -1);"
    source = (emulation.KERNELS / "attention_step.cu").read_text(encoding="utf-8")
    assert source.count(text) == 1
    mutant = tmp_path / "mutant.cu"
    mutant.write_text(source.replace(text, f"guessed = {guess};"), encoding="utf-8")
    case = StepCase(POSITIONS, SLOTS)
    expected = run_step(case, Emulated(900, MANY))
    machine = Emulated(900, MANY)
    machine.source = mutant
    for array, other in zip(run_step(case, machine), expected, strict=True):
        assert same_bits(array, other)


def test_positions_outside_the_cache_are_left_alone() -> None:
    """A record that nobody has written; and a position at the very end works."""
    case = StepCase((271, 300, -5), (0, 1, 2))
    inside = StepCase((271,), (0,))
    arrays: list[Array] = []
    for c in (case, inside):
        fixed = StepCase(tuple(max(0, min(p, 271)) for p in c.positions), c.slot_of_row)
        object.__setattr__(fixed, "slot_records", c.slot_records)
        arrays.append(run_step(fixed, Emulated(900, MANY))[0])
    assert same_bits(arrays[0][:1], arrays[1])
    assert np.isnan(arrays[0][1:].astype(np.float32)).all()


@pytest.mark.parametrize("fault", [{"skip_barrier": n} for n in (1, 2)] + [{"skip_wait": n} for n in range(3)])
def test_faults_of_a_cluster_are_caught(fault: dict[str, int]) -> None:
    """Barriers behind queries and scores; waits for keys, for values, and for the states that other blocks send."""
    case = StepCase((256,), (0,))
    run_step(case, Emulated(900, MANY))
    with pytest.raises(emulation.EmulationError, match=r"race|in flight"):
        run_step(case, Emulated(900, MANY, **fault))


@pytest.mark.parametrize(
    ("text", "instead", "error"),
    [
        ("states.expect(splits.count)", "states.expect(splits.count + 1)", "deadlock"),
        ("states.expect(splits.count)", "states.expect(splits.count - 1)", "more bytes|race"),
        ("if (has_newest) put_value", "if (false) put_value", None),
        ("if (has_newest) put_key", "if (false) put_key", None),
    ],
)
def test_mistakes_of_a_cluster_are_caught(tmp_path: Path, text: str, instead: str, error: str | None) -> None:
    source = (emulation.KERNELS / "attention_step.cu").read_text(encoding="utf-8")
    assert source.count(text) == 1
    mutant = tmp_path / "mutant.cu"
    mutant.write_text(source.replace(text, instead), encoding="utf-8")
    case = StepCase((256, 30), (0, 1))
    machine = Emulated(900, MANY, reverse=True)
    expected = run_step(case, machine)[0]
    machine.source = mutant
    if error is None:
        assert not same_bits(run_step(case, machine)[0], expected)
        return
    with pytest.raises(emulation.EmulationError, match=error):
        run_step(case, machine)
