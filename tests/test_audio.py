"""WAV files: what their bytes say, and that one is written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import struct
import wave
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from soprano_cupy import OutputError, audio
from soprano_cupy.audio import check_writable, make_folder, to_pcm16, wav_bytes, wav_header, write_wav


def test_pcm16_rounds_and_clips() -> None:
    samples = np.array([0, 1, -1, 0.5 / 32767, 1.5 / 32767, 2, -2, 1.6 / 32767], np.float32)
    assert to_pcm16(samples).tolist() == [0, 32767, -32767, 0, 2, 32767, -32768, 2]


def test_standard_library_reads_our_pcm_file() -> None:
    samples = np.linspace(-1, 1, 1001, dtype=np.float32)
    with wave.open(BytesIO(wav_bytes(samples))) as file:
        assert file.getparams()[:4] == (1, 2, 32000, 1001)
        np.testing.assert_array_equal(np.frombuffer(file.readframes(1001), "<i2"), to_pcm16(samples))


def test_float_file_layout() -> None:
    samples = np.array([0.25, -3.5], np.float32)
    data = wav_bytes(samples, as_float=True)
    assert struct.unpack("<4sI4s", data[:12]) == (b"RIFF", len(data) - 8, b"WAVE")
    assert struct.unpack("<4sIHHIIHHH", data[12:38]) == (b"fmt ", 18, 3, 1, 32000, 128000, 4, 32, 0)
    assert struct.unpack("<4sII4sI", data[38:58]) == (b"fact", 4, 2, b"data", 8)
    np.testing.assert_array_equal(np.frombuffer(data[58:], "<f4"), samples)


def test_header_of_unknown_length_declares_the_greatest() -> None:
    header = wav_header(None)
    assert len(header) == 44
    assert struct.unpack("<I", header[4:8]) == struct.unpack("<I", header[40:44]) == (0xFFFFFFFF,)


def test_empty_audio_is_a_valid_file() -> None:
    with wave.open(BytesIO(wav_bytes(np.empty(0, np.float32)))) as file:
        assert file.getnframes() == 0


def test_write_replaces_whole_and_honours_the_umask(tmp_path: Path) -> None:
    target = tmp_path / "a.wav"
    target.write_bytes(b"old")
    before = os.umask(0o027)
    try:
        write_wav(target, np.zeros(10, np.float32))
    finally:
        os.umask(before)
    assert target.read_bytes() == wav_bytes(np.zeros(10, np.float32))
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "disk is full"), (errno.EIO, "error")])
def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    target = tmp_path / "a.wav"
    target.write_bytes(b"old")

    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(audio.os, "fsync", fail)
    with pytest.raises(OutputError, match=words):
        write_wav(target, np.zeros(10, np.float32))
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="does not exist; create it"):
        check_writable(tmp_path / "no" / "a.wav")
    with pytest.raises(OutputError, match="is a folder"):
        check_writable(tmp_path)
    with pytest.raises(OutputError, match="is a file, not a folder"):
        make_folder(tmp_path / "file")
    with pytest.raises(OutputError, match="does not exist"):
        make_folder(tmp_path / "no" / "deeper")
    assert make_folder(tmp_path / "new").is_dir()


def test_more_than_a_wav_file_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Huge(bytes):
        def __len__(self) -> int:
            return 1 << 32

    monkeypatch.setattr(audio, "encode", lambda samples, *, as_float: Huge())
    with pytest.raises(OutputError, match="4 GB"):
        wav_bytes(np.empty(0, np.float32))
