"""`soprano-cupy bench`: how fast this machine speaks, in a few seconds.

Results are checked before anything is timed. The thorough measurements, with the machine's limits beside them, are
the programs in benchmarks/.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from .. import __version__, settings
from ..errors import ParameterError
from .console import echo, say
from .options import add_voice_options, open_voice
from .progress import Progress

if TYPE_CHECKING:
    from ..pipeline import SopranoTTS
    from ..runner import LanguageModelRunner

SENTENCES = (
    "The little boat sailed slowly across the quiet lake.",
    "Thank you for calling, and have a wonderful day.",
    "There is a small shop at the end of the street.",
    "In the evening, the old man told stories by the fire.",
)
LEAST_REPEATS, LEAST_SECONDS = 3, 0.6  # of each measurement; quick ones are repeated more often
MAX_BATCH = 4096
REST_SECONDS = 0.3  # threads of NumPy's products, which the checks use, look for work a while longer
CONTEXT = 256  # tokens that a voice holds in the middle of a long sentence
STEPS, STEP_REPEATS = 16, 9  # in a row; how often
DECODED_TOKENS = 64


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    case: str
    value: float
    unit: str
    meaning: str
    repeats: int = 1

    def as_json(self) -> dict[str, Any]:
        return {**self.__dict__, "value": round(self.value, 3)}


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure how fast this machine speaks",
        description="Check the results, then measure a step of the language model, first sound, one voice, a batch, "
        "the decoder and memory; medians of three runs or more, after one to warm up.",
        allow_abbrev=False,
    )
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="sentences spoken together (8)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("-v", "--verbose", action="store_true", help="say more about what is used and why")
    add_voice_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if not 1 <= options.batch <= MAX_BATCH:
        raise ParameterError(f"--batch {options.batch} must be from 1 to {MAX_BATCH}")
    free_mb = _free_gpu_mb()
    begin = time.perf_counter()
    tts = open_voice(options)
    results = [Result("load", time.perf_counter() - begin, "s", "reading the checkpoint")]
    state = [(0.0, "checking the results")]
    with Progress(lambda: state[0]):
        memory, checks = _checked(tts, free_mb)
        time.sleep(REST_SECONDS)
        measures = _measures(tts, options.batch)
        for index, measure in enumerate(measures):
            state[0] = (index / len(measures), f"measurement {index + 1} of {len(measures)}")
            results += measure()
    results += memory
    if options.json:
        echo(json.dumps(_record(tts, results, checks)))
        return 0
    runner, decoder = tts.engine.language_model, tts.engine.decoder
    if not options.verbose:  # which has said it already
        say(f"{tts.model.name} on {tts.device}: {tts.device_reason}")
        say(f"language model in {runner.dtype}, {runner.attention} attention: {runner.reason}")
    say(f"decoder in {decoder.dtype}: {decoder.reason}")
    say(f"{checks} checks passed")
    for result in results:
        echo(f"{result.case:<16} {result.value:>9.1f} {result.unit:<12} {result.meaning}")
    return 0


# ---- before the clock runs ----


def _checked(tts: SopranoTTS, free_mb: float | None) -> tuple[list[Result], int]:
    """What one voice takes of memory, read before the checks take their own, and how many checks passed."""
    from .bench_checks import Voiced, check

    voiced = Voiced.of(tts, SENTENCES[0])
    resident = resident_mb()
    host = "the process's resident memory at its highest, one voice"
    memory = [Result("memory/B1", resident, "MB", host)]
    if tts.device != "cpu" and free_mb is not None:
        taken = free_mb - (_free_gpu_mb() or 0.0)
        gpu = "what the voice takes of the GPU's memory, without CUDA's own"
        memory = [Result("memory/B1", taken, "MB", gpu), Result("memory/host", resident, "MB", host)]
    return memory, check(tts, voiced)


def resident_mb() -> float:
    """The most memory that this process has had resident; getrusage would count what its parent had, too."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii", errors="replace"))
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def _free_gpu_mb() -> float | None:
    """MB that the GPU of the voice has free, its context being made; None where the CPU speaks."""
    from ..device import cuda_index, resolve_device

    device, _ = resolve_device(settings.device())
    if device == "cpu":
        return None
    import cupy

    with cupy.cuda.Device(cuda_index(device)):
        cupy.cuda.get_current_stream().synchronize()
        return float(cupy.cuda.runtime.memGetInfo()[0]) / 1e6


# ---- measurements ----


def _measures(tts: SopranoTTS, batch: int) -> list[Callable[[], list[Result]]]:
    """What gives the rows, in their order."""
    steps = [lambda size=size: [_step(tts.engine.language_model, size)] for size in sorted({1, batch})]
    return [*steps, lambda: _voice(tts), lambda: [_batch(tts, batch)], lambda: [_vocos(tts)]]


def _step(runner: LanguageModelRunner, batch: int) -> Result:
    context = min(CONTEXT, runner.config.max_positions // 2)
    samples = step_seconds(runner, batch, context, STEPS, STEP_REPEATS)
    tokens = "one token" if batch == 1 else f"one token for each of {batch} voices"
    meaning = f"{tokens}, {context} tokens into its sentence"
    return Result(f"step/B{batch}/ctx{context}", median(samples) * 1e6, "us", meaning, len(samples))


def step_seconds(runner: LanguageModelRunner, batch: int, context: int, steps: int, repeats: int) -> list[float]:
    """Seconds of a step of `batch` sequences that hold `context` tokens each, for each of `repeats` measurements.

    A step takes the last token of each sequence and chooses the next, the likeliest. An engine that keeps its tokens
    on the device measures itself (`benchmark_step`); else `steps` steps in a row are timed by the host's clock.
    """
    measure = getattr(runner, "benchmark_step", None)
    if measure is not None:
        return [float(seconds) for seconds in measure(batch, context, steps, repeats)]
    import numpy as np

    from ..sampling import greedy

    cache = runner.new_cache(batch, context + steps)
    ids = np.random.default_rng(0).integers(0, runner.config.vocab_size, context).astype(np.int32)
    runner.extend(cache, ids[:-1], np.array([0, context - 1], np.int32), last_only=True)
    for slot in range(1, batch):
        cache.move(0, slot)
    rows = np.arange(batch + 1, dtype=np.int32)
    samples = []
    for _ in range(repeats + 1):
        cache.lengths[:] = context - 1
        tokens = np.repeat(ids[-1:], batch)
        begin = time.perf_counter()
        for _ in range(steps):
            tokens = greedy(runner.logits(runner.extend(cache, tokens, rows, last_only=True))).astype(np.int32)
        samples.append((time.perf_counter() - begin) / steps)
    return samples[1:]


def _voice(tts: SopranoTTS) -> list[Result]:
    """Seconds to the first sound of a stream, and the real-time factor of the whole stream."""

    def stream() -> tuple[float, float]:
        begin, first, samples = time.perf_counter(), None, 0
        for chunk in tts.infer_stream(SENTENCES[0]):
            first = first if first is not None else time.perf_counter() - begin
            samples += len(chunk)
        return first or 0.0, _factor(samples, time.perf_counter() - begin)

    runs = _runs(stream)
    first_s, factor = (median(run[which] for run in runs) for which in (0, 1))
    return [
        Result("first_audio", first_s * 1e3, "ms", "from the call to the first sound of a stream", len(runs)),
        Result("voice/B1", factor, "x real time", "seconds of sound for each second of work, one voice", len(runs)),
    ]


def _batch(tts: SopranoTTS, size: int) -> Result:
    texts = [SENTENCES[index % len(SENTENCES)] for index in range(size)]

    def speak() -> float:
        begin = time.perf_counter()
        samples = sum(map(len, tts.infer_batch(texts)))
        return _factor(samples, time.perf_counter() - begin)

    runs = _runs(speak)
    meaning = "the same, in one piece" if size == 1 else f"the same, {size} sentences together"
    return Result(f"throughput/B{size}", median(runs), "x real time", meaning, len(runs))


def _vocos(tts: SopranoTTS) -> Result:
    """The decoder alone, one utterance."""
    import numpy as np

    from ..device import array_module

    decoder = tts.engine.decoder
    shape = (DECODED_TOKENS + 1, decoder.config.input_size)
    states = array_module(tts.device).asarray(np.random.default_rng(0).standard_normal(shape, np.float32))

    def decode() -> float:
        begin = time.perf_counter()
        samples = len(decoder.decode_many([states])[0])
        return _factor(samples, time.perf_counter() - begin)

    runs = _runs(decode)
    meaning = f"the same, the decoder alone on {DECODED_TOKENS} tokens"
    return Result(f"vocos/B1/T{DECODED_TOKENS}", median(runs), "x real time", meaning, len(runs))


def _runs(measure: Callable[[], Any]) -> list[Any]:
    """What `measure` returns, a few times after a run to warm up."""
    measure()
    runs: list[Any] = []
    end = time.perf_counter() + LEAST_SECONDS
    while len(runs) < LEAST_REPEATS or time.perf_counter() < end:
        runs.append(measure())
    return runs


def _factor(samples: int, wall_s: float) -> float:
    from ..config import SAMPLE_RATE_HZ

    return samples / SAMPLE_RATE_HZ / wall_s


def _record(tts: SopranoTTS, results: list[Result], checks: int) -> dict[str, Any]:
    from .doctor import processor

    runner, decoder = tts.engine.language_model, tts.engine.decoder
    return {
        "what": "soprano-cupy bench",
        "version": __version__,
        "machine": processor(),
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": tts.model.name,
        "device": tts.device,
        "device_reason": tts.device_reason,
        "dtype": runner.dtype,
        "attention": runner.attention,
        "reason": runner.reason,
        "decoder_dtype": decoder.dtype,
        "decoder_reason": decoder.reason,
        "checks": f"passed {checks}",
        "rows": [result.as_json() for result in results],
    }
