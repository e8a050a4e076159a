"""`SopranoTTS` end to end on a small random checkpoint: batches, streams, files, bad input."""

from __future__ import annotations

import dataclasses
import json
import logging
import wave
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from soprano_cupy import CheckpointError, OutputError, ParameterError, SopranoTTS, TextError, joiner
from soprano_cupy.engine import Engine, Timings
from soprano_cupy.generation import LOOP_LENGTH, Generation, Step
from soprano_cupy.pipeline import max_text_length
from soprano_cupy.runner import Take
from soprano_cupy.testing import TINY, make_checkpoint

CPU_AND_GPU = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TEXT = "Hello there, how are you this fine morning? I am quite well, thank you very much. See you soon, my old friend."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(path, seed=5)
    return path


@pytest.fixture(scope="module")
def tts(folder: Path) -> SopranoTTS:
    return SopranoTTS(folder, device="cpu")


def joined(chunks: object) -> np.ndarray:
    return np.concatenate(list(chunks))  # type: ignore[call-overload]


@pytest.mark.parametrize("device", CPU_AND_GPU)
@pytest.mark.parametrize("chunk_size", [1, 3, 1000])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_streamed_chunks_joined_are_the_offline_audio(
    folder: Path, device: str, chunk_size: int, temperature: float
) -> None:
    tts = SopranoTTS(folder, device=device, dtype="float32")
    whole = tts.infer(TEXT, temperature=temperature, seed=1)
    assert whole.dtype == np.float32
    assert whole.ndim == 1
    assert len(whole) > 0
    assert len(whole) % 2048 == 0
    chunks = list(tts.infer_stream(TEXT, chunk_size, temperature=temperature, seed=1))
    assert np.abs(joined(chunks) - whole).max() <= 1e-5
    assert max(map(len, chunks)) <= chunk_size * 2048


def test_a_batch_gives_each_text_what_it_gets_alone(tts: SopranoTTS) -> None:
    texts = [TEXT, "One.", "A second text, which is neither long nor short."]
    for text, audio in zip(texts, tts.infer_batch(texts, temperature=0.7, seed=3), strict=True):
        alone = tts.infer(text, temperature=0.7, seed=3)
        assert audio.shape == alone.shape
        assert np.abs(audio - alone).max() <= 1e-5


def test_many_sentences_are_joined_by_threads(tts: SopranoTTS, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{TEXT} {i}." for i in range(9)]
    threaded = tts.infer_batch(texts)
    monkeypatch.setattr(joiner, "FROM_SENTENCES", 1 << 30)
    for audio, one in zip(threaded, tts.infer_batch(texts), strict=True):
        assert audio.flags.owndata
        np.testing.assert_array_equal(audio, one)


def test_seeds(tts: SopranoTTS) -> None:
    first, second, other = (tts.infer("Good evening.", temperature=1.0, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert first.shape != other.shape or not np.array_equal(first, other)


def test_files(tts: SopranoTTS, tmp_path: Path) -> None:
    audio = tts.infer("One.", tmp_path / "one.wav")
    tts.infer_batch(["One.", "Two."], tmp_path / "several")
    for path in [tmp_path / "one.wav", tmp_path / "several" / "0.wav"]:
        with wave.open(str(path)) as file:
            assert (file.getframerate(), file.getnframes()) == (32000, len(audio))
    assert sorted(p.name for p in (tmp_path / "several").iterdir()) == ["0.wav", "1.wav"]


def test_timings_describe_the_last_call(tts: SopranoTTS) -> None:
    audio = tts.infer(TEXT)
    timings = tts.timings
    assert timings.samples == len(audio)
    assert timings.audio_s == len(audio) / 32000
    assert timings.tokens * 2048 >= len(audio)
    assert timings.total_s == timings.text_s + timings.language_model_s + timings.decoder_s > 0
    assert timings.real_time_factor == timings.audio_s / timings.total_s
    assert timings.first_audio_s is None
    joined(tts.infer_stream(TEXT))
    assert tts.timings.samples == len(audio)
    assert tts.timings.first_audio_s is not None


@pytest.mark.parametrize("text", ["", "   \n\t", "...", "!?", "\u200b"])
def test_nothing_to_speak(tts: SopranoTTS, text: str, tmp_path: Path) -> None:
    for call in (
        lambda: tts.infer(text, tmp_path / "a.wav"),
        lambda: tts.infer_batch([text]),
        lambda: tts.infer_stream(text),
    ):
        with pytest.raises(TextError, match="nothing to speak"):
            call()
    with pytest.raises(TextError, match=r"texts\[1\]: nothing to speak"):
        tts.infer_batch(["Hello.", text])
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments(tts: SopranoTTS) -> None:
    with pytest.raises(ParameterError, match="text must be a string, not bytes"):
        tts.infer(b"hello")  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="texts = 'hello' must be a list"):
        tts.infer_batch("hello")
    with pytest.raises(ParameterError, match="chunk_size = 0"):
        tts.infer_stream("hello", 0)
    with pytest.raises(ParameterError, match="retries = -1"):
        tts.infer("hello", retries=-1)
    with pytest.raises(ParameterError, match=r"top_p = 2"):
        tts.infer_stream("hello", top_p=2)
    assert tts.infer_batch([]) == []


def test_unwritable_output_is_refused_before_any_work(tts: SopranoTTS, tmp_path: Path) -> None:
    before = tts.timings
    with pytest.raises(OutputError, match="does not exist"):
        tts.infer("Hello.", tmp_path / "no" / "a.wav")
    with pytest.raises(OutputError, match="does not exist"):
        tts.infer_batch(["Hello."], tmp_path / "no" / "deeper")
    assert tts.timings is before


def test_arguments_of_the_pytorch_package(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "soprano_cupy.pipeline"):
        tts = SopranoTTS(
            backend="transformers", device="cpu", cache_size_mb=100, decoder_batch_size=4, model_path=str(folder)
        )
    assert tts.model.folder == folder
    assert [word in caplog.text for word in ("backend", "cache_size_mb", "decoder_batch_size")] == [True] * 3
    with pytest.raises(ParameterError, match="only one of them"):
        SopranoTTS(folder, model_path=folder)


def test_settings_from_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOPRANO_MODEL", str(folder))
    monkeypatch.setenv("SOPRANO_DEVICE", "cpu")
    assert SopranoTTS().model.folder == folder
    monkeypatch.setenv("SOPRANO_DEVICE", "toaster")
    with pytest.raises(ParameterError, match="SOPRANO_DEVICE"):
        SopranoTTS()
    assert SopranoTTS(device="cpu").device == "cpu"


def test_files_of_two_checkpoints_do_not_mix(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_checkpoint(tmp_path, seed=1)
    for path in folder.iterdir():
        if not path.name.startswith("decoder"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert not other.exists()
    assert SopranoTTS(tmp_path, device="cpu").infer("Hi.").size > 0


def test_states_and_decoder_must_fit(folder: Path, shared_dir: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        if not path.name.startswith("decoder"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "decoder.safetensors").write_bytes((shared_dir / "voice/decoder.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="belong to different checkpoints"):
        SopranoTTS(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("positions", "wanted", "expected"), [(1024, None, 300), (512, None, 256), (1024, 180, 180), (16, None, 30)]
)
def test_longest_sentence(tmp_path: Path, positions: int, wanted: int | None, expected: int) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({} if wanted is None else {"max_text_length": wanted}))
    assert max_text_length(tmp_path, dataclasses.replace(TINY, max_positions=positions)) == expected


@pytest.mark.parametrize("wanted", [0, 29, 301, "100", True, 1.5, None])
def test_longest_sentence_out_of_range(tmp_path: Path, wanted: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_text_length": wanted}))
    with pytest.raises(CheckpointError, match="max_text_length = "):
        max_text_length(tmp_path, TINY)


class Stuck:
    """A language model whose states never move until it draws at random."""

    def __init__(self, inner: object) -> None:
        self._inner, self.attempts = inner, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def extend(self, cache: object, ids: np.ndarray, cu_seqlens: np.ndarray, *, last_only: bool = False) -> np.ndarray:
        states = self._inner.extend(cache, ids, cu_seqlens, last_only=last_only)  # type: ignore[attr-defined]
        self.attempts += len(ids) > len(cu_seqlens) - 1
        return states * 1e-6 if self.attempts == 1 else states * 1e4

    def logits(self, states: np.ndarray) -> np.ndarray:
        logits: np.ndarray = self._inner.logits(states)  # type: ignore[attr-defined]
        logits[:, self._inner.config.eos_token_id] = -1e9  # type: ignore[attr-defined]
        return logits


def test_loop_check_and_retries_in_every_mode(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tts = SopranoTTS(folder, device="cpu")
    inner = tts.engine.language_model
    lengths = []
    for call in (
        lambda: tts.infer("Hello.", retries=2, seed=4),
        lambda: tts.infer_batch(["Hello."], retries=2, seed=4)[0],
        lambda: joined(tts.infer_stream("Hello.", retries=2, seed=4)),
    ):
        tts.engine.language_model = Stuck(inner)  # type: ignore[assignment]
        caplog.clear()
        lengths.append(len(call()))
        assert "trying again with another seed" in caplog.text
        assert tts.engine.language_model.attempts == 2  # type: ignore[attr-defined]
    assert len(set(lengths)) == 1
    tts.engine.language_model = Stuck(inner)  # type: ignore[assignment]
    caplog.clear()
    assert len(joined(tts.infer_stream("Hello."))) > LOOP_LENGTH * 2048
    assert "got stuck" in caplog.text


def test_a_stream_that_is_closed_closes_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not when the stream itself is forgotten: what it holds of a GPU is free then."""
    closed: list[str] = []

    def pieces(*_: object) -> Iterator[np.ndarray]:
        try:
            while True:
                yield np.zeros(4096, np.float32)
        finally:
            closed.append("pieces")

    tts = object.__new__(SopranoTTS)
    tts.engine = SimpleNamespace(stream=pieces)  # type: ignore[assignment]
    stream = tts._stream([object(), object()], 2048, 0, Timings(), 0.0)  # type: ignore[list-item]
    assert len(next(stream)) == 2048
    stream.close()  # type: ignore[attr-defined]
    assert closed == ["pieces"]


def test_an_engine_s_stream_that_is_closed_closes_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    def rounds(*_: object) -> Iterator[list[Step]]:
        try:
            while True:
                yield [Step(0, 5, np.zeros(4, np.float32), None, False)]
        finally:
            closed.append("rounds")

    monkeypatch.setattr("soprano_cupy.engine.begin", rounds)
    voice = SimpleNamespace(push=lambda states: np.zeros(2048, np.float32))
    engine = Engine(object(), SimpleNamespace(stream=lambda: voice))  # type: ignore[arg-type]
    stream = engine.stream(object(), 0, Timings())  # type: ignore[arg-type]
    assert len(next(stream)) == 2048
    stream.close()
    assert closed == ["rounds"]


def test_sentences_without_sound_keep_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """One state and none make no samples, at the ends and between others; two at a time come from the decoder."""
    states = [0, 3, 1, 0, 4, 2, 5, 1]
    results = [
        Generation(np.zeros(n + 1, np.int32), np.full((n, 1), i, np.float32), "stop") for i, n in enumerate(states)
    ]
    monkeypatch.setattr("soprano_cupy.engine.generate", lambda model, requests, retries: results)

    def decode_in_turn(heard: list[np.ndarray], take: Take) -> None:
        audio = [np.repeat(one[0], len(one) - 1) for one in heard]
        for start in range(0, len(audio), 2):
            take(audio[start : start + 2])

    engine = Engine(SimpleNamespace(batch=8), SimpleNamespace(decode_in_turn=decode_in_turn))  # type: ignore[arg-type]
    taken: list[np.ndarray] = []
    engine.speak([object()] * len(states), 0, timings := Timings(), taken.extend)  # type: ignore[list-item]
    assert [one.tolist() for one in taken] == [[], [1, 1], [], [], [4, 4, 4], [5], [6, 6, 6, 6], []]
    assert timings.samples == 10
