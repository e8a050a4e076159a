"""Which processor computes: `cpu` or one CUDA device, and the array library that goes with it."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np

from .errors import DeviceError, ParameterError

logger = logging.getLogger(__name__)

INSTALL_CUPY = "pip install 'soprano-cupy[cuda12]' (or [cuda13])"


@lru_cache(maxsize=1)
def cuda_problem() -> str | None:
    """Why no CUDA device can be used on this machine, as one line; None when at least one can."""
    try:
        import cupy
    except ImportError as error:
        if error.name == "cupy":
            return f"CuPy is not installed; {INSTALL_CUPY} adds it"
        return f"CuPy cannot be imported ({error}); reinstall it with {INSTALL_CUPY}"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        return f"CuPy finds no usable NVIDIA driver ({_first_line(error)}); check that nvidia-smi works"
    if count == 0:
        return "no NVIDIA GPU is visible; check nvidia-smi and CUDA_VISIBLE_DEVICES"
    return None


def resolve_device(device: str = "auto") -> tuple[str, str]:
    """Turn `auto`, `cpu`, `cuda` or `cuda:N` into ("cpu" or "cuda:N", one line that says why).

    Raises `ParameterError` for another word and `DeviceError` for a CUDA device that is not there. `auto`
    takes the current CUDA device when one works and the CPU otherwise.
    """
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        raise ParameterError(f"device = {device!r} is not known; use auto, cpu, cuda or cuda:N")
    if device == "cpu":
        return "cpu", "asked for"
    problem = cuda_problem()
    if problem is not None:
        if device != "auto":
            raise DeviceError(f"device {device} cannot be used: {problem}; or choose --device cpu")
        return "cpu", problem
    import cupy

    count = cupy.cuda.runtime.getDeviceCount()
    index = int(device[5:]) if ":" in device else cupy.cuda.runtime.getDevice()
    if index >= count:
        raise DeviceError(f"device {device} does not exist: this machine has cuda:0 to cuda:{count - 1}")
    return f"cuda:{index}", "asked for" if device != "auto" else "a CUDA device works"


def resolve_devices(devices: Sequence[str], called: str) -> list[str]:
    """Each by `resolve_device`, for work that they share; `ParameterError` where one is named twice.

    called: what the caller knows the devices as, in that message.
    """
    names = [resolve_device(device)[0] for device in devices]
    if len(set(names)) < len(names):
        raise ParameterError(f"{called} names the same device twice ({', '.join(names)}); name each once")
    return names


def cuda_index(device: str) -> int:
    """The device number of `cuda:N`."""
    return int(device.partition(":")[2] or 0)


def array_module(device: str) -> ModuleType:
    """NumPy for `cpu`, CuPy for `cuda:N`."""
    if device == "cpu":
        return np
    import cupy

    module: ModuleType = cupy
    return module


def module_of(array: Any) -> ModuleType:
    """The array library that `array` belongs to, without importing CuPy for it."""
    if isinstance(array, np.ndarray):
        return np
    import cupy

    # cupy.get_array_module asks for sparse matrices, too, for which it imports 300 ms of cupyx at its first call
    module: ModuleType = cupy if isinstance(array, cupy.ndarray) else np
    return module


def to_host(array: Any) -> np.ndarray:
    """The array's values as a NumPy array; a copy only if it lives on a GPU."""
    return np.asarray(array.get() if hasattr(array, "get") else array)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
