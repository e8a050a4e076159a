"""The GPU's crowd device without a GPU: its sizes and rows, and all of it with the real kernels on the emulated
machine, where what is spoken in a crowd must be, bit for bit, what is spoken alone."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiling import registers_without_spills
from crowd_standin import FACTS, CrowdStandIn
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import snr_db

from soprano_cupy import DeviceError, ParameterError, Qwen3
from soprano_cupy.audio import to_pcm16
from soprano_cupy.checkpoint import decoder_config, open_decoder, open_language_model
from soprano_cupy.config import DecoderConfig, ModelConfig
from soprano_cupy.crowd.device import AT_ITS_END, NOT_WATCHED, News
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
    slots,
    vocos,
    vocos_slices,
)
from soprano_cupy.gpu._tables import watched_slots
from soprano_cupy.gpu.arena import Arena
from soprano_cupy.gpu.crowd_device import GpuDevice, open_device
from soprano_cupy.gpu.crowd_rows import BUCKETS, Rows, bucket_of, buckets_up_to
from soprano_cupy.gpu.crowd_sizes import (
    CrowdSizes,
    crowd_bytes,
    crowd_specs,
    packed_specs,
    slots_that_fit,
    staged_specs,
)
from soprano_cupy.gpu.crowd_upload import plan_enter
from soprano_cupy.gpu.forward import RowRange
from soprano_cupy.gpu.launch import Launch
from soprano_cupy.gpu.qwen3 import GpuLanguageModel
from soprano_cupy.gpu.vocos import GpuDecoder
from soprano_cupy.gpu.vocos_tables import frames_of, voice_pieces, whole_pieces
from soprano_cupy.portable.vocos import PortableDecoder
from soprano_cupy.sampling import SamplingParams
from soprano_cupy.testing import SOPRANO_1_1_80M, TINY, make_checkpoint

CONFIG = dataclasses.replace(TINY, num_layers=2, hidden_size=48, max_positions=256)
DECODER = DecoderConfig(48, 24, 32, 2, 1, 3, 64, 16)
MOST_PROMPT = 40

# -- sizes and rows ---------------------------------------------------------------------------------------------------


def test_buckets() -> None:
    assert list(BUCKETS) == sorted(set(BUCKETS))
    assert bucket_of(1) == 1
    assert bucket_of(65) == 96
    assert bucket_of(2048) == 2048
    assert buckets_up_to(5) == [1, 2, 4, 8]
    assert buckets_up_to(8) == [1, 2, 4, 8]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 19), max_size=120))
def test_rows_are_conserved(moves: list[int]) -> None:
    """Slots enter and leave; each keeps one row, the lowest that was free; packing keeps their order."""
    rows, held = Rows(20), {}
    for slot in moves:
        if slot in held:
            assert rows.leave(slot) == held.pop(slot)
        else:
            lowest = min(set(range(20)) - set(held.values()))
            held[slot] = rows.enter(slot)
            assert held[slot] == lowest
        assert {slot: row for row, slot in enumerate(rows.slot_of_row.tolist()) if slot >= 0} == held
        assert rows.bucket == bucket_of(max(held.values(), default=0) + 1)
        if rows.best_bucket < rows.bucket:
            before = sorted(held, key=lambda s: held[s])
            sources = rows.pack()
            assert sources.tolist() == sorted(held.values())
            held = {slot: row for row, slot in enumerate(before)}
            assert rows.bucket == rows.best_bucket


def test_memory_of_a_thousand_voices() -> None:
    """The keys and values of 832 tokens, and the states of 512: less than 10 GB."""
    sizes = CrowdSizes.plan(SOPRANO_1_1_80M, 1024, 316)
    assert (sizes.capacity, sizes.tokens, sizes.prompt_rows) == (832, 512, 4096)
    assert 8.5e9 < crowd_bytes(SOPRANO_1_1_80M, sizes) < 10e9
    assert slots_that_fit(SOPRANO_1_1_80M, 2048, 316, None) == 2048
    assert slots_that_fit(SOPRANO_1_1_80M, 2048, 316, 10_000_000_000) == 1024
    assert slots_that_fit(SOPRANO_1_1_80M, 100, 316, 10_000_000_000) == 100
    assert slots_that_fit(SOPRANO_1_1_80M, 100, 316, 1_000_000) == 0


def test_what_the_host_writes_lies_together() -> None:
    sizes = CrowdSizes.plan(SOPRANO_1_1_80M, 300, 316)
    names = list(crowd_specs(SOPRANO_1_1_80M, sizes))
    staged, packed = list(staged_specs(SOPRANO_1_1_80M, sizes)), list(packed_specs(sizes))
    assert names[-len(staged) - len(packed) :] == [*staged, *packed]
    assert sizes.entry_buckets == [1, 4, 16, 64, 128]
    assert sizes.prompt_classes == [64, 256, 1024, 4096]
    assert crowd_specs(SOPRANO_1_1_80M, sizes)["step.residual"][0][0] == 320


def test_prefills_are_graphs() -> None:
    """Every prefill has one that holds its rows and prompts, whichever they are."""
    sizes = CrowdSizes.plan(SOPRANO_1_1_80M, 1024, 316)
    graphs = sizes.entry_graphs
    assert len(graphs) == len(set(graphs)) < 90
    for rows in range(1, 4097):
        padded = sizes.padded_rows(rows)
        assert rows <= padded < min(max(33, 2 * rows), rows + 256)
        for count in {-(-rows // 316), min(5, rows), min(17, rows), min(128, rows)}:
            if rows <= 316 * count:
                assert (padded, sizes.entry_bucket(count)) in graphs
    few = CrowdSizes.plan(SOPRANO_1_1_80M, 1, 40)
    assert (few.prompt_rows, few.padded_rows(33)) == (40, 33)
    assert few.entry_graphs == [(32, 1)]


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 600), st.lists(st.integers(1, 300), max_size=8), st.sampled_from([64, 128, 1024]))
def test_pieces_of_a_voice_make_each_hop_once(tokens: int, cuts: list[int], most_rows: int) -> None:
    margin, given_hops, made = 8, 0, []
    for count in [*sorted({cut for cut in cuts if 1 < cut < tokens}), tokens]:
        ends = count == tokens
        pieces = list(
            voice_pieces(1 << 20, 600, count, ends=ends, given=given_hops, output=5, margin=margin, most_rows=most_rows)
        )
        output = 5
        for piece in pieces:
            assert piece.output == output
            assert 0 <= piece.first_frame < piece.end_frame <= frames_of(count)
            assert piece.rows <= most_rows
            assert piece.end_token <= count
            assert ends or piece.end_hop + margin <= frames_of(count)
            made += list(range(piece.first_hop, piece.end_hop))
            output += piece.hops
        given_hops += output - 5
    whole = list(whole_pieces(1 << 20, tokens, 0, margin, 1 << 20))
    assert made == list(range(whole[0].first_hop, whole[-1].end_hop))


# -- on the emulated machine ------------------------------------------------------------------------------------------


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


def test_watched_slots_are_news_once_they_are_there() -> None:
    rng = np.random.default_rng(0)
    count, status, stuck = rng.integers(0, 600, 700), rng.integers(0, 5, 700) * (rng.random(700) < 0.3), rng.random(700)
    token = rng.integers(0, 1 << 24, 700)
    words = [
        int(c) | int(s) << 32 | int(q < 0.2) << 39 | int(t) << 40
        for c, s, q, t in zip(count, status, stuck, token, strict=True)
    ]
    watched = array("q", [int(n) for n in rng.integers(1, 600, 700)])
    for slot in range(0, 700, 3):
        watched[slot] = (NOT_WATCHED, AT_ITS_END)[slot % 2]
    expected = [
        News(slot, slots.progress_count(word), slots.progress_status(word), slots.progress_stuck(word))
        for slot, word in enumerate(words)
        if watched[slot] != NOT_WATCHED
        and (slots.progress_status(word) != slots.RUNNING or slots.progress_count(word) >= watched[slot])
    ]
    assert 200 < len(expected) < 500
    assert watched_slots(np.array(words, np.uint64), watched) == expected
    assert watched_slots(np.array(words, np.uint64), array("q", [NOT_WATCHED]) * 700) == []
    with pytest.raises(ParameterError, match="3 slots are watched, and there are 700"):
        watched_slots(np.array(words, np.uint64), array("q", [1, 2, 3]))
