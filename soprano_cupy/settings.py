"""Settings from the environment, read when asked for and checked; an argument that is given wins.

    SOPRANO_MODEL       checkpoint folder, hub id or "mini"
    SOPRANO_DEVICE      auto, cpu, cuda or cuda:N
    SOPRANO_ATTENTION   auto, flash or standard
    SOPRANO_DTYPE       auto, float32, bfloat16, float16, int8 or float64
    SOPRANO_CACHE_DIR   where downloaded checkpoints are kept; by default the hub's own folder
    SOPRANO_THREADS     threads of the CPU engine; by default one per core it may use

A variable that is set to nothing counts as not set.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import ParameterError

ATTENTIONS = ("auto", "flash", "standard")
DTYPES = ("auto", "float32", "bfloat16", "float16", "int8", "float64")
MAX_THREADS = 1024


def model() -> str | None:
    """The checkpoint named by SOPRANO_MODEL, or None."""
    return _variable("SOPRANO_MODEL")


def device(value: str = "auto") -> str:
    """`value`, or SOPRANO_DEVICE where it is "auto": auto, cpu, cuda or cuda:N."""
    name, value = _choose("device", value, "SOPRANO_DEVICE")
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value):
        raise ParameterError(f"{name} = {value!r} is not known; use auto, cpu, cuda or cuda:N")
    return value


def attention(value: str = "auto") -> str:
    """`value`, or SOPRANO_ATTENTION where it is "auto": one of `ATTENTIONS`."""
    return _one_of(ATTENTIONS, *_choose("attention", value, "SOPRANO_ATTENTION"))


def dtype(value: str = "auto") -> str:
    """`value`, or SOPRANO_DTYPE where it is "auto": one of `DTYPES`."""
    return _one_of(DTYPES, *_choose("dtype", value, "SOPRANO_DTYPE"))


def cache_dir() -> Path | None:
    """The folder named by SOPRANO_CACHE_DIR, which need not exist yet, or None."""
    value = _variable("SOPRANO_CACHE_DIR")
    if value is None:
        return None
    path = Path(value).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise ParameterError(f"SOPRANO_CACHE_DIR = {value!r} is not a folder")
    return path


def threads(value: int | None = None) -> int | None:
    """`value`, or SOPRANO_THREADS; None leaves the number to the CPU engine."""
    if value is not None:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_THREADS:
            raise ParameterError(f"threads = {value!r} is not a whole number from 1 to {MAX_THREADS}")
        return value
    text = _variable("SOPRANO_THREADS")
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,4}", text) or not 1 <= int(text) <= MAX_THREADS:
        raise ParameterError(f"SOPRANO_THREADS = {text!r} is not a whole number from 1 to {MAX_THREADS}")
    return int(text)


def _variable(name: str) -> str | None:
    return os.environ.get(name, "").strip() or None


def _choose(name: str, value: str, variable: str) -> tuple[str, str]:
    """What decides, and what it says: the argument, or behind "auto" the environment."""
    if not isinstance(value, str):
        raise ParameterError(f"{name} = {value!r} is not text")
    setting = _variable(variable) if value == "auto" else None
    return (name, value) if setting is None else (variable, setting.lower())


def _one_of(allowed: tuple[str, ...], name: str, value: str) -> str:
    if value not in allowed:
        raise ParameterError(f"{name} = {value!r} is not known; use one of {', '.join(allowed)}")
    return value
