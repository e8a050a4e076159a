"""The generation loop: from prompts to audio tokens and the hidden states that make the sound.

State j is the state that predicts token j: state 0 sits on the prompt's last token. The state that
predicts [STOP] is not kept.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .device import array_module, to_host
from .errors import ParameterError
from .runner import LanguageModelRunner, Rounds
from .sampling import SamplingParams, draw, greedy, penalise, uniform

logger = logging.getLogger(__name__)

Array = Any

LOOP_DISTANCE = 300.0  # two consecutive states closer than this (L1) count as repeating
LOOP_LENGTH = 16  # more repeats than this, less the changes between them, mean a stuck voice


@dataclass(frozen=True)
class Request:
    """One sequence to generate: its prompt, how to sample, and the random stream it draws from."""

    ids: np.ndarray  # (S,) int32
    params: SamplingParams  # with a definite seed unless temperature is 0
    stream: int = 0


@dataclass(frozen=True)
class Step:
    """What one step made for one sequence."""

    index: int  # which request
    token: int
    state: Array | None  # (hidden,) on the device; None when the token is [STOP]
    finish_reason: str | None  # "stop", "length" or, while it goes on, None
    stuck: bool  # the states so far repeat themselves


@dataclass
class Generation:
    """A finished sequence.

    tokens: (T,) int32, [STOP] included when it came. states: (T', hidden) on the device, one for each token
    but [STOP]. finish_reason: "stop", or "length" when max_new_tokens or the model's positions ran out.
    stuck: the loop check found a voice that repeats itself.
    """

    tokens: np.ndarray
    states: Array
    finish_reason: str
    stuck: bool = False


class LoopCheck:
    """Counts how long a voice has hardly changed, from the L1 distance of consecutive states."""

    def __init__(self) -> None:
        self._count = 0
        self.stuck = False

    def update(self, distance: float) -> bool:
        """Take the next distance; True from the moment the count goes over the limit."""
        self._count = self._count + 1 if distance < LOOP_DISTANCE else max(self._count - 1, 0)
        self.stuck = self.stuck or self._count > LOOP_LENGTH
        return self.stuck


class Loop:
    """Generates several sequences together, one token each a step; ended ones leave the batch.

    Iterating yields the `Step`s of each round. give_up: sequences that get stuck end after the round in which they do.
    """

    def __init__(self, runner: LanguageModelRunner, requests: Sequence[Request], *, give_up: bool = False) -> None:
        self._runner = runner
        self._requests = requests
        self._give_up = give_up
        self._xp = array_module(runner.device)
        longest = max(len(r.ids) + r.params.max_new_tokens for r in requests)
        self._cache = runner.new_cache(len(requests), min(longest, runner.config.max_positions))
        self._active = list(range(len(requests)))  # the request in each slot
        self._checks = [LoopCheck() for _ in requests]
        self._counts = [0] * len(requests)
        self._seen = self._seen_mask()

    def __iter__(self) -> Iterator[list[Step]]:
        ids = np.concatenate([r.ids for r in self._requests]).astype(np.int32)
        lengths = np.array([len(r.ids) for r in self._requests])
        previous: Array | None = None
        while self._active:
            cu_seqlens = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
            states = self._runner.extend(self._cache, ids, cu_seqlens, last_only=True)
            tokens, distances = self._choose(states, previous)
            steps = [self._step(slot, int(tokens[slot]), states, distances) for slot in range(len(self._active))]
            yield steps
            kept = self._retire({s.index for s in steps if s.finish_reason or (s.stuck and self._give_up)})
            previous, ids = states[self._xp.asarray(kept)], tokens[kept].astype(np.int32)
            lengths = np.ones(len(kept), np.int64)

    def results(self) -> list[Generation]:
        """All sequences, generated to their ends."""
        tokens: list[list[int]] = [[] for _ in self._requests]
        states: list[list[Array]] = [[] for _ in self._requests]
        reasons, stuck = ["length"] * len(tokens), [False] * len(tokens)
        for steps in self:
            for step in steps:
                tokens[step.index].append(step.token)
                if step.state is not None:
                    states[step.index].append(step.state)
                reasons[step.index] = step.finish_reason or reasons[step.index]
                stuck[step.index] = step.stuck
        empty = self._xp.empty((0, self._runner.config.hidden_size), np.float32)
        return [
            Generation(np.array(tokens[i], np.int32), self._xp.stack(kept) if kept else empty, reasons[i], stuck[i])
            for i, kept in enumerate(states)
        ]

    def _seen_mask(self) -> Array:
        """(n, vocab) bool: the ids that each sequence holds so far."""
        seen = np.zeros((len(self._requests), self._runner.config.vocab_size), bool)
        for row, request in zip(seen, self._requests, strict=True):
            row[request.ids] = True
        return self._xp.asarray(seen)

    def _choose(self, states: Array, previous: Array | None) -> tuple[np.ndarray, np.ndarray | None]:
        """The next token of each active sequence and its state's distance from the one before."""
        logits = self._runner.logits(states)
        params = [self._requests[i].params for i in self._active]
        penalties = self._xp.asarray([[p.repetition_penalty] for p in params], logits.dtype)
        scores = penalise(logits, self._seen, penalties)
        tokens = greedy(scores)
        for slot, (index, p) in enumerate(zip(self._active, params, strict=True)):
            if p.temperature > 0:
                number = uniform(p.seed or 0, self._requests[index].stream, self._counts[index])
                tokens[slot] = draw(to_host(scores[slot]), p.temperature, p.top_p, number)
        self._seen[self._xp.arange(len(tokens)), self._xp.asarray(tokens)] = True
        if previous is None:
            return tokens, None
        return tokens, to_host(abs(states - previous).sum(axis=-1))

    def _step(self, slot: int, token: int, states: Array, distances: np.ndarray | None) -> Step:
        index = self._active[slot]
        request, config = self._requests[index], self._runner.config
        self._counts[index] += 1
        stop = token == config.eos_token_id
        full = len(request.ids) + self._counts[index] > self._cache.capacity
        reason = "stop" if stop else None
        if not stop and (full or self._counts[index] >= request.params.max_new_tokens):
            reason = "length"
        stuck = self._checks[index].stuck
        if distances is not None and not stop:
            stuck = self._checks[index].update(float(distances[slot]))
        return Step(index, token, None if stop else states[slot], reason, stuck)

    def _retire(self, ended: set[int]) -> np.ndarray:
        """Close the gaps that ended sequences leave; return the slots' former places, (n,) int64."""
        places = list(range(len(self._active)))
        slot = 0
        while slot < len(self._active):
            if self._active[slot] not in ended:
                slot += 1
                continue
            last = len(self._active) - 1
            if slot != last:
                self._cache.move(last, slot)
                self._seen[slot] = self._seen[last]
                self._active[slot], places[slot] = self._active[last], places[last]
            self._active.pop()
            places.pop()
        self._seen = self._seen[: len(places)]
        return np.array(places, np.int64)


def begin(runner: LanguageModelRunner, requests: Sequence[Request], *, give_up: bool = False) -> Rounds:
    """The runner's own loop where it has one, else the common one. `ParameterError` for a prompt that is too long."""
    prompt = max(len(r.ids) for r in requests)
    if prompt > runner.config.max_positions:
        raise ParameterError(
            f"a prompt has {prompt} tokens; this model reads at most {runner.config.max_positions}: split the text"
        )
    return runner.begin(requests, give_up=give_up) or Loop(runner, requests, give_up=give_up)


def generate(runner: LanguageModelRunner, requests: Sequence[Request], *, retries: int = 0) -> list[Generation]:
    """Generate all requests together; a stuck one is begun again up to `retries` times with another stream."""
    results: list[Generation | None] = [None] * len(requests)
    pending = list(range(len(requests)))
    for attempt in range(retries + 1):
        batch = [retry(requests[i], attempt) for i in pending]
        for i, result in zip(pending, begin(runner, batch, give_up=attempt < retries).results(), strict=True):
            results[i] = result
        pending = [i for i in pending if results[i].stuck]  # type: ignore[union-attr]
        if not pending or attempt == retries:
            break
        logger.warning("%d sentence(s) got stuck; trying again with another seed", len(pending))
    return [r for r in results if r is not None]


def retry(request: Request, attempt: int) -> Request:
    """The request as its `attempt`-th repetition makes it: another random stream, never greedy."""
    if attempt == 0:
        return request
    return Request(request.ids, request.params.for_retry().seeded(), request.stream + (attempt << 32))
