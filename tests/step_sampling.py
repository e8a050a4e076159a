"""Cases of the sampling kernel, and what the package's own sampling and loop check make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import emulation
import ml_dtypes
import numpy as np
from slot_records import slot_state
from step_attention import EPSILON, filled

from soprano_cupy.generation import LoopCheck, Request
from soprano_cupy.gpu import step
from soprano_cupy.gpu.launch import Launch
from soprano_cupy.sampling import SamplingParams, draw, greedy, penalise, uniform

Array = np.ndarray[Any, Any]
END_TOKEN = 3
WRITTEN = {
    "next_residual", "next_hidden", "next_square_sums", "next_slot_of_row", "slots", "seen", "tokens", "states",
    "progress",
}  # fmt: skip


@dataclass
class Voice:
    """One slot's sequence as the package itself generates it."""

    request: Request
    capacity: int
    give_up: bool = False
    tokens: list[int] = field(default_factory=list)
    check: LoopCheck = field(default_factory=LoopCheck)
    status: int = step.RUNNING
    previous: Array | None = None

    def take(self, logits: Array, seen: Array, state: Array) -> None:
        """One step, as `generation.Loop` does it. seen: (vocab,) bool."""
        params = self.request.params
        penalty = np.array([[params.repetition_penalty]], np.float32)
        scores = penalise(logits[None], seen[None], penalty)
        token = int(greedy(scores)[0])
        if params.temperature > 0:
            number = uniform(params.seed or 0, self.request.stream, len(self.tokens))
            token = draw(scores[0], params.temperature, params.top_p, number)
        self.tokens.append(token)
        stop = token == END_TOKEN
        if self.previous is not None and not stop:
            self.check.update(float(np.abs(state - self.previous).sum(dtype=np.float64)))
        self.previous = state
        full = len(self.request.ids) + len(self.tokens) > self.capacity
        if stop:
            self.status = step.STOP
        elif self.give_up and self.check.stuck:
            self.status = step.STUCK
        elif full or len(self.tokens) >= params.max_new_tokens:
            self.status = step.LENGTH


class Sampling:
    """Slots being sampled by the kernel and, beside it, by the package."""

    def __init__(
        self,
        voices: Sequence[Voice],
        slot_of_row: Sequence[int],
        *,
        vocab: int = 300,
        hidden: int = 48,
        dtype: str = "bfloat16",
        most_tokens: int = 24,
        seed: int = 0,
    ) -> None:
        self.voices, self.vocab, self.hidden, self.dtype, self.most_tokens = voices, vocab, hidden, dtype, most_tokens
        self.element: Any = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
        rows, slots, self.stride = len(slot_of_row), len(voices), -(-hidden // 64) * 64
        self.norm_scale = np.float32(1 / 16 if dtype == "float16" else 1)
        self.seen = np.zeros((slots, -(-vocab // 32) * 32), bool)
        records = emulation.poisoned((slots * 16,), np.float32).view(step.SLOT_STATE)
        for slot, voice in enumerate(voices):
            records[slot] = slot_state(voice.request, voice.capacity, give_up=voice.give_up)
            self.seen[slot, voice.request.ids] = True
        self.arrays: dict[str, Array] = {
            "logits": emulation.poisoned((rows, vocab), np.float32),
            "residual": emulation.poisoned((rows, self.stride), np.float32),
            "square_sums": emulation.poisoned((rows, -(-hidden // 16)), np.float32),
            "final_gain": filled(seed + 1, (hidden,)), "next_gain": filled(seed + 2, (hidden,)),
            "embeddings": filled(seed + 3, (vocab, hidden), self.element),
            "next_residual": emulation.poisoned((rows, self.stride), np.float32),
            "next_hidden": emulation.poisoned((rows, self.stride), self.element),
            "next_square_sums": emulation.poisoned((rows, -(-hidden // 16)), np.float32),
            "slot_of_row": _ints(slot_of_row), "next_slot_of_row": _ints([99] * rows), "slots": records,
            "seen": self._packed_seen(), "tokens": _ints([-1] * (slots * most_tokens)).reshape(slots, -1),
            "states": emulation.poisoned((slots, most_tokens, hidden), np.float32),
            "progress": emulation.poisoned((slots * 2,), np.float32).view(np.uint64),
        }  # fmt: skip
        self.arrays["progress"][:] = 0

    def _packed_seen(self) -> Array:
        return np.packbits(self.seen, axis=1, bitorder="little").view(np.uint32)

    def fill(self, row: int, logits: Array, residual: Array) -> None:
        """What the model gives for a row."""
        a = self.arrays
        a["logits"][row], a["residual"][row, : self.hidden] = logits, residual
        padded = np.zeros(len(a["square_sums"][row]) * 16, np.float32)
        padded[: self.hidden] = residual
        a["square_sums"][row] = (padded.reshape(-1, 16) ** 2).sum(1)

    def state(self, row: int) -> Array:
        """The row's state through the final norm, in float64."""
        x = self.arrays["residual"][row, : self.hidden].astype(np.float64)
        return np.asarray(x / np.sqrt((x * x).mean() + EPSILON) * self.arrays["final_gain"])

    def launch(self, machine: Any, **others: Any) -> Launch:
        """Run the kernel on every row."""
        launched: Launch = machine.run(
            step.plan_sample, self.arrays, WRITTEN, dtype=self.dtype, rows=len(self.arrays["logits"]),
            hidden_size=self.hidden, vocab_size=self.vocab, end_token=END_TOKEN, epsilon=EPSILON, stride=self.stride,
            most_tokens=self.most_tokens, **others,
        )  # fmt: skip
        return launched

    def step(self, machine: Any) -> None:
        """One step by the kernel and by the package; checks that they agree in everything."""
        a = self.arrays
        rows = [r for r, slot in enumerate(a["slot_of_row"]) if slot >= 0 and not self.voices[slot].status]
        for row in rows:
            slot = int(a["slot_of_row"][row])
            self.voices[slot].take(a["logits"][row], self.seen[slot, : self.vocab], self.state(row))
            self.seen[slot, self.voices[slot].tokens[-1]] = True
        self.launch(machine)
        for row in rows:
            self._check(row, int(a["slot_of_row"][row]))
        a["slot_of_row"][rows] = a["next_slot_of_row"][rows]
        np.testing.assert_array_equal(a["seen"], self._packed_seen())

    def _check(self, row: int, slot: int) -> None:
        a, voice = self.arrays, self.voices[slot]
        count, token = len(voice.tokens), voice.tokens[-1]
        assert a["tokens"][slot].tolist() == voice.tokens + [-1] * (self.most_tokens - count)
        # 16 bits of a row's rounding errors: those of its sum of squares, its root, and three products
        np.testing.assert_allclose(a["states"][slot, count - 1], self.state(row), rtol=2**-20, atol=0)
        word = a["progress"][slot]
        assert step.progress_count(word) == step.progress_count(int(word)) == count
        assert step.progress_status(word) == step.progress_status(int(word)) == voice.status
        assert step.progress_stuck(word) == step.progress_stuck(int(word)) == voice.check.stuck
        assert step.progress_token(word) == step.progress_token(int(word)) == token
        record = a["slots"][slot]
        assert (record["count"], record["status"]) == (count, voice.status)
        assert record["position"] == len(voice.request.ids) - 1 + count
        assert a["next_slot_of_row"][row] == (slot if voice.status == step.RUNNING else -1)
        if voice.status == step.RUNNING:
            self.check_embedded(row, token)

    def check_embedded(self, row: int, token: int) -> None:
        """The next step's input of `row` is the token's embedding."""
        a, width = self.arrays, self.hidden
        embedding = a["embeddings"][token].astype(np.float32)
        np.testing.assert_array_equal(a["next_residual"][row, :width], embedding)
        scaled = (embedding * a["next_gain"] * self.norm_scale).astype(self.element)
        np.testing.assert_array_equal(a["next_hidden"][row, :width].view(np.uint16), scaled.view(np.uint16))
        padded = np.zeros(len(a["next_square_sums"][row]) * 16)
        padded[:width] = embedding
        sums = (padded.reshape(-1, 16) ** 2).sum(1)
        np.testing.assert_allclose(a["next_square_sums"][row], sums, rtol=16 * 2**-24)
        assert np.isnan(a["next_residual"][row, width:]).all()
        assert np.isnan(a["next_hidden"][row, width:].astype(np.float32)).all()


def _ints(values: Sequence[int]) -> Array:
    array = emulation.poisoned((len(values),), np.float32).view(np.int32)
    array[:] = values
    return array


def voices_of_all_kinds(count: int, *, seed: int = 0, capacity: int = 1000) -> list[Voice]:
    """Sequences with random temperatures, top-p, penalties, seeds and streams; every fifth one greedy."""
    rng = np.random.default_rng(seed)
    return [
        Voice(
            Request(
                ids=rng.integers(0, 50, 5).astype(np.int32),
                params=SamplingParams(
                    temperature=0.0 if i % 5 == 0 else float(rng.choice([0.05, 0.3, 0.7, 1.0, 3.0, 100.0])),
                    top_p=float(rng.choice([1.0, 0.999, 0.95, 0.5, 0.01])),
                    repetition_penalty=float(rng.choice([1.0, 1.2, 0.7])),
                    seed=int(rng.integers(1 << 63)),
                ),
                stream=int(rng.integers(1 << 40)),
            ),
            capacity,
        )
        for i in range(count)
    ]
