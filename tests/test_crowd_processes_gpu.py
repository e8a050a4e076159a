"""Several processes on GPUs: the bits that each text has alone, on one GPU that they share and on several; the loss of
one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from soprano_cupy import DeviceError, SopranoTTS
from soprano_cupy.crowd import plan
from soprano_cupy.crowd.processes import ProcessCrowd
from soprano_cupy.testing import make_checkpoint

pytestmark = pytest.mark.gpu

TEXTS = [f"Number {n} of so many is speaking{', and goes on and on' * (n % 7)}." for n in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("voice"), seed=8, mean_tokens=60)


@pytest.fixture(params=["shared", "several"])
def tts(folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[SopranoTTS]:
    """Two processes on one GPU, and one on each of several."""
    import cupy

    count = int(cupy.cuda.runtime.getDeviceCount())
    if request.param == "several" and count < 2:
        pytest.skip("only one GPU is here")
    names = [f"cuda:{i}" for i in range(count)] if request.param == "several" else ["cuda:0", "cuda:0"]
    monkeypatch.setattr(plan, "device_names", lambda *_: names)
    monkeypatch.setattr(plan, "wants_processes", lambda names: True)
    with SopranoTTS(folder, device="cuda:0", max_batch=16, invariant=True) as tts:
        yield tts


def test_the_bits_of_one_and_the_loss_of_one(folder: Path, tts: SopranoTTS) -> None:
    crowd = tts._opened()
    assert isinstance(crowd, ProcessCrowd)
    count = len(crowd.devices)
    assert count >= 2
    for device in crowd.devices:
        assert device.name.startswith("cuda:")
        assert device.nbytes > 0
    alone = [tts.submit(text, stream=n % 2 == 0, temperature=0.5, seed=n).result(60) for n, text in enumerate(TEXTS)]
    for killed in (False, True):
        speeches = [tts.submit(text, stream=n % 2 == 1, temperature=0.5, seed=n) for n, text in enumerate(TEXTS)]
        if killed:
            next(iter(speeches[1]))
            os.kill(crowd.pids[-1], signal.SIGKILL)
        for speech, samples in zip(speeches, alone, strict=True):
            np.testing.assert_array_equal(speech.result(120), samples)
    for pid in crowd.pids:
        os.kill(pid, signal.SIGKILL)
    late = tts.submit(TEXTS[0], temperature=0.5, seed=0)  # waits until one has been started anew
    np.testing.assert_array_equal(late.result(120), alone[0])


def test_a_device_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others speak; where none is left, the reason is told."""
    names = ["cuda:0", "cuda:99"]
    monkeypatch.setattr(plan, "device_names", lambda *_: names)
    monkeypatch.setattr(plan, "wants_processes", lambda names: True)
    with SopranoTTS(folder, device="cuda:0", max_batch=8) as tts:
        assert len(tts.submit(TEXTS[0]).result(60)) > 0
        assert len(tts._opened().devices) == 1
    names[0] = "cuda:98"
    with (
        SopranoTTS(folder, device="cuda:0", max_batch=8) as tts,
        pytest.raises(DeviceError, match=r"cannot be used|does not exist"),
    ):
        tts.submit(TEXTS[0])
