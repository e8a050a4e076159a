"""The CPU engine: one voice, batches, first audio, memory and cold start, next to the PyTorch package in one run.

    python benchmarks/cpu.py [--quick] [--peer PYTHON] [--model FOLDER] [--out FILE]

Results are checked against the portable oracle before anything is timed. Every configuration runs in a process of
its own, so that memory and start-up are its own too; sentences are held to 128 tokens (8.1 s of sound), prompts have
about 60 ids. The checkpoint is a random one of Soprano-1.1-80M's shape unless --model names another.

Rows: cpu/voice/DTYPE and cpu/batchN/DTYPE are seconds of sound made in a second, text to samples; limit is what
reading the language model's weights once a step would allow at this machine's measured bandwidth. cpu/step/* is one
step of the language model with its logits, cpu/vocos/* the decoder's time for a token. --peer is a Python where
`soprano` (soprano-tts 0.2.0) with torch is installed; without one the peer columns stay empty.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

if TYPE_CHECKING:
    from benchmarks.common import Row
    from soprano_cupy import SopranoTTS
    from soprano_cupy.cpu.qwen3 import CpuLanguageModel
    from soprano_cupy.runner import LanguageModelRunner

TOKENS = 128
TOKEN_SECONDS = 0.064
SAMPLE_RATE_HZ = 32_000
DTYPES = ("float32", "bfloat16", "int8")
BATCHES = (1, 2, 4, 8, 16, 32)
TEXTS = (
    "The quick brown fox jumps over the lazy dog and runs away into the forest to sleep.",
    "Nobody expected the little boat to come back before the storm had passed the harbour.",
    "She opened the window and listened to the rain that fell on the roofs of the old town.",
    "Please remember to water the plants on the balcony when you come home this evening.",
)


# ---- what runs in processes of its own; the peer's Python need not have our dependencies ----


def resident_mb() -> float:
    """The most memory that this process has had resident. (getrusage would count what its parent had.)"""
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1.024 / 1000  # from units of 1,024 bytes


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_of(call: Callable[[], float], repeats: int) -> float:
    call()
    return median(call() for _ in range(repeats))


def texts(count: int) -> list[str]:
    return [TEXTS[i % len(TEXTS)] for i in range(count)]


def work_ours(folder: str, dtype: str, batches: list[int], repeats: int) -> dict[str, Any]:
    """All timings of one dtype."""
    from soprano_cupy import SopranoTTS
    from soprano_cupy.cpu.qwen3 import CpuLanguageModel
    from soprano_cupy.engine import Timings
    from soprano_cupy.generation import Request
    from soprano_cupy.sampling import SamplingParams

    tts = SopranoTTS(folder, device="cpu", dtype=dtype)
    lm, decoder = tts.engine.language_model, tts.engine.decoder
    if not isinstance(lm, CpuLanguageModel):
        raise SystemExit(f"the CPU engine does not run here: {lm.reason}")
    params = SamplingParams(temperature=0.0, max_new_tokens=TOKENS)

    def speed(count: int) -> float:
        audio: list[np.ndarray] = []

        def speak() -> None:
            requests = [Request(ids, params) for ids in encode(tts, texts(count))]
            tts.engine.speak(requests, 0, Timings(), audio.extend)

        seconds = seconds_of(speak)
        return sum(map(len, audio)) / SAMPLE_RATE_HZ / seconds

    first = median_of(lambda: seconds_of(lambda: next(iter(tts.infer_stream(TEXTS[0])))), 2 * repeats)
    result = {"first_audio": first, "step": {}, "lm_bytes": read_each_step(lm)}
    result["batch"] = {n: median_of(lambda n=n: speed(n), repeats) for n in batches}  # type: ignore[misc]
    result["step"] = {n: step_seconds(lm, n) for n in batches}
    states = np.random.default_rng(0).standard_normal((1, TOKENS + 1, lm.config.hidden_size)).astype(np.float32)
    result["vocos"] = median_of(lambda: seconds_of(lambda: decoder.decode(states)), repeats) / TOKENS
    result["isa"] = lm._model.isa
    return result


def encode(tts: SopranoTTS, sentences: list[str]) -> list[np.ndarray]:
    from soprano_cupy.sampling import SamplingParams

    return [tts._reader.read(text, SamplingParams())[0].ids for text in sentences]


def read_each_step(lm: CpuLanguageModel) -> int:
    """Bytes of weights that a step of one voice reads: all but the embeddings."""
    embeddings = lm.config.vocab_size * lm.config.hidden_size * 2
    return lm.weight_bytes - embeddings


def step_seconds(lm: LanguageModelRunner, batch: int, context: int = 128, steps: int = 60) -> float:
    """Median of one token for each of `batch` sequences, logits included, at contexts from `context` on."""
    cache = lm.new_cache(batch, context + steps)
    ids = np.random.default_rng(0).integers(4, lm.config.vocab_size, batch * context).astype(np.int32)
    lm.extend(cache, ids, np.arange(batch + 1, dtype=np.int32) * context, last_only=True)
    one = np.arange(batch + 1, dtype=np.int32)
    return median(
        seconds_of(lambda: lm.logits(lm.extend(cache, ids[:batch], one, last_only=True))) for _ in range(steps)
    )


def work_start(model: str, dtype: str) -> dict[str, Any]:
    """A fresh process: the first audio is told at once, its peak of resident memory after the sentence."""
    from soprano_cupy import SopranoTTS

    tts = SopranoTTS(model, device="cpu", dtype=dtype)
    chunks = tts.infer_stream(TEXTS[0])
    next(chunks)
    print("audio", flush=True)
    for _, _ in zip(range(TOKENS), chunks, strict=False):
        pass
    return {"resident_mb": resident_mb()}


def load_peer(folder: str) -> Any:
    """The PyTorch package, its sentences held to the same number of tokens."""
    from soprano import SopranoTTS

    tts = SopranoTTS(backend="transformers", device="cpu", model_path=folder)
    generate = tts.pipeline.model.generate
    tts.pipeline.model.generate = lambda **options: generate(**{**options, "max_new_tokens": TOKENS})
    return tts


def work_peer(folder: str, batches: list[int], repeats: int) -> dict[str, Any]:
    tts = load_peer(folder)

    def speed(count: int) -> float:
        audio: list[Any] = []
        seconds = seconds_of(lambda: audio.extend(tts.infer_batch(texts(count), temperature=0.0)))
        return sum(len(piece) for piece in audio) / SAMPLE_RATE_HZ / seconds

    first = lambda: seconds_of(lambda: next(iter(tts.infer_stream(TEXTS[0], temperature=0.0))))  # noqa: E731
    result: dict[str, Any] = {"first_audio": median_of(first, 2 * repeats)}
    result["batch"] = {n: median_of(lambda n=n: speed(n), max(1, repeats if n < 8 else repeats // 2)) for n in batches}  # type: ignore[misc]
    return result


def work_peer_start(folder: str) -> dict[str, Any]:
    tts = load_peer(folder)
    chunks = tts.infer_stream(TEXTS[0], temperature=0.0)
    next(iter(chunks))
    print("audio", flush=True)
    for _, _ in zip(range(TOKENS), chunks, strict=False):
        pass
    return {"resident_mb": resident_mb()}


# ---- checks ----


def check(folder: str) -> int:
    """Compare the engine with the portable oracle; returns how many checks passed, or ends the run."""
    from soprano_cupy.checkpoint import decoder_config, open_decoder, open_language_model
    from soprano_cupy.config import ModelConfig
    from soprano_cupy.cpu.qwen3 import CpuLanguageModel
    from soprano_cupy.cpu.vocos import CpuDecoder
    from soprano_cupy.portable.vocos import PortableDecoder
    from soprano_cupy.select import select_language_model
    from soprano_cupy.text import build_prompts
    from soprano_cupy.tokenizer import Tokenizer

    config = ModelConfig.from_folder(folder)
    passed = 0

    def require(what: str, value: float, allowed: float, *, at_least: bool = False) -> None:
        nonlocal passed
        if not (value >= allowed if at_least else value <= allowed):
            sys.exit(f"{what}: {value:.3g}, allowed is {'at least' if at_least else 'at most'} {allowed:g}")
        passed += 1

    tokenizer = Tokenizer.load(Path(folder))
    prompts = [np.asarray(tokenizer.encode(build_prompts(text)[0]), np.int32) for text in TEXTS]
    prompts += [np.random.default_rng(n).integers(4, config.vocab_size, n).astype(np.int32) for n in (1, 5, 64, 200)]
    with open_language_model(folder) as file:
        oracle = select_language_model(file, config, "cpu", "float64", "auto")
    exact = [forward(oracle, ids) for ids in prompts]
    del oracle
    worst: dict[str, float] = {}
    for dtype in DTYPES:
        with open_language_model(folder) as file:
            model = CpuLanguageModel(file, config, dtype)
        for ids, states in zip(prompts, exact, strict=True):
            mine = forward(model, ids)
            error = float(np.linalg.norm(mine - states) / np.linalg.norm(states))
            cosine = (mine * states).sum(-1) / np.linalg.norm(mine, axis=-1) / np.linalg.norm(states, axis=-1)
            if dtype == "float32":
                require("float32 states, relative error", error, 1e-4)
            require(f"{dtype} states of {len(ids)} ids, cosine", float(cosine.min()), 0.999, at_least=True)
            worst[dtype] = min(worst.get(dtype, 1.0), float(cosine.min()))
    print("worst cosine of states:", ", ".join(f"{dtype} {value:.6f}" for dtype, value in worst.items()))
    states = exact[0][None, :40].astype(np.float32)
    with open_decoder(folder) as file:
        audio = PortableDecoder(file, decoder_config(file), "cpu", "float64", "oracle").decode(states)
    for dtype, decibels in (("float32", 90), ("bfloat16", 40), ("int8", 40)):
        with open_decoder(folder) as file:
            decoder = CpuDecoder(file, decoder_config(file), dtype)
        mine = decoder.decode(states)
        noise = float(np.linalg.norm(mine - audio) / np.linalg.norm(audio))
        require(f"{dtype} decoder, dB", -20 * float(np.log10(noise)), decibels, at_least=True)
        stream = decoder.stream()
        pieces = [*(stream.push(state[None]) for state in states[0]), stream.finish()]
        require(f"{dtype} stream against whole", float(np.abs(np.concatenate(pieces) - mine[0]).max()), 0.0)
    return passed


def forward(model: LanguageModelRunner, ids: np.ndarray) -> np.ndarray:
    cache = model.new_cache(1, len(ids))
    return np.asarray(model.extend(cache, ids, np.array([0, len(ids)], np.int32)), np.float64)


# ---- this machine's limits ----


def read_gb_s(size: int, threads: int) -> float:
    """Bandwidth of `threads` threads that read `size` bytes over and over, best of several rounds."""
    shares = [np.ones(size // threads, np.uint8) for _ in range(threads)]

    def round_trip() -> None:
        others = [threading.Thread(target=share.max) for share in shares[1:]]
        for other in others:
            other.start()
        shares[0].max()
        for other in others:
            other.join()

    return size / min(seconds_of(round_trip) for _ in range(15)) / 1e9


def matmul_gflop_s(n: int = 2048) -> float:
    """Rate of a large float32 product in NumPy's BLAS with all its threads."""
    a, b = np.random.default_rng(0).standard_normal((2, n, n), np.float32)
    return 2 * n**3 / min(seconds_of(lambda: a @ b) for _ in range(5)) / 1e9


# ---- the run ----


def run_worker(python: str, *arguments: str) -> tuple[dict[str, Any], float | None]:
    """Run this file as a worker; its result, and seconds from the process' start to its first audio if it tells."""
    start, first = time.perf_counter(), None
    command = [python, str(Path(__file__).resolve()), "--worker", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tempfile.gettempdir()) as process:
        assert process.stdout is not None
        line = ""
        for line in process.stdout:
            if line == "audio\n":
                first = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return json.loads(line), first


def rows_of(options: argparse.Namespace, folder: str, starting: str) -> tuple[list[Row], dict[str, float]]:
    from benchmarks.common import Row
    from soprano_cupy.cpu.threads import wanted_threads

    batches = [n for n in BATCHES if n <= (8 if options.quick else 32)]
    arguments = json.dumps(batches), str(options.repeats)
    threads = wanted_threads()
    limits = {"threads": float(threads), "float32_matmul_gflop_s": matmul_gflop_s()}
    peer, peer_memory, peer_start = measure_peer(options.peer, folder, starting, arguments, options.repeats)
    rows: list[Row] = []
    for dtype in DTYPES:
        result, _ = run_worker(sys.executable, "ours", folder, dtype, *arguments)
        name = f"read_gb_s/{dtype}"
        limits[name] = read_gb_s(result["lm_bytes"], threads)
        bound = TOKEN_SECONDS / (result["lm_bytes"] / limits[name] / 1e9)
        for n, value in result["batch"].items():
            case = f"cpu/voice/{dtype}" if n == "1" else f"cpu/batch{n}/{dtype}"
            row = Row(case, value, "x real time", options.repeats, peer=named(peer.get("batch", {}).get(n)))
            if n == "1":
                row.limit, row.share_of_limit = bound, value / bound
            rows.append(row)
        for n, value in result["step"].items():
            limit = result["lm_bytes"] / limits[name] / 1e6
            rows.append(
                Row(f"cpu/step/B{n}/{dtype}", value * 1e3, "ms", 60, limit=limit, share_of_limit=limit / value / 1e3)
            )
        rows.append(Row(f"cpu/vocos/{dtype}", result["vocos"] * 1e3, "ms a token", options.repeats))
        first = named(peer.get("first_audio"), 1e3)
        rows.append(Row(f"cpu/first_audio/{dtype}", result["first_audio"] * 1e3, "ms", 2 * options.repeats, peer=first))
        starts = [run_worker(sys.executable, "start", starting, dtype) for _ in range(options.repeats)]
        memory = median(start[0]["resident_mb"] for start in starts)
        rows.append(Row(f"cpu/memory/{dtype}", memory, "MB", options.repeats, peer=named(peer_memory)))
        seconds = median(start[1] or 0.0 for start in starts)
        rows.append(
            Row(f"cpu/cold_start/80M/{dtype}", seconds * 1e3, "ms", options.repeats, peer=named(peer_start, 1e3))
        )
    minis = [run_worker(sys.executable, "start", "mini", "auto")[1] or 0.0 for _ in range(options.repeats)]
    rows.append(Row("cpu/cold_start/mini", median(minis) * 1e3, "ms", options.repeats))
    return rows, limits


def measure_peer(
    python: str | None, folder: str, starting: str, arguments: tuple[str, str], repeats: int
) -> tuple[dict[str, Any], float | None, float | None]:
    """Speeds, resident megabytes and seconds to the first audio of the PyTorch package, where it is installed."""
    python = python or sys.executable
    if subprocess.run([python, "-c", "import soprano, torch"], capture_output=True).returncode:
        print("the peer is not installed: pip install torch soprano-tts, or name a Python that has them with --peer")
        return {}, None, None
    result, _ = run_worker(python, "peer", folder, *arguments)
    starts = [run_worker(python, "peer_start", starting) for _ in range(max(1, repeats // 2))]
    return result, median(s[0]["resident_mb"] for s in starts), median(s[1] or 0.0 for s in starts)


def named(value: float | None, scale: float = 1.0) -> dict[str, float]:
    return {} if value is None else {"torch_float32": float(f"{value * scale:.5g}")}


def checkpoints(named_model: str | None) -> Iterator[tuple[str, str]]:
    """Folders to measure speed and start-up with: those named, or random ones that last as long as the run.

    Sentences of the first never end before they are cut off; those of the second end after about 24 tokens, as the
    PyTorch package speaks a sentence of its own when it starts.
    """
    if named_model:
        folder = str(Path(named_model).resolve())
        yield folder, folder
        return
    from soprano_cupy.testing import SOPRANO_1_1_80M, make_checkpoint

    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root) / "endless", Path(root) / "ending"]
        for made, tokens in zip(folders, (None, 24), strict=True):
            make_checkpoint(made, config=SOPRANO_1_1_80M, mean_tokens=tokens)
            described = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[STOP]"}
            (made / "tokenizer_config.json").write_text(json.dumps(described))
        yield str(folders[0]), str(folders[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batches up to 8, fewer repeats")
    parser.add_argument("--peer", help="a Python with torch and soprano-tts")
    parser.add_argument("--model", help="a checkpoint folder instead of a random one")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/cpu-runtime.json)")
    options = parser.parse_args()
    options.repeats = 3 if options.quick else 5

    from benchmarks.common import RESULTS, machine_facts, write_results

    for folder, starting in checkpoints(options.model):
        checks = check(folder)
        print(f"{checks} checks passed", flush=True)
        rows, limits = rows_of(options, folder, starting)
        for row in rows:
            print(f"{row.case:28} {row.value:9.4g} {row.unit:12} {row.share_of_limit or '':<8.3} {row.peer or ''}")
        out = options.out or RESULTS / "cpu-runtime.json"
        write_results(out, "cpu-runtime", machine_facts(gpu=False), limits, rows, checks)


def worker(arguments: list[str]) -> None:
    """Run one of the `work_*` functions; its result is the last line on stdout."""
    logging.disable(logging.WARNING)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    name, *rest = arguments
    if name == "ours":
        result = work_ours(rest[0], rest[1], json.loads(rest[2]), int(rest[3]))
    elif name == "start":
        result = work_start(rest[0], rest[1])
    elif name == "peer":
        result = work_peer(rest[0], json.loads(rest[1]), int(rest[2]))
    else:
        result = work_peer_start(rest[0])
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2:])
    else:
        main()
