"""The generation loop over a language model whose every answer is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from soprano_cupy.config import ModelConfig
from soprano_cupy.errors import ParameterError
from soprano_cupy.generation import LOOP_LENGTH, Generation, LoopCheck, Request, generate
from soprano_cupy.runner import KVCache, LanguageModelRunner
from soprano_cupy.sampling import SamplingParams

VOCAB, STOP = 40, 3


class TokenCache(KVCache):
    """Holds the ids themselves in place of keys and values."""

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.lengths = np.zeros(slots, np.int32)
        self.ids = np.full((slots, capacity), -1)

    def move(self, source: int, target: int) -> None:
        self.ids[target], self.lengths[target] = self.ids[source], self.lengths[source]


class Counting(LanguageModelRunner):
    """After ... a comes a + 1 (or, at `ends[first id]`, [STOP]); the state spells the whole sequence's sum."""

    config = ModelConfig(VOCAB, 4, 1, 1, 1, 4, 4, 64, 1e4, 1e-6, True, STOP)
    device, dtype, attention, reason = "cpu", "float64", "standard", "test"

    def __init__(self, ends: dict[int, int] | None = None, step: float = 1000.0) -> None:
        self.ends, self.step, self.calls = ends or {}, step, []

    def new_cache(self, slots: int, capacity: int) -> TokenCache:
        return TokenCache(slots, capacity)

    def extend(self, cache: KVCache, ids: np.ndarray, cu_seqlens: np.ndarray, *, last_only: bool = False) -> np.ndarray:
        assert isinstance(cache, TokenCache)
        assert last_only
        self.calls.append(len(cu_seqlens) - 1)
        states = []
        for slot, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
            length = cache.lengths[slot]
            cache.ids[slot, length : length + end - start] = ids[start:end]
            cache.lengths[slot] += end - start
            held = cache.ids[slot, : cache.lengths[slot]]
            following = STOP if held[-1] == self.ends.get(int(held[0])) else (held[-1] + 1) % VOCAB
            states.append([following, held[0], len(held) * self.step, held.sum()])
        return np.array(states, np.float64)

    def logits(self, states: np.ndarray) -> np.ndarray:
        scores = np.zeros((len(states), VOCAB))
        scores[np.arange(len(states)), states[:, 0].astype(int)] = 10
        return scores


def request(*ids: int, limit: int = 20, stream: int = 0, **params: float) -> Request:
    return Request(np.array(ids, np.int32), SamplingParams(max_new_tokens=limit, seed=1, **params), stream)


def test_state_j_is_the_one_that_predicts_token_j_and_stop_has_none() -> None:
    (out,) = generate(Counting({10: 13}), [request(10, 11)])
    assert out.tokens.tolist() == [12, 13, STOP]
    assert out.states[:, 0].tolist() == [12, 13]
    assert out.states[:, 3].tolist() == [21, 33]
    assert out.finish_reason == "stop"
    assert out.tokens.dtype == np.int32


def test_limits_end_with_length() -> None:
    (out,) = generate(Counting(), [request(10, limit=5)])
    assert (out.tokens.tolist(), out.finish_reason, len(out.states)) == ([11, 12, 13, 14, 15], "length", 5)


def test_the_models_positions_are_a_limit_too() -> None:
    (out,) = generate(Counting(), [request(*range(10, 40), *range(0, 30), limit=100)])  # 60 of 64 positions
    assert len(out.tokens) == 5  # the fifth is predicted from the 64th position
    assert out.finish_reason == "length"


def test_a_prompt_longer_than_the_model_reads_is_refused() -> None:
    with pytest.raises(ParameterError, match="65 tokens; this model reads at most 64"):
        generate(Counting(), [request(*[5] * 65)])


def test_stop_at_once_gives_no_states() -> None:
    (out,) = generate(Counting({10: 10}), [request(10)])
    assert out.tokens.tolist() == [STOP]
    assert out.states.shape == (0, 4)


def test_sequences_that_end_leave_the_batch_and_the_others_do_not_notice() -> None:
    ends = {10: 12, 11: 18, 12: 13, 13: 26, 14: 14}
    runner = Counting(ends)
    prompts = [request(first) for first in ends]
    together = generate(runner, prompts)
    for prompt, out in zip(prompts, together, strict=True):
        (alone,) = generate(Counting(ends), [prompt])
        np.testing.assert_array_equal(out.tokens, alone.tokens)
        np.testing.assert_array_equal(out.states, alone.states)
    assert runner.calls == [5, 4, 3, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1]


def test_repetition_penalty_sees_the_prompt_and_what_was_said() -> None:
    class Stubborn(Counting):
        def logits(self, states: np.ndarray) -> np.ndarray:
            scores = np.full((len(states), VOCAB), -5.0)
            scores[:, [20, 21, 22]] = 6.0, 5.5, 5.2
            return scores

    (out,) = generate(Stubborn(), [request(20, limit=3)])
    assert out.tokens.tolist() == [21, 22, 20]  # 6 / 1.2 = 5.0 < 5.2, then 5.0 against 5.5 / 1.2 and 5.2 / 1.2
    (out,) = generate(Stubborn(), [request(20, limit=3, repetition_penalty=1.0)])
    assert out.tokens.tolist() == [20, 20, 20]


def test_draws_depend_on_seed_stream_and_position_alone() -> None:
    class Flat(Counting):
        def logits(self, states: np.ndarray) -> np.ndarray:
            scores = np.zeros((len(states), VOCAB))
            scores[:, STOP] = -100
            return scores

    flat = [request(5, stream=i, temperature=1.0, limit=12) for i in range(4)]
    together = [out.tokens.tolist() for out in generate(Flat(), flat)]
    alone = [generate(Flat(), [r])[0].tokens.tolist() for r in flat]
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) == 4


def test_loop_check_counts_up_and_down() -> None:
    check = LoopCheck()
    assert not any(check.update(0.0) for _ in range(LOOP_LENGTH))
    assert not check.update(300.0)  # not under 300: one back
    assert not check.update(0.0)
    assert check.update(299.0)
    assert check.update(1e9), "once stuck, a sentence stays stuck"
    fresh = LoopCheck()
    assert not any(fresh.update(distance) for distance in [400.0, 10.0] * 100)


def generate_stuck(retries: int) -> tuple[Generation, Counting]:
    """Greedy attempts crawl (their states hardly move); drawn ones, whose scores differ, do not."""

    class Crawling(Counting):
        def extend(
            self, cache: KVCache, ids: np.ndarray, cu_seqlens: np.ndarray, *, last_only: bool = False
        ) -> np.ndarray:
            states = super().extend(cache, ids, cu_seqlens, last_only=last_only)
            if cache.lengths[0] == 1:
                self.attempt = getattr(self, "attempt", -1) + 1
            states[:, 2] *= 1.0 if self.attempt else 1e-6
            return states

    runner = Crawling()
    (out,) = generate(runner, [request(5, limit=30)], retries=retries)
    return out, runner


def test_a_stuck_sentence_is_made_again_and_given_up_early() -> None:
    out, runner = generate_stuck(retries=3)
    assert not out.stuck
    assert len(out.tokens) == 30
    assert len(runner.calls) == LOOP_LENGTH + 2 + 30  # the first attempt ends where the check fires


def test_without_retries_a_stuck_sentence_is_kept_and_marked() -> None:
    out, runner = generate_stuck(retries=0)
    assert out.stuck
    assert len(out.tokens) == len(runner.calls) == 30


def test_requests_with_different_limits() -> None:
    outs = generate(Counting(), [request(10, limit=2), request(20, limit=7), request(30, limit=1)])
    assert [len(out.tokens) for out in outs] == [2, 7, 1]


@pytest.mark.parametrize("count", [1, 7])
def test_one_prefill_for_all(count: int) -> None:
    runner = Counting()
    generate(runner, [request(10, limit=1) for _ in range(count)])
    assert runner.calls == [count]
