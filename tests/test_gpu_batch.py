"""What the GPU engine plans for a batch, without a GPU: sizes, buffers, groups of prompts, rounds read from words."""

from __future__ import annotations

import gc
import math
import threading
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from soprano_cupy import DeviceError
from soprano_cupy.generation import Request
from soprano_cupy.gpu import qwen3, slots
from soprano_cupy.gpu.batch_sizes import (
    BUCKETS,
    BatchSizes,
    batch_specs,
    bucket_of,
    prompt_capacity,
    prompt_groups,
    sizes_for,
    upload_specs,
)
from soprano_cupy.gpu.rounds import GpuRounds, checked
from soprano_cupy.sampling import SamplingParams
from soprano_cupy.testing import SOPRANO_1_1_80M


def request(length: int, new_tokens: int = 512) -> Request:
    return Request(np.arange(4, 4 + length, dtype=np.int32), SamplingParams(max_new_tokens=new_tokens))


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (8, 8), (9, 16), (65, 128), (1025, 2048)])
def test_the_smallest_bucket_that_holds_the_rows(rows: int, bucket: int) -> None:
    assert bucket_of(rows) == bucket


def test_sizes_follow_the_requests() -> None:
    assert sizes_for([request(40)], 1024) == BatchSizes(1, 1024, 512)
    assert sizes_for([request(40)] * 5, 1024) == BatchSizes(8, 1024, 512)
    assert sizes_for([request(40, 600)], 1024) == BatchSizes(1, 1024, 600)
    assert sizes_for([request(600, 900)], 4096) == BatchSizes(1, 2048, 900)
    assert sizes_for([request(40)], 512) == BatchSizes(1, 512, 512)  # Soprano-80M's positions


def test_a_batch_serves_what_is_no_larger_than_itself() -> None:
    batch = BatchSizes(8, 1024, 512)
    assert batch.serves(BatchSizes(8, 1024, 512))
    assert batch.serves(BatchSizes(1, 512, 1))
    assert not batch.serves(BatchSizes(16, 1024, 512))
    assert not batch.serves(BatchSizes(8, 2048, 512))
    assert not batch.serves(BatchSizes(8, 1024, 513))


def test_memory_of_one_voice_and_of_many() -> None:
    """A slot of 1,024 tokens keeps 8.9 MB of keys and values; one voice needs no more than 30 MB in all."""

    def megabytes(sizes: BatchSizes) -> float:
        specs = batch_specs(SOPRANO_1_1_80M, sizes).values()
        return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in specs) / 1e6

    assert megabytes(BatchSizes(1, 1024, 512)) < 30
    assert megabytes(BatchSizes(1024, 1024, 512)) < 12_000


def test_uploaded_buffers_lie_behind_the_others() -> None:
    """One copy brings them: they are the arena's last buffers, in the order of the upload."""
    sizes = BatchSizes(4, 1024, 512)
    names = list(batch_specs(SOPRANO_1_1_80M, sizes))
    uploaded = list(upload_specs(SOPRANO_1_1_80M, sizes))
    assert names[-len(uploaded) :] == uploaded


def test_a_whole_prompt_always_fits_a_prefill() -> None:
    assert prompt_capacity(BatchSizes(1, 1024, 512)) == 1024
    assert prompt_capacity(BatchSizes(64, 1024, 512)) == 4096
    assert prompt_capacity(BatchSizes(2048, 1024, 512)) == 8192
    assert prompt_capacity(BatchSizes(1, 32768, 512)) == 32768


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([5], [[0]]),
        ([50, 50, 1], [[0, 1], [2]]),
        ([100, 100], [[0], [1]]),
        ([1] * 250, [list(range(100)), list(range(100, 200)), list(range(200, 250))]),
    ],
)
def test_prompts_are_read_in_groups_that_fit(lengths: list[int], groups: list[list[int]]) -> None:
    assert prompt_groups(lengths, 100) == groups


def word(count: int, status: int, *, stuck: bool = False) -> int:
    return count | status << 32 | int(stuck) << 39


class FakeBatch:
    """A batch that is done: tokens, states and last words are given."""

    def __init__(self, tokens: list[list[int]], words: list[int]) -> None:
        longest = max(map(len, tokens))
        self.tokens = np.array([row + [0] * (longest - len(row)) for row in tokens], np.int32)
        self.states = np.arange(self.tokens.size * 2, dtype=np.float32).reshape(*self.tokens.shape, 2)
        self.words = words

    def begin(self, requests: Any, *, give_up: bool) -> None:
        pass

    def wait(self, slot: int, count: int) -> int:
        return self.words[slot]

    def finish(self, count: int) -> list[int]:
        return self.words[:count]


class FakeModel:
    def __init__(self, batch: FakeBatch) -> None:
        self.batch = batch

    def borrowed(self, requests: Any) -> Any:
        from contextlib import nullcontext

        return nullcontext(self.batch)


def rounds(tokens: list[list[int]], words: list[int], *, give_up: bool = False) -> GpuRounds:
    model: Any = FakeModel(FakeBatch(tokens, words))
    return GpuRounds(model, [request(3)] * len(tokens), give_up=give_up)


def test_rounds_of_sequences_that_end_at_different_steps() -> None:
    tokens, words = [[7, 8, 3], [9, 9]], [word(3, slots.STOP), word(2, slots.LENGTH)]
    steps = list(rounds(tokens, words))
    assert [[(s.index, s.token, s.finish_reason) for s in found] for found in steps] == [
        [(0, 7, None), (1, 9, None)],
        [(0, 8, None), (1, 9, "length")],
        [(0, 3, "stop")],
    ]
    assert steps[2][0].state is None  # [STOP] makes no sound
    np.testing.assert_array_equal(steps[1][0].state, [2, 3])


def test_results_drop_the_state_of_the_end_token() -> None:
    first, second = rounds([[7, 8, 3], [9, 9]], [word(3, slots.STOP), word(2, slots.LENGTH, stuck=True)]).results()
    assert (first.tokens.tolist(), len(first.states), first.finish_reason, first.stuck) == ([7, 8, 3], 2, "stop", False)
    assert (second.tokens.tolist(), len(second.states), second.finish_reason) == ([9, 9], 2, "length")
    assert second.stuck


def test_a_stuck_sequence_ends_where_it_is_given_up() -> None:
    found = list(rounds([[7, 8]], [word(2, slots.STUCK, stuck=True)], give_up=True))
    assert len(found) == 1 or found[-1][0].stuck
    assert all(step.finish_reason is None for steps in found for step in steps)


def test_numbers_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(DeviceError, match="not finite"):
        rounds([[7]], [word(1, slots.FAILED)]).results()
    assert checked(word(5, slots.RUNNING)) == slots.RUNNING


def test_buckets_are_powers_of_two() -> None:
    assert tuple(1 << i for i in range(12)) == BUCKETS


class Lent(FakeBatch):
    """A batch that says what has become of it."""

    sizes = BatchSizes(1, 1024, 512)

    def __init__(self) -> None:
        super().__init__([[7, 8, 3]], [word(3, slots.STOP)])
        self.told: list[str] = []

    def settle(self, count: int) -> None:
        assert self in qwen3._borrowed  # its stream is used here
        self.told.append("settled")

    def abandon(self) -> None:
        assert self in qwen3._borrowed
        self.told.append("abandoned")


def lender(batch: Lent) -> Any:
    model: Any = object.__new__(qwen3.GpuLanguageModel)
    model.config, model._lock, model._on_device = SOPRANO_1_1_80M, threading.Lock(), nullcontext()
    model._idle = [batch]
    return model


def test_a_batch_is_known_to_the_module_while_it_is_lent() -> None:
    """So that the garbage collector, which may close a lost stream at any time, finds the batch whole."""
    batch = Lent()
    model = lender(batch)
    assert len(GpuRounds(model, [request(3)], give_up=False).results()) == 1
    assert (batch.told, model._idle) == (["settled"], [batch])
    rounds_ = iter(GpuRounds(model, [request(3)], give_up=False))
    next(rounds_)
    assert batch in qwen3._borrowed
    assert model._idle == []
    lost: dict[str, Any] = {"rounds": rounds_, "model": model}
    lost["lost"] = lost
    del rounds_, model, lost
    gc.collect()
    assert batch.told == ["settled", "settled"]
    assert batch not in qwen3._borrowed


def test_a_batch_behind_an_error_is_not_lent_again() -> None:
    batch = Lent()
    batch.words = [word(1, slots.FAILED)]
    model = lender(batch)
    with pytest.raises(DeviceError, match="not finite"):
        GpuRounds(model, [request(3)], give_up=False).results()
    assert (batch.told, model._idle) == (["abandoned"], [])
    assert batch not in qwen3._borrowed
