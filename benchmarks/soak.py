"""A long time of everything at once: random requests, cancellations, deadlines, and failures on purpose.

    python benchmarks/soak.py [--seconds 600] [--device cuda] [--gpus N] [--share] [--batch 256] [--tiny]
                              [--samples 48] [--rest 35] [--seed 0] [--model FOLDER] [--out FILE]

Some requests are spoken quietly first, one after the other; then three threads and an event loop submit them and
others, streamed and whole, cancel some and give others little time, while steps fail, memory runs out, sequences make
numbers that are not finite and, with several devices, a device's process is killed. At the end every request must
have ended exactly once; those that were spoken quietly must have the same bits again; memory of the host and of the
GPU must be flat (looked at when for a moment nothing is on its way); and no thread, process, open file or shared
memory may be left. Exit code 1 where that is not so.

--gpus N has a process for each; with --share all of them use one GPU, or with --device cpu the CPU.

Failures of a device come `--rest` seconds apart, since a device that fails three times in 30 s is used no more.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import queue
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import machine_facts
from benchmarks.soak_faults import DEVICE, INJECTED, VARIABLE, install, write_plan
from benchmarks.soak_memory import Memory, Traces
from benchmarks.soak_requests import DEADLINES, Asked, Tally, Wanted, draw
from soprano_cupy import Busy, SopranoError, SopranoTTS
from soprano_cupy.config import SAMPLE_RATE_HZ
from soprano_cupy.crowd import plan
from soprano_cupy.crowd.crowd import SWITCH_S, Crowd
from soprano_cupy.crowd.processes import ProcessCrowd
from soprano_cupy.crowd.speech import Speech
from soprano_cupy.testing import SOPRANO_1_1_80M, TINY, make_checkpoint

PROGRESS_S = 30.0
FEEDERS = 3
KNOWN = 0.4  # of all requests are among those spoken quietly
CANCELLED = 0.12
LOOK_S = 0.8  # from one look at the memory to the next, at least
QUIET_S = 20.0  # that what is on its way then may take
BACK_S = 60.0  # that a device may take to be set up anew
ANSWER_S = 60.0  # after the last submission, until everything must have ended


class Logged(logging.Handler):
    """Counts what the package logs, by the beginning of each message."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.counts: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        self.counts[record.getMessage()[:100]] += 1


class Soak:
    """One run: feeders submit, a checker looks at what has ended."""

    def __init__(self, tts: SopranoTTS, known: Sequence[tuple[Wanted, np.ndarray]], options: argparse.Namespace):
        self._tts, self._known, self._longest = tts, known, options.longest
        self._slots = options.batch * len(options.devices)
        self.tally = Tally()
        self._ended: queue.SimpleQueue[tuple[Asked, Speech] | None] = queue.SimpleQueue()
        self._stop, self._pause = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._open = 0
        self._target = self._slots
        self._failures: list[BaseException] = []

    # -- submitting -----------------------------------------------------------------------------------------------

    def _draw(self, rng: random.Random) -> Asked:
        deadline = rng.choice(DEADLINES)
        if self._known and rng.random() < KNOWN:
            wanted, reference = rng.choice(self._known)
            return Asked(wanted, reference, deadline)
        return Asked(draw(rng, self._longest), None, deadline)

    def _submit(self, rng: random.Random) -> tuple[Asked, Speech] | None:
        asked = self._draw(rng)
        try:
            speech = asked.wanted.submit(self._tts, deadline_s=asked.deadline_s)
        except Busy:
            with self._lock:
                self.tally.busy += 1
            return None
        with self._lock:
            self._open += 1
            self.tally.submitted += 1

        def ended(_: Any) -> None:
            asked.told += 1
            self._ended.put((asked, speech))

        if rng.random() < CANCELLED / 2:
            asked.cancel_asked = True
            speech.add_done_callback(ended)
            speech.cancel()
        else:
            speech.add_done_callback(ended)
        return asked, speech

    def feed(self, seed: int) -> None:
        """Submit as long as fewer than wanted are on their way, and cancel some of the newest."""
        rng = random.Random(seed)
        newest: list[tuple[Asked, Speech]] = []
        turn = 0.0
        try:
            while not self._stop.is_set():
                if time.monotonic() > turn:  # from a quiet house to one that is much too full
                    turn = time.monotonic() + rng.uniform(0.2, 2)
                    self._target = int(self._slots * rng.choice((0.05, 0.5, 1, 1, 2, 4)))
                if self._pause.is_set():
                    newest = []
                if self._pause.is_set() or self._open >= self._target:
                    time.sleep(0.002)
                    continue
                new = self._submit(rng)
                if new is None:
                    time.sleep(0.01)
                    continue
                newest = [*newest[-20:], new]
                if rng.random() < CANCELLED / 2:
                    asked, speech = rng.choice(newest)
                    asked.cancel_asked = True
                    speech.cancel()
        except BaseException as error:
            self._failures.append(error)

    def listen(self, seed: int) -> None:
        """Streams that are heard in an event loop as they come."""
        rng = random.Random(seed)

        async def hear() -> None:
            new = self._submit(rng)
            if new is None:
                await asyncio.sleep(0.02)
                return
            asked, speech = new
            heard = []
            try:
                async for chunk in speech:
                    heard.append(chunk)
                    if rng.random() < 0.01:
                        asked.cancel_asked = True
                        speech.cancel()
            except (SopranoError, CancelledError):
                return
            if len(heard) and not np.array_equal(np.concatenate(heard), speech.result()):
                self.tally.wrong("a stream's chunks are not its result")

        async def many() -> None:
            while not self._stop.is_set():
                await asyncio.gather(*(hear() for _ in range(4)))
                while self._pause.is_set():
                    await asyncio.sleep(0.01)

        try:
            asyncio.run(many())
        except BaseException as error:
            self._failures.append(error)

    # -- looking ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Look at all that has ended."""
        while (item := self._ended.get()) is not None:
            with self._lock:
                self._open -= 1
                self.tally.count(*item)

    def run(self, seconds: float, memory: Memory, kills: Sequence[float], seed: int) -> None:
        """Everything for so many seconds, and until all has ended."""
        feeders = [threading.Thread(target=self.feed, args=(seed + i,)) for i in range(FEEDERS)]
        feeders.append(threading.Thread(target=self.listen, args=(seed + FEEDERS,)))
        checker = threading.Thread(target=self.check)
        for thread in (*feeders, checker):
            thread.start()
        begin = told = time.monotonic()
        look_every = max(LOOK_S, seconds / 60)
        look, waiting = begin + look_every, sorted(kills)
        while (now := time.monotonic()) < begin + seconds and not self._failures:
            time.sleep(min(0.2, max(0.0, begin + seconds - now)))
            if now > look:
                self._look(memory)
                look = time.monotonic() + look_every
            if waiting and now > waiting[0]:
                waiting.pop(0)
                kill_a_process(self._tts, random.Random(int(now)))
            if now - told >= PROGRESS_S:
                told = now
                say(f"{now - begin:6.0f} s  {self.line()}  {memory.line()}")
        self._stop.set()
        for thread in feeders:
            thread.join()
        end = time.monotonic() + ANSWER_S
        while self.tally.ended < self.tally.submitted and time.monotonic() < end:
            time.sleep(0.01)
        self._ended.put(None)
        checker.join()
        for error in self._failures:
            self.tally.wrong(f"submitting failed: {type(error).__name__}: {error}")
        if self.tally.ended != self.tally.submitted:
            self.tally.wrong(f"{self.tally.submitted - self.tally.ended} requests have not ended")

    def _look(self, memory: Memory) -> None:
        """Let all that is on its way end, and see how much memory is in use then."""
        self._pause.set()
        end = time.monotonic() + QUIET_S
        while self._open and time.monotonic() < end:
            time.sleep(0.005)
        if not self._open:
            memory.sample()
        self._pause.clear()

    def line(self) -> str:
        t = self.tally
        return (
            f"{t.submitted} submitted: {t.answered} answered ({t.compared} compared), {t.cancelled} cancelled, "
            f"{t.late} late, {t.failed} failed; {t.busy} busy; {len(t.violations)} violations"
        )


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def kill_a_process(tts: SopranoTTS, rng: random.Random) -> None:
    """Kill one of the processes that serve the devices."""
    import signal

    crowd = tts._opened()
    pids = crowd.pids if isinstance(crowd, ProcessCrowd) else []
    if len(pids) > 1:
        os.kill(rng.choice(pids), signal.SIGKILL)


def quiet(tts: SopranoTTS, count: int, longest: int, seed: int) -> list[tuple[Wanted, np.ndarray]]:
    """Requests spoken one after the other."""
    rng = random.Random(seed)
    wanted = [draw(rng, longest) for _ in range(count)]
    return [(one, one.submit(tts).result(120)) for one in wanted]


def all_back(crowd: Crowd | ProcessCrowd, count: int) -> int:
    """The devices that work, once all do, or after a while."""
    end = time.monotonic() + BACK_S
    while len(crowd.devices) < count and time.monotonic() < end:
        time.sleep(0.05)
    return len(crowd.devices)


def plan_faults(options: argparse.Namespace) -> tuple[int, list[float]]:
    """Write when which device fails; how often that is, and when a process is killed."""
    begin = time.monotonic()
    rng = random.Random(options.seed + 1)
    several = len(options.devices) > 1
    steps: dict[str, list[tuple[float, str]]] = {name: [] for name in options.devices}  # of one name, all at once
    kills: list[float] = []
    at, turn, count = begin + min(options.rest, options.seconds / 4), 0, 0
    while at < begin + options.seconds * 0.9:
        name = options.devices[turn % len(options.devices)]
        if several and turn % 3 == 2:
            kills.append(at)
        else:
            steps[name].append((at, ("launch", "memory")[count % 2]))
            count += 1
        turn += 1
        at += options.rest * rng.uniform(1, 1.3)
    write_plan(begin, steps)
    return count, kills


def soak(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run it; what is to be told."""
    if len(options.devices) > 1:
        plan.OPENER, only_this = "benchmarks.soak_faults:Voice", plan.only_this
        plan.only_this = lambda name: {**only_this(name), DEVICE: name}
        if options.share or options.device == "cpu":
            plan.device_names = lambda *_: options.devices
            plan.wants_processes = lambda names: True
    install(options.device)
    gc.collect()
    traces, logged = Traces(gpu=options.device != "cpu"), Logged()
    logger = logging.getLogger("soprano_cupy")
    logger.addHandler(logged)
    logger.propagate = False
    begin = time.perf_counter()
    with SopranoTTS(
        folder, device=options.devices[0], devices=sorted(set(options.devices)), max_batch=options.batch,
        max_queue=4 * options.batch, invariant=options.device != "cpu",
    ) as tts:  # fmt: skip
        known = quiet(tts, options.samples, options.longest, options.seed)
        ready_s = time.perf_counter() - begin
        say(f"{len(known)} requests were spoken quietly; {ready_s:.1f} s since the start")
        crowd = tts._opened()
        memory = Memory(options.devices, lambda: crowd.pids if isinstance(crowd, ProcessCrowd) else [])
        planned, kills = plan_faults(options)
        run = Soak(tts, known, options)
        begin = time.perf_counter()
        run.run(options.seconds, memory, kills, 1000 * options.seed)
        lasted = time.perf_counter() - begin
        devices_left = all_back(crowd, len(options.devices))
    del tts
    tally = run.tally
    for violation in (*memory.violations(), *traces.left()):
        tally.wrong(violation)
    if devices_left < len(options.devices):
        tally.wrong(f"only {devices_left} of {len(options.devices)} devices are left")
    happened = sum(count for text, count in logged.counts.items() if f"{INJECTED}:" in text)
    if happened < planned - len(kills):  # a process that is being started anew misses one
        tally.wrong(f"only {happened} of {planned} failures that were planned have happened")
    say(f"{lasted:6.0f} s  {run.line()}  {memory.line()}")
    failures = {text: count for text, count in logged.counts.items() if "fail" in text or "process" in text}
    return {
        "what": "soak", **machine_facts(gpu=options.device != "cpu"), "line": run.line(),
        "devices": options.devices, "batch": options.batch, "seconds": lasted, "ready_s": ready_s,
        "submitted": tally.submitted, "answered": tally.answered, "compared": tally.compared,
        "cancelled": tally.cancelled, "late": tally.late, "failed": tally.failed, "busy": tally.busy,
        "times_real_time": tally.sound_samples / SAMPLE_RATE_HZ / lasted, "step_failures_planned": planned,
        "kills_planned": len(kills), "failures_logged": failures, "memory": memory.summary(),
        "violations": tally.violations,
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--share", action="store_true", help="all processes on one GPU")
    parser.add_argument("--batch", type=int, help="sentences at once on a device; 256, on a CPU 8")
    parser.add_argument("--tiny", action="store_true", help="a tiny model")
    parser.add_argument("--samples", type=int, default=48, help="requests that are spoken quietly first")
    parser.add_argument("--longest", type=int, default=3000, help="characters of a text")
    parser.add_argument("--rest", type=float, default=35.0, help="seconds between failures of devices")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.batch = options.batch or (8 if options.device == "cpu" else 256)
    name = "cpu" if options.device == "cpu" else "cuda:0"
    options.devices = [f"cuda:{i}" for i in range(options.gpus)]
    if options.share or options.device == "cpu":
        options.devices = [name] * options.gpus
    return options


def main() -> int:
    options = parse()
    sys.setswitchinterval(SWITCH_S)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model
        if folder is None:
            config = TINY if options.tiny else SOPRANO_1_1_80M
            folder = make_checkpoint(scratch, seed=8, config=config, mean_tokens=60)
        notes = Path(scratch, "notes")
        notes.mkdir()
        os.environ[VARIABLE] = str(notes)
        result = soak(options, folder)
    text = json.dumps(result, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    say(text)
    say(result["line"])
    say("FAILED" if result["violations"] else "passed")
    return 1 if result["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
