"""Choosing a processor, with and without a (pretended) GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from soprano_cupy import DeviceError, ParameterError, device


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Call with what `import cupy` should give: a device count, an exception, or None for no CuPy."""

    def install(answer: Any) -> None:
        def count() -> int:
            if isinstance(answer, Exception):
                raise answer
            return int(answer)

        runtime = SimpleNamespace(getDeviceCount=count, getDevice=lambda: 1)
        fake = None if answer is None else SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
        monkeypatch.setitem(sys.modules, "cupy", fake)  # type: ignore[arg-type]
        device.cuda_problem.cache_clear()

    yield install
    device.cuda_problem.cache_clear()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "CuPy is not installed; pip install"),
        (RuntimeError("cudaErrorInsufficientDriver: too old\nmore"), r"\(cudaErrorInsufficientDriver: too old\)"),
        (0, "no NVIDIA GPU is visible"),
    ],
)
def test_without_a_usable_gpu(pretend: Callable[[Any], None], answer: Any, words: str) -> None:
    pretend(answer)
    name, reason = device.resolve_device("auto")
    assert name == "cpu"
    with pytest.raises(DeviceError, match=words):
        device.resolve_device("cuda")
    assert reason == device.cuda_problem()
    assert device.resolve_device("cpu") == ("cpu", "asked for")


def test_with_two_gpus(pretend: Callable[[Any], None]) -> None:
    pretend(2)
    assert device.resolve_device("auto") == ("cuda:1", "a CUDA device works")
    assert device.resolve_device("cuda:0") == ("cuda:0", "asked for")
    with pytest.raises(DeviceError, match="cuda:2 does not exist: this machine has cuda:0 to cuda:1"):
        device.resolve_device("cuda:2")


@pytest.mark.parametrize("word", ["", "gpu", "mps", "cuda:", "cuda:-1", "cuda:x", "CPU ", None, 0])
def test_unknown_words(word: Any) -> None:
    with pytest.raises(ParameterError, match="device = "):
        device.resolve_device(word)


def test_host_arrays_need_no_cupy() -> None:
    array = np.arange(3)
    assert device.module_of(array) is np
    assert device.to_host(array) is array
    assert device.array_module("cpu") is np
    assert (device.cuda_index("cuda:3"), device.cuda_index("cuda")) == (3, 0)


def test_devices_that_share_work_are_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "resolve_device", lambda name: ({"cuda": "cuda:0"}.get(name, name), "asked for"))
    assert device.resolve_devices(["cuda", "cuda:1"], "devices") == ["cuda:0", "cuda:1"]
    with pytest.raises(ParameterError, match=r"^these names the same device twice \(cuda:0, cuda:0\); name each once$"):
        device.resolve_devices(["cuda", "cuda:0"], "these")
