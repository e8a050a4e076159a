"""Random prompts through the persistent kernel for as long as is asked: nothing may hang, fail or come out differently.

    python benchmarks/persistent_soak.py [--seconds 3600] [--threads N] [--side-by-side N] [--processes N] [--gpus 0,1]
                                         [--voices 1,2,4,8] [--model FOLDER] [--seed N] [--add FILE ...] [--out FILE]

Each worker asks for random prompts, greedy and drawn, of random length; some a second time, whose tokens and states
must be the first time's bits; some by the graph path too, whose tokens must be the same up to where its two best scores
are closer than the two paths' logits; and gives some up half-way. --threads: workers of one model, which take turns on
its kernel. --side-by-side: models, whose kernels run at the same time where the GPU holds them all. --processes: copies
of all that, in processes of their own. --gpus: as many such processes on each of these GPUs, all at the same time.
Exit code 1 on any hang, mismatch, error or fallback to graphs.

`kernel_seconds` tells how long kernels were asked for prompts: from when the workers began until those of a model had
ended, summed over models, processes and GPUs; what is checked by graphs meanwhile is among it. --add: results of
earlier runs, whose counts and seconds are added; `runs` lists them all. Where no seed is given each run has its own,
so that runs add up to different prompts. --out is written every minute and at the end: `complete` tells which.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import machine_facts
from benchmarks.persistent_soak_parts import COUNTED, PROBLEMS, Found, Report, Save, in_processes, read_earlier
from soprano_cupy import Qwen3
from soprano_cupy.audio import check_writable
from soprano_cupy.device import to_host
from soprano_cupy.errors import OutputError
from soprano_cupy.generation import Generation, Request, begin, generate
from soprano_cupy.sampling import SamplingParams, penalise
from soprano_cupy.testing import SOPRANO_1_1_80M, make_checkpoint

if TYPE_CHECKING:
    from soprano_cupy.gpu.persistent_path import PersistentPath
    from soprano_cupy.gpu.qwen3 import GpuLanguageModel

HANG_S = 20.0  # a request of at most 8 x 512 tokens takes a fifth of a second
REMEMBERED = 20_000  # first occurrences
AGAIN, BY_GRAPHS, GIVEN_UP = 0.25, 0.02, 0.08  # shares of the requests
PROGRESS_S = 60.0
PROGRAM = Path(__file__).resolve()


@dataclass
class Tally:
    """What all workers of a process have seen."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[tuple[int, ...], bytes] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    since: dict[str, tuple[float, str]] = field(default_factory=dict)  # what each worker is at
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, name: str, number: int = 1, complaint: str = "") -> None:
        with self.lock:
            self.counts[name] += number
            if complaint and len(self.complaints) < 20:
                self.complaints.append(complaint)

    def same_as_first(self, key: tuple[int, ...], digest: bytes) -> bool:
        with self.lock:
            if key not in self.first:
                if len(self.first) < REMEMBERED:
                    self.first[key] = digest
                return True
            self.counts["repeats"] += 1
            return self.first[key] == digest

    def as_json(self) -> dict[str, Any]:
        return {name: self.counts[name] for name in COUNTED} | {"complaints": self.complaints}


class Worker:
    """One thread's requests to one model."""

    def __init__(self, name: str, seed: int, model: Qwen3, graphs: Qwen3, voices: list[int], tally: Tally) -> None:
        self.name, self.model, self.graphs, self.voices, self.tally = name, model, graphs, voices, tally
        self.rng = np.random.default_rng(seed)
        self.keys: list[tuple[int, ...]] = []
        self.ended: float | None = None

    def run(self, until: float) -> None:
        while time.monotonic() < until and path_of(self.model).failure is None:
            key = self._choose()
            self.tally.since[self.name] = time.monotonic(), f"{self.name}: {key}"
            try:
                self._ask(key)
            except Exception as error:  # counted, and the soak goes on
                self.tally.count("errors", complaint=f"{key}: {type(error).__name__}: {error}")
                if getattr(error, "sticky", False):
                    break
        self.tally.since.pop(self.name, None)
        self.ended = time.monotonic()
        if path_of(self.model).failure is not None:
            self.tally.count("fallbacks", complaint=f"{self.name}: {path_of(self.model).failure}")

    def _choose(self) -> tuple[int, ...]:
        """(seed of the prompts, voices, whether tokens are drawn): all that a request depends on."""
        if self.keys and self.rng.random() < AGAIN:
            return self.keys[int(self.rng.integers(len(self.keys)))]
        key = int(self.rng.integers(1 << 40)), int(self.rng.choice(self.voices)), int(self.rng.random() < 0.5)
        self.keys = [*self.keys[-1000:], key]
        return key

    def _requests(self, key: tuple[int, ...]) -> list[Request]:
        seed, count, drawn = key
        rng = np.random.default_rng(seed)
        vocab = self.model.config.vocab_size
        limit = int(rng.choice([8, 40, 120, 300, 512]))
        params = SamplingParams(0.7 if drawn else 0.0, max_new_tokens=limit, seed=seed & 0xFFFF)
        lengths = rng.integers(1, int(rng.choice([20, 80, 400])), count)
        return [Request(rng.integers(4, vocab, n).astype(np.int32), params, i) for i, n in enumerate(lengths)]

    def _ask(self, key: tuple[int, ...]) -> None:
        requests = self._requests(key)
        if self.rng.random() < GIVEN_UP:
            rounds = iter(begin(self.model.runner, requests[:1]))
            for _ in range(int(self.rng.integers(1, 30))):
                if next(rounds, None) is None:
                    break
            rounds.close()  # type: ignore[attr-defined]
            self.tally.count("given up")
            return
        results = generate(self.model.runner, requests)
        self.tally.count("prompts", len(requests))
        self.tally.count("tokens", sum(len(r.tokens) for r in results))
        if not self.tally.same_as_first(key, digest_of(results)):
            self.tally.count("mismatches", complaint=f"{key}: other bits than the first time")
        if self.rng.random() < BY_GRAPHS:
            for request, result, expected in zip(
                requests, results, generate(self.graphs.runner, requests), strict=True
            ):
                self.tally.count("checked against graphs")
                complaint = difference(self.graphs, request, result, expected)
                if complaint:
                    self.tally.count("mismatches", complaint=f"{key}: {complaint}")


def path_of(model: Qwen3) -> PersistentPath:
    """The persistent kernel of a model that `load` has found to have one."""
    return cast("GpuLanguageModel", model.runner).persistent


def digest_of(results: list[Generation]) -> bytes:
    """Of every token and every bit of every state."""
    digest = blake2b(digest_size=16)
    for result in results:
        digest.update(result.tokens.tobytes())
        digest.update(to_host(result.states).tobytes())
    return digest.digest()


def difference(graphs: Qwen3, request: Request, got: Generation, expected: Generation) -> str:
    """What is wrong with a result beside the graph path's; empty when nothing is."""
    length = min(len(got.tokens), len(expected.tokens))
    different = np.flatnonzero(got.tokens[:length] != expected.tokens[:length])
    same = int(different[0]) if len(different) else length
    kept = min(same + 1, len(got.states), len(expected.states))
    if kept == 0:
        return "" if same else "another first token"
    states, reference = to_host(got.states)[:kept], to_host(expected.states)[:kept]
    error = np.abs(states - reference).max() / np.sqrt((reference**2).mean())
    if error > 0.15:
        return f"a state differs by {error:.2g} of the states' size within {kept} tokens"
    if same == len(got.tokens) == len(expected.tokens) or request.params.temperature > 0 or same >= kept:
        return ""
    logits = to_host(graphs.runner.logits(np.stack([states[same], reference[same]]))).astype(np.float64)
    seen = np.zeros((1, logits.shape[1]), bool)
    seen[0, [*request.ids, *expected.tokens[:same]]] = True
    best = np.sort(penalise(logits[1:], seen, np.array([[request.params.repetition_penalty]]))[0])[-2:]
    between = np.abs(logits[0] - logits[1]).max()
    return "" if best[1] - best[0] <= 4 * between else f"token {same} differs, {best[1] - best[0]:.3g} ahead"


def soak(options: argparse.Namespace, save: Save) -> Found:
    """One process' part; what there is is saved every minute."""
    parent = os.getppid()
    tally = Tally()
    models, graphs = load(options)
    voices = [n for n in options.voices if path_of(models[0]).problem(n, drawn=False) is None]
    if not voices:
        raise SystemExit(f"nothing to soak: {path_of(models[0]).describe()[0]}")
    begun = told = time.monotonic()
    workers = [
        Worker(f"model {m} thread {t}", options.seed + 1000 * m + t, model, graphs, voices, tally)
        for m, model in enumerate(models)
        for t in range(options.threads)
    ]
    threads = [threading.Thread(target=worker.run, args=(begun + options.seconds,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.2)
        now = time.monotonic()
        hung = [what for since, what in list(tally.since.values()) if now - since > HANG_S]
        if hung:
            tally.count("hangs", len(hung), complaint="; ".join(hung))
            break
        if now - told > PROGRESS_S:
            told = now
            logging.info("%s: %.0f s, %s", options.part or f"GPU {options.gpus[0]}", now - begun, dict(tally.counts))
            save({"complete": False, **told_so_far(workers, begun, voices, tally)})
        if options.part and os.getppid() != parent:
            raise SystemExit(f"{options.part}: nobody is left who would take the result")
    return {"complete": True, **told_so_far(workers, begun, voices, tally)}


def told_so_far(workers: Sequence[Worker], begun: float, voices: list[int], tally: Tally) -> Found:
    now = time.monotonic()
    seconds = {"seconds": round(now - begun, 1), "kernel_seconds": round(kernel_seconds(workers, begun, now), 1)}
    return seconds | {"voices": voices} | tally.as_json()


def kernel_seconds(workers: Sequence[Worker], begun: float, now: float) -> float:
    """How long the models' kernels have been asked for prompts, in sum: each until its last worker ended."""
    last: dict[int, float] = {}
    for worker in workers:
        last[id(worker.model)] = max(last.get(id(worker.model), begun), now if worker.ended is None else worker.ended)
    return sum(ended - begun for ended in last.values())


def load(options: argparse.Namespace) -> tuple[list[Qwen3], Qwen3]:
    """The models that are soaked, and one that goes by graphs."""
    with tempfile.TemporaryDirectory() as folder:
        named = options.model or make_checkpoint(folder, config=SOPRANO_1_1_80M, seed=1, mean_tokens=80)
        os.environ["SOPRANO_PERSISTENT"] = "1"
        models = [Qwen3.load(named, "cuda", "auto") for _ in range(options.side_by_side)]
        os.environ["SOPRANO_PERSISTENT"] = "0"
        graphs = Qwen3.load(named, "cuda", "auto")
    if not hasattr(graphs.runner, "persistent"):
        raise SystemExit(f"the GPU engine does not run here: {graphs.runner.reason}")
    return models, graphs


def soak_in_processes(options: argparse.Namespace, save: Save) -> Found:
    """The same by processes on all GPUs."""
    arguments = ["--seconds", options.seconds, "--threads", options.threads, "--side-by-side", options.side_by_side]
    arguments += ["--voices", ",".join(map(str, options.voices))]
    if options.model:
        arguments += ["--model", Path(options.model).absolute() if Path(options.model).exists() else options.model]
    return in_processes(
        PROGRAM, list(map(str, arguments)), options.gpus, options.processes, options.seed, options.seconds, save
    )


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[Found]]:
    """What is asked for, and the earlier results that are to be added."""

    def numbers(least: int) -> Any:
        def read(text: str) -> list[int]:
            found = [whole(least)(word) for word in text.split(",")]
            if len(set(found)) < len(found):
                raise argparse.ArgumentTypeError(f"{text!r} names one twice")
            return found

        return read

    def whole(least: int) -> Any:
        def read(text: str) -> int:
            if not (text.isascii() and text.isdigit()) or int(text) < least:
                raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
            return int(text)

        return read

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--threads", type=whole(1), default=1)
    parser.add_argument("--side-by-side", type=whole(1), default=1)
    parser.add_argument("--processes", type=whole(1), default=1, help="on each GPU")
    parser.add_argument("--gpus", type=numbers(0), default=[0])
    parser.add_argument("--voices", type=numbers(1), default=[1])
    parser.add_argument("--model", help="a checkpoint folder instead of a random one of the 80M shape")
    parser.add_argument("--seed", type=whole(0), default=random.SystemRandom().getrandbits(40))
    parser.add_argument("--add", type=Path, action="extend", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", help=argparse.SUPPRESS)  # the name of this process, where it is one of several
    options = parser.parse_args(argv)
    try:
        if options.out is not None:
            check_writable(options.out)
        return options, read_earlier(options.add)
    except (OutputError, ValueError) as error:
        parser.error(str(error))


def main(argv: Sequence[str] | None = None) -> int:
    options, earlier = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("soprano_cupy").setLevel(logging.WARNING)
    names = ("threads", "side_by_side", "processes", "gpus", "seed")
    asked = {name: getattr(options, name) for name in names}
    report = Report({**machine_facts(gpu=True), **asked}, earlier, options.out)
    alone = options.processes == 1 and options.gpus == [0]
    found = (soak if alone else soak_in_processes)(options, report.save_partial)
    result = report.of(found)
    sys.stdout.write(f"{json.dumps(result, indent=1)}\n")
    sys.stdout.flush()
    report.save(found)
    good = found["complete"] and found["prompts"] and not any(result[name] for name in PROBLEMS)
    if alone and found["hangs"]:
        os._exit(1)  # what hangs would keep the process
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
