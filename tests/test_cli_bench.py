"""`soprano-cupy bench`: that it measures what it says; how fast is no matter of a test."""

from __future__ import annotations

import json
from pathlib import Path

import command_line
import pytest
from command_line import run

from soprano_cupy.testing import make_checkpoint


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in command_line.quiet_environment(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SOPRANO_MODEL", str(make_checkpoint(tmp_path / "voice", seed=5)))


def test_json(tmp_path: Path) -> None:
    result = run("bench", "--batch", "2", "--json")
    assert (result.code, result.err) == (0, "")
    record = json.loads(result.out)
    assert {"what", "machine", "python", "date", "model", "device", "dtype", "attention", "rows"} <= record.keys()
    assert record["model"] == str(tmp_path / "voice")
    assert record["device"] == "cpu"
    cases = {row["case"]: row for row in record["rows"]}
    assert list(cases) == ["load", "first_audio", "voice/B1", "throughput/B2", "memory"]
    for row in cases.values():
        assert row["value"] > 0
        assert row["unit"]
        assert row["meaning"]


def test_the_numbers_follow_from_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is a second: a stream's first chunk comes after one, its end after two."""
    from soprano_cupy.cli import bench
    from soprano_cupy.pipeline import SopranoTTS

    ticks = iter(range(100))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(SopranoTTS, "infer_stream", lambda *_: iter([[0.0] * 32000, [0.0] * 64000]))
    monkeypatch.setattr(SopranoTTS, "infer_batch", lambda _, texts: [[0.0] * 16000] * len(texts))
    rows = {row["case"]: row["value"] for row in json.loads(run("bench", "--batch", "6", "--json").out)["rows"]}
    assert rows["first_audio"] == 1000.0
    assert rows["voice/B1"] == 3.0 / 2
    assert rows["throughput/B6"] == 3.0


def test_table() -> None:
    result = run("bench", "--batch", "1")
    assert result.code == 0
    assert len(result.text.splitlines()) == 5
    assert "bfloat16, flash attention" in result.only_line


@pytest.mark.parametrize("size", ["0", "-1", "5000"])
def test_wrong_batch(size: str) -> None:
    result = run("bench", "--batch", size)
    assert result.code == 2
    assert f"--batch {size}" in result.only_line
