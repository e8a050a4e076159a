"""The system's speakers, through the optional package sounddevice (PortAudio)."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np

from .config import SAMPLE_RATE_HZ
from .errors import OutputError


class Player:
    """Plays samples as they come; a context manager. `OutputError` says what is missing."""

    def __init__(self) -> None:
        self._sounddevice = _import()
        try:
            self._stream: Any = self._sounddevice.OutputStream(
                samplerate=SAMPLE_RATE_HZ, channels=1, dtype="float32", latency="high"
            )
            self._stream.start()
        except self._sounddevice.PortAudioError as error:
            raise OutputError(f"no speakers can be opened ({error}); write a file with -o instead") from error

    def write(self, chunk: np.ndarray) -> None:
        """Queue float32 samples (n,); returns when they fit into the device's buffer."""
        try:
            self._stream.write(np.ascontiguousarray(chunk, np.float32).reshape(-1, 1))
        except self._sounddevice.PortAudioError as error:
            raise OutputError(f"playing stopped ({error}); write a file with -o instead") from error

    def finish(self) -> None:
        """Wait until the last sample has been heard."""
        self._stream.stop()

    def __enter__(self) -> Player:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:  # Ctrl-C: silence at once
            self._stream.abort()
        self._stream.close()

    def __str__(self) -> str:
        return "the speakers"


def _import() -> Any:
    try:
        import sounddevice
    except ImportError as error:
        raise OutputError("playing needs the package sounddevice: pip install 'soprano-cupy[play]'") from error
    except OSError as error:  # the package is there, the PortAudio library is not
        raise OutputError(f"playing needs the PortAudio library ({error}): apt install libportaudio2") from error
    return sounddevice
