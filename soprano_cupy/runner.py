"""The seam between the public interface and what computes: what every engine's parts must offer.

A `LanguageModelRunner` turns token ids into hidden states and logits with a key-value cache; a
`DecoderRunner` turns hidden states into samples. `Qwen3` and `VocosDecoder` check their arguments, own the
sampling loop and call one of these; they never look inside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .config import DecoderConfig, ModelConfig
from .device import to_host

if TYPE_CHECKING:
    from .generation import Generation, Request, Step

Array = Any  # np.ndarray on the CPU, cupy.ndarray on a GPU
Take = Callable[[list[np.ndarray]], None]  # is given samples on the host, float32 (n,) each, as they come


class KVCache(ABC):
    """Keys and values of up to `slots` sequences of up to `capacity` tokens, allocated once.

    Sequences that still run occupy slots 0..n-1; when one ends, `move` brings the last into its place.
    """

    slots: int
    capacity: int
    lengths: np.ndarray  # (slots,) int32, on the host: tokens held by each slot

    @abstractmethod
    def move(self, source: int, target: int) -> None:
        """Copy slot `source` over slot `target`, length included."""


class Rounds(Protocol):
    """Several sequences being generated together. Either iterate over it, or take the results; once."""

    def __iter__(self) -> Iterator[list[Step]]:
        """Each round's steps, one for every sequence that still runs."""

    def results(self) -> list[Generation]:
        """All sequences, generated to their ends, in the requests' order."""


class LanguageModelRunner(ABC):
    """The Qwen3 forward pass over ragged batches."""

    config: ModelConfig
    device: str  # "cpu" or "cuda:0"
    dtype: str  # what the weights are kept in: float64, float32, bfloat16, float16 or int8
    attention: str  # "standard" or "flash"
    reason: str  # why this runner and this attention: one line for -v and doctor
    batch: int = 8  # how many sequences it is best given together

    @abstractmethod
    def new_cache(self, slots: int, capacity: int) -> KVCache:
        """An empty cache for `slots` sequences of up to `capacity` tokens."""

    @abstractmethod
    def extend(self, cache: KVCache, ids: np.ndarray, cu_seqlens: np.ndarray, *, last_only: bool = False) -> Array:
        """Append tokens to the sequences in slots 0..n-1 and return their final hidden states.

        ids: (N,) int32, the new tokens of all sequences, one sequence after the other.
        cu_seqlens: (n + 1,) int32, sequence i owns ids[cu_seqlens[i]:cu_seqlens[i + 1]], at least one.
        Returns (N, hidden_size), or (n, hidden_size) with `last_only`: the state of each last token; after
        the final norm; float64 for a float64 model, else float32. There is no padding, so nothing can
        depend on it.
        """

    @abstractmethod
    def logits(self, states: Array) -> Array:
        """(M, hidden_size) -> (M, vocab_size), of the states' dtype."""

    def begin(self, requests: Sequence[Request], *, give_up: bool = False) -> Rounds | None:
        """The engine's own generation loop over these requests, or None: the common one draws from `logits`.

        give_up: a sequence that gets stuck ends at once.
        """
        return None


class DecoderStream(ABC):
    """One voice being decoded piece by piece; the pieces, joined, are the whole's samples."""

    @abstractmethod
    def push(self, states: Array) -> np.ndarray:
        """Take (n, input_size) further states; return the float32 samples that are final now, maybe none."""

    @abstractmethod
    def finish(self) -> np.ndarray:
        """The remaining samples; nothing may be pushed afterwards."""


class DecoderRunner(ABC):
    """The Vocos decoder."""

    config: DecoderConfig
    device: str
    dtype: str
    reason: str

    @abstractmethod
    def decode(self, states: Array) -> Array:
        """(B, T, input_size) -> (B, (T - 1) * token_samples) samples, T >= 2."""

    def decode_in_turn(self, utterances: Sequence[Array], take: Take) -> None:
        """Utterances of any lengths, (T, input_size) each with T >= 2, to float32 samples on the host.

        `take` is given the next ones' as soon as they are there, a few at a time, while later ones are being decoded.
        """
        for states in utterances:
            take([to_host(self.decode(states[None])[0]).astype(np.float32, copy=False)])

    def decode_many(self, utterances: Sequence[Array]) -> list[np.ndarray]:
        """The same, all at once."""
        audio: list[np.ndarray] = []
        self.decode_in_turn(utterances, audio.extend)
        return audio

    @abstractmethod
    def stream(self) -> DecoderStream:
        """A fresh streaming state for one voice."""
