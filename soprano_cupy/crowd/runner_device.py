"""A crowd's device made of any language model and decoder runner, on the CPU or in array code on a GPU.

The cache holds running sequences in rows 0..n-1: a newcomer is a further row whose new tokens are its prompt, so that
one call reads prompts and makes one token for everybody else. Everything happens within `advance` and `decode`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..audio import to_pcm16
from ..config import MAX_NEW_TOKENS
from ..device import array_module, cuda_index, to_host
from ..generation import LoopCheck, Request
from ..runner import DecoderRunner, DecoderStream, KVCache, LanguageModelRunner
from ..sampling import draw, greedy, penalise, uniform
from .device import FAILED, LENGTH, NOT_WATCHED, RUNNING, STOP, STUCK, Audio, Entry, News, Order, Report

Array = Any

CAPACITY_STEP = 1024  # tokens of a row: what the largest prompt and its speech need, up to a multiple of this
PROMPT_ROWS = 512  # of one step, so that it does not keep those that speak waiting for long


@dataclass
class _Sequence:
    """One slot's sequence."""

    slot: int
    request: Request
    give_up: bool
    tokens: list[int] = field(default_factory=list)
    states: list[Array] = field(default_factory=list)
    status: int = RUNNING
    stuck: bool = False
    check: LoopCheck = field(default_factory=LoopCheck)
    stream: DecoderStream | None = None
    pushed: int = 0  # states that the stream has


class RunnerDevice:
    """`Device` of two runners; `slots` sequences at once, prompts of up to `most_prompt` tokens."""

    decode_states = 1 << 30

    def __init__(
        self, language_model: LanguageModelRunner, decoder: DecoderRunner, slots: int, most_prompt: int
    ) -> None:
        self._lm, self._decoder = language_model, decoder
        if language_model.device != "cpu":
            import cupy

            cupy.cuda.Device(cuda_index(language_model.device)).use()  # of the thread that will use this
        config = language_model.config
        self.name, self.slots = language_model.device, slots
        self.most_prompt = min(most_prompt, config.max_positions)
        self.prompt_rows, self.most_entries = PROMPT_ROWS, slots
        wanted = -(-(self.most_prompt + MAX_NEW_TOKENS) // CAPACITY_STEP) * CAPACITY_STEP
        self._cache: KVCache = language_model.new_cache(slots, min(wanted, config.max_positions))
        self._xp = array_module(language_model.device)
        self._rows: list[_Sequence] = []  # those that run, by the row of the cache
        self._of: dict[int, _Sequence] = {}
        self._seen = self._xp.zeros((slots, config.vocab_size), bool)
        self._last: Array = None  # (slots, hidden) the newest state of each row, from the first step on
        self._report = Report()

    def admit(self, entries: Sequence[Entry]) -> None:
        for slot, request, give_up in entries:
            row = len(self._rows)
            sequence = self._of[slot] = _Sequence(slot, request, give_up)
            self._rows.append(sequence)
            self._cache.lengths[row] = 0
            self._seen[row] = False
            self._seen[row, self._xp.asarray(request.ids)] = True

    def remove(self, slots: Sequence[int]) -> None:
        for slot in slots:
            sequence = self._of.pop(slot)
            if sequence in self._rows:
                self._retire(self._rows.index(sequence))
            self._report.left.append(slot)

    def advance(self) -> None:
        rows = self._rows
        if not rows:
            return
        new = [s.request.ids if not s.tokens else np.array(s.tokens[-1:], np.int32) for s in rows]
        cu_seqlens = np.concatenate(([0], np.cumsum([len(ids) for ids in new]))).astype(np.int32)
        ids = np.concatenate(new).astype(np.int32)
        states = self._lm.extend(self._cache, ids, cu_seqlens, last_only=True)
        logits = self._lm.logits(states)
        finite = to_host(self._xp.isfinite(logits).all(axis=-1))
        tokens = self._choose(logits)
        if self._last is None:
            self._last = self._xp.zeros((self.slots, states.shape[1]), states.dtype)
        distances = to_host(abs(states - self._last[: len(rows)]).sum(axis=-1))
        self._last[: len(rows)] = states
        for row, sequence in enumerate(rows):
            distance = float(distances[row]) if sequence.tokens else None
            self._take(sequence, int(tokens[row]), states[row], distance, bool(finite[row]))
        for row in range(len(rows) - 1, -1, -1):
            if rows[row].status != RUNNING:
                self._retire(row)

    def decode_room(self) -> int:
        return 1

    def decode(self, orders: Sequence[Order]) -> None:
        whole = [order for order in orders if order.ends and self._of[order.slot].stream is None]
        audio = self._decoder.decode_many([self._stacked(order, 0) for order in whole]) if whole else []
        for order, samples in zip(whole, audio, strict=True):
            self._answer(order, samples)
        for order in orders:
            if order not in whole:
                self._answer(order, self._piece(order))

    def report(self, watched: array[int]) -> Report:
        report, self._report = self._report, Report()
        for slot, sequence in sorted(self._of.items()):
            count, ended = len(sequence.tokens), sequence.status != RUNNING
            if watched[slot] != NOT_WATCHED and (ended or count >= watched[slot]):
                report.news.append(News(slot, count, sequence.status, sequence.stuck))
        return report

    def tokens(self, slot: int, count: int) -> np.ndarray:
        return np.array(self._of[slot].tokens[:count], np.int32)

    def wait(self, seconds: float) -> None:
        pass

    def close(self) -> None:
        self._rows, self._of = [], {}

    def _choose(self, logits: Array) -> np.ndarray:
        """The next token of each row, as `generation.py` chooses it."""
        count, xp = len(self._rows), self._xp
        penalties = xp.asarray([[s.request.params.repetition_penalty] for s in self._rows], logits.dtype)
        scores = penalise(logits, self._seen[:count], penalties)
        tokens = greedy(scores)
        for row, sequence in enumerate(self._rows):
            params = sequence.request.params
            if params.temperature > 0:
                number = uniform(params.seed or 0, sequence.request.stream, len(sequence.tokens))
                tokens[row] = draw(to_host(scores[row]), params.temperature, params.top_p, number)
        self._seen[xp.arange(count), xp.asarray(tokens)] = True
        return tokens

    def _take(self, sequence: _Sequence, token: int, state: Array, distance: float | None, finite: bool) -> None:
        """What one step made for one sequence."""
        sequence.tokens.append(token)
        sequence.states.append(state)
        request, count = sequence.request, len(sequence.tokens)
        status = RUNNING
        if not finite:
            status = FAILED
        elif token == self._lm.config.eos_token_id:
            status = STOP
        elif count >= request.params.max_new_tokens or len(request.ids) + count > self._cache.capacity:
            status = LENGTH
        if status in (RUNNING, LENGTH) and distance is not None and sequence.check.update(distance):
            sequence.stuck = True
            if sequence.give_up and status == RUNNING:
                status = STUCK
        sequence.status = status

    def _retire(self, row: int) -> None:
        """A row's sequence runs no more; the last row takes its place."""
        last = len(self._rows) - 1
        if row != last:
            self._cache.move(last, row)
            self._seen[row], self._last[row] = self._seen[last], self._last[last]
            self._rows[row] = self._rows[last]
        self._rows.pop()

    def _stacked(self, order: Order, first: int) -> Array:
        return self._xp.stack(self._of[order.slot].states[first : order.states])

    def _piece(self, order: Order) -> np.ndarray:
        sequence = self._of[order.slot]
        if sequence.stream is None:
            sequence.stream = self._decoder.stream()
        pieces = []
        if order.states > sequence.pushed:
            pieces.append(sequence.stream.push(self._stacked(order, sequence.pushed)))
            sequence.pushed = order.states
        if order.ends:
            pieces.append(sequence.stream.finish())
        return np.concatenate(pieces) if len(pieces) != 1 else pieces[0]

    def _answer(self, order: Order, samples: np.ndarray) -> None:
        own = to_pcm16(samples) if order.pcm else samples if samples.base is None else samples.copy()
        self._report.audio.append(Audio(order.slot, own, order.ends))
