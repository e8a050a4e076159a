"""Kernels that the first call needs, built and loaded while the weights are still being read.

Where nothing has been compiled yet NVRTC takes seconds for them, and it needs the model's sizes alone: so they are
planned on addresses of nothing, for one voice and, since all of them are alike, one layer or block.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from ..config import DecoderConfig, ModelConfig
from ..cuda.module import DeviceFacts
from .batch_launches import BatchLaunches
from .batch_sizes import one_voice
from .forward import Forward
from .launch import ANY_ADDRESS, Launch, row_class
from .program import load_kernels
from .vocos_plan import Facts, variants
from .vocos_slices import ROW_CLASSES
from .vocos_stream import StreamSizes
from .weights import Layer

log = logging.getLogger(__name__)

SENTENCE_ROWS = (256, 1024)  # frames, at most, of the sentences that most callers speak


class _Anywhere:
    """An array, or an arena of them, of which nobody asks more than where it is."""

    data = SimpleNamespace(ptr=ANY_ADDRESS)
    nbytes = 0

    def pointer(self, name: str, offset: int = 0) -> int:
        return ANY_ADDRESS


def language_model_kernels(config: ModelConfig, dtype: str, facts: DeviceFacts) -> list[Launch]:
    """What one voice needs of the language model, by graphs; the persistent kernel is compiled beside this."""
    anywhere: Any = _Anywhere()
    layer = Layer(*[anywhere] * len(Layer.__dataclass_fields__))
    weights: Any = SimpleNamespace(layers=[layer], embeddings=anywhere, norm=anywhere, head=anywhere, rope=anywhere)
    forward = Forward(replace(config, num_layers=1), weights, dtype, facts)
    address = ANY_ADDRESS
    launches = BatchLaunches(forward, one_voice(config), anywhere, tokens=address, progress=address, workspace=address)
    return launches.first_call()


def decoder_kernels(config: DecoderConfig, facts: DeviceFacts, most_rows: int) -> list[Launch]:
    """What a stream needs of the decoder, then what sentences do; most_rows: frames of a slice of whole voices."""
    whole = [row_class(rows, most_rows, ROW_CLASSES) for rows in SENTENCE_ROWS]
    known = Facts(facts.capability, facts.multiprocessors)
    return list(variants(replace(config, num_blocks=1), known, StreamSizes.of(config).row_classes(), whole))


def begin(plan: Callable[[], Sequence[Launch]], device: int) -> None:
    """Load the planned kernels on a CUDA device in a thread of its own; returns at once.

    Whoever needs one of them waits for it. One that cannot be had is told by whoever needs it, too.
    """

    def work() -> None:
        try:
            load_kernels(plan(), device)
        except Exception as error:
            log.debug("kernels were not built ahead: %s", error)

    threading.Thread(target=work, name="soprano-kernels").start()
