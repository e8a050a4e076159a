"""Settings from the environment: an argument wins, nonsense is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from soprano_cupy import settings
from soprano_cupy.errors import ParameterError

VARIABLES = ("MODEL", "DEVICE", "ATTENTION", "DTYPE", "CACHE_DIR", "THREADS")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(f"SOPRANO_{name}", raising=False)


def test_defaults():
    assert settings.model() is None
    assert settings.device() == settings.attention() == settings.dtype() == "auto"
    assert settings.cache_dir() is None
    assert settings.threads() is None


def test_variables_set_to_nothing(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(f"SOPRANO_{name}", " ")
    test_defaults()


@pytest.mark.parametrize(
    ("read", "variable", "value", "argument"),
    [
        (settings.device, "SOPRANO_DEVICE", "cuda:1", "cpu"),
        (settings.device, "SOPRANO_DEVICE", "cuda", "cuda:0"),
        (settings.attention, "SOPRANO_ATTENTION", "standard", "flash"),
        (settings.dtype, "SOPRANO_DTYPE", "bfloat16", "float64"),
        (settings.dtype, "SOPRANO_DTYPE", "int8", "float16"),
    ],
)
def test_the_environment_is_read_and_an_argument_wins(monkeypatch, read, variable, value, argument):
    assert read(argument) == argument
    monkeypatch.setenv(variable, value.upper())
    assert read() == value
    assert read("auto") == value
    assert read(argument) == argument
    monkeypatch.setenv(variable, "auto")
    assert read() == "auto"


def test_values_are_read_at_each_call(monkeypatch):
    for value in ("2", "7"):
        monkeypatch.setenv("SOPRANO_THREADS", value)
        assert settings.threads() == int(value)
        monkeypatch.setenv("SOPRANO_MODEL", value)
        assert settings.model() == value
    assert settings.threads(3) == 3


@pytest.mark.parametrize(
    ("read", "name", "allowed"),
    [
        (settings.device, "DEVICE", "use auto, cpu, cuda or cuda:N"),
        (settings.attention, "ATTENTION", "use one of auto, flash, standard"),
        (settings.dtype, "DTYPE", "use one of auto, float32, bfloat16, float16, int8, float64"),
    ],
)
@pytest.mark.parametrize("value", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1234", "flash2", "float8", "cpu cuda"])
def test_unknown_words(monkeypatch, read, name, allowed, value):
    with pytest.raises(ParameterError, match=f"^{name.lower()} = '{value}' is not known; {allowed}$"):
        read(value)
    monkeypatch.setenv(f"SOPRANO_{name}", value)
    with pytest.raises(ParameterError, match=f"^SOPRANO_{name} = '{value}' is not known; {allowed}$"):
        read()


@pytest.mark.parametrize("read", [settings.device, settings.attention, settings.dtype])
@pytest.mark.parametrize("value", [None, 0, b"cpu", ["cpu"]])
def test_arguments_that_are_not_text(read, value):
    with pytest.raises(ParameterError, match="is not text"):
        read(value)


@pytest.mark.parametrize("value", ["0", "-1", "1025", "99999", "two", "1.5", "²"])
def test_wrong_thread_counts(monkeypatch, value):
    monkeypatch.setenv("SOPRANO_THREADS", value)
    with pytest.raises(ParameterError, match=r"SOPRANO_THREADS = .* is not a whole number from 1 to 1024"):
        settings.threads()


@pytest.mark.parametrize("value", [0, -1, 1025, True, 2.0, "2"])
def test_wrong_thread_arguments(value):
    with pytest.raises(ParameterError, match=r"threads = .* is not a whole number from 1 to 1024"):
        settings.threads(value)


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("SOPRANO_CACHE_DIR", "~/voices")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings.cache_dir() == tmp_path / "voices"
    monkeypatch.setenv("SOPRANO_CACHE_DIR", "voices")
    assert settings.cache_dir() == Path.cwd() / "voices"
    (tmp_path / "voices").write_text("")
    monkeypatch.setenv("SOPRANO_CACHE_DIR", str(tmp_path / "voices"))
    with pytest.raises(ParameterError, match=r"SOPRANO_CACHE_DIR = .*voices' is not a folder"):
        settings.cache_dir()
