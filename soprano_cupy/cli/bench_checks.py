"""What `soprano-cupy bench` compares before it times: the runtime with the readable array code, and with itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..device import to_host
from ..errors import SopranoError
from ..sampling import SamplingParams

if TYPE_CHECKING:
    from ..pipeline import SopranoTTS

LEAST_COSINE = 0.999  # of each state in any precision with that in float32: int8 weights pass, a wrong layer does not
LEAST_DECODER_DB = 40.0  # 16-bit matrices pass
LEAST_STREAM_DB = 50.0


@dataclass(frozen=True)
class Voiced:
    """One sentence, spoken three times."""

    text: str
    whole: np.ndarray
    again: np.ndarray
    pieces: list[np.ndarray]  # of a stream

    @classmethod
    def of(cls, tts: SopranoTTS, text: str) -> Voiced:
        return cls(text, tts.infer(text), tts.infer(text), list(tts.infer_stream(text)))


def check(tts: SopranoTTS, voiced: Voiced) -> int:
    """How many checks passed; `SopranoError` names the first that did not."""
    stream = np.concatenate([np.empty(0, np.float32), *voiced.pieces])
    checks: tuple[tuple[str, Callable[[], float], float], ...] = (
        ("decibels of a repeat", lambda: decibels(voiced.again, voiced.whole), np.inf),
        ("decibels of a stream", lambda: decibels(stream, voiced.whole), LEAST_STREAM_DB),
        ("cosine of states with float32's", lambda: least_cosine(tts, voiced.text), LEAST_COSINE),
        ("decibels of the decoder against float32's", lambda: decoder_db(tts), LEAST_DECODER_DB),
    )
    for what, measure, least in checks:
        value = measure()
        if not value >= least:
            raise SopranoError(
                f"wrong results, nothing is timed: {what} is {value:.4g}, must be {least:g} or more; "
                "try --device cpu or --dtype float32, and report it with what -v shows"
            )
    return len(checks)


def least_cosine(tts: SopranoTTS, text: str) -> float:
    """The smallest cosine between a state of the text's prompt and the same state in float32 array code."""
    from ..attention import AttentionChoice, standard_attention
    from ..checkpoint import open_language_model
    from ..portable.qwen3 import PortableLanguageModel

    runner = tts.engine.language_model
    ids = tts._reader.read(text, SamplingParams())[0].ids
    choice = AttentionChoice("standard", "as the reference", standard_attention)
    with open_language_model(tts.model.folder) as file:
        plain = PortableLanguageModel(file, runner.config, tts.device, "float32", choice, "reference")
    rows = np.array([0, len(ids)], np.int32)
    mine, exact = (
        to_host(model.extend(model.new_cache(1, len(ids)), ids, rows)).astype(np.float64) for model in (runner, plain)
    )
    lengths = np.linalg.norm(mine, axis=-1) * np.linalg.norm(exact, axis=-1)
    return float(((mine * exact).sum(axis=-1) / lengths).min())


def decoder_db(tts: SopranoTTS, tokens: int = 24) -> float:
    """Signal to noise of the decoder against float32 array code on the same random states."""
    from ..checkpoint import decoder_config, open_decoder
    from ..device import array_module
    from ..portable.vocos import PortableDecoder

    with open_decoder(tts.model.folder) as file:
        plain = PortableDecoder(file, decoder_config(file), tts.device, "float32", "reference")
    shape = (1, tokens, plain.config.input_size)
    states = array_module(tts.device).asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
    return decibels(to_host(tts.engine.decoder.decode(states)), to_host(plain.decode(states)))


def decibels(values: np.ndarray, reference: np.ndarray) -> float:
    """Of `reference` over its difference to `values`; arrays of different shapes have nothing in common."""
    if values.shape != reference.shape:
        return -np.inf
    wide = reference.astype(np.float64)
    noise = float(np.linalg.norm(values - wide))
    return np.inf if noise == 0 else float(20 * np.log10(np.linalg.norm(wide) / noise))
