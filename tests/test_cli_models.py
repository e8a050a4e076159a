"""`soprano-cupy list`, `download`, `cache` and `convert`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import command_line
import numpy as np
import pytest
from command_line import run

from soprano_cupy import DownloadError, VocosDecoder
from soprano_cupy.checkpoint import hub
from soprano_cupy.testing import make_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv("SOPRANO_MODEL", raising=False)
    folder = tmp_path / "cache"
    for name, value in command_line.quiet_environment(folder).items():
        monkeypatch.setenv(name, value)
    return folder


def cached(cache: Path, model_id: str, missing: str = "") -> Path:
    """A model in the cache's layout, complete unless a file is to be missing."""
    repository = cache / f"models--{model_id.replace('/', '--')}"
    folder = make_checkpoint(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    if missing:
        (folder / missing).unlink()
    return folder


def test_list_without_downloads() -> None:
    result = run("list")
    assert result.code == 0
    lines = result.text.splitlines()
    assert lines[0].split()[:3] == ["*", "mini", "bundled,"]
    assert [line.split(None, 1) for line in lines[1:]] == [[name, "not downloaded"] for name in hub.KNOWN_MODELS]


def test_list_marks_what_speaks_by_default(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cached(cache, "ekwek/Soprano-1.1-80M")
    cached(cache, "someone/other-voice", missing="model.safetensors")
    rows = {line[2:].split()[0]: line for line in run("list").text.splitlines()}
    assert rows["ekwek/Soprano-1.1-80M"].startswith("* ")
    assert rows["ekwek/Soprano-1.1-80M"].endswith(str(folder))
    assert "incomplete" in rows["someone/other-voice"]
    assert sum(line.startswith("*") for line in rows.values()) == 1
    monkeypatch.setenv("SOPRANO_MODEL", "/some/folder")
    assert "* /some/folder  named by SOPRANO_MODEL" in [
        " ".join([line[:1], "  ".join(line[2:].split(None, 1))]) for line in run("list").text.splitlines()
    ]


def test_cache_shows_and_clears(cache: Path) -> None:
    cached(cache, "ekwek/Soprano-80M")
    cached(cache, "someone/voice")
    foreign = cache / "models--someone--llm" / "snapshots" / COMMIT
    foreign.mkdir(parents=True)
    (foreign / "model.safetensors").write_bytes(bytes(100))
    (cache / "kernels").mkdir()
    (cache / "kernels" / "abc.cubin").write_bytes(bytes(2_000_000))

    shown = run("cache").text
    assert f"voices in {cache}" in shown
    assert "ekwek/Soprano-80M" in shown
    assert "1 files, 2.0 MB" in shown
    assert "llm" not in shown

    result = run("cache", "--clear", "someone/voice")
    assert result.code == 0
    assert not (cache / "models--someone--voice").exists()
    assert (cache / "kernels" / "abc.cubin").exists()

    assert run("cache", "--clear").text.endswith(" MB freed\n")
    assert not (cache / "models--ekwek--Soprano-80M").exists()
    assert not (cache / "kernels" / "abc.cubin").exists()
    assert (foreign / "model.safetensors").exists()
    assert run("cache", "--clear").text == "0.0 MB freed\n"


def test_clearing_a_model_that_is_not_there() -> None:
    result = run("cache", "--clear", "ekwek/Soprano-80M")
    assert result.code == 1
    assert "ekwek/Soprano-80M" in result.only_line


def fake_download(calls: list[str], folder: Path) -> Callable[..., Path]:
    def download(model_id: str, *, progress: hub.Progress | None = None) -> Path:
        calls.append(model_id)
        assert progress is not None
        for done in range(0, 1_000_001, 100):
            progress("model.safetensors", done, 1_000_000)
        return folder

    return download


def test_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []
    monkeypatch.setattr(hub, "download", fake_download(calls, tmp_path))
    result = run("download")
    assert (result.code, result.text, result.err) == (0, f"{tmp_path}\n", "")
    run("download", "ekwek/Soprano-80M")
    assert calls == ["ekwek/Soprano-1.1-80M", "ekwek/Soprano-80M"]


def test_download_shows_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("soprano_cupy.cli.progress.REDRAW_SECONDS", 0.0)
    monkeypatch.setattr(hub, "download", fake_download([], tmp_path))
    result = run("download", terminals=("stderr",))
    assert result.code == 0
    assert result.err.endswith("\r\x1b[K")
    assert "of 1.0 MB" in result.err or "asking the hub" in result.err


def test_a_voice_that_is_not_here_is_fetched_before_speaking(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    calls: list[str] = []

    def download(model_id: str, **_: object) -> Path:
        calls.append(model_id)
        return cached(cache, model_id)

    monkeypatch.setattr(hub, "download", download)
    for _ in range(2):
        result = run("generate", "-t", "Hello.", "-o", tmp_path / "a.wav", "-m", "someone/voice")
        assert result.code == 0
    assert calls == ["someone/voice"]


def test_offline_download_says_what_to_do() -> None:
    result = run("download", "ekwek/Soprano-80M")
    assert result.code == 1
    assert "HF_HUB_OFFLINE" in result.only_line


def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> Path:
        raise DownloadError("the hub cannot be reached;\ncheck the network")

    monkeypatch.setattr(hub, "download", download)
    result = run("download")
    assert result.code == 1
    assert result.only_line == "soprano-cupy: the hub cannot be reached; check the network"


def test_no_hub_id() -> None:
    result = run("download", "not a hub id")
    assert result.code == 2
    assert "'not a hub id'" in result.only_line


def test_convert(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "voice")
    states = np.random.default_rng(1).standard_normal((5, VocosDecoder.load(folder).config.input_size))
    before = VocosDecoder.load(folder)(states.astype(np.float32))
    result = run("convert", folder)
    assert (result.code, result.text) == (0, f"{folder / 'decoder.safetensors'}\n")
    (folder / "decoder.pth").unlink()
    np.testing.assert_array_equal(VocosDecoder.load(folder)(states.astype(np.float32)), before)


def test_convert_to_another_place(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "voice")
    assert run("convert", folder, "-o", tmp_path / "other.safetensors").code == 0
    assert (tmp_path / "other.safetensors").stat().st_size > 0
    assert not (folder / "decoder.safetensors").exists()


def test_convert_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    for place in (tmp_path / "missing", tmp_path):
        result = run("convert", place)
        assert result.code == 1
        assert str(place) in result.only_line
    (tmp_path / "decoder.pth").write_bytes(b"PK\3\4 not a checkpoint")
    assert run("convert", tmp_path).code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decoder.pth"]
