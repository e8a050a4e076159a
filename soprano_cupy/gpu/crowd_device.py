"""A crowd's device on the GPU engine: `crowd.device.Device`."""

from __future__ import annotations

import contextlib
import logging
import time
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..crowd.device import Entry, Order, Report
from ..errors import DeviceError
from . import slots as words
from ._tables import watched_slots
from .crowd_sizes import DEFAULT_SLOTS, CrowdSizes, crowd_bytes, slots_that_fit
from .crowd_steps import CrowdSteps
from .crowd_voices import VoiceDecoder
from .forward import Forward
from .qwen3 import GpuLanguageModel
from .vocos import GpuDecoder

logger = logging.getLogger(__name__)

FEWEST_SLOTS = 8  # below which a lack of memory is an error
WAIT_S = 1e-4  # for audio; who has been submitted meanwhile does not wait longer


def open_device(
    language_model: GpuLanguageModel,
    decoder: GpuDecoder,
    most_prompt: int,
    max_batch: int | None = None,
    max_memory: int | None = None,
    *,
    invariant: bool = False,
) -> GpuDevice:
    """A device of up to `max_batch` voices whose buffers take up to `max_memory` bytes, for prompts of `most_prompt`.

    Takes fewer, with a warning, where there is no memory for as many; `DeviceError` where there is none for a few. The
    calling thread is the one that will use it: the GPU stays its current one.
    """
    import cupy

    index = language_model.forward.facts.index
    cupy.cuda.Device(index).use()
    cupy.cuda.runtime.free(0)  # makes the context this thread's
    wanted = max_batch or DEFAULT_SLOTS
    config = language_model.config
    slots = slots_that_fit(config, wanted, most_prompt, max_memory)
    if slots < min(wanted, FEWEST_SLOTS):
        least = crowd_bytes(config, CrowdSizes.plan(config, min(wanted, FEWEST_SLOTS), most_prompt))
        raise DeviceError(f"max_memory = {max_memory} is too little: a few voices need {least} bytes")
    if slots < wanted:
        logger.warning("max_memory = %s holds %d voices, not %d", max_memory, slots, wanted)
    while True:
        try:
            return GpuDevice(language_model, decoder, CrowdSizes.plan(config, slots, most_prompt), invariant=invariant)
        except MemoryError as error:
            if slots <= FEWEST_SLOTS:
                raise DeviceError(
                    f"the GPU has no memory left for {slots} voices; close other programs that use it"
                ) from error
        logger.warning("no GPU memory for %d voices at once; trying %d (max_batch)", slots, slots // 2)
        slots = max(FEWEST_SLOTS, slots // 2)
        cupy.get_default_memory_pool().free_all_blocks()  # not within the handler: the error keeps what was allocated


class GpuDevice:
    """`Device`: sequences on one stream, the decoder on another, samples copied on a third."""

    def __init__(
        self, language_model: GpuLanguageModel, decoder: GpuDecoder, sizes: CrowdSizes, *, invariant: bool = False
    ) -> None:
        forward: Forward = language_model.forward
        self.name = language_model.device
        self.slots, self.most_prompt = sizes.slots, sizes.most_prompt
        self.prompt_rows, self.most_entries = sizes.prompt_rows, sizes.entries
        self._keep = language_model, decoder
        self._steps = CrowdSteps(forward, sizes, invariant=invariant)
        self._voices = VoiceDecoder(decoder, self._steps.states, one_class=invariant)
        self.decode_states = self._voices.most_states
        self._steps.prepare()
        self._leaving: list[tuple[int, Any]] = []  # slots, and the event behind which nothing is drawn there
        self._failed = False

    @property
    def nbytes(self) -> int:
        """GPU memory of all buffers; the weights are the models'."""
        return self._steps.nbytes + self._voices.nbytes

    def admit(self, entries: Sequence[Entry]) -> None:
        self._steps.enter(entries)
        self._voices.begin([entry.slot for entry in entries])

    def remove(self, slots: Sequence[int]) -> None:
        for slot in slots:
            running = words.progress_status(int(self._steps.progress[slot])) == words.RUNNING
            self._leaving.append((slot, self._steps.leave(slot, running=running)))

    def advance(self) -> None:
        self._steps.advance()

    def decode_room(self) -> int:
        return self._voices.room

    def decode(self, orders: Sequence[Order]) -> None:
        self._voices.order(orders)

    def report(self, watched: array[int]) -> Report:
        audio = self._voices.answers()
        left: list[int] = []
        staying: list[tuple[int, Any]] = []
        for slot, event in self._leaving:
            if (event is None or event.done()) and not self._voices.owes(slot):
                left.append(slot)
            else:
                staying.append((slot, event))
        self._leaving = staying
        return Report(watched_slots(self._steps.progress, watched), audio, left)

    def tokens(self, slot: int, count: int) -> np.ndarray:
        return np.array(self._steps.tokens[slot, :count])

    def wait(self, seconds: float) -> None:
        seconds = min(seconds, WAIT_S)
        if self._voices.busy:
            self._voices.wait(seconds)
        else:
            time.sleep(seconds)  # slots that are about to be free

    def close(self) -> None:
        """Wait until the GPU uses none of the memory, and give it back."""
        with contextlib.suppress(Exception):
            self._steps.wait(self._steps.mark())
        with contextlib.suppress(Exception):
            self._voices.close()
        vars(self).pop("_steps", None)
        vars(self).pop("_voices", None)
        with contextlib.suppress(Exception):
            import cupy

            cupy.get_default_memory_pool().free_all_blocks()
