"""The peer "upstream": the PyTorch package (soprano-tts with its transformers backend) on the same folder and texts.

Job: {"folder", "device", "tokens", "text"} and either {"start": true}, a program that loads the voice and speaks one
sentence, or {"batches", "texts", "first_texts", "repeats"}. The package has no way to hold a sentence to a length:
transformers' `generate` is given `max_new_tokens`, and a stream is left after as many tokens. The sentence that the
package speaks when it is loaded is held to 24 tokens in a start and left out elsewhere. Batches are decoded 16 at a
time, which is faster than the package's default of one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from statistics import median
from typing import Any
from unittest import mock

from benchmarks.workers import job, tell, tell_first_audio

SAMPLE_RATE_HZ = 32_000
DECODED_TOGETHER = 16
GREETING_TOKENS = 24


def load(folder: str, device: str) -> Any:
    from soprano import SopranoTTS

    return SopranoTTS(backend="transformers", device=device, model_path=folder)


@contextmanager
def held_to(tokens: int) -> Iterator[None]:
    """Sentences end after `tokens` tokens while the context lasts."""
    from transformers import GenerationMixin

    exact = GenerationMixin.generate

    def generate(self: Any, **options: Any) -> Any:
        return exact(self, **{**options, "max_new_tokens": tokens})

    with mock.patch.object(GenerationMixin, "generate", generate):
        yield


def speak_first(asked: dict[str, Any]) -> dict[str, Any]:
    """A fresh program: the first audio is told at once; then what it takes of the GPU's memory."""
    with held_to(GREETING_TOKENS):
        tts = load(asked["folder"], asked["device"])
    chunks = tts.infer_stream(asked["text"], temperature=0.0)
    next(chunks)
    tell_first_audio()
    for _ in islice(chunks, asked["tokens"]):
        pass
    return {"after": free_bytes() if asked["device"] != "cpu" else None}


def free_bytes() -> int:
    import torch

    return int(torch.cuda.mem_get_info()[0])


def measure(asked: dict[str, Any]) -> dict[str, Any]:
    from soprano import SopranoTTS

    with mock.patch.object(SopranoTTS, "infer"):
        tts = load(asked["folder"], asked["device"])
    first = [seconds_of(partial(first_chunk, tts, text)) for text in asked["first_texts"]]
    result: dict[str, Any] = {"first_audio_s": median(first[2:] or first), "batch": {}}
    for count in asked["batches"]:
        texts = asked["texts"][:count]
        tts.decoder_batch_size = min(count, DECODED_TOGETHER)
        with held_to(asked["tokens"]):
            factors = [real_time_factor(tts, texts) for _ in range(asked["repeats"] + 1)]
        result["batch"][count] = median(factors[1:])
    return result


def first_chunk(tts: Any, text: str) -> Any:
    return next(tts.infer_stream(text, temperature=0.0))


def real_time_factor(tts: Any, texts: list[str]) -> float:
    audio: list[Any] = []
    seconds = seconds_of(lambda: audio.extend(tts.infer_batch(texts, temperature=0.0)))
    return sum(len(piece) for piece in audio) / SAMPLE_RATE_HZ / seconds


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    asked = job()
    tell(speak_first(asked) if asked.get("start") else measure(asked))
