"""`soprano-cupy doctor` and `devices`."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import command_line
import numpy as np
import pytest
from command_line import run

from soprano_cupy import device
from soprano_cupy.cli import doctor
from soprano_cupy.testing import make_checkpoint


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("voice"), seed=5)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, voice: Path) -> None:
    for name, value in command_line.quiet_environment(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SOPRANO_MODEL", str(voice))


def findings(text: str) -> dict[str, tuple[str, str]]:
    """name: (state, text) of each line."""
    lines = [(line[:2], line[4:17].strip(), line[18:]) for line in text.splitlines()]
    return {name: (state, text) for state, name, text in lines}


def test_a_healthy_machine(voice: Path) -> None:
    result = run("doctor")
    assert (result.code, result.err) == (0, "")
    found = findings(result.text)
    for name in ("soprano-cupy", "Python", "C extensions", "NumPy", "tokenizers", "hub client", "voice"):
        assert found[name][0] in ("ok", "--"), name
    assert found["NumPy"] == ("ok", np.__version__)
    assert found["would use"] == ("ok", f"{voice}: named by SOPRANO_MODEL, a folder")
    assert found["device"] == ("ok", "cpu: asked for")
    assert found["attention"][1].startswith("flash, weights bfloat16: compiled engine, by default")
    assert found["speech"][0] == "ok"
    assert list(found)[-1] == "speech"
    assert "!!" not in [state for state, _ in found.values()]


def test_exit_code_is_whether_it_speaks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = run("doctor", "-m", tmp_path / "nowhere")
    assert (result.code, result.err) == (1, "")
    state, text = findings(result.text)["speech"]
    assert state == "!!"
    assert str(tmp_path / "nowhere") in text
    assert "NumPy" in findings(result.text)


def test_silence_is_no_speech(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soprano_cupy.SopranoTTS.infer", lambda *_: np.zeros(2048, np.float32))
    result = run("doctor")
    assert result.code == 1
    assert findings(result.text)["speech"] == (
        "!!",
        "the voice made no sound; download it again, or try --device cpu",
    )


def test_unwritable_folders_are_named_and_speech_still_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    result = run("doctor")
    assert result.code == 0
    for name in ("voice folder", "kernel folder"):
        state, text = findings(result.text)[name]
        assert state == "!!"
        assert "Permission denied" in text
        assert "SOPRANO_CACHE_DIR" in text


def test_a_check_that_breaks_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(doctor, "_CHECKS", (("libraries", broken), *doctor._CHECKS))
    result = run("doctor")
    assert result.code == 0
    assert result.text.splitlines()[0] == "!!  libraries     RuntimeError: two lines"


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.delitem(sys.modules, "soprano_cupy.tokenizer", raising=False)
    result = run("doctor")
    assert result.code == 1
    assert findings(result.text)["tokenizers"][0] == "!!"
    assert "pip install --force-reinstall tokenizers" in result.text


def test_devices_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOPRANO_DEVICE")
    monkeypatch.setattr(device, "cuda_problem", lambda: "CuPy is not installed; install it")
    result = run("devices")
    assert result.code == 0
    lines = result.text.splitlines()
    assert lines[0].startswith("* cpu ")
    assert "cores usable" in lines[0]
    assert lines[1:] == [
        "  cuda     none: CuPy is not installed; install it",
        "cpu is used: CuPy is not installed; install it",
    ]


def fake_cupy() -> types.ModuleType:
    """A CuPy that sees two GPUs and breaks when it computes."""
    runtime = types.SimpleNamespace(
        getDeviceCount=lambda: 2,
        getDevice=lambda: 1,
        driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 12090,
        getDeviceProperties=lambda index: {
            "name": f"GPU {index}".encode(),
            "totalGlobalMem": 8 << 30,
            "major": 9,
            "minor": index,
        },
    )
    module = types.ModuleType("cupy")
    module.__version__ = "14.2.0"  # type: ignore[attr-defined]
    module.cuda = types.SimpleNamespace(runtime=runtime)  # type: ignore[attr-defined]

    def ones(*_: object) -> None:
        raise ImportError("libcublas.so.12 is missing")

    module.ones = ones  # type: ignore[attr-defined]
    return module


def test_gpus_are_listed_and_missing_libraries_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOPRANO_DEVICE")
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    monkeypatch.setattr(device, "cuda_problem", lambda: None)
    lines = run("devices").text.splitlines()
    assert lines[1] == "  cuda:0   GPU 0, 8 GiB, compute capability 9.0"
    assert lines[2] == "* cuda:1   GPU 1, 8 GiB, compute capability 9.1"
    assert lines[3] == "cuda:1 is used: a CUDA device works"
    found = findings(run("doctor", "-d", "cpu").text)
    assert found["CuPy"] == ("ok", "14.2.0")
    assert found["driver"][1].endswith("for CUDA up to 13.0; CuPy was built with CUDA 12.9")
    assert found["cuda:1"] == ("ok", "GPU 1, 8 GiB, compute capability 9.1")
    assert found["cuBLAS"] == ("!!", "libcublas.so.12 is missing; pip install 'soprano-cupy[cuda12]'")
    assert found["speech"][0] == "ok"


@pytest.mark.gpu
def test_doctor_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOPRANO_DEVICE")
    result = run("doctor")
    assert result.code == 0
    found = findings(result.text)
    for name in ("CuPy", "driver", "cuda:0", "NVRTC", "cuBLAS", "speech"):
        assert found[name][0] == "ok", name
    assert found["device"][1].startswith("cuda:")


def test_wrong_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("devices", "extra").code == 2
    assert run("doctor", "--attention", "fast").code == 2
    monkeypatch.setenv("SOPRANO_DEVICE", "gpu")
    result = run("devices")
    assert result.code == 2
    assert "SOPRANO_DEVICE = 'gpu'" in result.only_line
    result = run("doctor")
    assert result.code == 1
    assert "SOPRANO_DEVICE = 'gpu'" in findings(result.text)["speech"][1]
