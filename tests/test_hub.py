"""Downloads against a local hub: complete, resumed, verified, and every way to fail."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, HubServer, model_files

from soprano_cupy.checkpoint import hub, open_decoder, open_language_model, resolve_model, transfer
from soprano_cupy.errors import DownloadError, ParameterError
from soprano_cupy.testing import make_checkpoint

MODEL = hub.DEFAULT_MODEL
LARGE = "model.safetensors"
PIECE = transfer.PIECE_BYTES


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return model_files(make_checkpoint(tmp_path_factory.mktemp("origin")))


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOPRANO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("SOPRANO_MODEL", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(transfer, "RETRY_SECONDS", 0.0)


@pytest.fixture
def server(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer({MODEL: dict(files)}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models--ekwek--Soprano-1.1-80M"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def needed(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name not in ("README.md", "tokenizer_config.json")}


# What works


def test_a_whole_download(tmp_path, server, files):
    folder = hub.download(MODEL)
    assert folder == cache(tmp_path) / "snapshots" / COMMIT
    assert content(folder) == needed(files)
    assert (cache(tmp_path) / "refs" / "main").read_text() == COMMIT
    assert not list((cache(tmp_path) / "blobs").glob("*.part"))
    assert all(os.readlink(path).startswith("../../blobs/") for path in folder.iterdir())
    with open_language_model(folder), open_decoder(folder):
        pass


def test_nothing_is_fetched_twice(server):
    hub.download(MODEL)
    server.downloads.clear()
    hub.download(MODEL)
    assert server.downloads == []


def test_decoder_safetensors_is_preferred(server, files):
    server.models[MODEL]["decoder.safetensors"] = b"x" * 20_000
    folder = hub.download(MODEL)
    assert (folder / "decoder.safetensors").read_bytes() == b"x" * 20_000
    assert not (folder / "decoder.pth").exists()


def test_generation_config_may_be_absent(server):
    del server.models[MODEL]["generation_config.json"]
    assert not (hub.download(MODEL) / "generation_config.json").exists()


def test_a_new_commit_fetches_only_what_changed(tmp_path, server):
    old = hub.download(MODEL)
    server.commit = "f" * 40
    server.models[MODEL]["config.json"] += b"\n"
    server.downloads.clear()
    new = hub.download(MODEL)
    assert {name for name, _, _ in server.downloads} == {"config.json"}
    assert (new / "config.json").read_bytes() == (old / "config.json").read_bytes() + b"\n"
    assert hub.cached_folder(MODEL) == new


def test_progress_counts_every_byte(server, files):
    calls: list[tuple[str, int, int]] = []
    hub.download(MODEL, progress=lambda *call: calls.append(call))
    total = sum(len(data) for data in needed(files).values())
    assert {call[2] for call in calls} == {total}
    done = [call[1] for call in calls]
    assert done == sorted(done)
    assert done[-1] == total
    assert {call[0] for call in calls} == needed(files).keys()


def test_huggingface_hub_finds_our_files_and_we_find_its(tmp_path, server, files):
    import huggingface_hub

    folder = hub.download(MODEL)
    found = huggingface_hub.try_to_load_from_cache(MODEL, LARGE, cache_dir=tmp_path / "cache")
    assert found == str(folder / LARGE)
    assert huggingface_hub.snapshot_download(MODEL, cache_dir=tmp_path / "cache", local_files_only=True) == str(folder)
    shutil.rmtree(tmp_path / "cache")
    for name in needed(files):
        huggingface_hub.hf_hub_download(MODEL, name, cache_dir=tmp_path / "cache", endpoint=server.url)
    assert content(hub.cached_folder(MODEL)) == needed(files)
    server.downloads.clear()
    hub.download(MODEL)
    assert server.downloads == []


def test_the_token_stays_with_the_hub(server, monkeypatch):
    """Large files lie on another host, which must not see it."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.download(MODEL)
    requests = zip(server.requests, server.headers, strict=True)
    seen = {request.split("/")[1]: headers.get("authorization") for request, headers in requests}
    assert seen == {"ekwek": "Bearer hf_secret", "storage": None}


# Interrupted


def test_a_cut_connection_continues(server, files):
    server.faults.cuts = {LARGE: [2 * PIECE, PIECE]}
    assert content(hub.download(MODEL)) == needed(files)
    starts = [first for name, first, _ in server.downloads if name == LARGE]
    assert starts == [0, 2 * PIECE, 3 * PIECE]
    assert server.bytes_sent(LARGE) == len(files[LARGE])


def test_another_process_continues(tmp_path, server, files, monkeypatch):
    server.faults.cuts = {LARGE: [2 * PIECE] + [0] * transfer.ATTEMPTS}
    with pytest.raises(DownloadError, match=r"broke while fetching model.safetensors .*0\.0 of 0\.\d MB are kept"):
        hub.download(MODEL)
    (part,) = (cache(tmp_path) / "blobs").glob("*.soprano.part")
    assert part.read_bytes() == files[LARGE][: 2 * PIECE]
    assert hub.cached_folder(MODEL) is None
    server.faults.cuts = {}
    server.downloads.clear()
    assert content(hub.download(MODEL)) == needed(files)
    assert (LARGE, 2 * PIECE, len(files[LARGE]) - 2 * PIECE) in server.downloads
    assert not part.exists()


def test_ctrl_c_keeps_what_arrived(tmp_path, server, files):
    def interrupt(name: str, done: int, total: int) -> None:
        if name == LARGE:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.download(MODEL, progress=interrupt)
    assert hub.cached_folder(MODEL) is None
    assert content(hub.download(MODEL)) == needed(files)


@pytest.mark.parametrize("fault", ["ignore_range", "wrong_range"])
def test_servers_that_cannot_continue_start_again(server, files, fault):
    setattr(server.faults, fault, True)
    server.faults.cuts = {LARGE: [20_000]}
    assert content(hub.download(MODEL)) == needed(files)


def test_a_server_that_never_gets_further(server):
    server.faults.wrong_range = True
    server.faults.cuts = {LARGE: [20_000] * 100}
    with pytest.raises(DownloadError, match=r"connection broke while fetching model\.safetensors"):
        hub.download(MODEL)
    assert len(server.downloads) < 20


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server, files, status):
    server.faults.statuses = {LARGE: [status, status], "config.json": [status]}
    assert content(hub.download(MODEL)) == needed(files)


def test_a_part_that_is_longer_than_the_file(tmp_path, server, files):
    hub.download(MODEL)
    blob = (hub.cached_folder(MODEL) / LARGE).resolve()
    blob.rename(transfer.part_path(blob))
    with transfer.part_path(blob).open("ab") as stream:
        stream.write(b"more")
    assert content(hub.download(MODEL)) == needed(files)


def test_a_damaged_part_is_fetched_again_from_the_start(tmp_path, server, files, caplog):
    hub.download(MODEL)
    blob = (hub.cached_folder(MODEL) / LARGE).resolve()
    transfer.part_path(blob).write_bytes(b"\xff" * 1000)
    blob.unlink()
    with caplog.at_level(logging.WARNING):
        assert content(hub.download(MODEL)) == needed(files)
    assert "does not match its hash after it was continued" in caplog.text


def test_two_downloads_at_once(server, files):
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(hub.download(MODEL))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 3
    assert len(set(folders)) == 1
    assert content(folders[0]) == needed(files)
    assert server.bytes_sent(LARGE) == len(files[LARGE])


# What fails


@pytest.mark.parametrize("name", ["config.json", LARGE])
def test_damaged_content_never_counts(tmp_path, server, name):
    server.faults.damage = {name}
    with pytest.raises(DownloadError, match=f"what arrived for {name} does not match its hash"):
        hub.download(MODEL)
    assert hub.cached_folder(MODEL) is None
    assert not list((cache(tmp_path) / "blobs").glob("*.part"))
    server.faults.damage = set()
    hub.download(MODEL)


def test_a_server_that_sends_too_much(server):
    server.faults.too_long = {LARGE}
    with pytest.raises(DownloadError, match="sends more than"):
        hub.download(MODEL)


def test_a_download_that_is_refused(server):
    server.faults.statuses = {LARGE: [418]}
    with pytest.raises(DownloadError, match="answers 418 to the download"):
        hub.download(MODEL)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "no model .* or it is private"),
        (403, "needs permission"),
        (500, "answers 500"),
        (502, "answers 502"),
    ],
)
def test_a_hub_that_refuses(server, status, message):
    server.faults.refuse_models = status
    with pytest.raises(DownloadError, match=message):
        hub.download(MODEL)


def test_an_unknown_model(server):
    with pytest.raises(DownloadError, match=r"the hub has no model someone/nothing, or it is private; known are ekwek"):
        hub.download("someone/nothing")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", LARGE, "decoder.pth"])
def test_a_model_without_a_needed_file(tmp_path, server, name):
    del server.models[MODEL][name]
    with pytest.raises(DownloadError, match="is it a Soprano checkpoint"):
        hub.download(MODEL)
    assert not (tmp_path / "cache").exists()


def test_a_server_that_is_no_hub(server):
    server.faults.no_commit = True
    with pytest.raises(DownloadError, match="not answered by a model hub; check HF_ENDPOINT"):
        hub.download(MODEL)


def test_a_hub_without_hashes(server):
    server.faults.no_etag = True
    with pytest.raises(DownloadError, match=r"gives no hash for config\.json"):
        hub.download(MODEL)


def test_an_unreachable_hub(files, monkeypatch):
    with HubServer({}) as stopped:
        monkeypatch.setenv("HF_ENDPOINT", stopped.url)
    with pytest.raises(DownloadError, match=r"cannot be reached at http://127.* check the network") as caught:
        hub.download(MODEL)
    assert "\n" not in str(caught.value)


def test_offline(server, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="not downloaded and HF_HUB_OFFLINE forbids it"):
        hub.download(MODEL)
    assert server.requests == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    folder = hub.download(MODEL)
    server.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "true")
    assert hub.download(MODEL) == folder
    assert server.requests == []


def test_not_enough_space(tmp_path, server, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(DownloadError, match=r"0 MB free and \d MB are needed; free some space or set SOPRANO"):
        hub.download(MODEL)
    assert server.downloads == []


def test_the_disk_fills_up(tmp_path, server, files, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DownloadError, match=r"disk is full at .* run the same again to continue"):
            hub.download(MODEL)
    assert hub.cached_folder(MODEL) is None
    assert content(hub.download(MODEL)) == needed(files)


def test_a_cache_that_cannot_be_written(tmp_path, server, monkeypatch):
    (tmp_path / "cache").mkdir()
    cache(tmp_path).write_text("in the way")
    with pytest.raises(DownloadError, match=r"cannot write to .*Not a directory.* set SOPRANO_CACHE_DIR"):
        hub.download(MODEL)
    monkeypatch.setenv("SOPRANO_CACHE_DIR", str(cache(tmp_path)))
    with pytest.raises(ParameterError, match=r"SOPRANO_CACHE_DIR = .* is not a folder"):
        hub.download(MODEL)


@pytest.mark.parametrize(
    "name", ["", "x", "a/b/c", "../x/y", "a/..", "a/b..c", "/a/b", "a b/c", "a--b/c", "a/b\n", "é/b", None, 3]
)
def test_ids_that_cannot_be(name):
    with pytest.raises(ParameterError, match="is not a hub id like ekwek"):
        hub.download(name)
    with pytest.raises(ParameterError, match="is not a hub id like ekwek"):
        hub.cached_folder(name)


# The cache


def test_cached_models(tmp_path, server, files):
    assert hub.cached_models() == []
    server.faults.cuts = {LARGE: [30_000] + [0] * transfer.ATTEMPTS}
    with pytest.raises(DownloadError):
        hub.download(MODEL)
    (model,) = hub.cached_models()
    assert (model.model_id, model.folder, model.complete) == (MODEL, None, False)
    assert model.size_bytes >= 30_000
    server.faults.cuts = {}
    folder = hub.download(MODEL)
    (model,) = hub.cached_models()
    assert (model.folder, model.complete) == (folder, True)
    total = sum(len(data) for data in needed(files).values())
    assert total <= model.size_bytes <= total + 200


def test_other_models_in_the_cache_are_left_alone(tmp_path, server):
    server.models["someone/voice"] = server.models[MODEL]
    hub.download("someone/voice")
    hub.download(MODEL)
    other = tmp_path / "cache" / "models--someone--else" / "snapshots" / COMMIT
    other.mkdir(parents=True)
    (other / LARGE).write_bytes(b"not ours")
    assert [model.model_id for model in hub.cached_models()] == [MODEL, "someone/voice"]
    size = hub.cached_models()[1].size_bytes
    assert hub.clear_cache("someone/voice") == size
    assert [model.model_id for model in hub.cached_models()] == [MODEL]
    assert hub.clear_cache("someone/voice") == 0
    assert hub.clear_cache() > 0
    assert hub.cached_models() == []
    assert (other / LARGE).read_bytes() == b"not ours"


def test_cache_folder(tmp_path, monkeypatch):
    assert hub.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("SOPRANO_CACHE_DIR")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert hub.cache_folder() == tmp_path / "hub"


def test_links_are_copied_where_there_are_none(server, files, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    folder = hub.download(MODEL)
    assert content(folder) == needed(files)
    assert not any(path.is_symlink() for path in folder.iterdir())


# Names


def test_resolving_a_hub_id_downloads_it_once(server):
    first = resolve_model(MODEL)
    assert (first.name, first.reason) == (MODEL, "asked for, downloaded now")
    server.requests.clear()
    second = resolve_model(MODEL)
    assert (second.folder, second.reason) == (first.folder, "asked for, downloaded before")
    assert resolve_model(None).folder == first.folder
    assert resolve_model(None).reason == "the best voice downloaded"
    assert server.requests == []
