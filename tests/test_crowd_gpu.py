"""Crowds on a GPU: the same bits in a crowd as alone, slots entered and left at random, faults, memory."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numerics import snr_db

from soprano_cupy import Busy, DeadlineExceeded, DeviceError, SopranoTTS
from soprano_cupy.audio import to_pcm16
from soprano_cupy.crowd.driver import Driver
from soprano_cupy.gpu import step
from soprano_cupy.gpu.crowd_device import GpuDevice, open_device
from soprano_cupy.gpu.crowd_steps import CrowdSteps
from soprano_cupy.sampling import SamplingParams, penalise
from soprano_cupy.testing import SOPRANO_1_1_80M, make_checkpoint

pytestmark = pytest.mark.gpu

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
SAME = 30  # dB between a crowd's samples and those of `infer`: bfloat16 states that kernels add up in another order
STATE_ERROR = 0.1  # of the states' root mean square, for the same reason


def text_of(number: int) -> str:
    """A sentence of its own for each number."""
    rng = random.Random(number)
    return f"{' '.join(rng.choice(WORDS) for _ in range(rng.randint(2, 30)))}."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("voice"), seed=8, mean_tokens=60)


@pytest.fixture(scope="module")
def tts(folder: Path) -> Iterator[SopranoTTS]:
    with SopranoTTS(folder, device="cuda", max_batch=64) as tts:
        yield tts


@pytest.fixture(scope="module")
def invariant(folder: Path) -> Iterator[SopranoTTS]:
    with SopranoTTS(folder, device="cuda", max_batch=64, invariant=True) as tts:
        yield tts


def alike(samples: np.ndarray, reference: np.ndarray) -> bool:
    """Of the same length, and the same but for roundings."""
    return samples.shape == reference.shape and (len(samples) == 0 or snr_db(samples, reference) >= SAME)


def device_of(tts: SopranoTTS) -> GpuDevice:
    device = tts._opened().devices[0]
    assert isinstance(device, GpuDevice), "another engine runs"
    return device


def all_free(tts: SopranoTTS) -> None:
    """Every slot is free again within a second."""
    worker = tts._opened()._workers[0]
    end = time.monotonic() + 1
    while worker.driver is None or worker.driver.free < worker.driver.slots:
        assert time.monotonic() < end, "slots are lost"
        time.sleep(0.001)


def test_one_voice_says_what_infer_says(tts: SopranoTTS, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to a token, if any, whose lead is within the error: `infer` has kernels of its own for one voice."""
    assert device_of(tts).slots == 64
    model: Any = tts.engine.language_model
    wanted = {n: tts._reader.read(text_of(n), SamplingParams())[0] for n in range(6)}
    made = what_is_made(monkeypatch, wanted)
    for n, request in wanted.items():
        alone = tts.infer(text_of(n))
        batch = model._idle[-1]
        count = int(step.progress_count(int(batch.progress[0])))
        reference = np.array(batch.tokens[0, :count]), batch.states[0, :count].get()
        for stream in (False, True):
            samples = tts.submit(text_of(n), stream=stream).result(60)
            if says_the_same(model, request, made[n], reference):
                assert alike(samples, alone), f"sentence {n}"
    all_free(tts)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_same_bits_alone_and_in_a_crowd(invariant: SopranoTTS, temperature: float) -> None:
    """300 sentences through 64 slots, streamed and whole, in two orders: each has the bits that it has alone."""
    options: dict[str, Any] = {"temperature": temperature, "seed": 11}
    numbers = list(range(300))
    rounds = []
    for _ in range(2):
        speeches = {n: invariant.submit(text_of(n), stream=n % 2 == 0, **options) for n in numbers}
        rounds.append({n: speech.result(120) for n, speech in speeches.items()})
        random.Random(1).shuffle(numbers)
    for n in numbers:
        np.testing.assert_array_equal(rounds[0][n], rounds[1][n])
    for n in numbers[:40]:
        np.testing.assert_array_equal(invariant.submit(text_of(n), **options).result(60), rounds[0][n])
    all_free(invariant)


def test_crowds_without_fixed_kernels_say_the_same_words(tts: SopranoTTS, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 40 in a crowd of 200 says what it says alone, up to a token, if any, whose lead is within the error.

    A random checkpoint's best scores are close to each other everywhere. Kernels for other numbers of rows add up in
    another order, so some greedy choices turn over, and what follows is another sentence.
    """
    model: Any = tts.engine.language_model
    wanted = {n: tts._reader.read(text_of(n), SamplingParams())[0] for n in range(40)}
    made = what_is_made(monkeypatch, wanted)
    samples_alone = [tts.submit(text_of(n)).result(60) for n in wanted]
    alone = dict(made)
    samples = [speech.result(60) for speech in [tts.submit(text_of(n)) for n in range(200)]]
    for n, request in wanted.items():
        if says_the_same(model, request, made[n], alone[n]):
            assert alike(samples[n], samples_alone[n]), f"sentence {n}"


Made = tuple[np.ndarray, np.ndarray]  # tokens, and the state that made each


def what_is_made(monkeypatch: pytest.MonkeyPatch, wanted: dict[int, Any]) -> dict[int, Made]:
    """What a crowd makes of these requests, as it comes; of each the newest."""
    number_of = {request.ids.tobytes(): n for n, request in wanted.items()}
    made: dict[int, Made] = {}
    end = Driver._end

    def keep(self: Driver, slot: int, sentence: Any, count: int, *rest: Any) -> None:
        n = number_of.get(sentence.request.ids.tobytes())
        if n is not None:
            device: Any = self.device
            made[n] = device.tokens(slot, count), device._steps.states[slot, :count].get()
        end(self, slot, sentence, count, *rest)

    monkeypatch.setattr(Driver, "_end", keep)
    return made


def says_the_same(model: Any, request: Any, made: Made, reference: Made) -> bool:
    """Whether all tokens are the same; asserts that the first other one had no lead, and that states are close."""
    (tokens, states), (others, others_states) = made, reference
    common = min(len(tokens), len(others))
    different = np.flatnonzero(tokens[:common] != others[:common])
    same = int(different[0]) if len(different) else common
    kept = min(same + 1, common)
    error = np.abs(states[:kept] - others_states[:kept]).max() / np.sqrt((others_states**2).mean())
    assert error < STATE_ERROR
    if same == common:
        assert len(tokens) == len(others)
        return True
    assert same >= 1
    assert lead(model, request, others[:same], others_states[same], states[same]) < 1, f"token {same}"
    return False


def lead(model: Any, request: Any, before: np.ndarray, state: np.ndarray, other: np.ndarray) -> float:
    """The best score's lead over the second, in shares of what the two states' logits differ by at most, both ways.

    A choice turns over where two scores move by half their distance each; the repetition penalty stretches what lies
    below zero, and the kernels that make the scores add an error of their own: twice that is allowed for both.
    """
    import cupy

    logits = model.logits(cupy.asarray(np.stack([state, other]))).get().astype(np.float64)
    seen = np.zeros((1, logits.shape[1]), bool)
    seen[0, [*request.ids, *before]] = True
    scores = np.sort(penalise(logits[:1], seen, np.array([[request.params.repetition_penalty]]))[0])
    return float((scores[-1] - scores[-2]) / (4 * np.abs(logits[0] - logits[1]).max()))


def test_chunks_and_16_bit_samples(invariant: SopranoTTS) -> None:
    speech = invariant.submit(text_of(3), stream=True)
    chunks = list(speech)
    whole = invariant.submit(text_of(3)).result(60)
    assert len(chunks) >= 2
    np.testing.assert_array_equal(np.concatenate(chunks), whole)
    np.testing.assert_array_equal(invariant.submit(text_of(3), dtype=np.int16).result(60), to_pcm16(whole))

    async def listen() -> np.ndarray:
        return np.concatenate([chunk async for chunk in invariant.submit(text_of(3), stream=True)])

    np.testing.assert_array_equal(asyncio.run(listen()), whole)


def test_books_and_short_texts(invariant: SopranoTTS) -> None:
    """A book's sentences come in order; a short text that comes later is done earlier."""
    book = " ".join(text_of(n).capitalize() for n in range(150))
    long = invariant.submit(book, stream=True)
    short = invariant.submit(text_of(2))
    np.testing.assert_array_equal(short.result(60), invariant.submit(text_of(2)).result(60))
    assert not long.done() or len(long.result()) > 0
    np.testing.assert_array_equal(long.result(120), invariant.submit(book).result(120))


def test_cancellations_deadlines_and_crowds(invariant: SopranoTTS) -> None:
    """Five seconds of everything: what is answered has the bits that it has alone, and memory does not grow."""
    import cupy

    rng = random.Random(2)
    alone = {n: invariant.submit(text_of(n)).result(60) for n in range(30)}
    speeches = []
    used: list[int] = []
    end = time.monotonic() + 5
    while time.monotonic() < end:
        n = rng.randrange(30)
        deadline = rng.choice([None, None, 0.005, 0.1])
        speeches.append((n, deadline, invariant.submit(text_of(n), stream=rng.random() < 0.5, deadline_s=deadline)))
        if rng.random() < 0.3:
            rng.choice(speeches[-50:])[2].cancel()
        if len(speeches) % 100 == 0:
            used.append(cupy.get_default_memory_pool().total_bytes())
        time.sleep(rng.random() * 0.004)
    answered = 0
    for n, deadline, speech in speeches:
        try:
            np.testing.assert_array_equal(speech.result(60), alone[n])
            answered += 1
        except DeadlineExceeded:
            assert deadline is not None
        except BaseException:
            assert speech.cancelled()
    assert answered > len(speeches) / 4
    assert used[-1] <= used[len(used) // 2]
    all_free(invariant)


@pytest.mark.parametrize("error", [DeviceError("launch failed"), MemoryError("out of memory")])
def test_failures_in_flight(folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """All buffers are set up anew and everything is answered."""
    with SopranoTTS(folder, device="cuda", max_batch=16, invariant=True) as tts:
        alone = [tts.submit(text_of(n)).result(60) for n in range(24)]
        failures = [30, 90]
        calls = [0]
        original = CrowdSteps.advance

        def advance(self: CrowdSteps) -> None:
            calls[0] += 1
            if calls[0] in failures:
                raise error
            original(self)

        monkeypatch.setattr(CrowdSteps, "advance", advance)
        speeches = [tts.submit(text_of(n), stream=n % 2 == 0) for n in range(24)]
        for speech, samples in zip(speeches, alone, strict=True):
            np.testing.assert_array_equal(speech.result(120), samples)
        assert calls[0] > max(failures)
        all_free(tts)


def test_a_poisoned_sequence(invariant: SopranoTTS, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN among one sentence's values: it fails, its neighbours have their bits."""
    alone = [invariant.submit(text_of(n)).result(60) for n in range(12)]
    device = device_of(invariant)
    original = GpuDevice.admit
    bad = invariant._reader.read(text_of(5), SamplingParams(seed=1))

    def admit(self: GpuDevice, entries: Any) -> None:
        original(self, entries)
        for entry in entries:
            if np.array_equal(entry.request.ids, bad[0].ids):
                with self._steps.stream:
                    self._steps._arena["values"][:, entry.slot] = 0x7FC0  # NaN in bfloat16

    monkeypatch.setattr(GpuDevice, "admit", admit)
    speeches = [invariant.submit(text_of(n)) for n in range(12)]
    for n, speech in enumerate(speeches):
        if n == 5:
            with pytest.raises(DeviceError, match="not finite"):
                speech.result(60)
        else:
            np.testing.assert_array_equal(speech.result(60), alone[n])
    monkeypatch.undo()
    np.testing.assert_array_equal(invariant.submit(text_of(5)).result(60), alone[5])
    assert device_of(invariant) is device  # nothing was set up anew


def test_memory_decides_how_many(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    import cupy

    with SopranoTTS(folder, device="cuda", max_batch=512, max_memory=300_000_000) as tts:
        device = device_of(tts)
        assert 8 <= device.slots < 512
        assert "max_memory" in caplog.text
        speeches = [tts.submit(text_of(n)) for n in range(50)]
        assert all(len(speech.result(60)) >= 0 for speech in speeches)
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    tts = SopranoTTS(folder, device="cuda")
    pool.set_limit(pool.used_bytes() + 400_000_000)
    try:
        language_model: Any = tts.engine.language_model
        decoder: Any = tts.engine.decoder
        device = open_device(language_model, decoder, 316, 1024)
        assert 8 <= device.slots < 1024
        assert "no GPU memory for 1024 voices" in caplog.text
        device.close()
    finally:
        pool.set_limit(0)


def test_real_sizes(tmp_path: Path) -> None:
    """Soprano-1.1-80M's shape, 1,024 voices: they fit 10 GB, and 3,000 sentences come out."""
    make_checkpoint(tmp_path, seed=1, config=SOPRANO_1_1_80M, mean_tokens=60)
    with SopranoTTS(tmp_path, device="cuda", max_batch=1024, max_queue=4000) as tts:
        device = device_of(tts)
        assert device.slots == 1024
        assert device.nbytes < 10e9
        begin = time.perf_counter()
        speeches = [tts.submit(text_of(n), dtype=np.int16) for n in range(3000)]
        total = sum(len(speech.result(120)) for speech in speeches)
        print(f"{total / 32000 / (time.perf_counter() - begin):.0f} times real time, {device.nbytes / 1e9:.2f} GB")
        first = [tts.submit(text_of(n), stream=True) for n in range(20)]
        for speech in first:
            speech.result(60)
        waits = sorted(speech.first_audio_s for speech in first if speech.first_audio_s is not None)
        print(f"first audio of 20 at once: {1e3 * waits[0]:.1f} to {1e3 * waits[-1]:.1f} ms")
        all_free(tts)


def test_many_threads_beside_infer(tts: SopranoTTS) -> None:
    alone = tts.infer(text_of(1))
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                assert alike(tts.submit(text_of(1)).result(60), alone)
                assert alike(tts.infer(text_of(1)), alone)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_busy_and_closed(folder: Path) -> None:
    before = set(threading.enumerate())
    with SopranoTTS(folder, device="cuda", max_batch=8, max_queue=4) as tts, pytest.raises(Busy):  # noqa: PT012
        for n in range(500):
            tts.submit(text_of(n))
    assert set(threading.enumerate()) <= before
