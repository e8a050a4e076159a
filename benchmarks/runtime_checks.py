"""What must be right before anything is timed: the runtime against float64, float32, itself and the goldens.

The oracle is the array code in float64; "plain" is the same array code in the runtime's own precision with
matmul-softmax. A result may be twice as far from the oracle as plain's, in its largest and in its mean error.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.random_text import sentences
from benchmarks.spoken_length import held_to
from soprano_cupy.attention import AttentionChoice, standard_attention
from soprano_cupy.checkpoint import decoder_config, open_decoder, open_language_model
from soprano_cupy.config import ModelConfig
from soprano_cupy.device import array_module, to_host
from soprano_cupy.generation import Request, generate
from soprano_cupy.pipeline import SopranoTTS
from soprano_cupy.portable.qwen3 import PortableLanguageModel
from soprano_cupy.portable.vocos import PortableDecoder
from soprano_cupy.runner import Array, LanguageModelRunner
from soprano_cupy.sampling import SamplingParams

ERROR_RATIO = 2.0
LEAST_SNR_DB = 50.0
PENALTY = 1.2
FIRST_TOKEN = 4  # ids below are markers
TOGETHER = 8  # sequences in one call: bounds the logits in memory


@dataclass
class Checks:
    """Counts what passed and keeps what failed; each check is a line on stdout."""

    passed: int = 0
    failures: list[str] = field(default_factory=list)

    def require(self, what: str, value: float, allowed: float, *, at_least: bool = False) -> None:
        """`value` must be at most, or with `at_least` at least, `allowed`; NaN never is."""
        well = value >= allowed if at_least else value <= allowed
        line = f"{what}: {value:.4g}, {'at least' if at_least else 'at most'} {allowed:.4g}"
        sys.stdout.write(f"  {'ok   ' if well else 'WRONG'} {line}\n")
        sys.stdout.flush()
        if well:
            self.passed += 1
        else:
            self.failures.append(line)


@dataclass
class Errors:
    """Largest and mean absolute error of arrays, taken one after the other."""

    largest: float = 0.0
    total: float = 0.0
    count: int = 0

    def add(self, difference: Array) -> None:
        if not difference.size:
            return
        distance = abs(difference)
        largest = float(distance.max())
        if not (largest <= self.largest or math.isnan(self.largest)):  # NaN stays
            self.largest = largest
        self.total += float(distance.sum(dtype=np.float64))
        self.count += distance.size

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)


@dataclass(frozen=True)
class Models:
    """The runtime's language model, the oracle and the plain one, on one device."""

    ours: LanguageModelRunner
    oracle: LanguageModelRunner
    plain: LanguageModelRunner

    @classmethod
    def load(cls, folder: str | Path, ours: LanguageModelRunner) -> Models:
        dtype = ours.dtype if ours.dtype in ("bfloat16", "float16") else "float32"
        return cls(ours, _portable(folder, ours.device, "float64"), _portable(folder, ours.device, dtype))


def _portable(folder: str | Path, device: str, dtype: str) -> PortableLanguageModel:
    choice = AttentionChoice("standard", "as the reference", standard_attention)
    with open_language_model(folder) as file:
        return PortableLanguageModel(file, ModelConfig.from_folder(folder), device, dtype, choice, "reference")


def random_prompts(config: ModelConfig, count: int, longest: int = 96) -> list[np.ndarray]:
    """Ids of `count` prompts of 2 to `longest` tokens, all lengths alike."""
    rng = np.random.default_rng(count)
    lengths = rng.integers(2, longest + 1, count)
    return [rng.integers(FIRST_TOKEN, config.vocab_size, length).astype(np.int32) for length in lengths]


def check_logits(checks: Checks, models: Models, count: int) -> None:
    """Logits at every position of random prompts, the last of them by a step behind the others."""
    errors = {"ours": Errors(), "plain": Errors()}
    for group in groups(random_prompts(models.oracle.config, count)):
        exact = prompt_logits(models.oracle, group)
        errors["ours"].add(prompt_logits(models.ours, group) - exact)
        errors["plain"].add(prompt_logits(models.plain, group) - exact)
    _compare(checks, f"logits of {count} prompts", errors)


def _compare(checks: Checks, what: str, errors: dict[str, Errors]) -> None:
    for kind in ("largest", "mean"):
        allowed = ERROR_RATIO * getattr(errors["plain"], kind)
        checks.require(f"{what}, {kind} error", getattr(errors["ours"], kind), allowed)


def prompt_logits(runner: LanguageModelRunner, prompts: Sequence[np.ndarray]) -> Array:
    """(N, vocab) logits of the prompts' tokens, those of the last tokens behind all others."""
    cache = runner.new_cache(len(prompts), max(map(len, prompts)))
    starts = _starts([len(ids) - 1 for ids in prompts])
    before = runner.extend(cache, np.concatenate([ids[:-1] for ids in prompts]), starts)
    scores = runner.logits(before)
    last = np.array([ids[-1] for ids in prompts], np.int32)
    state = runner.extend(cache, last, np.arange(len(prompts) + 1, dtype=np.int32), last_only=True)
    return array_module(runner.device).concatenate((scores, runner.logits(state)))


def _starts(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)


def groups(items: Sequence[Any], size: int = TOGETHER) -> Iterator[list[Any]]:
    """`items` in lists of at most `size`."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def spoken_prompts(tts: SopranoTTS, count: int) -> list[np.ndarray]:
    """Ids of `count` sentences."""
    texts = sentences(count, seed=count, longest=80)
    return [tts._reader.read(text, SamplingParams())[0].ids for text in texts]


def check_generation(checks: Checks, models: Models, prompts: list[np.ndarray], tokens: int) -> None:
    """The steps as they run while generating: their states, and that each token is the best within the error."""
    batch = len(prompts)
    requests = [Request(ids, SamplingParams(max_new_tokens=tokens, repetition_penalty=PENALTY)) for ids in prompts]
    errors, scores = {"ours": Errors(), "plain": Errors()}, Errors()
    shortfall = 0.0
    spoken = list(zip(prompts, generate(models.ours, requests), strict=True))
    for group in groups(spoken):
        whole = [np.concatenate((ids, out.tokens[:-1])).astype(np.int32) for ids, out in group]
        exact, plain = (prompt_states(runner, whole) for runner in (models.oracle, models.plain))
        for (ids, out), states, others in zip(group, exact, plain, strict=True):
            kept = slice(len(ids) - 1, len(ids) - 1 + len(out.states))
            errors["ours"].add(array_module(models.ours.device).asarray(out.states) - states[kept])
            errors["plain"].add(others[kept] - states[kept])
            true = models.oracle.logits(states[len(ids) - 1 :])
            scores.add(models.plain.logits(others[len(ids) - 1 :]) - true)
            shortfall = max(shortfall, _shortfall(to_host(true), ids, out.tokens))
    _compare(checks, f"states of {batch} voices x {tokens} tokens", errors)
    allowed = 2 * PENALTY * ERROR_RATIO * scores.largest  # both scores that are compared may be off
    checks.require(f"greedy choice among {batch} voices, score lost", shortfall, allowed)


def prompt_states(runner: LanguageModelRunner, prompts: Sequence[np.ndarray]) -> list[Array]:
    """The states (tokens, hidden) of each prompt."""
    cache = runner.new_cache(len(prompts), max(map(len, prompts)))
    starts = _starts([len(ids) for ids in prompts])
    states = runner.extend(cache, np.concatenate(prompts), starts)
    return [states[starts[i] : starts[i + 1]] for i in range(len(prompts))]


def _shortfall(logits: np.ndarray, prompt: np.ndarray, tokens: np.ndarray) -> float:
    """How far the worst token lies under the best one of its step, by exact penalised scores."""
    seen = np.zeros(logits.shape[1], bool)
    seen[prompt] = True
    worst = 0.0
    for row, token in zip(logits, tokens, strict=True):
        scores = np.where(seen, np.where(row > 0, row / PENALTY, row * PENALTY), row)
        worst = max(worst, float(scores.max() - scores[token]))
        seen[token] = True
    return worst


def check_decoder(checks: Checks, folder: str | Path, tts: SopranoTTS, voices: int) -> None:
    """Utterances of many lengths against the float32 array code on the same states."""
    runner, decoder = tts.engine.language_model, tts.engine.decoder
    params = SamplingParams(max_new_tokens=48)
    made = generate(runner, [Request(ids, params) for ids in spoken_prompts(tts, voices)])
    states = [out.states[: 2 + 7 * i] for i, out in enumerate(made) if len(out.states) >= 2]
    with open_decoder(folder) as file:
        plain = PortableDecoder(file, decoder_config(file), runner.device, "float32", "reference")
    exact = [to_host(plain.decode(one[None]))[0] for one in states]
    worst = min(snr_db(mine, audio) for mine, audio in zip(decoder.decode_many(states), exact, strict=True))
    checks.require(f"decoder on {len(states)} utterances, dB", worst, LEAST_SNR_DB, at_least=True)
    alone = to_host(decoder.decode(states[-1][None]))[0]
    checks.require("decoder on one utterance, dB", snr_db(alone, exact[-1]), LEAST_SNR_DB, at_least=True)


def snr_db(values: np.ndarray, reference: np.ndarray) -> float:
    """Decibels of `reference` over the difference; of another length it is nothing alike."""
    if values.shape != reference.shape:
        return -np.inf
    wide = np.asarray(reference, np.float64)
    noise = float(np.linalg.norm(values - wide))
    return 300.0 if noise == 0 else float(20 * np.log10(np.linalg.norm(wide) / noise))


def check_stream(checks: Checks, tts: SopranoTTS) -> None:
    """A stream, joined, is the sound that is made in one piece."""
    for text in sentences(3, seed=7):
        with held_to(40):
            whole = tts.infer(text)
            pieces = np.concatenate(list(tts.infer_stream(text)))
        checks.require("stream against whole, dB", snr_db(pieces, whole), LEAST_SNR_DB, at_least=True)


def check_repeats(checks: Checks, tts: SopranoTTS, repeats: int, tokens: int = 8) -> None:
    """The same sentence, drawn from the same seed, is the same sound bit for bit every time."""
    text = sentences(1, seed=11)[0]
    with held_to(tokens):
        first = tts.infer(text, temperature=0.8, seed=1).tobytes()
        different = sum(tts.infer(text, temperature=0.8, seed=1).tobytes() != first for _ in range(repeats - 1))
    checks.require(f"of {repeats} repeats, those that differ", different, 0)


def check_goldens(checks: Checks, device: str) -> None:
    """float32: every golden token of the reference PyTorch implementation, where its outputs are at hand."""
    from benchmarks.parity import CHECKPOINTS, SHARED, frequencies_of
    from soprano_cupy import Qwen3

    if not (SHARED / "golden").is_dir():
        sys.stdout.write(f"  golden tokens are left out: nothing at {SHARED}; SOPRANO_SHARED names their folder\n")
        return

    prompts = different = 0
    for name in CHECKPOINTS:
        expected = np.load(SHARED / name / "expected.npz")
        with frequencies_of(name):
            model = Qwen3.load(SHARED / name, device, "float32")
            for i in range(3):
                prompts += 1
                tokens = expected[f"greedy{i}"]
                made = model.generate(expected[f"ids{i}"], max_new_tokens=len(tokens)).tokens
                different += not np.array_equal(made, tokens)
    checks.require(f"of {prompts} golden sentences, those with another token", different, 0)
