"""Penalty, temperature, top-p and the counter-based random numbers."""

from __future__ import annotations

import numpy as np
import pytest

from soprano_cupy.errors import ParameterError
from soprano_cupy.sampling import RETRY_TEMPERATURE, SamplingParams, draw, greedy, penalise, philox, uniform


def philox4x32(counter: list[int], key: list[int]) -> list[int]:
    """All four words, written from the paper's definition, to check the one word that the package keeps."""
    (a, b, c, d), (k, m) = counter, key
    for r in range(10):
        x, y = 0xD2511F53 * a, 0xCD9E8D57 * c
        ka, kb = (k + r * 0x9E3779B9) % 2**32, (m + r * 0xBB67AE85) % 2**32
        a, b, c, d = (y >> 32) ^ b ^ ka, y % 2**32, (x >> 32) ^ d ^ kb, x % 2**32
    return [a, b, c, d]


def test_philox_known_answers() -> None:
    """The first words of the generator's published known-answer tests."""
    assert philox(0, 0, 0) == 0x6627E8D5
    full = 2**64 - 1
    assert philox(full, full, full) == 0x408F276D
    pi_key, pi_position, pi_stream = 0x299F31D0_A4093822, 0x85A308D3_243F6A88, 0x03707344_13198A2E
    assert philox(pi_key, pi_stream, pi_position) == 0xD16CFE09


@pytest.mark.parametrize("numbers", [(1, 2, 3), (2**40 + 5, 2**33 + 7, 2**35 + 9), (2**64 - 1, 0, 1)])
def test_philox_matches_its_definition(numbers: tuple[int, int, int]) -> None:
    seed, stream, position = numbers
    words = [position % 2**32, position >> 32, stream % 2**32, stream >> 32]
    assert philox(seed, stream, position) == philox4x32(words, [seed % 2**32, seed >> 32])[0]


def test_uniform_is_even_and_independent_of_neighbours() -> None:
    draws = np.array([[uniform(7, stream, i) for i in range(4000)] for stream in range(2)])
    counts = np.histogram(draws[0], bins=16, range=(0, 1))[0]
    assert counts.sum() == 4000
    assert ((counts - 250) ** 2 / 250).sum() < 37.7  # chi-squared, 15 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(draws)[0, 1]) < 0.06
    assert uniform(7, 1, 5) == draws[1, 5]


def test_penalty_divides_positive_and_multiplies_negative_scores_of_seen_ids() -> None:
    logits = np.array([[2.0, -2.0, 3.0, 0.0]], np.float32)
    seen = np.array([[True, True, False, True]])
    scores = penalise(logits, seen, np.array([[1.25]], np.float32))
    np.testing.assert_array_equal(scores, np.array([[1.6, -2.5, 3.0, 0.0]], np.float32))


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    assert greedy(np.array([[0.0, 5.0, 5.0], [1.0, 1.0, 1.0]])).tolist() == [1, 0]


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    scores = np.log(np.array([0.1, 0.4, 0.3, 0.2]))
    reached = {
        p: {draw(scores, 1.0, p, u) for u in np.linspace(0, 0.9999, 400)} for p in (0.4, 0.41, 0.7, 0.9, 0.91, 1.0)
    }
    assert reached[0.4] == {1}
    assert reached[0.41] == {1, 2}
    assert reached[0.7] == {1, 2}
    assert reached[0.9] == {1, 2, 3}
    assert reached[0.91] == {0, 1, 2, 3}
    assert reached[1.0] == {0, 1, 2, 3}


def test_draws_follow_the_kept_probabilities() -> None:
    scores = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    picks = np.array([draw(scores, 1.0, 0.9, (i + 0.5) / 20_000) for i in range(20_000)])
    shares = np.bincount(picks, minlength=4) / 20_000
    np.testing.assert_allclose(shares, np.array([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=1e-4)


def test_temperature_sharpens() -> None:
    scores = np.array([0.0, 1.0])
    cold = np.mean([draw(scores, 0.25, 1.0, (i + 0.5) / 5000) for i in range(5000)])
    assert cold == pytest.approx(1 / (1 + np.exp(-4.0)), abs=3e-4)


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-24])
def test_draw_survives_extreme_scores(number: float) -> None:
    scores = np.array([-1e30, 3e38, -np.inf, 1.0])
    assert draw(scores, 1e-3, 0.95, number) == 1
    assert draw(np.zeros(5), 1.0, 1e-300, number) == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "0.5"),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", None),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1),
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.0),
    ],
)
def test_values_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(ParameterError, match=f"{field} = "):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_seeds_and_retries() -> None:
    assert SamplingParams(seed=5).seeded().seed == 5
    assert SamplingParams().seeded().seed != SamplingParams().seeded().seed
    assert SamplingParams().for_retry().temperature == RETRY_TEMPERATURE
    assert SamplingParams(temperature=0.7).for_retry().temperature == 0.7
