"""A step's sampling, run on the CPU: the package's own choices, its ends of sequences, and rows that fail alone."""

from __future__ import annotations

from typing import Any

import emulation
import numpy as np
import pytest
from numerics import same_bits
from step_attention import filled
from step_machine import Emulated
from step_sampling import END_TOKEN, Sampling, Voice, voices_of_all_kinds

from soprano_cupy.generation import LOOP_LENGTH, Request
from soprano_cupy.gpu import step
from soprano_cupy.sampling import SamplingParams


def random_steps(sampling: Sampling, machine: Emulated, steps: int, scale: float = 3.0) -> None:
    rng = np.random.default_rng(5)
    for _ in range(steps):
        for row in range(len(sampling.arrays["logits"])):
            logits = (scale * rng.standard_normal(sampling.vocab)).astype(np.float32)
            sampling.fill(row, logits, rng.standard_normal(sampling.hidden).astype(np.float32))
        sampling.step(machine)


@pytest.mark.parametrize(
    ("vocab", "hidden", "dtype", "rows", "steps", "arch"),
    [
        (700, 48, "bfloat16", 60, 3, 800),
        (301, 300, "float16", 10, 3, 750),  # an odd vocabulary; more columns than threads
        (8192, 512, "bfloat16", 5, 2, 900),
        (20_001, 40, "bfloat16", 3, 2, 900),  # too many scores for registers
    ],
)
def test_steps_are_those_of_the_package(vocab: int, hidden: int, dtype: str, rows: int, steps: int, arch: int) -> None:
    voices = voices_of_all_kinds(rows, seed=vocab)
    order = np.random.default_rng(0).permutation(rows).tolist()
    sampling = Sampling(voices, [*order, -1], vocab=vocab, hidden=hidden, dtype=dtype)
    sampling.fill(rows, np.full(vocab, np.nan, np.float32), np.full(hidden, np.nan, np.float32))
    random_steps(sampling, Emulated(arch), steps)
    assert np.isnan(sampling.arrays["next_residual"][rows]).all()
    assert sampling.arrays["next_slot_of_row"][rows] == 99


@pytest.mark.parametrize("kind", ["rounded", "all equal", "hardly different", "two heaps", "one possible", "huge"])
def test_scores_that_are_hard_to_tell_apart(kind: str) -> None:
    """Equal scores go by their ids; scores that fall into one bin together take more levels of the search."""
    vocab, voices = 700, voices_of_all_kinds(16, seed=3)
    sampling = Sampling(voices, range(16), vocab=vocab)
    rng = np.random.default_rng(1)
    for row in range(16):
        logits = (3 * rng.standard_normal(vocab)).astype(np.float32)
        if kind == "rounded":
            logits = np.round(logits)
        elif kind == "all equal":
            logits[:] = 1.5
        elif kind == "hardly different":
            logits = np.float32(10) + np.float32(1e-5) * rng.integers(0, 40, vocab).astype(np.float32)
            logits[5] = -300
        elif kind == "two heaps":
            logits = np.where(rng.random(vocab) < 0.5, np.float32(8), np.nextafter(np.float32(8), np.float32(9)))
        elif kind == "one possible":
            logits[:] = -np.inf
            logits[13] = -5
        else:
            logits *= np.float32(1e37)
        sampling.fill(row, logits, rng.standard_normal(sampling.hidden).astype(np.float32))
    sampling.step(Emulated())


def test_hundreds_of_draws_are_those_of_the_package() -> None:
    """No mismatch is expected: a boundary comes within 1e-6 of the random number in one case of some 100,000."""
    sampling = Sampling(voices_of_all_kinds(250, seed=11), range(250), vocab=130, hidden=16)
    random_steps(sampling, Emulated(), 1, scale=2.0)


def voice(give_up: bool = False, **changes: Any) -> Voice:
    params = {"repetition_penalty": 1.0, "max_new_tokens": 1000, "seed": 1, **changes}
    return Voice(Request(np.arange(4, dtype=np.int32) + 10, SamplingParams(**params)), 24, give_up)


def test_ends_of_sequences() -> None:
    """By the end token, by the limit, by the cache, by a voice that is stuck; a stuck one that goes on says so."""
    voices = [voice(), voice(max_new_tokens=3), voice(), voice(give_up=True), voice(max_new_tokens=LOOP_LENGTH + 5)]
    sampling = Sampling(voices, [4, 2, 0, 1, 3], hidden=48)
    rng, machine = np.random.default_rng(0), Emulated()
    for count in range(1, 23):
        for row, slot in enumerate((4, 2, 0, 1, 3)):
            logits = rng.standard_normal(sampling.vocab).astype(np.float32)
            logits[END_TOKEN] = 50 if slot == 0 and count == 5 else -50
            still = slot in (3, 4)  # its state hardly changes
            residual = np.ones(48, np.float32) if still else (100 * rng.standard_normal(48)).astype(np.float32)
            sampling.arrays["final_gain"][:] = 100
            sampling.fill(row, logits, residual + np.float32(0.001 * count))
        sampling.step(machine)
    assert [v.status for v in voices] == [step.STOP, step.LENGTH, step.LENGTH, step.STUCK, step.LENGTH]
    assert [len(v.tokens) for v in voices] == [5, 3, 21, LOOP_LENGTH + 2, LOOP_LENGTH + 5]
    assert [v.check.stuck for v in voices] == [False, False, False, True, True]
    assert sampling.arrays["slot_of_row"].tolist() == [-1] * 5


@pytest.mark.parametrize("bad", [np.nan, np.inf, "nothing"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_no_numbers_fail_their_own_row(bad: Any, temperature: float) -> None:
    voices = [voice(temperature=temperature), voice(temperature=temperature)]
    sampling = Sampling(voices, [0, 1])
    rng = np.random.default_rng(0)
    for row in range(2):
        sampling.fill(row, rng.standard_normal(300).astype(np.float32), rng.standard_normal(48).astype(np.float32))
    if bad == "nothing":
        sampling.arrays["logits"][0] = -np.inf
    else:
        sampling.arrays["logits"][0, 299] = -bad if np.isnan(bad) else bad
    voices[0].status = step.FAILED
    seen = sampling.arrays["seen"][0].copy()
    sampling.step(Emulated())
    word = sampling.arrays["progress"][0]
    assert (step.progress_status(word), step.progress_count(word)) == (step.FAILED, 0)
    assert sampling.arrays["slots"][0]["status"] == step.FAILED
    assert sampling.arrays["next_slot_of_row"].tolist() == [-1, 1]
    assert (sampling.arrays["tokens"][0] == -1).all()
    np.testing.assert_array_equal(sampling.arrays["seen"][0], seen)
    assert np.isnan(sampling.arrays["next_residual"][0]).all()


def test_a_slot_that_the_host_has_ended_leaves_its_row() -> None:
    sampling = Sampling([voice(), voice()], [1, 0])
    sampling.arrays["slots"][1]["status"] = step.LENGTH
    for row in range(2):
        sampling.fill(row, filled(row, (300,)), filled(row + 9, (48,)))
    sampling.launch(Emulated())
    assert sampling.arrays["next_slot_of_row"].tolist() == [-1, 0]
    assert sampling.arrays["progress"][1] == 0
    assert np.isnan(sampling.arrays["next_residual"][0]).all()


def test_rows_of_a_prefill_go_to_other_rows_of_the_step() -> None:
    sampling = Sampling([voice(), voice(), voice(max_new_tokens=1)], [2, 0, 1])
    sampling.arrays["target_rows"] = np.array([1, 0, 2], np.int32)
    for row in range(3):
        sampling.fill(row, filled(row, (300,)), filled(row + 9, (48,)))
    sampling.launch(Emulated())
    a = sampling.arrays
    assert a["next_slot_of_row"].tolist() == [0, -1, 1]
    sampling.check_embedded(0, int(a["tokens"][0, 0]))
    sampling.check_embedded(2, int(a["tokens"][1, 0]))
    assert np.isnan(a["next_residual"][1]).all()


def test_the_next_input_may_take_the_place_of_the_present_one() -> None:
    apart, together = (Sampling(voices_of_all_kinds(6), range(6)) for _ in range(2))
    for name in ("residual", "square_sums"):
        together.arrays[f"next_{name}"] = together.arrays[name]
    for sampling in (apart, together):
        for row in range(6):
            sampling.fill(row, filled(row, (300,)), filled(row + 9, (48,)))
        sampling.launch(Emulated())
    for name in ("next_residual", "next_hidden", "next_square_sums", "states", "tokens"):
        columns = slice(None, 48 if name == "next_residual" else None)
        assert same_bits(together.arrays[name][..., columns].copy(), apart.arrays[name][..., columns].copy())


def test_the_order_of_threads_changes_nothing() -> None:
    results = []
    for options in ({}, {"reverse": True}):
        sampling = Sampling(voices_of_all_kinds(20), range(20), vocab=700)
        random_steps(sampling, Emulated(800, **options), 2)
        results.append(b"".join(sampling.arrays[name].tobytes() for name in sorted(sampling.arrays)))
    assert results[0] == results[1]


@pytest.mark.parametrize("barrier", range(6))
def test_missing_barriers_of_the_search_are_caught(barrier: int) -> None:
    """Of the warps' extremes, the cells, the bins, the choice, of a second level, the candidates and the result."""
    drawn = Sampling([voice(temperature=3.0, top_p=0.9)], [0], vocab=2000)
    drawn.fill(0, np.round(filled(0, (2000,)) * 4) / 4, filled(1, (48,)))
    drawn.launch(Emulated())
    with pytest.raises(emulation.EmulationError, match=r"race|outside"):
        drawn.launch(Emulated(skip_barrier=barrier))
