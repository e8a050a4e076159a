"""`soprano-cupy bench`: that it measures what it says, and right results only; how fast is no matter of a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
from command_line import run

from soprano_cupy.cli import bench, bench_checks
from soprano_cupy.cpu.qwen3 import CpuLanguageModel
from soprano_cupy.pipeline import SopranoTTS
from soprano_cupy.portable.vocos import PortableDecoder
from soprano_cupy.testing import make_checkpoint

CASES = ["load", "step/B1/ctx256", "step/B2/ctx256", "first_audio", "voice/B1", "throughput/B2", "vocos/B1/T64"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in command_line.quiet_environment(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SOPRANO_MODEL", str(make_checkpoint(tmp_path / "voice", seed=5)))
    monkeypatch.setattr(bench, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(bench, "REST_SECONDS", 0.0)


def test_json(tmp_path: Path) -> None:
    result = run("bench", "--batch", "2", "--json")
    assert (result.code, result.err) == (0, "")
    record = json.loads(result.out)
    assert {"what", "machine", "python", "date", "model", "device", "dtype", "attention", "rows"} <= record.keys()
    assert record["model"] == str(tmp_path / "voice")
    assert (record["device"], record["device_reason"]) == ("cpu", "asked for")
    assert "compiled engine" in record["reason"]
    assert "compiled engine" in record["decoder_reason"]
    assert record["checks"] == "passed 4"
    cases = {row["case"]: row for row in record["rows"]}
    assert list(cases) == [*CASES, "memory/B1"]
    for row in cases.values():
        assert row["value"] > 0
        assert row["unit"]
        assert row["meaning"]
    assert {case: row["repeats"] for case, row in cases.items()} == {
        **dict.fromkeys(CASES, 3),
        **dict.fromkeys(["load", "memory/B1"], 1),
        **dict.fromkeys(CASES[1:3], bench.STEP_REPEATS),
    }


class Clock:
    """Each look at it is a second later."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0


def test_the_numbers_follow_from_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream's first chunk comes one second after the call, its end two; a batch takes one."""
    monkeypatch.setattr(bench, "time", Clock())
    monkeypatch.setattr(bench_checks, "check", lambda *_: 4)
    monkeypatch.setattr(SopranoTTS, "infer_stream", lambda *_: iter([[0.0] * 32000, [0.0] * 64000]))
    monkeypatch.setattr(SopranoTTS, "infer_batch", lambda _, texts: [[0.0] * 16000] * len(texts))
    rows = {row["case"]: row["value"] for row in json.loads(run("bench", "--batch", "6", "--json").out)["rows"]}
    assert rows["first_audio"] == 1000.0
    assert rows["voice/B1"] == 3.0 / 2
    assert rows["throughput/B6"] == 3.0
    assert rows["step/B1/ctx256"] == rows["step/B6/ctx256"] == pytest.approx(1e6 / bench.STEPS, abs=1e-3)
    assert rows["vocos/B1/T64"] == pytest.approx(64 * 0.064, abs=1e-3)


def test_table() -> None:
    result = run("bench", "--batch", "1")
    assert result.code == 0
    assert [line.split()[0] for line in result.text.splitlines()] == [
        *(case.replace("B2", "B1") for case in CASES if case != "step/B2/ctx256"),
        "memory/B1",
    ]
    voice, language_model, decoder, checks = result.err.splitlines()
    assert "on cpu: asked for" in voice
    assert "bfloat16, flash attention: compiled engine" in language_model
    assert "decoder in float32: compiled engine" in decoder
    assert checks == "4 checks passed"


def test_verbose_says_what_is_used_once() -> None:
    assert run("bench", "--batch", "1", "-v").err.count("flash, weights bfloat16") == 1


@pytest.mark.parametrize("size", ["0", "-1", "5000"])
def test_wrong_batch(size: str) -> None:
    result = run("bench", "--batch", size)
    assert result.code == 2
    assert f"--batch {size}" in result.only_line


# ---- steps ----


class Counting:
    """A language model of 10 tokens that counts what it is asked for."""

    class config:  # noqa: N801
        vocab_size = 10

    class Cache:
        def __init__(self, slots: int, capacity: int) -> None:
            self.slots, self.capacity = slots, capacity
            self.lengths = np.zeros(slots, np.int32)

        def move(self, source: int, target: int) -> None:
            self.lengths[target] = self.lengths[source]

    def __init__(self) -> None:
        self.lengths: list[list[int]] = []

    def new_cache(self, slots: int, capacity: int) -> Any:
        self.cache = self.Cache(slots, capacity)
        return self.cache

    def extend(self, cache: Any, ids: np.ndarray, rows: np.ndarray, *, last_only: bool) -> np.ndarray:
        assert last_only
        counts = np.diff(rows)
        assert counts.sum() == len(ids)
        cache.lengths[: len(counts)] += counts
        assert cache.lengths.max() <= cache.capacity
        self.lengths.append(cache.lengths.tolist())
        return np.zeros((len(counts), 4), np.float32)

    def logits(self, states: np.ndarray) -> np.ndarray:
        return np.zeros((len(states), 10), np.float32)


def test_steps_have_the_context_that_they_say() -> None:
    """One prompt, copied to every slot; each measurement begins at the same context again."""
    model = Counting()
    samples = bench.step_seconds(model, 3, context=20, steps=4, repeats=2)  # type: ignore[arg-type]
    assert len(samples) == 2
    assert all(sample > 0 for sample in samples)
    assert model.lengths[0] == [19, 0, 0]
    assert model.lengths[1:] == [[n] * 3 for n in (20, 21, 22, 23)] * 3  # once to warm up


def test_an_engine_may_measure_its_steps_itself() -> None:
    class Engine:
        def benchmark_step(self, *sizes: int) -> list[float]:
            assert sizes == (8, 256, 16, 2)
            return [1e-4, 2e-4]

    assert bench.step_seconds(Engine(), 8, 256, 16, 2) == [1e-4, 2e-4]  # type: ignore[arg-type]


# ---- checks ----


@pytest.fixture
def tts() -> SopranoTTS:
    return SopranoTTS()


def voiced(tts: SopranoTTS) -> bench_checks.Voiced:
    return bench_checks.Voiced.of(tts, bench.SENTENCES[0])


def test_right_results_pass(tts: SopranoTTS) -> None:
    assert bench_checks.check(tts, voiced(tts)) == 4


@pytest.mark.parametrize("dtype", ["float32", "int8", "float64"])
def test_every_precision_passes(dtype: str) -> None:
    tts = SopranoTTS(dtype=dtype)
    assert bench_checks.check(tts, voiced(tts)) == 4


@pytest.mark.parametrize("what", ["states", "decoder", "stream", "repeat"])
def test_wrong_results_are_not_timed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "states":
        extend = CpuLanguageModel.extend
        monkeypatch.setattr(CpuLanguageModel, "extend", lambda *rest, **options: extend(*rest, **options)[::-1].copy())
    elif what == "decoder":
        decode = PortableDecoder.decode
        monkeypatch.setattr(PortableDecoder, "decode", lambda *rest: decode(*rest) * np.float32(0.95))
    elif what == "stream":
        monkeypatch.setattr(SopranoTTS, "infer_stream", lambda *_: iter([np.ones(2048, np.float32)]))
    else:
        sounds = iter(np.ones((9, 64), np.float32).cumsum(0))
        monkeypatch.setattr(SopranoTTS, "infer", lambda *_: next(sounds))
    result = run("bench", "--batch", "1")
    assert (result.code, result.text) == (1, "")
    assert "wrong results, nothing is timed" in result.only_line
    said = {"states": "cosine", "decoder": "of the decoder", "stream": "of a stream", "repeat": "of a repeat"}
    assert said[what] in result.only_line


def test_decibels() -> None:
    reference = np.ones(100, np.float32)
    assert bench_checks.decibels(reference, reference) == np.inf
    assert bench_checks.decibels(reference * np.float32(1.01), reference) == pytest.approx(40, abs=1e-4)
    assert bench_checks.decibels(reference[:-1], reference) == -np.inf
    assert not bench_checks.decibels(reference * np.nan, reference) >= 40
