"""`soprano-cupy bench`: how fast this machine speaks, in half a minute.

The thorough measurements, with the machine's limits beside them, are the programs in benchmarks/.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from datetime import datetime, timezone
from statistics import median
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import ParameterError
from .console import echo, say
from .options import add_voice_options, open_voice
from .progress import Progress

if TYPE_CHECKING:
    from ..pipeline import SopranoTTS

SENTENCES = (
    "The little boat sailed slowly across the quiet lake.",
    "Thank you for calling, and have a wonderful day.",
    "There is a small shop at the end of the street.",
    "In the evening, the old man told stories by the fire.",
)
REPEATS = 3
MAX_BATCH = 4096


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure how fast this machine speaks",
        description="Measure first sound, one voice and a batch; medians of three runs after one to warm up.",
        allow_abbrev=False,
    )
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="sentences spoken together (8)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is used and why")
    add_voice_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if not 1 <= options.batch <= MAX_BATCH:
        raise ParameterError(f"--batch {options.batch} must be from 1 to {MAX_BATCH}")
    begin = time.perf_counter()
    tts = open_voice(options)
    load_s = time.perf_counter() - begin
    steps = 2 * (REPEATS + 1)
    done = [0]
    with Progress(lambda: (done[0] / steps, f"run {done[0] + 1} of {steps}")):
        first_s, voice = _median_runs(lambda: _stream(tts), done)
        _, batch = _median_runs(lambda: _batch(tts, options.batch), done)
    rows = [
        _row("load", load_s, "s", "reading the checkpoint", repeats=1),
        _row("first_audio", first_s * 1e3, "ms", "from the call to the first sound of a stream"),
        _row("voice/B1", voice, "x real time", "seconds of sound for each second of work, one voice"),
        _row(f"throughput/B{options.batch}", batch, "x real time", f"the same, {options.batch} sentences together"),
        _row("memory", _peak_mb(), "MB", "the process's resident memory at its highest", repeats=1),
    ]
    if options.json:
        echo(json.dumps(_record(tts, rows)))
        return 0
    runner = tts.engine.language_model
    say(f"{tts.model.name} on {tts.device}, {runner.dtype}, {runner.attention} attention")
    for row in rows:
        echo(f"{row['case']:<16} {row['value']:>9.1f} {row['unit']:<12} {row['meaning']}")
    return 0


def _median_runs(measure: Any, done: list[int]) -> tuple[float, float]:
    """Medians of both numbers that `measure` returns, after a run to warm up."""
    results = []
    for _ in range(REPEATS + 1):
        results.append(measure())
        done[0] += 1
    return median(first for first, _ in results[1:]), median(second for _, second in results[1:])


def _stream(tts: SopranoTTS) -> tuple[float, float]:
    """Seconds to the first sound, and the real-time factor of the whole stream."""
    begin, first, samples = time.perf_counter(), None, 0
    for chunk in tts.infer_stream(SENTENCES[0]):
        first = first if first is not None else time.perf_counter() - begin
        samples += len(chunk)
    return first or 0.0, _factor(samples, time.perf_counter() - begin)


def _batch(tts: SopranoTTS, size: int) -> tuple[float, float]:
    texts = [SENTENCES[index % len(SENTENCES)] for index in range(size)]
    begin = time.perf_counter()
    samples = sum(map(len, tts.infer_batch(texts)))
    wall_s = time.perf_counter() - begin
    return wall_s, _factor(samples, wall_s)


def _factor(samples: int, wall_s: float) -> float:
    from ..config import SAMPLE_RATE_HZ

    return samples / SAMPLE_RATE_HZ / wall_s


def _row(case: str, value: float, unit: str, meaning: str, repeats: int = REPEATS) -> dict[str, Any]:
    return {"case": case, "value": round(value, 3), "unit": unit, "repeats": repeats, "meaning": meaning}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # Linux counts KB


def _record(tts: SopranoTTS, rows: list[dict[str, Any]]) -> dict[str, Any]:
    from .doctor import processor

    runner = tts.engine.language_model
    return {
        "what": "soprano-cupy bench",
        "version": __version__,
        "machine": processor(),
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": tts.model.name,
        "device": tts.device,
        "dtype": runner.dtype,
        "attention": runner.attention,
        "rows": rows,
    }
