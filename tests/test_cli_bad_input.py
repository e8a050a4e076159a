"""Bad input to the command line: the right exit code, one line that helps, nothing half-written."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import command_line
import pytest
from command_line import Outcome, run

from soprano_cupy import SopranoTTS, audio, device
from soprano_cupy.cli import sources
from soprano_cupy.testing import make_checkpoint

LONG_TEXT = "The little boat sailed slowly across the quiet lake. " * 200


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("voice"), seed=5)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, voice: Path) -> None:
    for name, value in command_line.quiet_environment(tmp_path_factory.mktemp("cache")).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SOPRANO_MODEL", str(voice))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in; `refused` holds that it stays empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(place: Path, code: int, *arguments: object, stdin: bytes = b"") -> str:
    """The one line of a command that fails and leaves nothing behind."""
    before = sorted(place.rglob("*"))
    result = run(*arguments, stdin=stdin)
    assert (result.code, result.out) == (code, b"")
    assert result.only_line.startswith("soprano-cupy: ")
    assert sorted(place.rglob("*")) == before
    return result.only_line


@pytest.mark.parametrize("text", ["", " \t\n", "!!!", "...", "\N{GRINNING FACE}", "\0\0"])
def test_nothing_to_speak(place: Path, text: str) -> None:
    for arguments, stdin in ((("-t", text), b""), ((), text.encode())):
        line = refused(place, 1, "generate", *arguments, "-o", "a.wav", stdin=stdin)
        assert "give at least one word or number" in line


def test_text_files_that_cannot_be_read(place: Path) -> None:
    (place / "latin.txt").write_bytes("First line.\nOne caf\xe9.".encode("latin-1"))
    (place / "wide.txt").write_bytes("Hello.".encode("utf-16"))
    (place / "empty.txt").write_bytes(b"")
    (place / "folder").mkdir()
    for name, expected in (
        ("missing.txt", "there is no file missing.txt"),
        ("folder", "folder is a folder"),
        ("latin.txt", "latin.txt is not valid UTF-8 (line 2, byte 19)"),
        ("wide.txt", "wide.txt is UTF-16, not UTF-8"),
        ("empty.txt", "empty.txt is empty"),
        ("x" * 300, "File name too long"),
        ("latin.txt/below.txt", "Not a directory"),
    ):
        assert expected in refused(place, 1, "generate", "-f", name, "-o", "a.wav")
    assert "-f is empty" in refused(place, 2, "generate", "-f", "", "-o", "a.wav")


def test_text_that_is_not_unicode(place: Path) -> None:
    assert "standard input is not valid UTF-8" in refused(place, 1, "generate", "-o", "a.wav", stdin=b"caf\xe9")
    assert "-t is not valid UTF-8" in refused(place, 1, "generate", "-t", "caf\udce9", "-o", "a.wav")


def test_endless_text(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_TEXT_BYTES", 1 << 20)
    assert "more than 1 MB" in refused(place, 1, "generate", "-f", "/dev/zero", "-o", "a.wav")


def test_an_unreadable_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "Permission denied" in refused(place, 1, "generate", "-f", "secret.txt", "-o", "a.wav")


def test_lines(place: Path) -> None:
    (place / "lines.txt").write_text("First.\n\n!!!\nLast.\n")
    (place / "blank.txt").write_text("\n  \n")
    line = refused(place, 1, "generate", "--lines", "-f", "lines.txt", "-o", "out")
    assert "line 3 of lines.txt holds nothing that can be spoken" in line
    assert "blank.txt is empty" in refused(place, 1, "generate", "--lines", "-f", "blank.txt", "-o", "out")
    assert "must be a folder" in refused(place, 2, "generate", "--lines", "-f", "lines.txt", "-o", "out.wav")
    assert "is a file" in refused(place, 1, "generate", "--lines", "-t", "First.", "-o", "lines.txt")
    for flags in (("-o", "-"), ("-o", "out", "--stream"), ("--play",)):
        assert "--lines writes one file a line" in refused(place, 2, "generate", "--lines", "-t", "First.", *flags)


def test_wrong_usage(place: Path) -> None:
    assert "-o FILE.wav" in refused(place, 2, "generate", "-t", "Hello.")
    assert "-o is empty" in refused(place, 2, "generate", "-t", "Hello.", "-o", "")
    result = run("generate", "-o", "a.wav", terminals=("stdin",))
    assert (result.code, list(place.iterdir())) == (2, [])
    assert "give a text" in result.only_line
    for arguments in (
        ("-t", "Hello.", "-f", "x", "-o", "a.wav"),
        ("-t", "Hello.", "-o", "a.wav", "--temp", "1"),
        ("-t", "Hello.", "-o", "a.wav", "--temperature", "hot"),
        ("-t", "Hello.", "-o", "a.wav", "--attention", "fast"),
        ("-t", "Hello.", "-o", "a.wav", "--dtype", "float8"),
        ("-t", "Hello.", "-o", "a.wav", "stray"),
        ("-t",),
    ):
        result = run("generate", *arguments)
        assert (result.code, result.out) == (2, b"")
        assert result.err.startswith("usage: ")
    assert run("speak").code == 2
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "value", "name"),
    [
        ("--temperature", "-0.1", "temperature"),
        ("--temperature", "nan", "temperature"),
        ("--temperature", "inf", "temperature"),
        ("--top-p", "0", "top_p"),
        ("--top-p", "1.01", "top_p"),
        ("--repetition-penalty", "0", "repetition_penalty"),
        ("--seed", "-1", "seed"),
        ("--seed", str(2**64), "seed"),
        ("--retries", "-1", "--retries"),
        ("--retries", "101", "--retries"),
        ("--device", "gpu", "SOPRANO_DEVICE"),
        ("--device", "cuda:", "SOPRANO_DEVICE"),
        ("--model", "", "model is empty"),
    ],
)
def test_values_out_of_range(place: Path, flag: str, value: str, name: str) -> None:
    assert name in refused(place, 2, "generate", "-t", "Hello.", "-o", "a.wav", f"{flag}={value}")


@pytest.mark.parametrize(
    ("variable", "value"),
    [("SOPRANO_DEVICE", "tpu"), ("SOPRANO_ATTENTION", "fast"), ("SOPRANO_DTYPE", "int4"), ("SOPRANO_THREADS", "many")],
)
def test_wrong_variables(place: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    assert f"{variable} = {value!r}" in refused(place, 2, "generate", "-t", "Hello.", "-o", "a.wav")


def test_devices_that_are_not_there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cuda_problem", lambda: "no NVIDIA GPU is visible; check nvidia-smi")
    for name in ("cuda", "cuda:7"):
        line = refused(place, 1, "generate", "-t", "Hello.", "-o", "a.wav", "-d", name)
        assert f"device {name} cannot be used: no NVIDIA GPU is visible" in line
    # array code, which float64 runs on, has no flash attention; the compiled engine has
    line = refused(place, 1, "generate", "-t", "Hello.", "-o", "a.wav", "--attention", "flash", "--dtype", "float64")
    assert "the CPU has no flash kernels" in line


def test_places_that_cannot_be_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "file").write_text("text")
    (place / "folder").mkdir()
    (place / "folder" / "0.wav").mkdir()
    for output, expected in (
        ("missing/a.wav", "folder missing does not exist"),
        ("missing/folder/", "folder missing does not exist"),
        ("file/a.wav", "folder file does not exist"),
        ("file/", "is a file"),
        ("folder", "0.wav is a folder"),
        ("x" * 300 + ".wav", "File name too long"),
    ):
        assert expected in refused(place, 1, "generate", "-t", "Hello.", "-o", output)
    assert "a.wav and convert it" in refused(place, 2, "generate", "-t", "Hello.", "-o", "a.mp3")
    monkeypatch.setattr(audio.os, "access", lambda *_: False)
    assert "is not writable" in refused(place, 1, "generate", "-t", "Hello.", "-o", "a.wav")
    monkeypatch.undo()


def test_refusals_come_before_the_work(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with the request is found before a model is read."""
    monkeypatch.setattr("soprano_cupy.pipeline.SopranoTTS", None)
    refused(place, 1, "generate", "-t", "Hello.", "-o", "missing/a.wav")
    refused(place, 1, "generate", "-t", "!!!", "-o", "a.wav")
    refused(place, 2, "generate", "-t", "Hello.", "-o", "a.wav", "--top-p", "2")
    refused(place, 2, "generate", "-t", "Hello.")


def test_a_terminal_is_no_place_for_sound(place: Path) -> None:
    result = run("generate", "-t", "Hello.", "-o", "-", terminals=("stdout",))
    assert (result.code, result.out) == (1, b"")
    assert "not written to a terminal" in result.only_line


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors", "decoder.pth"])
def test_damaged_checkpoints(place: Path, voice: Path, file: str) -> None:
    """Missing, empty, cut at several places, and replaced by a folder."""
    broken = make_checkpoint(place / "broken", seed=5)
    whole = (broken / file).read_bytes()
    arguments = ("generate", "-t", "Hello.", "-o", "a.wav", "-m", "broken")
    for length in (0, 1, 9, len(whole) // 2, len(whole) - 1):
        (broken / file).write_bytes(whole[:length])
        assert "broken/" in refused(place, 1, *arguments)
    (broken / file).unlink()
    assert "broken" in refused(place, 1, *arguments)
    (broken / file).mkdir()
    assert "broken" in refused(place, 1, *arguments)


def test_models_that_are_not_there(place: Path, voice: Path) -> None:
    for name, expected in (
        ("missing/folder/deeper", "'missing/folder/deeper' is not a folder on this machine"),
        ("./missing", "is not a folder on this machine"),
        (voice / "config.json", "is a file, not a checkpoint's folder"),
        ("someone/never-downloaded", "HF_HUB_OFFLINE forbids it"),
    ):
        assert expected in refused(place, 1, "generate", "-t", "Hello.", "-o", "a.wav", "-m", name)


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (RuntimeError("two\nlines"), 1, "unexpected RuntimeError: two lines"),
        (MemoryError("4 GB"), 1, "out of memory (4 GB)"),
        (OSError(errno.EIO, "Input/output error", "model.safetensors"), 1, "model.safetensors: Input/output error"),
    ],
)
def test_what_nobody_expected_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, expected: str
) -> None:
    monkeypatch.setattr(SopranoTTS, "infer", raising(error))
    assert expected in refused(place, code, "generate", "-t", "Hello.", "-o", "a.wav")


def test_verbose_shows_the_traceback_of_a_bug(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(SopranoTTS, "infer", raising(RuntimeError("bug")))
    assert "Traceback" in run("generate", "-t", "Hello.", "-o", "a.wav", "-v").err


@pytest.mark.parametrize("moment", ["infer", "fsync"])
def test_interruptions_leave_nothing(place: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    (place / "a.wav").write_bytes(b"old")
    target: object = SopranoTTS if moment == "infer" else audio.os
    monkeypatch.setattr(target, moment, raising(KeyboardInterrupt()))
    result = run("generate", "-t", "Hello.", "-o", "a.wav")
    assert (result.code, result.out, result.err) == (130, b"", "")
    assert [(path.name, path.read_bytes()) for path in place.iterdir()] == [("a.wav", b"old")]


def test_disk_full(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio.os, "fsync", raising(OSError(errno.ENOSPC, "No space left on device")))
    assert "the disk is full" in refused(place, 1, "generate", "-t", "Hello.", "-o", "a.wav")
    assert "the disk is full" in refused(place, 1, "generate", "-t", "Hello.", "-o", "/dev/full")


def test_devices_are_written_to_and_stay_devices(place: Path) -> None:
    result = run("generate", "-t", "Hello.", "-o", "/dev/null")
    assert (result.code, result.err) == (0, "")
    for name in ("/dev/null", "/dev/full"):
        assert stat.S_ISCHR(os.stat(name).st_mode)


def test_a_named_pipe_is_written_to(place: Path) -> None:
    os.mkfifo("pipe")
    with subprocess.Popen(["cat", "pipe"], stdout=subprocess.PIPE) as reader:
        assert run("generate", "-t", "Hello.", "-o", "pipe").code == 0
        assert reader.communicate(timeout=60)[0] == run("generate", "-t", "Hello.", "-o", "-").out
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)


# What only a process of its own can show.


def check(result: subprocess.CompletedProcess[bytes], code: int, expected: str = "") -> None:
    outcome = Outcome(result.returncode, result.stdout or b"", (result.stderr or b"").decode())
    assert outcome.code == code, outcome.err
    if expected:
        assert expected in outcome.only_line
    else:
        assert outcome.err == ""


def test_a_file_that_may_not_grow_is_not_left_behind(place: Path) -> None:
    """The system refuses in the middle of the file."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    result = command_line.process("generate", "-t", "Hello.", "-o", "a.wav", cwd=place, preexec_fn=limit)
    check(result, 1, "cannot write a.wav: File too large")
    assert list(place.iterdir()) == []


def test_a_full_standard_output(place: Path) -> None:
    for arguments in (("list",), ("generate", "-t", "Hello.", "-o", "-"), ("--help",)):
        with open("/dev/full", "wb") as full:
            result = command_line.process(*arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE)
        check(result, 1, "cannot write to standard output: the disk is full")


def test_closed_streams(place: Path) -> None:
    def closing(number: int) -> Callable[[], None]:
        return lambda: os.close(number)

    process = command_line.process
    check(process("generate", "-o", "a.wav", cwd=place, preexec_fn=closing(0)), 2, "give a text")
    check(process("generate", "-t", "Hello.", "-o", "-", preexec_fn=closing(1)), 1, "standard output is closed")
    check(process("list", preexec_fn=closing(1)), 1, "standard output is closed")
    check(process("generate", "-t", "Hello.", "-o", "a.wav", cwd=place, preexec_fn=closing(1)), 0)
    whole = (place / "a.wav").read_bytes()
    assert whole.startswith(b"RIFF")
    check(process("generate", "-t", "Hello.", "-o", "a.wav", "-v", cwd=place, preexec_fn=closing(2)), 0)
    assert (place / "a.wav").read_bytes() == whole
    assert process("generate", "-t", "!!!", "-o", "b.wav", cwd=place, preexec_fn=closing(2)).returncode == 1


def test_a_reader_that_has_gone(place: Path) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with command_line.started("generate", "-t", LONG_TEXT, "--stream", "-o", "-", **pipes) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert len(child.stdout.read(1000)) == 1000
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait(60) == 141
    with command_line.started("list", **pipes) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait(60) == 141


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + 15), (signal.SIGHUP, 128 + 1)]
)
def test_signals_in_the_middle_of_speaking(place: Path, number: int, code: int) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with command_line.started("generate", "-t", LONG_TEXT, "-o", "a.wav", "-v", cwd=place, **pipes) as child:
        assert child.stderr is not None
        while not child.stderr.readline().startswith(b"decoder"):  # the last line before it speaks
            pass
        child.send_signal(number)
        assert child.stderr.read() == b""
        assert child.wait(60) == code
    assert list(place.iterdir()) == []


def test_bytes_that_are_no_text_on_the_command_line(place: Path) -> None:
    result = subprocess.run(
        [*command_line.command("generate", "-o", "a.wav", "-t"), b"caf\xe9"],
        capture_output=True,
        cwd=place,
        env=command_line.environment(),
        check=False,
    )
    check(result, 1, "the text of -t is not valid UTF-8")
    strange = os.fsencode(place) + b"/caf\xe9.txt"
    result = subprocess.run(
        [*command_line.command("generate", "-o", "a.wav", "-f"), strange],
        capture_output=True,
        cwd=place,
        env=command_line.environment(),
        check=False,
    )
    check(result, 1, "there is no file")
    assert list(place.iterdir()) == []
