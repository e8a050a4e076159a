"""The texts that the benchmark of the text front end measures are read as it says they are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks/ lies beside the package, and is no part of it

from benchmarks import text as benchmark
from soprano_cupy.checkpoint.resolve import BUNDLED_FOLDER
from soprano_cupy.tokenizer import Tokenizer

TEXTS = {"plain": benchmark.plain_texts(), "long": benchmark.long_texts()}


def test_lengths() -> None:
    assert {len(text) for text in TEXTS["plain"]} == {benchmark.LENGTH}
    assert all(abs(len(text) - benchmark.LENGTH) <= 6 for text in (*benchmark.NUMBERS, *benchmark.NAMES))
    assert all(text.count(",") == 1 and text.endswith(".") for text in TEXTS["plain"])


def test_every_text_is_checked() -> None:
    tokenizer = Tokenizer.load(BUNDLED_FOLDER)
    compared = benchmark.TEXTS_EACH + len(benchmark.NUMBERS) + len(benchmark.NAMES) + 2 * len(TEXTS["long"])
    assert benchmark.check(TEXTS, tokenizer) == compared


def test_a_wrong_reading_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmark.NUMBERS, "On 5 May.", "on may fifth.")
    with pytest.raises(SystemExit, match=r"'On 5 May\.' became 'on five may\.'"):
        benchmark.check(TEXTS, Tokenizer.load(BUNDLED_FOLDER))


def test_rows_of_every_kind() -> None:
    rows = list(benchmark.measure({"plain": TEXTS["plain"][:1]}, Tokenizer.load(BUNDLED_FOLDER), 0.0))
    assert [row.case for row in rows] == [
        f"plain/{part}" for part in ("normalize", "prompts", "tokens", "ready", "ready/4_threads")
    ]
    assert [row.unit for row in rows] == ["us"] * 4 + ["sentences/s"]
    assert all(row.value > 0 for row in rows[:4])
