"""Which checkpoint a name means; nothing here touches a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from soprano_cupy.checkpoint import decoder_config, hub, open_decoder, open_language_model, resolve_model
from soprano_cupy.checkpoint.resolve import BUNDLED_FOLDER
from soprano_cupy.checkpoint.shapes import decoder_shapes, language_model_shapes, parameter_count
from soprano_cupy.config import ModelConfig
from soprano_cupy.errors import CheckpointError, DownloadError, ParameterError


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOPRANO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("SOPRANO_MODEL", raising=False)


def pretend_download(cache: Path, model_id: str, commit: str = "a" * 40, *, current: bool = True) -> Path:
    repository = cache / f"models--{model_id.replace('/', '--')}"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    for name in (*hub.REQUIRED, "decoder.pth"):
        (folder / name).write_text("x")
    if current:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
    return folder


def test_the_bundled_voice_is_the_last_resort():
    found = resolve_model()
    assert found.name == "mini"
    assert found.folder == BUNDLED_FOLDER
    assert '"soprano-cupy download ekwek/Soprano-1.1-80M" fetches the larger voice' in found.reason
    assert "\n" not in found.reason
    assert resolve_model("mini").folder == BUNDLED_FOLDER


def test_a_downloaded_80m_comes_before_it(tmp_path):
    folder = pretend_download(tmp_path / "cache", hub.DEFAULT_MODEL)
    assert resolve_model().folder == folder
    assert resolve_model().name == hub.DEFAULT_MODEL
    assert resolve_model("mini").folder == BUNDLED_FOLDER


def test_the_environment_comes_before_both(tmp_path, monkeypatch):
    pretend_download(tmp_path / "cache", hub.DEFAULT_MODEL)
    monkeypatch.setenv("SOPRANO_MODEL", "mini")
    assert resolve_model().folder == BUNDLED_FOLDER
    assert resolve_model().reason == "named by SOPRANO_MODEL, bundled with the program"
    monkeypatch.setenv("SOPRANO_MODEL", str(tmp_path))
    assert (resolve_model().folder, resolve_model().reason) == (tmp_path, "named by SOPRANO_MODEL, a folder")
    assert resolve_model("mini").reason == "asked for, bundled with the program"


def test_folders(tmp_path, monkeypatch):
    assert resolve_model(tmp_path).folder == tmp_path
    assert resolve_model(str(tmp_path)).name == str(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "voice").mkdir()
    assert resolve_model("~/voice").folder == tmp_path / "voice"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve_model("owner/name").folder == Path("owner/name")  # a folder wins over a hub id
    (tmp_path / "mini").mkdir()
    assert resolve_model("mini").folder == BUNDLED_FOLDER
    assert resolve_model("./mini").folder == Path("mini")


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/a/b", "a/b/c", "a b/c", "Soprano-1.1-80M", "x/y\n"])
def test_names_that_mean_nothing(name):
    with pytest.raises(CheckpointError, match="is not a folder on this machine; name a folder, a hub id like"):
        resolve_model(name)


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").write_text("x")
    for name in (tmp_path / "model.safetensors", str(tmp_path / "model.safetensors")):
        with pytest.raises(CheckpointError, match="is a file, not a checkpoint's folder"):
            resolve_model(name)


@pytest.mark.parametrize("name", ["", "  ", 3, b"x", ["mini"]])
def test_arguments_of_the_wrong_kind(name):
    with pytest.raises(ParameterError, match="model"):
        resolve_model(name)


def test_hub_ids_offline(tmp_path):
    with pytest.raises(DownloadError, match="ekwek/Soprano-80M is not downloaded and HF_HUB_OFFLINE forbids it"):
        resolve_model("ekwek/Soprano-80M")
    folder = pretend_download(tmp_path / "cache", "ekwek/Soprano-80M")
    found = resolve_model("ekwek/Soprano-80M")
    assert (found.name, found.folder, found.reason) == ("ekwek/Soprano-80M", folder, "asked for, downloaded before")


def test_incomplete_downloads_do_not_count(tmp_path):
    folder = pretend_download(tmp_path / "cache", hub.DEFAULT_MODEL)
    for name in (*hub.REQUIRED, "decoder.pth"):
        (folder / name).rename(folder / "away")
        assert hub.cached_folder(hub.DEFAULT_MODEL) is None
        assert resolve_model().name == "mini"
        (folder / "away").rename(folder / name)
    assert hub.cached_folder(hub.DEFAULT_MODEL) == folder


def test_an_older_complete_download_counts(tmp_path):
    older = pretend_download(tmp_path / "cache", hub.DEFAULT_MODEL, "b" * 40)
    newer = pretend_download(tmp_path / "cache", hub.DEFAULT_MODEL, "c" * 40)
    assert hub.cached_folder(hub.DEFAULT_MODEL) == newer
    (newer / "tokenizer.json").unlink()
    assert hub.cached_folder(hub.DEFAULT_MODEL) == older


def test_damaged_refs(tmp_path):
    folder = pretend_download(tmp_path / "cache", hub.DEFAULT_MODEL)
    for content in (b"", b"\xff\xff", b"../../../../etc", b"d" * 40):
        (folder.parents[1] / "refs" / "main").write_bytes(content)
        assert hub.cached_folder(hub.DEFAULT_MODEL) == folder


def test_a_missing_bundled_voice(monkeypatch, tmp_path):
    monkeypatch.setattr("soprano_cupy.checkpoint.resolve.BUNDLED_FOLDER", tmp_path)
    with pytest.raises(CheckpointError, match=r"bundled voice is missing from .*; install soprano-cupy again"):
        resolve_model("mini")


def test_the_bundled_voice_is_whole():
    """What its card says: 5.04 and 2.58 million weights, 16-bit, within 16 MB."""
    config = ModelConfig.from_folder(BUNDLED_FOLDER)
    assert round(parameter_count(language_model_shapes(config)) / 1e6, 2) == 5.04
    with open_language_model(BUNDLED_FOLDER) as file:
        assert file.names() == language_model_shapes(config).keys()
        assert {file.dtype(name) for name in file.names()} == {"bfloat16"}
        for name, shape in language_model_shapes(config).items():
            file.pop(name, shape)
    with open_decoder(BUNDLED_FOLDER) as file:
        decoder = decoder_config(file)
        assert round(parameter_count(decoder_shapes(decoder)) / 1e6, 2) == 2.58
        assert {file.dtype(name) for name in file.names()} == {"float16"}
        for name, shape in decoder_shapes(decoder).items():
            file.pop(name, shape)
    assert sum(path.stat().st_size for path in BUNDLED_FOLDER.iterdir()) < 16e6
    card = (BUNDLED_FOLDER / "README.md").read_text(encoding="utf-8")
    assert "cmu_us_slt" in card
    assert "Carnegie Mellon University" in card


def test_the_bundled_voice_is_the_reference_voice(shared_dir):
    """File by file; only the length of sentence that the card advises stands in the configuration besides."""
    for path in BUNDLED_FOLDER.iterdir():
        reference = shared_dir / "voice" / path.name
        if path.name == "generation_config.json":
            assert json.loads(path.read_text()) == json.loads(reference.read_text()) | {"max_text_length": 180}
        elif path.name != "README.md":
            assert path.read_bytes() == reference.read_bytes()
