"""A generation on the GPU as the rest of the package sees it: rounds of steps, or whole results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DeviceError
from ..generation import Generation, Request, Step
from . import step

if TYPE_CHECKING:
    from .batch import Batch
    from .qwen3 import GpuLanguageModel


class GpuRounds:
    """Several sequences being generated together; `runner.Rounds`."""

    def __init__(self, model: GpuLanguageModel, requests: Sequence[Request], *, give_up: bool) -> None:
        self._model, self._requests, self._give_up = model, requests, give_up

    def __iter__(self) -> Iterator[list[Step]]:
        """Rounds of steps; their states stay as they are until the iteration ends."""
        with self._model.borrowed(self._requests) as batch:
            batch.begin(self._requests, give_up=self._give_up)
            running = list(range(len(self._requests)))
            count = 0
            while running:
                count += 1
                steps = [self._step(batch, slot, count) for slot in running]
                yield steps
                running = [s.index for s in steps if not (s.finish_reason or (s.stuck and self._give_up))]

    def results(self) -> list[Generation]:
        """All sequences, generated to their ends."""
        with self._model.borrowed(self._requests) as batch:
            batch.begin(self._requests, give_up=self._give_up)
            words = batch.finish(len(self._requests))
            return [self._generation(batch, slot, word) for slot, word in enumerate(words)]

    def _step(self, batch: Batch, slot: int, count: int) -> Step:
        word = batch.wait(slot, count)
        status = checked(word)
        last = status != step.RUNNING and step.progress_count(word) <= count
        token = int(batch.tokens[slot, count - 1])
        stop = last and status == step.STOP
        reason = {step.STOP: "stop", step.LENGTH: "length"}.get(status) if last else None
        state = None if stop else batch.states[slot, count - 1]
        return Step(slot, token, state, reason, step.progress_stuck(word))

    def _generation(self, batch: Batch, slot: int, word: int) -> Generation:
        status, count = checked(word), step.progress_count(word)
        stop = status == step.STOP
        states = batch.states[slot, : count - stop].copy()
        tokens = np.array(batch.tokens[slot, :count])
        return Generation(tokens, states, "stop" if stop else "length", step.progress_stuck(word))


def checked(word: int) -> int:
    """The status in a progress word; `DeviceError` for a sequence that the kernels gave up."""
    status = int(step.progress_status(word))
    if status == step.FAILED:
        raise DeviceError(
            "the language model made numbers that are not finite; the checkpoint may be damaged: download it again, "
            "or use --attention standard and report it"
        )
    return status
