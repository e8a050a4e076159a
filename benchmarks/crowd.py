"""Many voices at once: throughput against batch, and latency of live streams that arrive at random.

    python benchmarks/crowd.py [--smoke] [--device cuda] [--batches 1,8,...] [--streams 1,10,...] [--seconds 1]
                               [--model FOLDER] [--invariant] [--plot FILE.png] [--out FILE]

The checkpoint is a random one of Soprano-1.1-80M's shape unless --model names another. Texts are random words of 20 to
200 characters; their sentences are held to between 40 and 200 tokens, drawn at random, 120 on average: 7.7 s of sound.

crowd/throughput/B* seconds of sound in a second, texts in (normalised, cut and tokenised by one thread), 16-bit
samples in host memory out, at most B sentences at once, the median of three measurements in a row; crowd/tokens_in/B*
the same from token ids; crowd/host/B* the per cent of the time, texts in, in which the language model had nothing to
do on the GPU since the host had asked for nothing (`peer`: the same with token ids). crowd/live/N*: N streams being
listened to at a time on average (Poisson arrivals, ten a second at least; each played at real time from its first
sample): first_audio, finish and silence in milliseconds, medians with p95 and p99 in `peer`; dry: streams in a
thousand that fell silent; refused: requests in a thousand that were sent away (`Busy`). crowd/cancel: milliseconds
from `cancel` until the slot is free. memory: GPU bytes of the crowd's buffers.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import cast

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Row
from benchmarks.crowd_load import REPEATS, Load, Texts, drain, speeds
from benchmarks.crowd_run import Save, run
from benchmarks.crowd_waits import Waits
from soprano_cupy import Busy, SopranoTTS
from soprano_cupy.config import SAMPLE_RATE_HZ, TOKEN_SAMPLES
from soprano_cupy.crowd.crowd import Crowd
from soprano_cupy.crowd.job import Wish
from soprano_cupy.crowd.speech import Speech
from soprano_cupy.generation import Request

LIMIT = 83_000.0  # times real time, of an H200: the arithmetic of both networks at the rates it reaches
BATCHES, STREAMS = (1, 8, 64, 256, 512, 1024, 2048), (1, 10, 100, 500, 1000, 2000, 5000)
PERCENTILES = (50, 95, 99)
LEAST_ARRIVALS = 10.0  # a second


class Subject:
    """A voice, crowds of it, and sentences for it."""

    def __init__(self, folder: Path, device: str, batch: int, *, invariant: bool, smoke: bool) -> None:
        self.tts = SopranoTTS(folder, device=device, max_batch=batch, max_queue=1 << 20, invariant=invariant)
        self.texts = Texts(smoke=smoke)

    def crowd(self) -> Crowd:
        crowd = self.tts._opened()
        assert isinstance(crowd, Crowd)
        return crowd

    def resize(self, batch: int) -> None:
        """Another crowd of the same voice, of `batch` sentences at once; what speaks is over."""
        if self.tts._crowd is not None:
            self.tts._crowd.close()
        self.tts._crowd = None
        self.tts._crowd_plan = replace(self.tts._crowd_plan, max_batch=batch)

    def waits(self, waits: Waits) -> AbstractContextManager[Waits]:
        """Measure how the GPU waits for the host."""
        return waits.of(self.crowd().devices[0])

    def request(self) -> list[Request]:
        """The next text's sentences, each as long as the same draw says."""
        return self.tts._reader.read(*self.texts.draw())

    def memory(self) -> int:
        """Bytes of a GPU that the crowd's buffers take."""
        from soprano_cupy.gpu.crowd_device import GpuDevice

        return sum(device.nbytes for device in self.crowd().devices if isinstance(device, GpuDevice))


def settle() -> None:
    """Collect what was loaded, and leave it alone from now on: it would be looked through while others wait."""
    gc.collect()
    gc.freeze()


def throughput(
    subject: Subject, batch: int, *, text_in: bool, seconds: float, waits: Waits | None = None
) -> list[float]:
    """Seconds of sound in a second of a full house, from the middle of many sentences, some times in a row."""
    crowd, wish = subject.crowd(), Wish(pcm=True)
    wanted = iter(subject.request, None)
    if not text_in:
        wanted = cycle([next(wanted) for _ in range(min(2048, 4 * batch))])
    settle()
    with Load(lambda: crowd.submit(next(wanted), wish), 2 * batch + 8) as load:  # so that slots never wait for one
        time.sleep(max(seconds / 2, 0.3))
        load.settle(2 * batch)  # those who began together have drifted apart
        with subject.waits(waits or Waits()):
            marks = load.marks(seconds, REPEATS)
    drain(crowd)
    return speeds(marks)


class Listener:
    """One live stream: when its chunks came, and how long it would have been silent."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.first: float | None = None
        self.last = self.begin
        self.heard_s = self.silent_s = 0.0

    def hear(self, samples: int) -> None:
        now = time.perf_counter()
        if self.first is None:
            self.first = now
        else:
            self.silent_s += max(0.0, now - (self.first + self.heard_s + self.silent_s))
        self.heard_s += samples / SAMPLE_RATE_HZ
        self.last = now


class Heard(Speech):
    """A stream whose listener hears each chunk in the moment in which it comes."""

    listener: Listener

    def add_chunk(self, samples: np.ndarray) -> None:
        self.listener.hear(len(samples))
        super().add_chunk(samples)


def live(subject: Subject, streams: int, seconds: float) -> tuple[list[Listener], int]:
    """Listeners that arrive at random so that `streams` are there at a time; and how many were refused."""
    crowd = subject.crowd()
    mean_s = subject.texts.mean_tokens * TOKEN_SAMPLES / SAMPLE_RATE_HZ
    rng = random.Random(streams)
    ready = [subject.request() for _ in range(256)]
    listeners: list[Listener] = []
    refused = 0
    settle()
    at = end = time.perf_counter()
    end += seconds
    while at < end:
        time.sleep(max(0.0, at - time.perf_counter()))
        listener = Listener()
        try:
            _submit(crowd, ready[rng.randrange(len(ready))], listener)
            listeners.append(listener)
        except Busy:
            refused += 1
        at += rng.expovariate(max(streams / mean_s, LEAST_ARRIVALS))
    drain(crowd)
    return listeners, refused


def _submit(crowd: Crowd, requests: Sequence[Request], listener: Listener) -> None:
    """Submit a stream whose chunks go to a listener from the first on."""
    with crowd.scheduler.lock:  # nothing comes before the listener is there
        speech = crowd.submit(requests, Wish(stream=True, pcm=True))
        speech.__class__ = Heard
        cast("Heard", speech).listener = listener


def cancel_ms(subject: Subject, times: int) -> list[float]:
    """Milliseconds from `cancel` until the device has all its slots again, with one voice running."""
    crowd = subject.crowd()
    driver = crowd._workers[0].driver
    assert driver is not None
    found = []
    for _ in range(times):
        speech = crowd.submit(subject.request()[:1], Wish(stream=True))
        next(iter(speech), None)
        begin = time.perf_counter()
        speech.cancel()
        while driver.free < driver.slots:
            time.sleep(2e-5)
        found.append(1e3 * (time.perf_counter() - begin))
    return found


def percentiles(case: str, values: Sequence[float]) -> Row:
    """A row of milliseconds with p95 and p99."""
    p50, p95, p99 = np.percentile(values, PERCENTILES).tolist()
    return Row(case, p50, "ms", len(values), p99=p99, peer={"p95": p95, "p99": p99})


def live_rows(subject: Subject, streams: int, seconds: float) -> Iterator[Row]:
    listeners, refused = live(subject, streams, seconds)
    heard = [listener for listener in listeners if listener.first is not None]
    case = f"crowd/live/N{streams}"
    if not heard:
        return
    yield percentiles(f"{case}/first_audio", [1e3 * (x.first - x.begin) for x in heard if x.first is not None])
    yield percentiles(f"{case}/finish", [1e3 * (x.last - x.begin) for x in heard])
    yield percentiles(f"{case}/silence", [1e3 * x.silent_s for x in heard])
    yield Row(f"{case}/dry", 1e3 * sum(x.silent_s > 0 for x in heard) / len(heard), "per mille", len(heard))
    yield Row(f"{case}/refused", 1e3 * refused / (len(listeners) + refused), "per mille", len(listeners) + refused)


def measure(options: argparse.Namespace, folder: Path, save: Save) -> None:
    """All rows; what there is is saved after each voice, whatever comes later."""
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        sys.stdout.write(f"{row.case:44} {row.value:12.4g} {row.unit} {row.peer or ''}\n")
        sys.stdout.flush()

    subject = Subject(folder, options.device, options.live_batch, invariant=options.invariant, smoke=options.smoke)
    with subject.tts:
        for batch in options.batches:
            subject.resize(batch)
            for row in throughput_rows(subject, batch, options):
                add(row)
            save(rows)
        subject.resize(options.live_batch)
        throughput(subject, 1, text_in=False, seconds=0.1)
        for streams in options.streams:
            for row in live_rows(subject, streams, 2 * options.seconds):
                add(row)
            save(rows)
        add(percentiles("crowd/cancel", cancel_ms(subject, 20)))
    save(rows)
    if options.plot:
        from benchmarks.crowd_plot import plot

        plot(rows, "Soprano, many voices at once", options.plot)


def throughput_rows(subject: Subject, batch: int, options: argparse.Namespace) -> Iterator[Row]:
    """Memory, speeds, and how long the GPU waits for the host."""
    on_gpu = options.device != "cpu"
    if on_gpu:
        yield Row(f"crowd/memory/B{batch}", subject.memory() / 1e6, "MB", 1)
    limit = LIMIT if on_gpu else None
    waited: dict[str, float] = {}
    for name, text_in in (("tokens_in", False), ("throughput", True)):
        waits = Waits()
        made = throughput(subject, batch, text_in=text_in, seconds=options.seconds, waits=waits)
        share = median(made) / limit if limit else None
        yield Row(f"crowd/{name}/B{batch}", median(made), "x real time", len(made), limit=limit, share_of_limit=share)
        if (found := waits.share()) is not None:
            waited[name] = 100 * found
    if "throughput" in waited:
        peer = {"tokens_in": waited["tokens_in"]} if "tokens_in" in waited else {}
        yield Row(f"crowd/host/B{batch}", waited["throughput"], "per cent", 1, peer=peer)


def main() -> int:
    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",") if word]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, to try the program itself")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--batches", type=numbers, default=list(BATCHES))
    parser.add_argument("--streams", type=numbers, default=list(STREAMS))
    parser.add_argument("--live-batch", type=int, default=1024, help="voices at once of the live part")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement; twice that of live ones")
    parser.add_argument("--plot", type=Path, help="also draw speeds and latencies against the number of voices")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--switch-us", type=float, default=100, help="of threads: sys.setswitchinterval")
    parser.add_argument("--invariant", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.smoke:
        options.device, options.batches, options.streams, options.live_batch = "cpu", [1, 4], [2], 4
        options.seconds = min(options.seconds, 0.4)
    sys.setswitchinterval(options.switch_us / 1e6)
    return run(options, "crowd", {"throughput_x": LIMIT}, measure)


if __name__ == "__main__":
    sys.exit(main())
