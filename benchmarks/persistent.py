"""Microseconds per token of one voice: the persistent kernel on several grids, and the graph path beside it.

    python benchmarks/persistent.py [--tokens 256] [--context 128] [--out FILE]

A random checkpoint of the 80M shape that does not stop. A run is timed by events around the launch, from the second
token to the last, so the mean context is `context` + `tokens` / 2.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, Row, machine_facts, timing, write_results
from soprano_cupy.checkpoint import open_language_model
from soprano_cupy.config import ModelConfig
from soprano_cupy.cuda.module import device_facts
from soprano_cupy.generation import Request
from soprano_cupy.gpu import persistent, step
from soprano_cupy.sampling import SamplingParams
from soprano_cupy.testing import SOPRANO_1_1_80M, make_checkpoint

if TYPE_CHECKING:
    from soprano_cupy.gpu.qwen3 import GpuLanguageModel

SAMPLINGS: dict[str, dict[str, Any]] = {"greedy": {}, "top-p": {"temperature": 0.3, "top_p": 0.95, "seed": 1}}
LIMIT_US = 36.5  # 151 MB at 4.14 TB/s


def time_run(
    model: GpuLanguageModel, decoder: persistent.PersistentDecoder, requests: list[Request]
) -> tuple[float, np.ndarray]:
    """Microseconds per step behind the first tokens, and the first voice's tokens."""
    from soprano_cupy.gpu._driver import Event

    with model.borrowed(requests) as batch:
        batch.begin(requests, give_up=False)
        batch.stream.synchronize()
        start, end = Event(timing=True), Event(timing=True)
        places = [batch.places(slot) for slot in range(len(requests))]
        start.record(batch.stream.ptr)
        decoder.launch(batch.stream.ptr, places, batch.common(persistent.UNLIMITED))
        end.record(batch.stream.ptr)
        batch.stream.synchronize()
        decoder.check()
        count = step.progress_count(int(batch.progress[0]))
        return 1e3 * end.elapsed_ms(start) / (count - 1), np.array(batch.tokens[0, :count])


def time_graph(model: GpuLanguageModel, requests: list[Request]) -> tuple[float, np.ndarray]:
    """The same by the graph path."""
    with model.borrowed(requests) as batch:
        batch.begin(requests, give_up=False)
        batch.stream.synchronize()
        begun = time.perf_counter()
        word = batch.finish(len(requests))[0]
        count = step.progress_count(word)
        return 1e6 * (time.perf_counter() - begun) / (count - 1), np.array(batch.tokens[0, :count])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--grids", type=int, default=len(persistent.GRIDS), help="how many of the grids to try")
    parser.add_argument("--voices", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--profile", action="store_true", help="where the last token's cycles went")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    from soprano_cupy.gpu.qwen3 import GpuLanguageModel, best_dtype

    facts = device_facts(0)
    dtype = best_dtype(facts.capability)
    rows, checks = [], 0
    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(Path(folder) / "80m", config=SOPRANO_1_1_80M, seed=1, mean_tokens=None)
        config = ModelConfig.from_folder(path)
        with open_language_model(path) as file:
            model = GpuLanguageModel(file, config, "cuda", dtype, "benchmark")
    model.persistent.use("0")  # `finish` is the graph path then
    prompt = np.random.default_rng(0).integers(4, config.vocab_size, arguments.context).astype(np.int32)
    if arguments.profile:
        profile(model, prompt, arguments.tokens)
        return
    for kind, sampling in SAMPLINGS.items():
        request = Request(prompt, SamplingParams(max_new_tokens=arguments.tokens, **sampling))
        graph = [time_graph(model, [request]) for _ in range(5)]
        t = timing([us for us, _ in graph[1:]])
        expected = graph[0][1]
        report(f"graph, {kind}", t.median, t.p99, f"{len(expected)} tokens")
        rows.append(Row(f"graph, {kind}", t.median, "us a token", t.repeats, p99=t.p99, limit=LIMIT_US))
        for grid in persistent.GRIDS[: arguments.grids]:
            name = f"{grid[0]} clusters of {grid[1]}, dims in {grid[2]}, {kind}"
            decoder = persistent.PersistentDecoder(config, lambda: model._weights, model._facts, dtype, grids=(grid,))
            if decoder.problem() is not None:
                sys.stdout.write(f"{name:40s} {decoder.problem()}\n")
                continue
            try:
                runs = [time_run(model, decoder, [request]) for _ in range(arguments.repeats)]
            except Exception as error:  # one grid that fails leaves the others
                sys.stdout.write(f"{name:40s} {type(error).__name__}: {error}\n")
                continue
            same = {tokens.tobytes() for _, tokens in runs}
            length = min(len(expected), len(runs[0][1]))
            different = np.flatnonzero(expected[:length] != runs[0][1][:length])
            first = int(different[0]) if len(different) else length
            t = timing([us for us, _ in runs[1:]])
            report(
                name, t.median, t.p99, f"{len(runs[0][1])} tokens, {first} as the graph's, {len(same)} kind of result"
            )
            if len(same) == 1 and first > 0:
                checks += 1
                rows.append(Row(name, t.median, "us a token", t.repeats, p99=t.p99, limit=LIMIT_US))
    rows += several(model, prompt, arguments.tokens, arguments.voices)
    head = machine_facts(gpu=True)
    write_results(arguments.out or RESULTS / f"{head['machine']}-persistent.json", "persistent", head, {}, rows, checks)


TOKEN_POINTS = ("head and its norm", "scores sent", "state sent", "token chosen", "token here", "taken")


def profile(model: GpuLanguageModel, prompt: np.ndarray, tokens: int) -> None:
    """Cycles between the marks of the kernel behind the last layer: of the block that chooses, and of the others."""
    plain, persistent.scratch_words = persistent.kernel_defines, lambda shape: (1 << 19) + 4096
    persistent.kernel_defines = lambda *known: (*plain(*known), ("PROFILE", 1))
    for kind, sampling in SAMPLINGS.items():
        decoder = persistent.PersistentDecoder(model.config, lambda: model._weights, model._facts, model.dtype)
        if decoder.problem() is not None:
            sys.stdout.write(f"{decoder.problem()}\n")
            return
        rows = []
        for i in range(12):
            request = Request(prompt, SamplingParams(max_new_tokens=tokens - i, **sampling))
            time_run(model, decoder, [request])
            rows.append(decoder._scratch[2 << 19 :][: 64 * 32].get().reshape(64, 32)[:, 24:31].astype(np.int64))
        cycles = np.diff(np.stack(rows), axis=2) & 0xFFFFFFFF
        sys.stdout.write(f"{kind}: cycles of the block that chooses, of the others\n")
        for i, name in enumerate(TOKEN_POINTS):
            mine, others = np.median(cycles[:, 0, i]), np.median(cycles[:, 1:, i])
            sys.stdout.write(f"    {name:20s} {mine:7.0f} {others:7.0f}\n")


def several(model: GpuLanguageModel, prompt: np.ndarray, tokens: int, counts: list[int]) -> list[Row]:
    """A few voices together, of different prompts, by the default grid and by the graph path."""
    rows = []
    decoder = persistent.PersistentDecoder(model.config, lambda: model._weights, model._facts, model.dtype)
    for count in counts:
        requests = [Request(np.roll(prompt, i), SamplingParams(max_new_tokens=tokens)) for i in range(count)]
        t = timing([time_graph(model, requests)[0] for _ in range(5)][1:])
        report(f"graph, {count} voices", t.median, t.p99, "")
        rows.append(Row(f"graph, {count} voices", t.median, "us a step", t.repeats, p99=t.p99))
        problem = decoder.problem(count)
        if problem is not None:
            sys.stdout.write(f"{count} voices: {problem}\n")
            continue
        try:
            runs = [time_run(model, decoder, requests) for _ in range(6)]
        except Exception as error:
            sys.stdout.write(f"{count} voices: {type(error).__name__}: {error}\n")
            break
        t = timing([us for us, _ in runs[1:]])
        report(f"persistent, {count} voices", t.median, t.p99, f"{len({x.tobytes() for _, x in runs})} kind of result")
        rows.append(Row(f"persistent, {count} voices", t.median, "us a step", t.repeats, p99=t.p99))
    return rows


def report(name: str, median: float, p99: float, more: str) -> None:
    sys.stdout.write(f"{name:40s} {median:8.2f} us a token (p99 {p99:.2f})  {more}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
