"""Several GPUs of one machine behind one `submit`: throughput with 1 and with N, texts in and samples out.

    python benchmarks/several_gpus.py [--gpus 1,2,...] [--batch 1024] [--seconds 2] [--device cuda] [--share] [--smoke]
                                      [--model FOLDER] [--invariant] [--out FILE]

Texts are random words of 20 to 200 characters; each is held to between 40 and 200 tokens, 120 on average: 7.7 s of
sound. They go in as text and come out as 16-bit samples in the front process' memory; twice as many as there are
slots are on their way. The checkpoint is a random one of Soprano-1.1-80M's shape unless --model names another.

Each number is the median of three measurements of --seconds in a row, `least` and `most` of which stand in `peer`.

several/in_process      one GPU in the benchmark's own process, seconds of sound in a second
several/gpusN           N GPUs, a process for each; `of_n_times` is its share of N times several/gpus1
several/gpusN/front     microseconds of processor time that the front takes for one sentence, all threads together;
                        copying its samples is among them
several/gpusN/even      the sentences of the process that spoke the fewest, of what each would have spoken were all
                        alike; `peer`: how many each of them spoke
several/gpusN/prepared  as several/gpusN, with texts that the front has prepared, under its own lock
several/apartN          N fronts that know nothing of each other, each as several/gpus1 with a GPU of its own, measured
                        at the same time, in sum; `of_one_front` is several/gpusN's share of it: what is missing there
                        is the price of one front for all, and what this lacks of N times several/gpus1 the host's
several/apartN/front    microseconds of processor time that these fronts take for one sentence
--share puts all processes on one GPU (or, with --device cpu, on the CPU): to try the program, not to measure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Row
from benchmarks.crowd_load import REPEATS, Load, Texts, drain, host_us, speeds
from benchmarks.crowd_run import HUSHED, Save, run
from soprano_cupy import SopranoTTS
from soprano_cupy.config import ModelConfig
from soprano_cupy.crowd.crowd import SWITCH_S, Crowd
from soprano_cupy.crowd.job import Wish
from soprano_cupy.crowd.plan import CrowdPlan, only_this, post
from soprano_cupy.crowd.processes import ProcessCrowd
from soprano_cupy.crowd.speech import Speech
from soprano_cupy.pipeline import max_text_length
from soprano_cupy.reader import Reader
from soprano_cupy.sampling import SamplingParams
from soprano_cupy.tokenizer import Tokenizer

WISH = Wish(pcm=True)

Wait = Callable[[], None]


@dataclass(frozen=True)
class Measured:
    """Of each measurement in a row; `spoken`: sentences of each process in all of them."""

    speeds: list[float]  # seconds of sound in a second
    host_us: list[float]  # of this process for a sentence
    spoken: list[int]


def under_load(
    crowd: Crowd | ProcessCrowd,
    submit: Callable[[str, SamplingParams], Speech],
    most: int,
    options: argparse.Namespace,
    wait: Wait,
) -> Measured:
    """What a crowd makes of texts once `wait` has returned, with `most` of them on their way."""
    texts = Texts(smoke=options.smoke)
    with Load(lambda: submit(*texts.draw()), most) as load:
        time.sleep(0.6 * options.seconds)
        wait()
        before = spoken(crowd)
        marks = load.marks(options.seconds, REPEATS)
        each = [b - a for a, b in zip(before, spoken(crowd), strict=True)]
    drain(crowd)
    return Measured(speeds(marks), host_us(marks), each)


def spoken(crowd: Crowd | ProcessCrowd) -> list[int]:
    """Requests that each process has done: those that it was sent but for those that are still there."""
    if not isinstance(crowd, ProcessCrowd):
        return []
    ledger = crowd._ledger
    with ledger.lock:
        there = Counter(id(ticket.station) for ticket in ledger.tickets.values())
        return [station.sent - there[id(station)] for station in crowd._stations]


def in_process(options: argparse.Namespace, folder: Path) -> Measured:
    """One device in this process."""
    device = "cpu" if options.device == "cpu" else "cuda:0"
    with SopranoTTS(
        folder, device=device, max_batch=options.batch, max_queue=1 << 20, invariant=options.invariant
    ) as tts:
        crowd = tts._opened()

        def submit(text: str, params: SamplingParams) -> Speech:
            return crowd.submit(tts._reader.read(text, params), WISH)

        return under_load(crowd, submit, 2 * options.batch + 8, options, lambda: None)


def in_processes(
    options: argparse.Namespace, folder: Path, gpus: int, *, prepared: bool = False, wait: Wait = lambda: None
) -> Measured:
    """A process for each device, which prepares texts itself unless they are `prepared` here."""
    reader = Reader(Tokenizer.load(folder), max_text_length(folder, ModelConfig.from_folder(folder)))
    plan = CrowdPlan(folder, "auto", "auto", options.batch, None, 1 << 20, None, options.invariant)
    posts = [replace(post(plan, device_name(options, index)), opener=HUSHED) for index in range(gpus)]
    with ProcessCrowd(posts, max_queue=1 << 20) as crowd:
        if len(crowd.devices) < gpus:
            raise SystemExit(f"only {len(crowd.devices)} of {gpus} processes could be started")

        def submit(text: str, params: SamplingParams) -> Speech:
            return crowd.submit(reader.read(text, params), WISH) if prepared else crowd.submit_text(text, params, WISH)

        return under_load(crowd, submit, gpus * (2 * options.batch + 8), options, wait)


def device_name(options: argparse.Namespace, index: int) -> str:
    return "cpu" if options.device == "cpu" else f"cuda:{0 if options.share else index}"


# ---- fronts that know nothing of each other ----


def apart(options: argparse.Namespace, folder: Path, fronts: int) -> list[Measured]:
    """This program once for each GPU, as `one_front`, all measured from the same moment on."""
    given = ["--device", options.device, "--batch", options.batch, "--seconds", options.seconds]
    given += ["--smoke"] * options.smoke + ["--invariant"] * options.invariant
    command = [sys.executable, __file__, "--one-front", "--model", folder.absolute(), *given]
    with ExitStack() as stack:
        running = []
        for index in range(fronts):
            environment = {**os.environ, **only_this(device_name(options, index))}
            front = subprocess.Popen(
                list(map(str, command)), env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            running.append(stack.enter_context(front))
            stack.callback(front.kill)
        for answers in ("ready", "done"):
            lines = [line_of(front) for front in running]  # all are ready before one begins, done before one ends
            for front in running if answers == "ready" else ():
                assert front.stdin is not None
                front.stdin.write("begin\n")
                front.stdin.flush()
        return [Measured(**json.loads(line)) for line in lines]


def line_of(front: subprocess.Popen[str]) -> str:
    """What a front says next."""
    assert front.stdout is not None
    line = front.stdout.readline()
    if not line:
        raise SystemExit(f"a front of its own ended with code {front.wait()}; it said why above")
    return line


def one_front(options: argparse.Namespace) -> int:
    """One GPU in a process behind this one. Says a line once it is at work, begins with one that it is told."""

    def wait() -> None:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        if not sys.stdin.readline():
            raise SystemExit("nobody waits for this any more")

    found = in_processes(options, options.model, 1, wait=wait)
    sys.stdout.write(f"{json.dumps(asdict(found))}\n")
    sys.stdout.flush()
    return 0


# ---- rows ----


def spread(case: str, values: Sequence[float], unit: str, **peer: float) -> Row:
    """The median, with the extremes beside it."""
    return Row(case, median(values), unit, len(values), peer={"least": min(values), "most": max(values), **peer})


def even(case: str, each: Sequence[int]) -> Row:
    peer = {f"process{index}": float(count) for index, count in enumerate(each)}
    return Row(case, len(each) * min(each) / max(1, sum(each)), "of an even share", 1, peer=peer)


def measure(options: argparse.Namespace, folder: Path, save: Save) -> None:
    rows: list[Row] = []

    def add(row: Row) -> float:
        rows.append(row)
        sys.stdout.write(f"{row.case:28} {row.value:12.5g} {row.unit} {row.peer or ''}\n")
        sys.stdout.flush()
        save(rows)
        return row.value

    if 1 in options.gpus:
        add(spread("several/in_process", in_process(options, folder).speeds, "x real time"))
    alone: float | None = None
    for gpus in sorted(options.gpus):
        case, found = f"several/gpus{gpus}", in_processes(options, folder, gpus)
        alone = median(found.speeds) if gpus == 1 else alone
        whole = None if alone is None else gpus * alone

        def of_n_times(values: Sequence[float], whole: float | None = whole) -> dict[str, float]:
            return {} if whole is None else {"of_n_times": median(values) / whole}

        made = add(spread(case, found.speeds, "x real time", **of_n_times(found.speeds)))
        add(spread(f"{case}/front", found.host_us, "us"))
        if gpus > 1:
            add(even(f"{case}/even", found.spoken))
        add(spread(f"{case}/prepared", in_processes(options, folder, gpus, prepared=True).speeds, "x real time"))
        if gpus > 1:
            fronts = apart(options, folder, gpus)
            total = [sum(values) for values in zip(*(front.speeds for front in fronts), strict=True)]
            share = made / median(total)
            add(spread(f"several/apart{gpus}", total, "x real time", of_one_front=share, **of_n_times(total)))
            add(spread(f"several/apart{gpus}/front", [us for front in fronts for us in front.host_us], "us"))


def numbers_here() -> list[int]:
    """1, 2, 4 and on, as many GPUs as there are."""
    import cupy

    count = cupy.cuda.runtime.getDeviceCount()
    return [1 << power for power in range(int(count).bit_length())]


def main() -> int:
    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",") if word]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, to try the program itself")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--gpus", type=numbers, help="1, 2, 4, ... of those that there are by default")
    parser.add_argument("--share", action="store_true", help="all processes on one GPU")
    parser.add_argument("--batch", type=int, default=1024, help="sentences at once on a GPU")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--invariant", action="store_true")
    parser.add_argument("--one-front", action="store_true", help=argparse.SUPPRESS)  # see `apart`
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.smoke:
        options.device, options.batch, options.seconds = "cpu", 4, min(options.seconds, 0.5)
    sys.setswitchinterval(SWITCH_S)
    if options.one_front:
        return one_front(options)
    if options.gpus is None:
        options.gpus = [1, 2] if options.share or options.device == "cpu" else numbers_here()
    return run(options, "several-gpus", {}, measure)


if __name__ == "__main__":
    sys.exit(main())
