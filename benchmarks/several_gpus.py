"""Several GPUs of one machine behind one `submit`: throughput with 1 and with N, texts in and samples out.

    python benchmarks/several_gpus.py [--gpus 1,2] [--batch 512] [--seconds 6] [--device cuda] [--share] [--smoke]
                                      [--model FOLDER] [--invariant] [--out FILE]

Texts are random words of 20 to 200 characters; each is held to between 40 and 200 tokens, 120 on average: 7.7 s of
sound. They go in as text and come out as 16-bit samples in the front process' memory; twice as many as there are
slots are on their way. The checkpoint is a random one of Soprano-1.1-80M's shape unless --model names another.

several/in_process      one GPU in the benchmark's own process, seconds of sound in a second
several/gpusN           N GPUs, a process for each; `of_n_times` is its share of N times several/gpus1
several/gpusN/prepared  the same with texts that the front has prepared, under its own lock
several/gpusN/front     microseconds of processor time that the front takes for one sentence, all threads together;
                        copying its samples is among them
--share puts all processes on one GPU (or, with --device cpu, on the CPU): to try the program, not to measure.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Row
from benchmarks.crowd_run import Save, run
from benchmarks.random_text import sentences
from soprano_cupy import SopranoTTS
from soprano_cupy.config import SAMPLE_RATE_HZ, ModelConfig
from soprano_cupy.crowd.crowd import SWITCH_S, Crowd
from soprano_cupy.crowd.job import Wish
from soprano_cupy.crowd.plan import CrowdPlan, post
from soprano_cupy.crowd.processes import ProcessCrowd
from soprano_cupy.generation import Request
from soprano_cupy.pipeline import max_text_length
from soprano_cupy.sampling import SamplingParams
from soprano_cupy.text import build_prompts
from soprano_cupy.tokenizer import Tokenizer

TOKENS = (40, 200)  # of a sentence
WISH = Wish(pcm=True)


class Load:
    """Texts on their way, and what has come of them."""

    def __init__(self, submit: Callable[[str, SamplingParams], Any], most: int, tokens: tuple[int, int]) -> None:
        self._submit, self._tokens = submit, tokens
        self._waiting = threading.Semaphore(most)
        self._texts, self._random = sentences(4096, seed=3), random.Random(5)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.samples = self.ended = 0
        self.failures: list[BaseException] = []

    def feed(self) -> None:
        """Submit as long as there is room."""
        rng = self._random
        while True:
            self._waiting.acquire()
            if self._stop.is_set():
                return
            tokens = rng.randint(*self._tokens)
            params = SamplingParams(temperature=0.3, seed=rng.getrandbits(32), max_new_tokens=tokens)
            self._submit(rng.choice(self._texts), params).add_done_callback(self._done)

    def _done(self, speech: Any) -> None:
        error = speech.exception()
        with self._lock:
            if error is not None:
                self.failures.append(error)
            self.samples += speech._samples
            self.ended += 1
        self._waiting.release()

    def look(self) -> tuple[float, float, int, int]:
        with self._lock:
            return time.perf_counter(), time.process_time(), self.samples, self.ended

    def measure(self, seconds: float) -> tuple[float, float]:
        """Seconds of sound in a second, and microseconds of this process for each sentence."""
        feeder = threading.Thread(target=self.feed)
        feeder.start()
        time.sleep(0.6 * seconds)
        begin = self.look()
        time.sleep(seconds)
        end = self.look()
        self._stop.set()
        self._waiting.release()
        feeder.join()
        if self.failures:
            raise self.failures[0]
        passed, used, samples, ended = (b - a for a, b in zip(begin, end, strict=True))
        return samples / SAMPLE_RATE_HZ / passed, 1e6 * used / max(1, ended)


def drain(crowd: Any) -> None:
    while (crowd.scheduler if isinstance(crowd, Crowd) else crowd).unfinished:
        time.sleep(0.005)


def in_process(options: argparse.Namespace, folder: Path, tokens: tuple[int, int]) -> tuple[float, float]:
    """One device in this process."""
    device = "cpu" if options.device == "cpu" else "cuda:0"
    with SopranoTTS(
        folder, device=device, max_batch=options.batch, max_queue=1 << 20, invariant=options.invariant
    ) as tts:
        crowd: Any = tts._opened()
        load = Load(lambda text, params: crowd.submit(tts._requests(text, params), WISH), 2 * options.batch + 8, tokens)
        found = load.measure(options.seconds)
        drain(crowd)
    return found


def in_processes(
    options: argparse.Namespace, folder: Path, tokens: tuple[int, int], gpus: int, *, prepared: bool = False
) -> tuple[float, float]:
    """A process for each device, which prepares texts itself unless they are `prepared` here."""
    tokenizer, longest = Tokenizer.load(folder), max_text_length(folder, ModelConfig.from_folder(folder))

    def requests(text: str, params: SamplingParams) -> list[Request]:
        prompts = build_prompts(text, longest)
        return [Request(ids, params, index) for index, ids in enumerate(tokenizer.encode_batch(prompts))]

    plan = CrowdPlan(folder, "auto", "auto", options.batch, None, 1 << 20, None, options.invariant)
    names = ["cpu" if options.device == "cpu" else f"cuda:{0 if options.share else i}" for i in range(gpus)]
    with ProcessCrowd([post(plan, name) for name in names], max_queue=1 << 20) as crowd:
        if len(crowd.devices) < gpus:
            raise SystemExit(f"only {len(crowd.devices)} of {gpus} processes could be started")

        def submit(text: str, params: SamplingParams) -> Any:
            return crowd.submit(requests(text, params), WISH) if prepared else crowd.submit_text(text, params, WISH)

        load = Load(submit, gpus * (2 * options.batch + 8), tokens)
        found = load.measure(options.seconds)
        drain(crowd)
    return found


def measure(options: argparse.Namespace, folder: Path, save: Save) -> None:
    tokens = (6, 20) if options.smoke else TOKENS
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        sys.stdout.write(f"{row.case:28} {row.value:12.5g} {row.unit} {row.peer or ''}\n")
        sys.stdout.flush()
        save(rows)

    if 1 in options.gpus:
        add(Row("several/in_process", in_process(options, folder, tokens)[0], "x real time", 1))
    alone: float | None = None
    for gpus in options.gpus:
        made, front_us = in_processes(options, folder, tokens, gpus)
        alone = made if gpus == 1 else alone
        peer = {} if alone is None else {"of_n_times": made / (gpus * alone)}
        add(Row(f"several/gpus{gpus}", made, "x real time", 1, peer=peer))
        add(Row(f"several/gpus{gpus}/front", front_us, "us", 1))
        made, _ = in_processes(options, folder, tokens, gpus, prepared=True)
        add(Row(f"several/gpus{gpus}/prepared", made, "x real time", 1))


def main() -> int:
    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",") if word]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, to try the program itself")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--gpus", type=numbers, default=[1, 2])
    parser.add_argument("--share", action="store_true", help="all processes on one GPU")
    parser.add_argument("--batch", type=int, default=512, help="sentences at once on a GPU")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--invariant", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.smoke:
        options.device, options.batch, options.seconds = "cpu", 4, min(options.seconds, 0.5)
    sys.setswitchinterval(SWITCH_S)
    return run(options, "several-gpus", {}, measure)


if __name__ == "__main__":
    sys.exit(main())
