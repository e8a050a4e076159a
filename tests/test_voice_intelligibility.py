"""The bundled voice is understood: a speech recogniser writes down what it hears."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from listening import RECOGNISER_HZ, halve_rate, to_recogniser, word_errors, words

from soprano_cupy import SopranoTTS

SENTENCES = (Path(__file__).parent / "data" / "everyday.txt").read_text(encoding="utf-8").splitlines()
MAX_WORD_ERROR_RATE = 0.08


@pytest.mark.voice
def test_everyday_sentences_are_understood() -> None:
    """At most 8 % word errors over 20 sentences; 10 of 196 words when this was written, one of them a spelling."""
    pocketsphinx = pytest.importorskip("pocketsphinx", reason="pip install 'soprano-cupy[test]' adds the recogniser")
    audio = SopranoTTS("mini", device="cpu").infer_batch(SENTENCES)
    listener = pocketsphinx.Decoder(samprate=RECOGNISER_HZ, loglevel="FATAL")
    errors = total = 0
    for sentence, samples in zip(SENTENCES, audio, strict=True):
        listener.start_utt()
        listener.process_raw(to_recogniser(samples), full_utt=True)
        listener.end_utt()
        heard = words(listener.hyp().hypstr) if listener.hyp() else []
        errors += word_errors(words(sentence), heard)
        total += len(words(sentence))
        print(f"{sentence} -> {' '.join(heard)}")
    print(f"word error rate {errors}/{total} = {errors / total:.3f}")
    assert total == 196
    assert errors <= MAX_WORD_ERROR_RATE * total


def test_word_errors() -> None:
    assert word_errors(["a", "b", "c", "d"], ["a", "b", "c", "d"]) == 0
    assert word_errors(["a", "b", "c", "d"], ["a", "x", "c", "d"]) == 1
    assert word_errors(["a", "b", "c", "d"], ["b", "c", "d", "e", "f"]) == 3
    assert word_errors(["a", "b"], []) == 2
    assert word_errors([], ["a", "b"]) == 2
    assert words("Let's go, at 9: it's LATE.") == ["let's", "go", "at", "9", "it's", "late"]


@pytest.mark.parametrize(("frequency_hz", "gain"), [(100, 1.0), (3000, 1.0), (7000, 1.0), (9000, 0.0), (15000, 0.0)])
def test_halving_keeps_what_fits_and_drops_what_would_alias(frequency_hz: float, gain: float) -> None:
    time_s = np.arange(32000) / 32000
    halved = halve_rate(np.sin(2 * np.pi * frequency_hz * time_s))
    assert len(halved) == 16000
    inner = halved[1000:-1000]
    expected = gain * np.sin(2 * np.pi * frequency_hz * time_s[::2])[1000:-1000]
    assert np.abs(inner - expected).max() < 1e-3
