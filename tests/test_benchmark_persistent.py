"""The soak of the persistent kernel and the table of who is faster: what they count and say, without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks/ lies beside the package, and is no part of it

from benchmarks import persistent_soak, persistent_table
from benchmarks.persistent_soak import Tally, Worker, difference, digest_of
from soprano_cupy.errors import DeviceError
from soprano_cupy.generation import Generation, Request
from soprano_cupy.sampling import SamplingParams

VOCAB = 20


def made(tokens: list[int], shift: float = 0.0) -> Generation:
    states = np.arange(len(tokens) * 4, dtype=np.float32).reshape(-1, 4) + np.float32(shift)
    return Generation(np.array(tokens, np.int32), states, "length")


def graphs(lead: float) -> Any:
    """A model whose logits are 0.01 apart between the two paths, and whose best score leads by `lead`."""

    def logits(states: np.ndarray) -> np.ndarray:
        scores = np.zeros((2, VOCAB))
        scores[:, 5] = lead
        scores[0] += 0.01
        return scores

    return SimpleNamespace(runner=SimpleNamespace(logits=logits))


REQUEST = Request(np.array([1, 2], np.int32), SamplingParams())


def test_results_that_are_the_same() -> None:
    assert difference(graphs(1.0), REQUEST, made([5, 6, 7]), made([5, 6, 7])) == ""


@pytest.mark.parametrize(("lead", "complaint"), [(0.03, ""), (1.0, "token 1 differs, 1 ahead")])
def test_tokens_may_differ_where_scores_are_close(lead: float, complaint: str) -> None:
    assert difference(graphs(lead), REQUEST, made([6, 8, 7]), made([6, 5, 7])) == complaint


def test_states_may_not_be_far_apart() -> None:
    assert "a state differs by" in difference(graphs(1.0), REQUEST, made([5, 6, 7], 5.0), made([5, 6, 7]))


def test_drawn_tokens_may_differ() -> None:
    drawn = Request(REQUEST.ids, SamplingParams(0.7, seed=1))
    assert difference(graphs(9.0), drawn, made([5, 6, 7]), made([5, 9, 7])) == ""


def test_repeats_must_have_the_first_ones_bits() -> None:
    tally = Tally()
    assert tally.same_as_first((1, 1, 0), digest_of([made([5, 6])]))
    assert tally.same_as_first((1, 1, 0), digest_of([made([5, 6])]))
    assert not tally.same_as_first((1, 1, 0), digest_of([made([5, 6], 1e-6)]) + b"x")
    assert tally.counts["repeats"] == 2
    assert digest_of([made([5, 6])]) != digest_of([made([5, 6], 0.5)])


class Fine:
    failure: str | None = None


def worker(tally: Tally, seed: int = 0) -> Worker:
    runner = SimpleNamespace(persistent=Fine())
    model: Any = SimpleNamespace(runner=runner, config=SimpleNamespace(vocab_size=VOCAB))
    return Worker("worker", seed, model, model, [1, 2], tally)


def test_a_request_depends_on_its_key_alone() -> None:
    one, other = worker(Tally(), 1), worker(Tally(), 2)
    first, second = one._requests((7, 2, 1)), other._requests((7, 2, 1))
    assert [r.params for r in first] == [r.params for r in second]
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
    keys = [one._choose() for _ in range(200)]
    assert len(set(keys)) < 190  # some come again
    assert {voices for _, voices, _ in keys} == {1, 2}


def test_errors_and_fallbacks_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    tally = Tally()
    asked = worker(tally)
    calls = iter([DeviceError("broken"), None])

    def generate(runner: Any, requests: list[Request]) -> list[Generation]:
        error = next(calls)
        if error is not None:
            raise error
        asked.model.runner.persistent.failure = "waited too long"
        return [made([5, 6]) for _ in requests]

    monkeypatch.setattr(persistent_soak, "generate", generate)
    monkeypatch.setattr(persistent_soak, "GIVEN_UP", 0.0)
    monkeypatch.setattr(persistent_soak, "BY_GRAPHS", 0.0)
    asked.run(float("inf"))
    assert tally.counts["errors"] == tally.counts["fallbacks"] == 1
    assert tally.counts["prompts"] >= 1
    assert any("broken" in line for line in tally.complaints)
    assert tally.since == {}


def test_the_table_is_printed_as_it_stands_in_the_source() -> None:
    class Path:
        def use(self, setting: str) -> None:
            self.setting = setting

        def problem(self, voices: int, *, drawn: bool) -> str | None:
            return "8 voices are too many" if voices == 8 else None

    class Runner:
        persistent = Path()

        def benchmark_step(
            self, voices: int, context: int, steps: int, repeats: int, temperature: float
        ) -> list[float]:
            return [1e-6 * (100 * voices + (self.persistent.setting == "1") + 10 * (temperature > 0))] * repeats

    rows, lines = persistent_table.measure(Runner(), 256, 3)
    assert lines[0] == "        (1, False): StepTimes(100.0, 101.0),"
    assert lines[-1] == "        (4, True): StepTimes(410.0, 411.0),"
    assert len(lines) == 6
    assert len(rows) == 12
    assert (rows[1].case, rows[1].value) == ("step/B1/greedy/persistent", pytest.approx(101.0))
