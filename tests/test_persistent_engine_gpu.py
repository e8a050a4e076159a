"""The persistent kernel behind the public interface: the graph path's tokens, streams, faults, threads, repeats."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from speaking import check_threads

from soprano_cupy import DeviceError, Qwen3, SopranoTTS
from soprano_cupy.device import to_host
from soprano_cupy.generation import Generation
from soprano_cupy.gpu import persistent_run, qwen3, step
from soprano_cupy.gpu.persistent import UNLIMITED
from soprano_cupy.sampling import penalise
from soprano_cupy.testing import SOPRANO_1_1_80M, make_checkpoint

pytestmark = pytest.mark.gpu

TEXT = "Hello there, how are you this fine morning, and what is new with you?"  # one sentence: one voice
SAMPLINGS: dict[str, dict[str, Any]] = {"greedy": {}, "drawn": {"temperature": 0.7, "seed": 3}}
STATE_ERROR = 0.1  # of the states' size: bfloat16 products that are added up in another order


def load(folder: Path, monkeypatch: pytest.MonkeyPatch, setting: str) -> Qwen3:
    monkeypatch.setenv("SOPRANO_PERSISTENT", setting)
    model = Qwen3.load(folder, "cuda", "bfloat16")
    if setting == "1":
        problem = model.runner.persistent.problem(1, drawn=False)
        if problem is not None:
            pytest.skip(f"the persistent kernel does not run here: {problem}")
    return model


def voice(folder: Path, monkeypatch: pytest.MonkeyPatch, setting: str) -> SopranoTTS:
    load(folder, monkeypatch, setting)  # skips
    return SopranoTTS(folder, device="cuda", dtype="bfloat16")


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but nobody stops before the limit of tokens."""
    config = replace(SOPRANO_1_1_80M, num_layers=4)
    return make_checkpoint(tmp_path_factory.mktemp("persistent") / "endless", config=config, seed=1, mean_tokens=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An 80M model with few layers, whose sentences end."""
    config = replace(SOPRANO_1_1_80M, num_layers=4)
    return make_checkpoint(tmp_path_factory.mktemp("persistent") / "voice", config=config, seed=1, mean_tokens=60)


def named(folder: Path, shared: Path, name: str) -> Path:
    return folder if name == "random" else shared / name


def runs(model: Any) -> list[int]:
    """A list that gets the number of voices of each launch of the persistent kernel from now on."""
    decoder, counts = model.runner.persistent.decoder, []
    launch = decoder.launch

    def counted(stream: int, places: Any, common: Any) -> None:
        counts.append(len(places))
        launch(stream, places, common)

    decoder.launch = counted
    return counts


def first_difference(one: np.ndarray, other: np.ndarray) -> int:
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length


def check_same(model: Qwen3, ids: np.ndarray, got: Generation, expected: Generation, sampling: dict[str, Any]) -> None:
    """Equal, or first different where the two scores are closer than the difference between the two paths' logits."""
    same = first_difference(got.tokens, expected.tokens)
    kept = min(same + 1, len(got.states), len(expected.states))
    states, reference = to_host(got.states)[:kept], to_host(expected.states)[:kept]
    assert np.abs(states - reference).max() <= STATE_ERROR * np.sqrt((reference**2).mean())
    if same == len(got.tokens) == len(expected.tokens):
        assert (got.finish_reason, got.stuck) == (expected.finish_reason, expected.stuck)
        return
    if sampling:  # a draw turns over where the random number lies between the two sums
        return
    logits = to_host(model.runner.logits(np.stack([states[same], reference[same]]))).astype(np.float64)
    seen = np.zeros((1, logits.shape[1]), bool)
    seen[0, [*ids, *expected.tokens[:same]]] = True
    best = np.sort(penalise(logits[1:], seen, np.array([[1.2]]))[0])[-2:]
    assert best[1] - best[0] <= 4 * np.abs(logits[0] - logits[1]).max()


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("name", ["golden/mqa", "voice", "random"])
def test_generate_as_the_graph_path(
    folder: Path, shared_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str, sampling: dict[str, Any]
) -> None:
    path = named(folder, shared_dir, name)
    model, graphs = load(path, monkeypatch, "1"), load(path, monkeypatch, "0")
    counts = runs(model)
    prompts = [np.random.default_rng(n).integers(4, model.config.vocab_size, n).astype(np.int32) for n in (1, 7, 60)]
    if name != "random":
        expected = np.load(path / "expected.npz")
        prompts = [expected[f"ids{i}"].astype(np.int32) for i in range(3)]
    for ids in prompts:
        got, reference = (m.generate(ids, max_new_tokens=150, **sampling) for m in (model, graphs))
        check_same(graphs, ids, got, reference, sampling)
    assert counts
    assert set(counts) == {1}


def test_few_voices_as_the_graph_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, graphs = load(folder, monkeypatch, "1"), load(folder, monkeypatch, "0")
    prompts = [
        np.random.default_rng(n).integers(4, model.config.vocab_size, 5 + 9 * n).astype(np.int32) for n in range(4)
    ]
    for count in (2, 3, 4):
        if model.runner.persistent.problem(count, drawn=False) is not None:
            continue
        counts = runs(model)
        got, expected = (m.generate(prompts[:count], max_new_tokens=40) for m in (model, graphs))
        for ids, one, other in zip(prompts, got, expected, strict=False):
            check_same(graphs, ids, one, other, {})
        assert counts == [count]


def test_limits_and_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tokens as are asked for, around the ends of launches; and no more positions than there are."""
    model = load(folder, monkeypatch, "1")
    ids = np.arange(4, 34, dtype=np.int32)
    whole = model.generate(ids, max_new_tokens=200)
    for limit in (1, 2, persistent_run.ALONE, persistent_run.ALONE + 1, persistent_run.ALONE + 2):
        out = model.generate(ids, max_new_tokens=limit)
        np.testing.assert_array_equal(out.tokens, whole.tokens[:limit])
        assert bool((out.states == whole.states[: len(out.states)]).all())
    most = model.config.max_positions
    long = np.random.default_rng(5).integers(4, model.config.vocab_size, most - 3).astype(np.int32)
    out = model.generate(long, max_new_tokens=50)
    assert len(out.tokens) <= 4


@pytest.mark.parametrize("setting", ["0", "1"])
def test_prompts_by_graphs(folder: Path, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    """A prompt's first time is by single launches, the next by a graph with further rows: the same bits."""
    model = load(folder, monkeypatch, "1")
    model.runner.persistent.use(setting)
    rng = np.random.default_rng(2)
    for length in (1, 15, 16, 17, 40, 63, 64, 65, 100, 200, 256, 257):
        ids = rng.integers(4, model.config.vocab_size, length).astype(np.int32)
        first, *others = (model.generate(ids, max_new_tokens=3) for _ in range(3))
        for other in others:
            np.testing.assert_array_equal(other.tokens, first.tokens)
            assert bool((other.states == first.states).all()), f"{length} tokens"
    graphs = model.runner._idle[-1]._prompt_graphs
    assert sorted(graphs) == [16, 32, 48, 64, 80, 112, 208, 256]
    assert all(graphs.values())


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_a_thousand_runs_are_identical(folder: Path, monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any]) -> None:
    model = load(folder, monkeypatch, "1")
    ids = np.arange(4, 24, dtype=np.int32)
    first = model.generate(ids, max_new_tokens=6, **sampling)
    for _ in range(1000):
        again = model.generate(ids, max_new_tokens=6, **sampling)
        assert again.tokens.tobytes() == first.tokens.tobytes()
        assert bool((again.states == first.states).all())


@pytest.mark.parametrize("name", ["voice", "random"])
def test_streams_say_what_infer_says(
    folder: Path, shared_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tts = voice(named(folder, shared_dir, name), monkeypatch, "1")
    for sampling in SAMPLINGS.values():
        whole = tts.infer(TEXT, **sampling)
        pieces = np.concatenate(list(tts.infer_stream(TEXT, **sampling)))
        assert len(pieces) == len(whole)
        assert np.abs(pieces - whole).max() <= 1e-2 * np.abs(whole).max()


def test_audio_comes_while_the_kernel_runs(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tts = voice(endless, monkeypatch, "1")
    monkeypatch.setattr(persistent_run, "ALONE", UNLIMITED)
    tokens: list[int] = []
    from soprano_cupy.gpu import rounds

    step_of = rounds.GpuRounds._step

    def noted(self: Any, batch: Any, slot: int, count: int) -> Any:
        found = step_of(self, batch, slot, count)
        tokens.append(int(batch.progress[0]) & 0xFFFFFFFF)
        return found

    monkeypatch.setattr(rounds.GpuRounds, "_step", noted)
    for _ in range(2):  # the first call builds what it needs
        tokens.clear()
        stream = tts.infer_stream(TEXT)
        next(stream)
        first = tokens[-1]
        rest = list(stream)
    assert len(rest) > 200
    assert first < len(tokens) / 2  # published while more were to come


def test_a_stream_that_is_closed_ends_the_launch(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tts = voice(endless, monkeypatch, "1")
    monkeypatch.setattr(persistent_run, "ALONE", UNLIMITED)
    whole = list(tts.infer_stream(TEXT))
    model = tts.engine.language_model
    cancel, told = persistent_run.ControlWords.cancel, 0

    def count_behind(words: persistent_run.ControlWords) -> None:
        """Tokens that are told right behind the word: however slow the host is, few can follow."""
        nonlocal told
        cancel(words)
        told = max(int(step.progress_count(int(batch.progress[0]))) for batch in qwen3._borrowed)

    monkeypatch.setattr(persistent_run.ControlWords, "cancel", count_behind)
    for _ in range(20):
        stream = tts.infer_stream(TEXT)
        np.testing.assert_array_equal(next(stream), whole[0])
        stream.close()  # type: ignore[attr-defined]
        made = max(int(step.progress_count(int(batch.progress[0]))) for batch in model._idle)
        assert 0 < told <= made <= told + 8
        assert model.persistent.users == 0
    for piece, expected in zip(tts.infer_stream(TEXT), whole, strict=True):
        np.testing.assert_array_equal(piece, expected)


def test_a_stream_that_is_lost_in_a_cycle(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector closes it, when everything else of the cycle may have been finalized."""
    for setting in ("1", "0"):
        tts = voice(endless, monkeypatch, "1")
        tts.engine.language_model.persistent.use(setting)
        for _ in range(3):
            stream = tts.infer_stream(TEXT)
            next(stream)
            lost: dict[str, Any] = {"stream": stream, "tts": tts}
            lost["lost"] = lost
        del stream, lost, tts
        gc.collect()


def stalling(model: Any, at: int) -> None:
    """The next launch stalls at its so-manieth token."""
    decoder = model.persistent.decoder
    launch = decoder.launch

    def stalled(stream: int, places: Any, common: Any) -> None:
        decoder.launch = launch
        launch(stream, places, replace(common, stall_at=at))

    decoder.launch = stalled


@pytest.mark.parametrize("at", [1, 9])
@pytest.mark.parametrize("count", [1, 3])
def test_a_stall_is_answered_by_graphs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, count: int, at: int
) -> None:
    model, graphs = load(folder, monkeypatch, "1"), load(folder, monkeypatch, "0")
    if model.runner.persistent.problem(count, drawn=False) is not None:
        pytest.skip(f"the kernel does not serve {count} voices here")
    prompts = [
        np.random.default_rng(n).integers(4, model.config.vocab_size, 5 + 9 * n).astype(np.int32) for n in range(count)
    ]
    expected = graphs.generate(prompts, max_new_tokens=30)
    stalling(model.runner, at)
    with caplog.at_level(logging.WARNING, "soprano_cupy"):
        got = model.generate(prompts, max_new_tokens=30)
        again = model.generate(prompts, max_new_tokens=30)
    lines = [record.message for record in caplog.records if "persistent" in record.message]
    assert len(lines) == 1, lines
    assert "waited too long for" in lines[0]
    for ids, one, other, reference in zip(prompts, got, again, expected, strict=True):
        check_same(graphs, ids, one, reference, {})
        np.testing.assert_array_equal(other.tokens, reference.tokens)
        assert bool((other.states == reference.states).all())  # graphs from the start


def test_a_stream_goes_on_after_a_stall(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tts = voice(endless, monkeypatch, "1")
    whole = np.concatenate(list(tts.infer_stream(TEXT)))
    stalling(tts.engine.language_model, 12)
    pieces = np.concatenate(list(tts.infer_stream(TEXT)))
    assert tts.engine.language_model.persistent.failure is not None
    np.testing.assert_array_equal(pieces[: 2048 * 6], whole[: 2048 * 6])  # before the stall
    assert len(pieces) == len(whole)


def test_a_launch_that_fails_is_answered_by_graphs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, graphs = load(folder, monkeypatch, "1"), load(folder, monkeypatch, "0")
    ids = np.arange(4, 34, dtype=np.int32)

    def refuse(*_: Any) -> None:
        raise DeviceError("too many resources requested")

    model.runner.persistent.decoder.launch = refuse
    got, expected = (m.generate(ids, max_new_tokens=40) for m in (model, graphs))
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    assert model.runner.persistent.failure == "too many resources requested"


def test_numbers_that_are_not_finite(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph path's error, and the kernel stays in use."""
    model = load(folder, monkeypatch, "1")
    ids = np.arange(4, 34, dtype=np.int32)
    expected = model.generate(ids, max_new_tokens=10)
    weights = model.runner.persistent.decoder._packed(model.runner.persistent.decoder._grid(1))
    kept = weights.gains.copy()
    weights.gains[:] = np.nan
    with pytest.raises(DeviceError, match="not finite"):
        model.generate(ids, max_new_tokens=10)
    weights.gains[:] = kept
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=10).tokens, expected.tokens)
    assert model.runner.persistent.failure is None


def test_threads_take_turns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tts = voice(folder, monkeypatch, "1")
    check_threads(tts, TEXT, temperature=0.7, seed=1)


def test_a_stuck_voice_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SOPRANO_1_1_80M, num_layers=2)
    path = make_checkpoint(tmp_path / "stuck", config=config, seed=1, mean_tokens=None, stuck=True)
    model, graphs = load(path, monkeypatch, "1"), load(path, monkeypatch, "0")
    ids = np.arange(4, 34, dtype=np.int32)
    got, expected = (m.generate(ids, max_new_tokens=60) for m in (model, graphs))
    assert got.stuck
    assert expected.stuck
    from soprano_cupy.generation import Request, begin
    from soprano_cupy.sampling import SamplingParams

    request = Request(ids, SamplingParams(max_new_tokens=200))
    one, other = (begin(m.runner, [request], give_up=True).results()[0] for m in (model, graphs))
    assert len(one.tokens) == len(other.tokens) < 60
    assert one.stuck


def test_beside_the_decoder_and_a_crowd(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's blocks come beside everything else that runs on the GPU: nothing waits for ever."""
    tts = voice(folder, monkeypatch, "1")
    expected = tts.infer(TEXT)
    speeches = [tts.submit(f"{TEXT} {i}") for i in range(40)]
    begun = time.perf_counter()
    for _ in range(20):
        np.testing.assert_array_equal(tts.infer(TEXT), expected)
    for speech in speeches:
        assert len(speech.result(60)) > 0
    assert time.perf_counter() - begun < 60  # a limit that only a hang would reach
    assert tts.engine.language_model.persistent.failure is None
    tts.close()


@pytest.fixture(autouse=True)
def within_time() -> Iterator[None]:
    """Models of one test do not wait for the next one's."""
    yield
    import cupy

    cupy.cuda.Device().synchronize()
