"""The peers of benchmarks/runtime.py: they run in processes of their own, and their values join our rows."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import Row
from benchmarks.random_text import sentences
from benchmarks.runtime_checks import Checks, Models, prompt_logits
from benchmarks.runtime_measure import Subject, _free_bytes
from benchmarks.workers import ask
from soprano_cupy.checkpoint import decoder_config, open_decoder
from soprano_cupy.device import to_host
from soprano_cupy.portable.vocos import PortableDecoder

PEERS = ("graph", "upstream")
GRAPH, DECODER, UPSTREAM = "torch_graph", "torch_float32", "torch_upstream"
MOST_LOGITS_ERROR = {"bfloat16": 0.05, "float32": 1e-4}  # relative: that it is the same model, not how well it rounds
MOST_AUDIO_ERROR = 0.01


def save_known(subject: Subject, models: Models, path: Path) -> None:
    """Inputs and exact outputs for a peer to be compared with."""
    rng = np.random.default_rng(21)
    ids = rng.integers(4, subject.model.vocab_size, (4, 12)).astype(np.int32)
    scores = to_host(prompt_logits(models.oracle, list(ids)))[-len(ids) :]
    states = rng.standard_normal((1, 9, subject.decoder.input_size), np.float32) * np.float32(2.0)
    with open_decoder(subject.folder) as file:
        decoder = PortableDecoder(file, decoder_config(file), subject.tts.device, "float32", "reference")
    np.savez(path, ids=ids, logits=scores, states=states, audio=to_host(decoder.decode(states)))


def graph(subject: Subject, rows: dict[str, Row], checks: Checks, python: str, known: Path) -> None:
    """A CUDA-graphed torch decode step, and the decoder in torch."""
    sizes, dtype = subject.sizes, "bfloat16" if subject.gpu else "float32"
    job = {
        "folder": subject.folder,
        "device": "cuda" if subject.gpu else "cpu",
        "dtype": dtype,
        "context": sizes.context,
        "batches": [batch for batch in sizes.graph if subject.fits(batch)],
        "steps": 50 if subject.gpu else 2,
        "repeats": 2 * sizes.repeats,
        "voices": sizes.vocos,
        "check": str(known),
    }
    told = ask("peer_graph.py", job, python=python).result
    known_well = Checks()
    known_well.require("torch step, relative error of logits", told["logits_error"], MOST_LOGITS_ERROR[dtype])
    known_well.require("torch decoder, relative error of samples", told["audio_error"], MOST_AUDIO_ERROR)
    if known_well.failures:
        raise ValueError(f"the peer is wrong, its times are left out: {'; '.join(known_well.failures)}")
    checks.passed += known_well.passed
    for batch, microseconds in told["step_us"].items():
        join(rows, f"step/B{batch}/ctx{sizes.context}", GRAPH, microseconds)
    for case, factor in told["vocos"].items():
        join(rows, f"vocos/{case}", DECODER, factor)


def upstream(subject: Subject, rows: dict[str, Row], python: str) -> None:
    """The PyTorch package: first audio, speeds, start-up and memory."""
    sizes, device = subject.sizes, "cuda" if subject.gpu else "cpu"
    common: dict[str, Any] = {"device": device, "tokens": sizes.tokens}
    job = {
        **common,
        "folder": subject.folder,
        "batches": sizes.upstream,
        "texts": subject.texts[: max(sizes.upstream)],
        "first_texts": sentences(2 + 6 * sizes.repeats, seed=5),
        "repeats": 1 if subject.gpu and sizes.repeats < 5 else 2,
    }
    told = ask("peer_upstream.py", job, python=python).result
    join(rows, "first_audio", UPSTREAM, told["first_audio_s"] * 1e3)
    for batch, factor in told["batch"].items():
        join(rows, "voice/B1" if batch == "1" else f"throughput/B{batch}", UPSTREAM, factor)
    job = {**common, "folder": subject.folder, "text": subject.texts[0], "start": True}
    free = _free_bytes() if subject.gpu else 0
    starts = [ask("peer_upstream.py", job, python=python) for _ in range(2)]
    join(rows, "cold_start/warm_cache", UPSTREAM, median(start.first_audio_s or 0.0 for start in starts))
    if subject.gpu:
        join(rows, "memory/B1", UPSTREAM, (free - starts[-1].result["after"]) / 1e6)


def join(rows: dict[str, Row], case: str, peer: str, value: float) -> None:
    """Put a peer's value beside ours, where ours was measured."""
    sys.stdout.write(f"{case:36} {value:12.5g} {peer}\n")
    if case in rows:
        rows[case].peer[peer] = value
