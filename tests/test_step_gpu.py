"""A generation step's own kernels on a GPU, at real sizes: against float64, the package's sampling, and one another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from attention_reference import assert_accurate, plain, reference
from step_attention import ELEMENTS, StepCase, run_separately, run_step
from step_machine import OnGpu
from step_sampling import Sampling, voices_of_all_kinds

from soprano_cupy.device import cuda_problem
from soprano_cupy.gpu import attention_step, step
from soprano_cupy.gpu.program import driver_problem

pytestmark = pytest.mark.gpu

CASES = (
    StepCase((0, 1, 63, 64, 255, 256, 700, 1023, 5), (3, 0, 1, 7, 4, 2, 6, 5, -1), capacity=1024),
    StepCase((0, 1, 63, 64, 255, 256, 700, 5), (3, 0, 1, 7, 4, 2, 6, -1), "float16", 64, 3, 2, 1024),
    StepCase((0, 200, 700, 5), (3, 0, 1, -1), "float16", 32, 40, 1, 1024),
    StepCase((2047, 2048, 5000), (1, 0, 2), capacity=6000),
    StepCase(tuple(range(0, 700, 7)), tuple(range(100)), capacity=1024),
)


@pytest.fixture(scope="module")
def machine() -> OnGpu:
    problem = cuda_problem() or driver_problem()
    if problem is not None:
        pytest.skip(problem)
    return OnGpu()


def served(case: StepCase, machine: OnGpu) -> StepCase:
    """The case in a dtype that the GPU has matrix products for."""
    return case if machine.capability >= (8, 0) else replace(case, dtype="float16")


def same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    return np.array_equal(first.view(np.uint16), second.view(np.uint16))


@pytest.mark.parametrize("case", CASES, ids=[f"{c.dtype}-{c.head_dim}-{c.group}-{c.capacity}" for c in CASES])
def test_attention_is_accurate(machine: OnGpu, case: StepCase) -> None:
    """Against float64 of the rounded queries, keys and values that qkv_finish makes of the same products."""
    case = served(case, machine)
    queries, keys, values = run_separately(case, machine)
    attended, new_keys, new_values = run_step(case, machine)
    assert same_bits(new_keys, keys)
    assert same_bits(new_values, values)
    live = [row for row, slot in enumerate(case.slot_of_row) if slot >= 0]
    slots = [case.slot_of_row[row] for row in live]
    lengths = np.array([case.positions[row] + 1 for row in live], np.int32)
    call = (queries[live][:, None], keys[slots], values[slots])
    expected, _ = reference(*call, causal=True, kv_lengths=lengths)
    assert_accurate(attended[live][:, None], expected, plain(*call, causal=True, kv_lengths=lengths))
    for row in set(range(case.rows)) - set(live):
        assert np.isnan(attended[row].astype(np.float32)).all()


def test_every_way_of_sharing_gives_the_same_bits(machine: OnGpu) -> None:
    case = served(CASES[0], machine)
    expected = run_step(case, machine)[0]
    tile = attention_step.decode.select_tile(machine.capability, case.dtype, 128, 4)
    shapes = [(1, 1, 1), (16, 1, 1), (5, 1, 1)]
    if machine.capability >= (8, 0):
        shapes += [(1, 1, 2), (8, 1, 2)]
    if machine.capability >= (9, 0):
        shapes += [(8, 8, 1), (8, 8, 2), (4, 4, 1), (2, 2, 2)]
    for splits, cluster, stages in shapes:
        shape = attention_step.AttentionStepShape(replace(tile, stages=stages), 1, splits, cluster, 4, 16)
        for _ in range(5):
            assert same_bits(run_step(case, machine, shape)[0], expected), f"{splits}, {cluster}, {stages}"


@pytest.mark.parametrize(
    ("vocab", "hidden", "rows"), [(8192, 512, 65), (2240, 256, 3), (8191, 96, 9), (50_001, 768, 5)]
)
def test_steps_are_those_of_the_package(machine: OnGpu, vocab: int, hidden: int, rows: int) -> None:
    dtype = "bfloat16" if machine.capability >= (8, 0) else "float16"
    order = np.random.default_rng(0).permutation(rows).tolist()
    sampling = Sampling(voices_of_all_kinds(rows, seed=vocab), order, vocab=vocab, hidden=hidden, dtype=dtype)
    rng: Any = np.random.default_rng(5)
    for _ in range(4):
        for row in range(rows):
            logits = (3 * rng.standard_normal(vocab)).astype(np.float32)
            sampling.fill(row, logits, rng.standard_normal(hidden).astype(np.float32))
        sampling.step(machine)


def test_draws_of_hard_scores(machine: OnGpu) -> None:
    """Thousands at once: rounded, hardly different, and ordinary scores."""
    dtype = "bfloat16" if machine.capability >= (8, 0) else "float16"
    rows, vocab = 3000, 1000
    sampling = Sampling(
        voices_of_all_kinds(rows, seed=2), range(rows), vocab=vocab, hidden=64, dtype=dtype, most_tokens=2
    )
    rng = np.random.default_rng(5)
    for row in range(rows):
        logits = (3 * rng.standard_normal(vocab)).astype(np.float32)
        if row % 3 == 1:
            logits = np.round(logits)
        elif row % 3 == 2:
            logits = np.float32(10) + np.float32(1e-5) * rng.integers(0, 40, vocab).astype(np.float32)
        sampling.fill(row, logits, rng.standard_normal(64).astype(np.float32))
    sampling.step(machine)


def test_logits_that_are_no_numbers(machine: OnGpu) -> None:
    dtype = "bfloat16" if machine.capability >= (8, 0) else "float16"
    sampling = Sampling(voices_of_all_kinds(4, seed=1), range(4), vocab=8192, hidden=512, dtype=dtype)
    for row, bad in enumerate((np.nan, -np.nan, np.inf, -np.inf)):
        sampling.fill(
            row, np.random.default_rng(row).standard_normal(8192).astype(np.float32), np.ones(512, np.float32)
        )
        sampling.arrays["logits"][row, 77 * row] = bad
    sampling.launch(machine)
    statuses = step.progress_status(sampling.arrays["progress"]).tolist()
    assert statuses == [step.FAILED] * 3 + [step.RUNNING]


def test_repeated_runs_have_equal_bits(machine: OnGpu) -> None:
    case = served(CASES[4], machine)
    expected = run_step(case, machine)[0]
    assert same_bits(run_step(case, machine, ahead=True)[0], expected)
    assert expected.dtype == ELEMENTS[case.dtype]
    for _ in range(20):
        assert same_bits(run_step(case, machine)[0], expected)
