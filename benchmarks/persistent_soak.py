"""Random prompts through the persistent kernel for as long as is asked: nothing may hang, fail or come out differently.

    python benchmarks/persistent_soak.py [--seconds 3600] [--threads N] [--side-by-side N] [--processes N]
                                         [--voices 1,2,4,8] [--model FOLDER] [--out FILE]

Each worker asks for random prompts, greedy and drawn, of random length; some a second time, whose tokens and states
must be the first time's bits; some by the graph path too, whose tokens must be the same up to where its two best scores
are closer than the two paths' logits; and gives some up half-way. --threads: workers of one model, which take turns on
its kernel. --side-by-side: models, whose kernels run at the same time where the GPU holds them all. --processes: copies
of all that, in processes of their own. Exit code 1 on any hang, mismatch, error or fallback to graphs.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import REPOSITORY, machine_facts
from soprano_cupy import Qwen3
from soprano_cupy.device import to_host
from soprano_cupy.generation import Generation, Request, begin, generate
from soprano_cupy.sampling import SamplingParams, penalise
from soprano_cupy.testing import SOPRANO_1_1_80M, make_checkpoint

HANG_S = 20.0  # a request of at most 8 x 512 tokens takes a fifth of a second
REMEMBERED = 20_000  # first occurrences
AGAIN, BY_GRAPHS, GIVEN_UP = 0.25, 0.02, 0.08  # shares of the requests
PROBLEMS = ("hangs", "mismatches", "errors", "fallbacks")
COUNTED = ("prompts", "tokens", "repeats", "checked against graphs", "given up", *PROBLEMS)


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

    def run(self, until: float) -> None:
        while time.monotonic() < until and self.model.runner.persistent.failure is None:
            key = self._choose()
            self.tally.since[self.name] = time.monotonic(), f"{self.name}: {key}"
            try:
                self._ask(key)
            except Exception as error:  # counted, and the soak goes on
                self.tally.count("errors", complaint=f"{key}: {type(error).__name__}: {error}")
                if getattr(error, "sticky", False):
                    break
        self.tally.since.pop(self.name, None)
        if self.model.runner.persistent.failure is not None:
            self.tally.count("fallbacks", complaint=f"{self.name}: {self.model.runner.persistent.failure}")

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


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """One process' part."""
    tally = Tally()
    models, graphs = load(options)
    voices = [n for n in options.voices if models[0].runner.persistent.problem(n, drawn=False) is None]
    if not voices:
        raise SystemExit(f"nothing to soak: {models[0].runner.persistent.describe()[0]}")
    until = time.monotonic() + options.seconds
    workers = [
        Worker(f"model {m} thread {t}", options.seed + 1000 * m + t, model, graphs, voices, tally)
        for m, model in enumerate(models)
        for t in range(options.threads)
    ]
    threads = [threading.Thread(target=worker.run, args=(until,), daemon=True) for worker in workers]
    begun = told = time.monotonic()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.2)
        now = time.monotonic()
        hung = [what for since, what in list(tally.since.values()) if now - since > HANG_S]
        if hung:
            tally.count("hangs", len(hung), complaint="; ".join(hung))
            break
        if now - told > 60:
            told = now
            logging.info("%.0f s: %s", now - begun, dict(tally.counts))
    return {"seconds": round(time.monotonic() - begun, 1), "voices": voices} | tally.as_json()


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


def in_processes(options: argparse.Namespace) -> dict[str, Any]:
    """All processes' counts together."""
    arguments = ["--seconds", options.seconds, "--threads", options.threads, "--side-by-side", options.side_by_side]
    arguments += ["--voices", ",".join(map(str, options.voices))]
    arguments += ["--model", options.model] if options.model else []
    total: Counter[str] = Counter()
    complaints: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder, f"{i}.json") for i in range(options.processes)]
        running = [
            subprocess.Popen(
                [sys.executable, __file__, *map(str, arguments), "--seed", str(options.seed + 10**6 * i), "--out", out],
                cwd=REPOSITORY,
            )
            for i, out in enumerate(outs)
        ]
        for process, out in zip(running, outs, strict=True):
            process.wait()
            if not out.exists():
                total["errors"] += 1
                complaints.append(f"a process ended with code {process.returncode}")
                continue
            found = json.loads(out.read_text(encoding="utf-8"))
            total.update({name: found[name] for name in COUNTED})
            complaints += found["complaints"]
    return (
        {"seconds": options.seconds, "voices": options.voices}
        | {n: total[n] for n in COUNTED}
        | {"complaints": complaints}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side-by-side", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--voices", type=lambda text: [int(n) for n in text.split(",")], default=[1])
    parser.add_argument("--model", help="a checkpoint folder instead of a random one of the 80M shape")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("soprano_cupy").setLevel(logging.WARNING)
    found = soak(options) if options.processes == 1 else in_processes(options)
    asked = {name: getattr(options, name) for name in ("threads", "side_by_side", "processes")}
    report = {"what": "persistent_soak", **machine_facts(gpu=True), **asked, **found}
    text = json.dumps(report, indent=1)
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
    if options.out:
        options.out.write_text(f"{text}\n", encoding="utf-8")
    bad = sum(found[name] for name in PROBLEMS)
    if found["hangs"]:
        os._exit(1)  # what hangs would keep the process
    sys.exit(1 if bad or not found["prompts"] else 0)


if __name__ == "__main__":
    main()
