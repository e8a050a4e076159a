"""Where `generate` sends sound: WAV files, standard output, and (in playback.py) the speakers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..errors import OutputError, ParameterError
from .console import write_bytes

if TYPE_CHECKING:
    import numpy as np

OTHER_FORMATS = {".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".aiff", ".wma", ".webm", ".mp4"}


class Output(Protocol):
    """Takes sound chunk by chunk."""

    def write(self, chunk: np.ndarray) -> None:
        """Take the next samples, float32 (n,)."""

    def finish(self) -> None:
        """Everything was written; only now may a file appear."""


class WavFile:
    """A WAV file that appears whole, or not at all."""

    def __init__(self, path: Path, *, as_float: bool) -> None:
        from ..audio import check_writable

        if path.suffix.lower() in OTHER_FORMATS:
            raise ParameterError(f"{path} would hold WAV data; name it {path.with_suffix('.wav')} and convert it later")
        check_writable(path)
        self.path, self._as_float = path, as_float
        self._chunks: list[np.ndarray] = []

    def write(self, chunk: np.ndarray) -> None:
        self._chunks.append(chunk)

    def finish(self) -> None:
        import numpy as np

        from ..audio import write_wav

        write_wav(self.path, np.concatenate(self._chunks), as_float=self._as_float)

    def __str__(self) -> str:
        return str(self.path.absolute())


class StandardOutput:
    """A WAV file on standard output once it is complete, or raw samples as they are made."""

    def __init__(self, *, raw: bool, as_float: bool) -> None:
        self._raw, self._as_float = raw, as_float
        self._chunks: list[np.ndarray] = []
        write_bytes(b"")  # a terminal or a closed stdout is refused before any work

    def write(self, chunk: np.ndarray) -> None:
        from ..audio import encode

        if self._raw:
            write_bytes(encode(chunk, as_float=self._as_float))
        else:
            self._chunks.append(chunk)

    def finish(self) -> None:
        import numpy as np

        from ..audio import wav_bytes

        if not self._raw:
            write_bytes(wav_bytes(np.concatenate(self._chunks), as_float=self._as_float))

    def __str__(self) -> str:
        return "standard output"


class WavFolder:
    """A folder that gets 0.wav, 1.wav and so on; it is created, if only it is missing, with the first of them."""

    def __init__(self, folder: Path, *, as_float: bool) -> None:
        from ..audio import check_writable

        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file, not a folder; choose another place for the output")
        check_writable(folder / "0.wav" if folder.is_dir() else folder)
        self._folder, self._as_float = folder, as_float
        self._chunks: list[np.ndarray] = []
        self.count = 0

    def write(self, chunk: np.ndarray) -> None:
        self._chunks.append(chunk)

    def finish(self) -> None:
        """Write what came since the last call as the next file."""
        from ..audio import make_folder

        file = WavFile(make_folder(self._folder) / f"{self.count}.wav", as_float=self._as_float)
        for chunk in self._chunks:
            file.write(chunk)
        file.finish()
        self._chunks.clear()
        self.count += 1

    def __str__(self) -> str:
        return f"{self._folder.absolute()}/ ({self.count} files)"
