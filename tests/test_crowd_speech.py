"""`SopranoTTS.submit` end to end on the CPU: what is spoken in a crowd is what `infer` speaks alone."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from soprano_cupy import Busy, Closed, DeadlineExceeded, DeviceError, ParameterError, SopranoTTS, TextError
from soprano_cupy.audio import to_pcm16
from soprano_cupy.crowd.runner_device import RunnerDevice
from soprano_cupy.testing import make_checkpoint

TEXT = "Hello there, how are you this fine morning? I am quite well, thank you very much. See you soon, my old friend."
TEXTS = [TEXT, "One.", "A second text, which is neither long nor short.", "Good evening to you all! Who is there?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("voice"), seed=8, mean_tokens=60)


@pytest.fixture(scope="module", params=["auto", "float32-standard"])
def tts(folder: Path, request: pytest.FixtureRequest) -> Any:
    """The compiled engine, and array code."""
    attention = "standard" if request.param != "auto" else "auto"
    with SopranoTTS(folder, device="cpu", attention=attention, max_batch=3) as tts:
        yield tts


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("stream", [False, True])
def test_a_crowd_hears_what_each_hears_alone(tts: SopranoTTS, temperature: float, stream: bool) -> None:
    speeches = [tts.submit(text, stream=stream, temperature=temperature, seed=3) for text in TEXTS for _ in range(2)]
    assert len(list(as_completed(speeches, 60))) == 8
    for i, speech in enumerate(speeches):
        alone = tts.infer(TEXTS[i // 2], temperature=temperature, seed=3)
        assert speech.result().dtype == np.float32
        np.testing.assert_allclose(speech.result(), alone, rtol=0, atol=1e-5)


def test_chunks_joined_are_the_result(tts: SopranoTTS) -> None:
    alone = tts.infer(TEXT)
    speech = tts.submit(TEXT, stream=True)
    chunks = list(speech)
    assert len(chunks) > 3
    assert speech.first_audio_s is not None
    np.testing.assert_array_equal(np.concatenate(chunks), speech.result())
    assert np.abs(speech.result() - alone).max() <= 1e-5

    async def listen() -> list[np.ndarray]:
        return [chunk async for chunk in tts.submit(TEXT)]

    sentences = asyncio.run(listen())
    assert 1 <= len(sentences) <= len(chunks)
    assert np.abs(np.concatenate(sentences) - alone).max() <= 1e-5


@pytest.mark.parametrize("stream", [False, True])
def test_16_bit_samples(tts: SopranoTTS, stream: bool) -> None:
    samples = tts.submit(TEXT, dtype="int16", stream=stream).result(60)
    assert samples.dtype == np.int16
    assert np.abs(samples.astype(int) - to_pcm16(tts.infer(TEXT)).astype(int)).max() <= 1


def test_many_threads_beside_infer(tts: SopranoTTS) -> None:
    alone = tts.infer(TEXT)
    found: list[np.ndarray] = []

    def work() -> None:
        found.append(tts.submit(TEXT).result(60))
        found.append(tts.infer(TEXT))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(np.abs(samples - alone).max() <= 1e-5 for samples in found)


def test_a_book_is_as_long_as_alone(tts: SopranoTTS) -> None:
    """More sentences than slots."""
    book = " ".join(TEXTS)
    assert np.abs(tts.submit(book).result(60) - tts.infer(book)).max() <= 1e-5


def test_retries_of_stuck_sentences(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, seed=5, stuck=True, mean_tokens=40)
    with SopranoTTS(folder, device="cpu") as tts:
        for retries in (0, 1, 2):
            alone = tts.infer(TEXT, retries=retries, seed=4)
            for stream in (False, True):
                crowd = tts.submit(TEXT, retries=retries, seed=4, stream=stream).result(60)
                np.testing.assert_allclose(crowd, alone, rtol=0, atol=1e-5)


def test_wrong_arguments(tts: SopranoTTS, folder: Path) -> None:
    for options, word in (
        ({"temperature": -1}, "temperature"),
        ({"retries": -1}, "retries"),
        ({"dtype": "float64"}, "dtype"),
        ({"dtype": "nothing"}, "dtype"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"deadline_s": "soon"}, "deadline_s"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(ParameterError, match=word):
            tts.submit(TEXT, **options)  # type: ignore[arg-type]
    with pytest.raises(TextError):
        tts.submit("!!!")
    with pytest.raises(ParameterError, match="must be a string"):
        tts.submit(None)  # type: ignore[arg-type]
    for options, word in (
        ({"max_batch": 0}, "max_batch"),
        ({"max_batch": 2049}, "max_batch"),
        ({"max_memory": 1.5}, "max_memory"),
        ({"max_queue": 0}, "max_queue"),
        ({"devices": "cpu"}, "devices"),
        ({"devices": []}, "devices"),
    ):
        with pytest.raises(ParameterError, match=word):
            SopranoTTS(folder, device="cpu", **options)  # type: ignore[arg-type]
    twice = SopranoTTS(folder, device="cpu", devices=["cpu", "cpu"])
    with pytest.raises(ParameterError, match="twice"):
        twice.submit(TEXT)


def test_deadlines_and_full_queues(folder: Path) -> None:
    with SopranoTTS(folder, device="cpu", max_batch=1, max_queue=1) as tts:
        with pytest.raises(DeadlineExceeded):
            tts.submit(" ".join(TEXTS), deadline_s=1e-3).result(60)
        with pytest.raises(Busy):  # noqa: PT012
            for _ in range(100):
                tts.submit(" ".join(TEXTS))


def test_closing(folder: Path) -> None:
    threads = set(threading.enumerate())
    tts = SopranoTTS(folder, device="cpu")
    first = tts.submit("One.")
    tts.close(drain_s=60)
    assert len(first.result()) > 0
    tts.close()
    with pytest.raises(Closed):
        tts.submit("One.")
    assert len(tts.infer("One.")) > 0  # the voice itself goes on
    forgotten = SopranoTTS(folder, device="cpu")
    speech = forgotten.submit(" ".join(TEXTS * 20))
    del forgotten
    gc.collect()
    assert isinstance(speech.exception(30), Closed)
    end = time.monotonic() + 10
    while set(threading.enumerate()) - threads and time.monotonic() < end:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - threads
    SopranoTTS(folder, device="cpu").close()


def test_poisoned_logits_fail_only_what_they_concern(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SopranoTTS(folder, device="cpu", max_batch=4) as tts:
        alone = tts.infer("One.")
        original = RunnerDevice._take

        def take(self: RunnerDevice, sequence: Any, token: int, state: Any, distance: Any, finite: bool) -> None:
            original(self, sequence, token, state, distance, finite and sequence.request.params.seed != 13)

        monkeypatch.setattr(RunnerDevice, "_take", take)
        good, bad = tts.submit("One.", seed=12), tts.submit("One.", seed=13)
        assert np.abs(good.result(60) - alone).max() <= 1e-5
        with pytest.raises(DeviceError, match="not finite"):
            bad.result(60)


def test_a_device_that_fails_is_set_up_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SopranoTTS(folder, device="cpu", max_batch=4) as tts:
        alone = tts.infer(TEXT)
        failures = [MemoryError("no memory"), DeviceError("launch failed")]
        original = RunnerDevice.advance

        def advance(self: RunnerDevice) -> None:
            original(self)
            if failures and any(len(sequence.tokens) > 8 for sequence in self._rows):
                raise failures.pop()

        monkeypatch.setattr(RunnerDevice, "advance", advance)
        for stream in (True, False):
            assert np.abs(tts.submit(TEXT, stream=stream).result(60) - alone).max() <= 1e-5
        assert not failures
