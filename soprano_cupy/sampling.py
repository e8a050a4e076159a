"""From logits to the next token: repetition penalty, temperature, top-p and one random number.

The order is the reference's. Random numbers come from a counter-based generator keyed by seed, stream and
position, so a voice sounds the same alone and in any batch, whichever engine draws.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .config import MAX_NEW_TOKENS
from .device import module_of, to_host
from .errors import ParameterError

Array = Any

RETRY_TEMPERATURE = 0.3  # a greedy sentence would repeat itself word for word; a retry must draw
_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Raises `ParameterError` for a value out of range.

    temperature: 0 takes the most likely token; above 0 draws from softmax(logits / temperature).
    top_p: draw from the smallest set of most likely tokens whose probability reaches this, in (0, 1].
    repetition_penalty: above 0; a seen token's positive score is divided and a negative one multiplied by it.
    max_new_tokens: generation ends after this many tokens.
    seed: 0 to 2**64 - 1, or None for a fresh one each time.
    """

    temperature: float = 0.0
    top_p: float = 0.95
    repetition_penalty: float = 1.2
    max_new_tokens: int = MAX_NEW_TOKENS
    seed: int | None = None

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, "0 or above", lambda v: v >= 0)
        _number("top_p", self.top_p, "above 0 and at most 1", lambda v: 0 < v <= 1)
        _number("repetition_penalty", self.repetition_penalty, "above 0", lambda v: v > 0)
        _whole("max_new_tokens", self.max_new_tokens, 1, 1 << 31)
        if self.seed is not None:
            _whole("seed", self.seed, 0, 1 << 64)

    def seeded(self) -> SamplingParams:
        """The same with a definite seed."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(64))

    def for_retry(self) -> SamplingParams:
        """What a repeated attempt uses: greedy choice would only repeat itself."""
        return self if self.temperature > 0 else replace(self, temperature=RETRY_TEMPERATURE)


def _number(name: str, value: Any, allowed: str, test: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise ParameterError(f"{name} = {value!r} must be a number {allowed}")
    if not math.isfinite(value) or not test(value):
        raise ParameterError(f"{name} = {value!r} must be {allowed}")


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value < high:
        raise ParameterError(f"{name} = {value!r} must be a whole number from {low} to {high - 1}")


def philox(seed: int, stream: int, position: int) -> int:
    """The first 32-bit word of Philox4x32-10 (Salmon et al., 2011) for key `seed`, counter (position, stream)."""
    c0, c1, c2, c3 = position & _MASK, (position >> 32) & _MASK, stream & _MASK, (stream >> 32) & _MASK
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        low, high = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (high >> 32) ^ c1 ^ k0, high & _MASK, (low >> 32) ^ c3 ^ k1, low & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0


def uniform(seed: int, stream: int, position: int) -> float:
    """A number in [0, 1) with 24 random bits, exact in float32."""
    return (philox(seed, stream, position) >> 8) * 2.0**-24


def penalise(logits: Array, seen: Array, penalty: Array) -> Array:
    """Scores (n, vocab): the repetition penalty (Keskar et al., 2019) where `seen` (n, vocab) is set.

    penalty: (n, 1), of the logits' dtype.
    """
    xp = module_of(logits)
    return xp.where(seen, xp.where(logits > 0, logits / penalty, logits * penalty), logits)


def greedy(scores: Array) -> np.ndarray:
    """The most likely token of each row, (n,) int64 on the host; the lowest id wins a tie."""
    return to_host(scores.argmax(axis=-1))


def draw(scores: np.ndarray, temperature: float, top_p: float, number: float) -> int:
    """Draw a token from one row of scores (vocab,) with a uniform `number` in [0, 1).

    Nucleus sampling (Holtzman et al., 2020): the kept set is the shortest run of tokens, most likely first
    and lower ids first among equals, whose probability reaches top_p. Computed in float64.
    """
    scaled = scores.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    order = np.argsort(-weights, kind="stable")
    sums = np.cumsum(weights[order])
    kept = int(np.searchsorted(sums, top_p * sums[-1])) + 1 if top_p < 1 else len(sums)
    kept = min(kept, len(sums))
    return int(order[min(int(np.searchsorted(sums[:kept], number * sums[kept - 1], side="right")), kept - 1)])
