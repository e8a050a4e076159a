"""`soprano-cupy generate`: where text comes from, where sound goes, and what is said about it."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import wave
from pathlib import Path

import command_line
import numpy as np
import pytest
from command_line import run

from soprano_cupy import SopranoTTS
from soprano_cupy.audio import to_pcm16, wav_bytes
from soprano_cupy.cli import generate
from soprano_cupy.cli.progress import bar
from soprano_cupy.engine import Timings
from soprano_cupy.testing import make_checkpoint

TEXT = "Hello there, how are you this fine morning? I am quite well, thank you very much."


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("voice"), seed=5)


@pytest.fixture(scope="module")
def tts(voice: Path) -> SopranoTTS:
    return SopranoTTS(voice, device="cpu")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, voice: Path) -> None:
    for name in ("SOPRANO_ATTENTION", "SOPRANO_DTYPE", "SOPRANO_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in command_line.quiet_environment(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SOPRANO_MODEL", str(voice))


def pcm(data: bytes) -> np.ndarray:
    with wave.open(io.BytesIO(data)) as file:
        assert file.getparams()[:3] == (1, 2, 32000)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


def assert_same_sound(actual: np.ndarray, expected: np.ndarray) -> None:
    """16-bit samples of the same sound, computed in another order: 1e-5 may round to the next integer."""
    assert actual.shape == expected.shape
    assert np.abs(actual.astype(int) - expected.astype(int)).max() <= 1


def test_text_from_argument_file_and_stdin_gives_the_same_file(tts: SopranoTTS, tmp_path: Path) -> None:
    expected = wav_bytes(tts.infer(TEXT))
    file = tmp_path / "text.txt"
    file.write_text(TEXT + "\n", encoding="utf-8-sig")
    out = tmp_path / "out.wav"
    for arguments, stdin in (
        (("-t", TEXT), b""),
        (("-f", file), b""),
        ((), TEXT.encode()),
        (("-f", "-"), TEXT.encode()),
    ):
        result = run("generate", *arguments, "-o", out, stdin=stdin)
        assert (result.code, result.out, result.err) == (0, b"", "")
        assert out.read_bytes() == expected
        out.unlink()
    assert list(tmp_path.glob(".*")) == []


def test_wav_on_stdout(tts: SopranoTTS) -> None:
    result = run("generate", "-t", TEXT, "-o", "-")
    assert result.code == 0
    assert result.out == wav_bytes(tts.infer(TEXT))


def test_raw_samples_on_stdout(tts: SopranoTTS) -> None:
    samples = tts.infer(TEXT)
    integers = np.frombuffer(run("generate", "-t", TEXT, "--stream", "-o", "-").out, "<i2")
    assert_same_sound(integers, to_pcm16(samples))
    floats = np.frombuffer(run("generate", "-t", TEXT, "--stream", "--float", "-o", "-").out, "<f4")
    np.testing.assert_allclose(floats, samples, rtol=0, atol=1e-5)


def test_a_streamed_file_is_the_whole_file(tts: SopranoTTS, tmp_path: Path) -> None:
    assert run("generate", "-t", TEXT, "--stream", "-o", tmp_path / "a.wav").code == 0
    assert_same_sound(pcm((tmp_path / "a.wav").read_bytes()), to_pcm16(tts.infer(TEXT)))


def test_samples_are_flushed_as_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk is out before the next is made: the reader of a pipe never waits for a buffer to fill."""
    events: list[str] = []
    original = SopranoTTS.infer_stream

    def infer_stream(self: SopranoTTS, text: str, **options: object) -> object:
        for chunk in original(self, text, **options):  # type: ignore[arg-type]
            events.append("made")
            yield chunk

    class Pipe(io.BytesIO):
        def write(self, data: object) -> int:
            events.extend(["sent"] * bool(data))
            return super().write(data)  # type: ignore[arg-type]

    monkeypatch.setattr(SopranoTTS, "infer_stream", infer_stream)
    monkeypatch.setattr(command_line.io, "BytesIO", Pipe)
    assert run("generate", "-t", "Hello there.", "--stream", "-o", "-").code == 0
    assert len(events) > 4
    assert events == ["made", "sent"] * (len(events) // 2)


def test_float_file(tts: SopranoTTS, tmp_path: Path) -> None:
    out = tmp_path / "out.wav"
    assert run("generate", "-t", TEXT, "--float", "-o", out).code == 0
    samples = tts.infer(TEXT)
    data = out.read_bytes()
    assert struct.unpack_from("<H", data, 20) == (3,)
    np.testing.assert_array_equal(np.frombuffer(data[-4 * len(samples) :], "<f4"), samples)


def test_a_folder_gets_one_file(tmp_path: Path, tts: SopranoTTS) -> None:
    """An existing folder, or one to be made: both by name."""
    (tmp_path / "there").mkdir()
    for name in ("there", "new/"):
        assert run("generate", "-t", TEXT, "-o", f"{tmp_path}/{name}").code == 0
        assert [path.name for path in (tmp_path / name).iterdir()] == ["0.wav"]
        assert (tmp_path / name / "0.wav").read_bytes() == wav_bytes(tts.infer(TEXT))


def test_lines(tmp_path: Path, tts: SopranoTTS, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file a line, blank lines skipped, the same whether spoken in one group or several."""
    lines = ["First.", "The second one.", "And a third."]
    file = tmp_path / "lines.txt"
    file.write_bytes("\r\n".join([lines[0], "", "   ", lines[1], lines[2], ""]).encode())
    for folder, group in (("one", 64), ("several", 2)):
        monkeypatch.setattr("soprano_cupy.cli.generate.LINES_AT_ONCE", group)
        result = run("generate", "-f", file, "--lines", "-o", tmp_path / folder, "-v")
        assert result.code == 0
        assert "(3 files)" in result.err
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == ["0.wav", "1.wav", "2.wav"]
        for index, line in enumerate(lines):
            samples = pcm((tmp_path / folder / f"{index}.wav").read_bytes())
            assert_same_sound(samples, to_pcm16(tts.infer(line)))


def test_an_existing_file_is_replaced_and_a_link_kept(tmp_path: Path, tts: SopranoTTS) -> None:
    target, link = tmp_path / "target.wav", tmp_path / "link.wav"
    target.write_bytes(b"old")
    link.symlink_to(target)
    assert run("generate", "-t", TEXT, "-o", link).code == 0
    assert link.is_symlink()
    assert target.read_bytes() == wav_bytes(tts.infer(TEXT))


def test_sampling_flags_reach_the_voice(tmp_path: Path, tts: SopranoTTS) -> None:
    out = tmp_path / "out.wav"
    flags = ("--temperature", 0.8, "--top-p", 0.9, "--repetition-penalty", 1.1, "--retries", 1, "--seed", 11)
    assert run("generate", "-t", TEXT, "-o", out, *flags).code == 0
    expected = tts.infer(TEXT, temperature=0.8, top_p=0.9, repetition_penalty=1.1, retries=1, seed=11)
    assert out.read_bytes() == wav_bytes(expected)
    assert not np.array_equal(expected, tts.infer(TEXT))


def test_verbose_tells_what_is_used_and_why(tmp_path: Path, voice: Path) -> None:
    result = run("generate", "-t", TEXT, "-o", tmp_path / "out.wav", "-v", "--stream")
    assert result.code == 0
    lines = dict(line.split(None, 1) for line in result.err.splitlines())
    assert lines["voice"].startswith(f"{voice}: named by SOPRANO_MODEL")
    assert lines["device"] == "cpu: asked for"
    assert lines["attention"].startswith("flash, weights bfloat16: compiled engine, by default")
    assert lines["text"].endswith(" ms")
    assert "tokens/s" in lines["language"]
    assert lines["first"].startswith("sound after ")
    assert lines["sound"].endswith(" times real time")
    assert lines["written"] == str(tmp_path / "out.wav")


def test_one_line_names_the_voice_that_nobody_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SOPRANO_MODEL")
    result = run("generate", "-t", "Hello.", "-o", tmp_path / "a.wav")
    assert result.code == 0
    assert result.only_line.startswith("voice mini: ")
    assert "soprano-cupy download ekwek/Soprano-1.1-80M" in result.only_line
    assert len(pcm((tmp_path / "a.wav").read_bytes())) > 16000
    assert run("generate", "-m", "mini", "-t", "Hello.", "-o", tmp_path / "b.wav").err == ""
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_a_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, voice: Path) -> None:
    """Also when the flag says auto; and the environment is as before afterwards."""
    wrong = {"SOPRANO_MODEL": "no-such-folder", "SOPRANO_ATTENTION": "flash", "SOPRANO_DTYPE": "float16"}
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    flags = ("-m", voice, "--attention", "standard", "--dtype", "auto", "-d", "cpu")
    assert run("generate", "-t", "Hello.", "-o", tmp_path / "a.wav", *flags).code == 0
    assert run("generate", "-t", "Hello.", "-o", tmp_path / "a.wav").code == 1
    assert command_line.os.environ["SOPRANO_DTYPE"] == "float16"


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    """Once, and only where the rest is spoken; tests/test_cli_bad_input.py has texts with nothing to speak."""
    result = run("generate", "-t", "Hello \N{SNOWMAN}\N{COMBINING TILDE} there.", "-o", tmp_path / "a.wav")
    assert result.code == 0
    assert result.only_line.startswith("warning: U+2603 (SNOWMAN) cannot be spoken")


@pytest.mark.parametrize("stream", [False, True])
def test_progress_on_a_terminal_only(stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soprano_cupy.cli.progress.REDRAW_SECONDS", 0.001)
    monkeypatch.setenv("TERM", "xterm")
    arguments = ("generate", "-t", TEXT, "-o", tmp_path / "a.wav", *(["--stream"] * stream))
    result = run(*arguments, terminals=("stderr",))
    assert result.code == 0
    assert "speaking, " in result.err or " s of sound" in result.err
    assert result.err.endswith("\r\x1b[K")  # taken away again
    assert run(*arguments).err == ""
    monkeypatch.setenv("TERM", "dumb")
    assert run(*arguments, terminals=("stderr",)).err == ""


class FakeSpeakers:
    """What playback.py uses of sounddevice."""

    class PortAudioError(Exception):
        pass

    def __init__(self, broken: bool = False) -> None:
        self.events: list[str] = []
        self.heard: list[np.ndarray] = []
        self.broken = broken

    def OutputStream(self, **options: object) -> FakeSpeakers:  # noqa: N802
        assert options["samplerate"] == 32000
        assert options["channels"] == 1
        if self.broken:
            raise self.PortAudioError("no default output device")
        return self

    def write(self, samples: np.ndarray) -> None:
        self.heard.append(samples[:, 0])

    def __getattr__(self, name: str) -> object:
        return lambda: self.events.append(name)


@pytest.mark.parametrize("stream", [False, True])
def test_play(stream: bool, monkeypatch: pytest.MonkeyPatch, tts: SopranoTTS, tmp_path: Path) -> None:
    speakers = FakeSpeakers()
    monkeypatch.setitem(sys.modules, "sounddevice", speakers)
    result = run("generate", "-t", TEXT, "--play", "-o", tmp_path / "a.wav", *(["--stream"] * stream))
    assert result.code == 0
    np.testing.assert_allclose(np.concatenate(speakers.heard), tts.infer(TEXT), rtol=0, atol=1e-5)
    assert (len(speakers.heard) > 1) == stream
    assert speakers.events == ["start", "stop", "close"]
    assert (tmp_path / "a.wav").exists()


def test_play_without_speakers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    result = run("generate", "-t", TEXT, "--play")
    assert result.code == 1
    assert "pip install 'soprano-cupy[play]'" in result.only_line
    monkeypatch.setitem(sys.modules, "sounddevice", FakeSpeakers(broken=True))
    result = run("generate", "-t", TEXT, "--play")
    assert result.code == 1
    assert "no default output device" in result.only_line


def test_playing_ends_at_once_when_something_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    speakers = FakeSpeakers()
    monkeypatch.setitem(sys.modules, "sounddevice", speakers)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SopranoTTS, "infer", interrupted)
    result = run("generate", "-t", TEXT, "--play")
    assert (result.code, result.err) == (130, "")
    assert speakers.events == ["start", "abort", "close"]


def test_installed_command_and_module_are_the_same(tmp_path: Path, voice: Path) -> None:
    result = command_line.process("generate", "-t", "Hello.", "-o", tmp_path / "a.wav", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    assert run("generate", "-t", "Hello.", "-o", tmp_path / "b.wav").code == 0
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_help_and_version_import_nothing_heavy() -> None:
    probe = (
        "import json, sys; from soprano_cupy.cli import main; code = main(sys.argv[1:]); "
        "print(json.dumps([code, sorted(sys.modules)]))"
    )
    for arguments in (["--help"], ["--version"], ["generate", "--help"], ["serve", "--help"]):
        result = subprocess.run(
            [sys.executable, "-c", probe, *arguments], capture_output=True, check=True, env=command_line.environment()
        )
        code, modules = json.loads(result.stdout.splitlines()[-1])
        assert code == 0
        heavy = {"numpy", "cupy", "tokenizers", "safetensors", "huggingface_hub", "http.server", "anyascii"}
        assert heavy.isdisjoint(modules)


def test_without_a_command() -> None:
    result = run()
    assert result.code == 2
    assert "COMMAND" in result.err


def test_what_the_progress_line_says(tts: SopranoTTS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    tts.timings = Timings()
    meter = generate._Meter(tts, expected_s=20.0)
    assert meter.state()[0] is None
    tts.timings.samples = 5 * 32000
    assert meter.state() == (0.25, "5 of about 20 s of sound")
    assert bar(*meter.state()) == "[######..................] 5 of about 20 s of sound"
    meter.made_s = 30.0
    assert meter.state() == (0.99, "30 of about 20 s of sound")
    monkeypatch.setenv("COLUMNS", "10")
    assert bar(0.5, "text") == "[########"
    assert bar(None, "text") == "text"
