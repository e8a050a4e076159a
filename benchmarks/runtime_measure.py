"""What benchmarks/runtime.py times: steps, sentences, the decoder, memory and start-up; each function gives rows."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.common import Row, Timing, timing
from benchmarks.least_work import (
    ELEMENT_BYTES,
    Work,
    cache_bytes,
    decoder_work,
    language_model_parameters,
    prefill_work,
    speech_seconds,
    step_work,
)
from benchmarks.random_text import sentences
from benchmarks.spoken_length import held_to
from benchmarks.workers import ask
from soprano_cupy.checkpoint import decoder_config, open_decoder
from soprano_cupy.cli.bench import step_seconds
from soprano_cupy.config import SAMPLE_RATE_HZ, DecoderConfig, ModelConfig
from soprano_cupy.device import array_module
from soprano_cupy.pipeline import SopranoTTS
from soprano_cupy.sampling import SamplingParams

if TYPE_CHECKING:
    from soprano_cupy.gpu.persistent_path import PersistentPath

MOST_OF_FREE_MEMORY = 0.7  # what a batch's caches may take of it
BLOCK_STEPS = 50
FEW = 4  # voices whose steps are timed by graphs and by the persistent kernel


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    context: int
    tokens: int  # of every sentence
    steps: tuple[int, ...]  # batches
    throughput: tuple[int, ...]
    vocos: tuple[tuple[int, int], ...]  # voices, tokens
    profiles: tuple[int, ...]
    graph: tuple[int, ...]  # batches of the torch step
    upstream: tuple[int, ...]  # batches of the PyTorch package
    repeats: int
    first_audio_calls: int
    prompts: int  # whose logits are checked
    identical: int  # repeats that must be the same
    memory_batch: int


FULL = Sizes(
    context=256,
    tokens=128,
    steps=(1, 4, 8, 16, 64, 128, 256, 512, 1024),
    throughput=(8, 16, 64, 128, 256, 512, 1024),
    vocos=((64, 128), (1, 128), (1, 1)),
    profiles=(1, 64, 512),
    graph=(1, 64, 512, 1024),
    upstream=(1, 16, 128),
    repeats=5,
    first_audio_calls=300,
    prompts=200,
    identical=1000,
    memory_batch=512,
)
QUICK = Sizes(256, 128, (1, 64, 512), (64,), ((64, 128), (1, 1)), (1,), (1, 64), (1,), 3, 50, 32, 20, 1)
SMOKE = Sizes(24, 12, (1, 4), (3,), ((2, 8), (1, 1)), (1,), (1, 4), (1, 3), 2, 5, 10, 3, 1)


@dataclass
class Subject:
    """The voice that is measured, its sizes, and this machine's limits; a CPU has none here."""

    folder: str
    tts: SopranoTTS
    sizes: Sizes
    limits: dict[str, float]

    def __post_init__(self) -> None:
        self.model: ModelConfig = self.tts.engine.language_model.config
        with open_decoder(self.folder) as file:
            self.decoder: DecoderConfig = decoder_config(file)
        self.gpu = self.tts.device != "cpu"
        self.texts = sentences(max(*self.sizes.throughput, *self.sizes.upstream, self.sizes.repeats), seed=3)

    def limit_us(self, work: Work) -> float | None:
        return work.seconds(self.limits) * 1e6 if self.limits else None

    def wait(self) -> None:
        """Until the GPU has done everything."""
        if self.gpu:
            import cupy

            cupy.cuda.Device().synchronize()

    def fits(self, batch: int) -> bool:
        """Whether the caches of so many voices fit into the GPU's free memory."""
        if not self.gpu:
            return True
        import cupy

        needed = batch * (self.sizes.context + self.sizes.tokens) * cache_bytes(self.model)
        return needed <= MOST_OF_FREE_MEMORY * float(cupy.cuda.runtime.memGetInfo()[0])


def time_row(case: str, times: Timing, unit: str, limit: float | None) -> Row:
    """A time, all in one unit; its share of the limit is how much of it could not be less."""
    return Row(case, times.median, unit, times.repeats, times.p99, limit, limit and limit / times.median)


def rate_row(case: str, values: Sequence[float], limit: float | None) -> Row:
    """Seconds of sound for each second."""
    value = median(values)
    return Row(case, value, "x real time", len(values), None, limit, limit and value / limit)


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ways(subject: Subject, voices: int, measure: Callable[[], Row]) -> Iterator[Row]:
    """The row as things are by default; then, where few voices have two ways, again by each: /graph, /persistent."""
    yield measure()
    path: PersistentPath | None = getattr(subject.tts.engine.language_model, "persistent", None)
    if path is None or path.setting == "0" or path.failure is not None:
        return
    before = path.setting
    try:
        for name, setting in (("graph", "0"), ("persistent", "1")):
            path.use(setting)
            if setting == "0" or path.problem(voices, drawn=False) is None:
                row = measure()
                row.case += f"/{name}"
                yield row
    finally:
        path.use(before)


# ---- the language model's step ----


def steps(subject: Subject, batch: int) -> Row:
    """A token for each of `batch` voices, chosen and fed back."""
    sizes, runner = subject.sizes, subject.tts.engine.language_model
    repeats = 4 * sizes.repeats if batch <= 64 else 2 * sizes.repeats
    samples = step_seconds(runner, batch, sizes.context, BLOCK_STEPS if subject.gpu else 4, repeats)
    limit = subject.limit_us(step_work(subject.model, batch, sizes.context))
    return time_row(f"step/B{batch}/ctx{sizes.context}", timing([s * 1e6 for s in samples]), "us", limit)


def profile(subject: Subject, batch: int) -> list[Row]:
    """Microseconds of a step by kernel, longest first; nothing where the engine does not tell."""
    measure = getattr(subject.tts.engine.language_model, "profile", None)
    if measure is None:
        return []
    prefix = f"profile/B{batch}/ctx{subject.sizes.context}"
    parts = sorted(measure(batch, subject.sizes.context), key=lambda part: -part[1])
    return [Row(f"{prefix}/{name}", microseconds, "us", 1) for name, microseconds in parts]


# ---- sentences ----


def first_audio(subject: Subject) -> Row:
    """From the call of `infer_stream` to the first samples on the host, over random texts."""
    calls = subject.sizes.first_audio_calls
    texts = sentences(calls + 10, seed=5)

    def seconds(text: str) -> float:
        start = time.perf_counter()
        chunks = subject.tts.infer_stream(text)
        next(chunks)
        took = time.perf_counter() - start
        chunks.close()  # type: ignore[attr-defined]
        return took

    samples = [seconds(text) * 1e3 for text in texts][-calls:]
    limit = None
    if subject.limits:
        before = states_before_sound(subject)
        prompt = round(float(np.mean(prompt_lengths(subject.tts, texts))))
        works = [step_work(subject.model, 1, prompt + step) for step in range(1, before)]
        works += [prefill_work(subject.model, [prompt]), decoder_work(subject.decoder, 1, before)]
        limit = sum(work.seconds(subject.limits) for work in works) * 1e3
    return time_row("first_audio", timing(samples), "ms", limit)


def states_before_sound(subject: Subject) -> int:
    """How many states the decoder must have before it makes its first samples."""
    xp, stream = array_module(subject.tts.device), subject.tts.engine.decoder.stream()
    state = xp.zeros((1, subject.decoder.input_size), np.float32)
    return next(count for count in range(1, 100) if len(stream.push(state)))


def voice(subject: Subject) -> Row:
    """One sentence after the other, from text to samples on the host."""
    return _speech(subject, "voice/B1", [[text] for text in subject.texts[: subject.sizes.repeats]])


def throughput(subject: Subject, batch: int) -> Row:
    """`batch` sentences together, from texts to samples on the host."""
    return _speech(subject, f"throughput/B{batch}", [subject.texts[:batch]] * subject.sizes.repeats)


def _speech(subject: Subject, case: str, calls: list[list[str]]) -> Row:
    factors = []
    tokens = subject.sizes.tokens
    with held_to(tokens):
        subject.tts.infer_batch(calls[0])
        for texts in calls:
            start = time.perf_counter()
            samples = sum(map(len, subject.tts.infer_batch(texts)))
            factors.append(samples / SAMPLE_RATE_HZ / (time.perf_counter() - start))
    limit = None
    if subject.limits:
        prompts = prompt_lengths(subject.tts, calls[0])
        least = speech_seconds(subject.model, subject.decoder, prompts, tokens, subject.limits)
        limit = len(prompts) * (tokens - 1) * subject.decoder.token_samples / SAMPLE_RATE_HZ / least
    return rate_row(case, factors, limit)


def prompt_lengths(tts: SopranoTTS, texts: Sequence[str]) -> list[int]:
    """Tokens of every prompt that these texts are spoken with."""
    return [len(request.ids) for text in texts for request in tts._reader.read(text, SamplingParams())]


# ---- the decoder alone ----


def vocos(subject: Subject, voices: int, tokens: int) -> Iterator[Row]:
    """States on the device to samples on the device, and to samples on the host where several voices speak."""
    decoder, xp = subject.tts.engine.decoder, array_module(subject.tts.device)
    rng = np.random.default_rng(voices + tokens)
    scale = np.float32(2.0)  # about the size of a random checkpoint's states
    shape = (voices, tokens + 1, subject.decoder.input_size)
    states = xp.asarray(rng.standard_normal(shape, np.float32) * scale)
    sound_s = voices * tokens * subject.decoder.token_samples / SAMPLE_RATE_HZ
    work = decoder_work(subject.decoder, voices, tokens)
    limit = sound_s / work.seconds(subject.limits) if subject.limits else None
    case = f"B{voices}/T{tokens}"
    repeats = 4 * subject.sizes.repeats

    def factors(call: Callable[[], Any]) -> list[float]:
        def waited() -> None:
            call()
            subject.wait()

        for _ in range(2):
            waited()
        return [sound_s / seconds_of(waited) for _ in range(repeats)]

    yield rate_row(f"vocos/{case}", factors(lambda: decoder.decode(states)), limit)
    if voices == 1:
        return
    utterances = list(states)
    yield rate_row(f"vocos_host/{case}/float32", factors(lambda: decoder.decode_many(utterances)), limit)
    narrow = getattr(decoder, "decode_pcm16", None)  # decoders that round to 16 bits themselves
    if narrow is not None:
        yield rate_row(f"vocos_host/{case}/int16", factors(lambda: narrow(utterances)), limit)


def vocos_stream(subject: Subject) -> Row:
    """One more token of a stream: its state on the device to its samples on the host."""
    xp, stream = array_module(subject.tts.device), subject.tts.engine.decoder.stream()
    state = xp.asarray(np.random.default_rng(1).standard_normal((1, subject.decoder.input_size), np.float32))
    for _ in range(10):
        stream.push(state)
    samples = [seconds_of(lambda: stream.push(state)) * 1e6 for _ in range(40 * subject.sizes.repeats)]
    return time_row("vocos_stream/B1", timing(samples), "us", subject.limit_us(decoder_work(subject.decoder, 1, 1)))


# ---- processes of their own ----


def memory(subject: Subject, batch: int) -> list[Row]:
    """MB (10^6 bytes) of a fresh process that has spoken: what the GPU has less free, and what of it is whose."""
    free_before = _free_bytes() if subject.gpu else 0
    told = ask("fresh_process.py", _job(subject, batch=batch, memory=True)).result
    if not subject.gpu:
        return [Row(f"memory/B{batch}", told["resident_mb"], "MB", 1)]
    parts = {
        "": free_before - told["after"],
        "/context": free_before - told["after_context"],
        "/ours": told["after_context"] - told["after"],
    }
    rows = [Row(f"memory/B{batch}{name}", count / 1e6, "MB", 1) for name, count in parts.items()]
    if told["nvidia_smi_mb"] is not None:
        rows.append(Row(f"memory/B{batch}/nvidia_smi", told["nvidia_smi_mb"], "MB", 1))
    if batch == 1:  # the weights in 16 bits, and no more
        embeddings = 0 if subject.model.tie_embeddings else subject.model.vocab_size * subject.model.hidden_size
        parameters = language_model_parameters(subject.model) + embeddings
        rows[0].limit = (parameters * ELEMENT_BYTES + decoder_work(subject.decoder, 0, 0).moved) / 1e6
        rows[0].share_of_limit = rows[0].limit / rows[0].value
    return rows


def _free_bytes() -> int:
    import cupy

    cupy.cuda.Device().synchronize()
    return int(cupy.cuda.runtime.memGetInfo()[0])


def cold_start(subject: Subject) -> Iterator[Row]:
    """Seconds from a process' start to its first audio, before and after anything was compiled.

    The caches are ours, CuPy's and the driver's own; what the file system keeps of Python's files is warm in both.
    """
    empty, warm = [], []
    for _ in range(2 if subject.sizes.repeats > 3 else 1):
        with tempfile.TemporaryDirectory() as folder:
            places = {"SOPRANO_CACHE_DIR": "ours", "CUPY_CACHE_DIR": "cupy", "CUDA_CACHE_PATH": "driver"}
            environment = {name: str(Path(folder, place)) for name, place in places.items()}
            runs = [
                ask("fresh_process.py", _job(subject, batch=1, memory=False), environment=environment).first_audio_s
                for _ in range(3)
            ]
            empty.append(runs[0] or 0.0)
            warm += [seconds or 0.0 for seconds in runs[1:]]
    yield Row("cold_start/warm_cache", median(warm), "s", len(warm))
    yield Row("cold_start/empty_cache", median(empty), "s", len(empty))


def _job(subject: Subject, *, batch: int, memory: bool) -> dict[str, Any]:
    return {
        "folder": subject.folder,
        "device": subject.tts.device,
        "text": subject.texts[0],
        "tokens": subject.sizes.tokens,
        "batch": batch,
        "memory": memory,
    }
