"""The GPU's crowd device without a GPU, with the real kernels on the emulated machine: what is spoken in a crowd must
be, bit for bit, what is spoken alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiling import registers_without_spills
from crowd_standin import FACTS, CrowdStandIn
from numerics import snr_db

from soprano_cupy import DeviceError, Qwen3
from soprano_cupy.audio import to_pcm16
from soprano_cupy.checkpoint import decoder_config, open_decoder, open_language_model
from soprano_cupy.config import DecoderConfig, ModelConfig
from soprano_cupy.crowd.driver import Driver
from soprano_cupy.crowd.job import Wish
from soprano_cupy.crowd.scheduler import Scheduler
from soprano_cupy.crowd.speech import Speech
from soprano_cupy.cuda.compiler import Nvrtc
from soprano_cupy.generation import Request
from soprano_cupy.gpu import (
    crowd_device,
    crowd_sizes,
    crowd_steps,
    crowd_voices,
    forward,
    linear,
    program,
    vocos,
    vocos_slices,
)
from soprano_cupy.gpu.arena import Arena
from soprano_cupy.gpu.crowd_device import GpuDevice, open_device
from soprano_cupy.gpu.crowd_rows import buckets_up_to
from soprano_cupy.gpu.crowd_sizes import CrowdSizes, crowd_bytes, crowd_specs
from soprano_cupy.gpu.crowd_upload import plan_enter
from soprano_cupy.gpu.launch import Launch, RowRange
from soprano_cupy.gpu.qwen3 import GpuLanguageModel
from soprano_cupy.gpu.vocos import GpuDecoder
from soprano_cupy.portable.vocos import PortableDecoder
from soprano_cupy.sampling import SamplingParams
from soprano_cupy.testing import TINY, make_checkpoint

CONFIG = dataclasses.replace(TINY, num_layers=2, hidden_size=48, max_positions=256)
DECODER = DecoderConfig(48, 24, 32, 2, 1, 3, 64, 16)
MOST_PROMPT = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("voice"), seed=8, config=CONFIG, decoder=DECODER, mean_tokens=14)


@pytest.fixture
def parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[GpuLanguageModel, GpuDecoder, CrowdStandIn]:
    standin = CrowdStandIn()
    standin.install(monkeypatch)
    monkeypatch.setattr(vocos, "LEAST_ROWS", 64)
    monkeypatch.setattr(vocos_slices, "LEAST_ROWS", 64)
    monkeypatch.setattr(vocos, "SLICE_ROWS_EACH", 32)
    monkeypatch.setattr(crowd_sizes, "PROMPT_ROWS", 64)
    monkeypatch.setattr(crowd_sizes, "MAX_NEW_TOKENS", 40)
    with open_language_model(folder) as file:
        model = GpuLanguageModel(file, ModelConfig.from_folder(folder), "cuda:0", "float16", "test")
    with open_decoder(folder) as file:
        decoder = GpuDecoder(file, decoder_config(file), "cuda:0", "test")
    return model, decoder, standin


def request(length: int, *, temperature: float = 0.0, tokens: int = 40) -> Request:
    ids = np.random.default_rng(length).integers(4, CONFIG.vocab_size, length).astype(np.int32)
    return Request(ids, SamplingParams(temperature, max_new_tokens=tokens, seed=9), length)


REQUESTS = [
    request(3), request(17, temperature=0.9), request(40), request(9, tokens=6), request(1), request(25),
    request(12, temperature=0.5), request(31, tokens=1), request(8), request(33, tokens=2),
]  # fmt: skip


class Told(GpuDevice):
    """Keeps the tokens of each sentence that ended."""

    tokens_of: dict[int, list[int]]
    prepared = False

    def admit(self, entries: Any) -> None:
        self.streams = getattr(self, "streams", {}) | {entry.slot: entry.request.stream for entry in entries}
        super().admit(entries)

    def report(self, watched: Any) -> Any:
        report = super().report(watched)
        for slot, count, status, _ in report.news:
            if status:
                self.tokens_of.setdefault(self.streams[slot], self.tokens(slot, count).tolist())
        return report


def device_of(parts: Any, slots: int, monkeypatch: pytest.MonkeyPatch) -> Told:
    model, decoder, _ = parts
    monkeypatch.setattr(crowd_steps.CrowdSteps, "prepare", lambda self: None)  # built as they are needed
    device = Told(model, decoder, CrowdSizes.plan(model.config, slots, MOST_PROMPT))
    device.tokens_of = {}
    return device


def speak(device: GpuDevice, requests: list[Request], wishes: list[Wish], between: Any = None) -> list[Speech]:
    scheduler = Scheduler()
    driver = Driver(device, scheduler)
    scheduler.join(driver)
    speeches: list[Speech] = []
    waiting = list(zip(requests, wishes, strict=True))
    for turn in range(2000):
        while waiting and (turn % 6 == 0 or len(waiting) % 4):
            wanted, wish = waiting.pop(0)
            speeches.append(scheduler.submit([wanted], wish, turn / 100))
        if between is not None:
            between(turn, speeches)
        busy = driver.turn(turn / 100)
        if not busy and not waiting and not scheduler.unfinished:
            assert driver.free == driver.slots
            return speeches
        if busy and not driver.generating:
            device.wait(0.002)  # as the device's thread does
    raise AssertionError("not done")


@pytest.fixture
def crowd(parts: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[Speech], dict[int, list[int]]]]:
    device = device_of(parts, 6, monkeypatch)
    wishes = [Wish(stream=i % 2 == 0, pcm=i % 3 == 0) for i in range(len(REQUESTS))]
    speeches = speak(device, REQUESTS, wishes)
    kinds = {key[0] for key in device._steps._programs}
    assert kinds == {"entry", "step", "pack"}
    yield speeches, device.tokens_of
    device.close()


def test_sequences_of_all_lengths_are_spoken(crowd: Any) -> None:
    """Some end at once, some by themselves, some at their limits, and rows were packed."""
    lengths = [len(tokens) for tokens in crowd[1].values()]
    assert len(lengths) == len(REQUESTS)
    assert {1, 2, 6} <= set(lengths)
    assert max(lengths) >= 12, lengths


def test_a_crowd_says_what_each_says_alone(
    crowd: Any, parts: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten sequences through six slots: the float32 engine's tokens, and the bits of the samples made alone."""
    speeches, tokens_of = crowd
    oracle = Qwen3.load(folder, "cpu", "float32")
    for i, wanted in enumerate(REQUESTS):
        device = device_of(parts, 1, monkeypatch)
        alone = speak(device, [wanted], [Wish()])[0].result()
        assert tokens_of[wanted.stream] == device.tokens_of[wanted.stream]
        samples = speeches[i].result()
        np.testing.assert_array_equal(samples, to_pcm16(alone) if i % 3 == 0 else alone)
        if wanted.params.temperature == 0:
            out = oracle.generate(wanted.ids, max_new_tokens=min(40, wanted.params.max_new_tokens))
            assert tokens_of[wanted.stream] == out.tokens.tolist()
            if len(alone):
                with open_decoder(folder) as file:
                    reference = PortableDecoder(file, decoder_config(file), "cpu", "float64", "test")
                assert snr_db(alone, reference.decode(np.asarray(out.states)[None].astype(np.float64))[0]) >= 30


@pytest.mark.parametrize("invariant", [False, True])
def test_everything_is_built_before_anybody_speaks(
    parts: Any, monkeypatch: pytest.MonkeyPatch, invariant: bool
) -> None:
    model, decoder, standin = parts
    compiled: list[int] = []
    monkeypatch.setattr(program, "compile_program", lambda launches, capability: compiled.append(len(launches)))
    device = GpuDevice(model, decoder, CrowdSizes.plan(model.config, 6, MOST_PROMPT), invariant=invariant)
    built = len(standin.program_sizes)
    assert sum(standin.program_sizes) >= compiled[0] >= 100
    wishes = [Wish(stream=i % 2 == 0) for i in range(len(REQUESTS))]
    assert all(speech.exception() is None for speech in speak(device, REQUESTS, wishes))
    assert len(standin.program_sizes) == built


def test_fixed_kernels_speak_too(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `invariant`, programs are planned for ranges of rows and told how many there are."""
    model, decoder, _ = parts
    alone = [speak(device_of(parts, 1, monkeypatch), [r], [Wish()])[0].result() for r in REQUESTS[:5]]
    device = GpuDevice(model, decoder, CrowdSizes.plan(model.config, 4, MOST_PROMPT), invariant=True)
    for speech, samples in zip(speak(device, REQUESTS[:5], [Wish(stream=True)] * 5), alone, strict=True):
        np.testing.assert_array_equal(speech.result(), samples)


def test_long_sentences_are_copied_by_threads(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All samples own their memory, and page-locked blocks come back, whoever copies."""
    monkeypatch.setattr(crowd_voices, "CUT_BYTES", 0)
    wishes = [Wish(stream=i % 2 == 0, pcm=i % 3 == 0) for i in range(6)]
    device = device_of(parts, 3, monkeypatch)
    speeches = speak(device, REQUESTS[:6], wishes)
    assert len(device._voices._blocks) == crowd_voices.BLOCKS
    device.close()
    for i, speech in enumerate(speeches):
        alone = speak(device_of(parts, 1, monkeypatch), [REQUESTS[i]], [wishes[i]])[0].result()
        np.testing.assert_array_equal(speech.result(), alone)
        assert speech.result().base is None or speech.result().base.nbytes == speech.result().nbytes


def kernels_of(launches: list[Launch]) -> list[tuple[object, ...]]:
    """What decides a launch's order of summation: everything but its grid and its addresses."""
    return [
        (launch.source, launch.kernel, launch.defines, launch.threads, launch.shared_bytes, launch.cluster)
        for launch in launches
    ]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_the_same_kernels_whatever_runs_beside(
    parts: Any, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    """With `invariant` every step and every prefill takes one variant of each kernel; without, small steps differ."""
    model, _, _ = parts
    monkeypatch.setattr(forward, "plan_linear", linear.plan_linear)
    monkeypatch.setattr(model.forward, "facts", dataclasses.replace(FACTS, capability=capability, multiprocessors=132))
    sizes = CrowdSizes.plan(model.config, 256, MOST_PROMPT)
    fixed, free = (crowd_steps.CrowdSteps(model.forward, sizes, invariant=value) for value in (True, False))
    steps = [kernels_of(fixed.step_launches(rows)) for rows in buckets_up_to(256)]
    assert all(kernels == steps[0] for kernels in steps)
    assert kernels_of(free.step_launches(1)) != kernels_of(free.step_launches(256))
    span = RowRange(1, sizes.prompt_rows)
    entries = [kernels_of(fixed.entry_launches(span, bucket)) for bucket in sizes.entry_buckets]
    assert all(kernels == entries[0] for kernels in entries)
    attention = [s for rows in (1, 4, 256) for s in fixed.step_launches(rows) if s.kernel == "attention_step"]
    assert len({launch.grid[0] for launch in attention}) == 1


@pytest.mark.parametrize("number", [75, 90, 120])
def test_entering_compiles(parts: Any, nvrtc: Nvrtc, number: int) -> None:
    if number not in nvrtc.architectures:
        pytest.skip("NVRTC {}.{} does not compile for sm_{}".format(*nvrtc.version, number))
    model, _, _ = parts
    sizes = CrowdSizes.plan(model.config, 4, MOST_PROMPT)
    arena = Arena(crowd_specs(model.config, sizes))
    launch = plan_enter(arena, "float16" if number < 80 else "bfloat16")
    assert max(registers_without_spills(nvrtc, number, launch)) <= 64


def test_cancelled_sequences_leave_no_trace(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some are cancelled in the middle; slots and rows are used again, and the others say what they say alone."""
    device = device_of(parts, 3, monkeypatch)
    gone = {0, 1, 2, 5, 8}

    def cancel(turn: int, speeches: list[Speech]) -> None:
        for i in gone & set(range(len(speeches))):
            running = [s for s, stream in getattr(device, "streams", {}).items() if stream == REQUESTS[i].stream]
            if running and (int(device._steps.progress[running[0]]) & 0xFFFFFFFF) >= 2 + i % 2:
                speeches[i].cancel()

    speeches = speak(device, REQUESTS, [Wish(stream=True)] * len(REQUESTS), cancel)
    for i, wanted in enumerate(REQUESTS):
        if not speeches[i].cancelled():
            alone = speak(device_of(parts, 1, monkeypatch), [wanted], [Wish()])[0].result()
            np.testing.assert_array_equal(speeches[i].result(), alone)
    assert sum(speeches[i].cancelled() for i in gone) >= 3


def test_a_poisoned_cache_fails_only_its_sequence(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device = device_of(parts, 4, monkeypatch)

    def poison(turn: int, speeches: list[Speech]) -> None:
        for slot, stream in getattr(device, "streams", {}).items():
            if stream == 17 and device._steps.progress[slot]:
                device._steps._arena["values"][:, slot] = 0x7E00  # NaN

    wishes = [Wish()] * 3
    speeches = speak(device, REQUESTS[:3], wishes, poison)
    with pytest.raises(DeviceError, match="not finite"):
        speeches[1].result()
    for i in (0, 2):
        alone = speak(device_of(parts, 1, monkeypatch), [REQUESTS[i]], [Wish()])[0].result()
        np.testing.assert_array_equal(speeches[i].result(), alone)


def test_too_little_memory_means_fewer_voices(
    parts: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, decoder, standin = parts
    monkeypatch.setattr(crowd_steps.CrowdSteps, "prepare", lambda self: None)
    monkeypatch.setattr(crowd_device, "FEWEST_SLOTS", 2)
    room = crowd_bytes(model.config, CrowdSizes.plan(model.config, 4, MOST_PROMPT)) + 100_000
    standin.memory_bytes = room
    device = open_device(model, decoder, MOST_PROMPT, 16)
    assert device.slots == 4
    assert "no GPU memory for 16 voices" in caplog.text
    standin.memory_bytes = None
    assert open_device(model, decoder, MOST_PROMPT, 16, room).slots == 4
    assert "holds 4 voices, not 16" in caplog.text
    with pytest.raises(DeviceError, match="too little"):
        open_device(model, decoder, MOST_PROMPT, 16, 1000)
    standin.memory_bytes = 10_000
    with pytest.raises(DeviceError, match="no memory left"):
        open_device(model, decoder, MOST_PROMPT, 16)
