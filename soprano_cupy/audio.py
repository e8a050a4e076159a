"""Samples to WAV files and raw PCM (RIFF/WAVE as in the Multimedia Programming Interface, 1991)."""

from __future__ import annotations

import errno
import os
import struct
import tempfile
from pathlib import Path

import numpy as np

from .config import SAMPLE_RATE_HZ
from .errors import OutputError

_PCM, _FLOAT = 1, 3  # WAVE format tags


def to_pcm16(samples: np.ndarray) -> np.ndarray:
    """Float samples in -1 to 1 as little-endian 16-bit integers, rounded; what lies outside is clipped."""
    return np.clip(np.rint(samples * 32767.0), -32768, 32767).astype("<i2")


def encode(samples: np.ndarray, *, as_float: bool = False) -> bytes:
    """The samples' bytes as they stand in a WAV file: 16-bit integers, or 32-bit floats."""
    return samples.astype("<f4").tobytes() if as_float else to_pcm16(samples).tobytes()


def wav_header(sample_count: int | None, *, as_float: bool = False, rate_hz: int = SAMPLE_RATE_HZ) -> bytes:
    """The header of a mono WAV file; `sample_count` None, for a pipe, declares the greatest possible length."""
    width, tag = (4, _FLOAT) if as_float else (2, _PCM)
    size = 0xFFFFFFFF if sample_count is None else sample_count * width
    extension = struct.pack("<H", 0) if as_float else b""  # the float format asks for an (empty) extension
    layout = struct.pack("<HHIIHH", tag, 1, rate_hz, rate_hz * width, width, width * 8) + extension
    fact = struct.pack("<4sII", b"fact", 4, min(size // width, 0xFFFFFFFF)) if as_float else b""
    before = b"WAVE" + struct.pack("<4sI", b"fmt ", len(layout)) + layout + fact
    total = min(len(before) + 8 + size, 0xFFFFFFFF)
    return struct.pack("<4sI", b"RIFF", total) + before + struct.pack("<4sI", b"data", min(size, 0xFFFFFFFF))


def wav_bytes(samples: np.ndarray, *, as_float: bool = False) -> bytes:
    """A whole mono 32 kHz WAV file; `OutputError` past the format's 4 GB."""
    data = encode(samples, as_float=as_float)
    if len(data) > 0xFFFFFF00:
        raise OutputError(f"{len(samples)} samples do not fit a WAV file (4 GB); split the text over several files")
    return wav_header(len(samples), as_float=as_float) + data


def write_wav(path: str | os.PathLike[str], samples: np.ndarray, *, as_float: bool = False) -> None:
    """Write a mono 32 kHz WAV file whole or not at all; `OutputError` says why it could not be.

    A link's target is replaced, not the link; a device or a named pipe is written to as it is.
    """
    target = Path(path)
    check_writable(target)
    data = wav_bytes(samples, as_float=as_float)
    try:
        if _is_special(target):
            with target.open("wb") as file:
                file.write(data)
        else:
            _replace(target.resolve(), data)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(_explain(target, error)) from error


def _replace(target: Path, data: bytes) -> None:
    """Write a file beside `target` that takes its name once everything is on disk."""
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name[:40]}.", suffix=".part", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
        temporary = None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise `OutputError` now if a file at `path` could not be written later."""
    target = Path(path)
    try:
        if target.is_dir():
            raise OutputError(f"{target} is a folder; name a file in it, for example {target / 'speech.wav'}")
        if target.exists() and not os.access(target, os.W_OK):
            raise OutputError(f"{target} is not writable; choose another place for the output")
        if _is_special(target):
            return
        if not target.parent.is_dir():
            raise OutputError(f"folder {target.parent} does not exist; create it first (mkdir -p {target.parent})")
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte in it
        raise OutputError(f"{str(target)!r:.80} cannot be a file's name ({error}); choose another") from error
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputError(f"folder {target.parent} is not writable; choose another place for the output")


def _is_special(path: Path) -> bool:
    """Whether something is there that must not be replaced by a file: a device, a named pipe."""
    return path.exists() and not path.is_file() and not path.is_dir()


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create an output folder if it is not there yet; its parent must exist."""
    folder = Path(path)
    try:
        folder.mkdir(exist_ok=True)
    except FileNotFoundError as error:
        raise OutputError(f"folder {folder.parent} does not exist; create it first") from error
    except FileExistsError as error:
        raise OutputError(f"{folder} is a file, not a folder; choose another place for the output") from error
    except OSError as error:
        raise OutputError(_explain(folder, error)) from error
    check_writable(folder / "0.wav")
    return folder


def _explain(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"cannot write {path}: the disk is full; free some space and try again"
    return f"cannot write {path}: {error.strerror or error}; choose another place for the output"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
