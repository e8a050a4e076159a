"""Text to speech with Soprano, without PyTorch.

Importing this package loads nothing heavy: each public name below is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import (
        AttentionUnavailable,
        Busy,
        CheckpointError,
        Closed,
        DeadlineExceeded,
        DeviceError,
        DownloadError,
        OutputError,
        ParameterError,
        SopranoError,
        TextError,
        UnsafePickleError,
    )
    from .pipeline import SopranoTTS
    from .qwen3 import Qwen3
    from .vocos import VocosDecoder

__version__ = "0.1.0"

_HOME = {
    "SopranoTTS": "pipeline",
    "Qwen3": "qwen3",
    "VocosDecoder": "vocos",
    "SopranoError": "errors",
    "ParameterError": "errors",
    "TextError": "errors",
    "CheckpointError": "errors",
    "UnsafePickleError": "errors",
    "DownloadError": "errors",
    "DeviceError": "errors",
    "AttentionUnavailable": "errors",
    "Busy": "errors",
    "Closed": "errors",
    "DeadlineExceeded": "errors",
    "OutputError": "errors",
}

__all__ = [
    "AttentionUnavailable",
    "Busy",
    "CheckpointError",
    "Closed",
    "DeadlineExceeded",
    "DeviceError",
    "DownloadError",
    "OutputError",
    "ParameterError",
    "Qwen3",
    "SopranoError",
    "SopranoTTS",
    "TextError",
    "UnsafePickleError",
    "VocosDecoder",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
