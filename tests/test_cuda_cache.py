"""Compiled kernels on disk: found by what made them, rebuilt when anything is off, never fatal."""

from __future__ import annotations

import json
import logging
import os
import struct
from pathlib import Path

import pytest

from soprano_cupy.cuda import cache, module
from soprano_cupy.cuda.cache import entry_key, pack_entry, read_entry, read_prebuilt, unpack_entry, write_entry
from soprano_cupy.cuda.compiler import Binary, compile_options
from soprano_cupy.errors import DeviceError

CUBIN = b"\x7fELF" + bytes(range(256)) * 5
KEY = entry_key("source", ["-a", "-b"], (12, 9))


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOPRANO_CACHE_DIR", str(tmp_path))
    cache._warn_unwritable.cache_clear()


def entry_path(tmp_path: Path, key: str = KEY) -> Path:
    return tmp_path / "kernels" / f"{key}.cubin"


def test_the_key_depends_on_every_part_and_on_where_one_ends() -> None:
    variants = [
        ("source", ["-a", "-b"], (12, 9)),
        ("source ", ["-a", "-b"], (12, 9)),
        ("source", ["-b", "-a"], (12, 9)),
        ("source", ["-a-b"], (12, 9)),
        ("source-a", ["-b"], (12, 9)),
        ("source", ["-a", "-b"], (12, 8)),
        ("source", ["-a", "-b"], (13, 9)),
    ]
    assert len({entry_key(*variant) for variant in variants}) == len(variants)
    assert entry_key(*variants[0]) == KEY


def test_an_entry_comes_back(tmp_path: Path) -> None:
    assert read_entry(KEY) is None
    assert write_entry(KEY, CUBIN)
    assert read_entry(KEY) == CUBIN
    assert [path.name for path in (tmp_path / "kernels").iterdir()] == [f"{KEY}.cubin"]
    assert (tmp_path / "kernels").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("at", [0, 7, 8, 20, 40, 50, 72, 75, 80, 81, 200, -1])
def test_one_flipped_bit_anywhere_is_not_trusted(at: int) -> None:
    data = bytearray(pack_entry(KEY, CUBIN))
    assert unpack_entry(KEY, bytes(data)) == CUBIN
    data[at] ^= 0x10
    assert unpack_entry(KEY, bytes(data)) is None


@pytest.mark.parametrize("length", [0, 4, 79, 80, 81, 1000])
def test_truncated_and_extended_entries_are_not_trusted(length: int, tmp_path: Path) -> None:
    whole = pack_entry(KEY, CUBIN)
    path = entry_path(tmp_path)
    path.parent.mkdir()
    for data in (whole[:length], whole + b"x"):
        path.write_bytes(data)
        assert read_entry(KEY) is None


def test_an_entry_renamed_to_another_key_is_foreign(caplog: pytest.LogCaptureFixture) -> None:
    other = entry_key("other", [], (12, 9))
    write_entry(other, CUBIN)
    folder = cache.cache_folder()
    assert folder is not None
    os.rename(folder / f"{other}.cubin", folder / f"{KEY}.cubin")
    with caplog.at_level(logging.INFO, logger="soprano_cupy"):
        assert read_entry(KEY) is None
    assert "damaged or foreign; it is built again" in caplog.text


def test_something_that_is_no_cubin_is_not_trusted() -> None:
    assert unpack_entry(KEY, pack_entry(KEY, b"MZ" + CUBIN)) is None


def test_an_entry_of_another_user_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    write_entry(KEY, CUBIN)
    owner = os.geteuid()
    monkeypatch.setattr(os, "fstat", lambda handle: os.stat_result((0o100600, 0, 0, 1, owner + 4321, 0, 0, 0, 0, 0)))
    assert read_entry(KEY) is None


def test_a_folder_in_the_entrys_place_is_tolerated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry_path(tmp_path).mkdir(parents=True)
    assert read_entry(KEY) is None
    assert not write_entry(KEY, CUBIN)
    assert list((tmp_path / "kernels").iterdir()) == [entry_path(tmp_path)]  # no temporary file is left


def test_an_unwritable_folder_is_one_logged_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "kernels").write_text("a file where the folder should be")
    assert not write_entry(KEY, CUBIN)
    assert not write_entry(KEY, CUBIN)
    assert len(caplog.records) == 1
    assert f"compiled kernels cannot be kept in {tmp_path / 'kernels'}" in caplog.text
    assert "set SOPRANO_CACHE_DIR" in caplog.text


def test_no_home_folder_is_tolerated(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("SOPRANO_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert read_entry(KEY) is None
    assert not write_entry(KEY, CUBIN)
    assert len(caplog.records) == 1
    assert "there is no home folder" in caplog.text


def test_a_file_in_the_cache_folders_place_is_tolerated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SOPRANO_CACHE_DIR", str(tmp_path / "file"))
    assert read_entry(KEY) is None
    assert not write_entry(KEY, CUBIN)
    assert len(caplog.records) == 1
    assert f"SOPRANO_CACHE_DIR = '{tmp_path / 'file'}' is not a folder" in caplog.text


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.cache_folder() == tmp_path / "kernels"
    monkeypatch.delenv("SOPRANO_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "soprano-cupy" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_folder() == tmp_path / "home" / ".cache" / "soprano-cupy" / "kernels"


def prebuild(folder: Path, source: str, options: tuple[str, ...], version: tuple[int, int] = (12, 9)) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "index.json").write_text(json.dumps({"nvrtc": list(version)}))
    write_entry(entry_key(source, options, version), CUBIN, folder)
    cache._prebuilt_version.cache_clear()


def test_shipped_binaries_are_found_by_the_same_key(tmp_path: Path) -> None:
    folder = tmp_path / "prebuilt"
    options = compile_options("sm_80", [("HEAD_DIM", 64)])
    assert read_prebuilt("source", options, folder) is None
    prebuild(folder, "source", options)
    assert read_prebuilt("source", options, folder) == CUBIN
    assert read_prebuilt("changed source", options, folder) is None
    assert read_prebuilt("source", compile_options("sm_80", [("HEAD_DIM", 128)]), folder) is None


@pytest.mark.parametrize("index", ["", "[]", '{"nvrtc": 12}', '{"nvrtc": ["a", "b"]}', "{}"])
def test_a_broken_index_ships_nothing(tmp_path: Path, index: str) -> None:
    prebuild(tmp_path, "source", ())
    (tmp_path / "index.json").write_text(index)
    cache._prebuilt_version.cache_clear()
    assert read_prebuilt("source", (), tmp_path) is None


class FakeNvrtc:
    """Counts compilations; its cubin names what was compiled."""

    version = (12, 9)
    architectures = (75, 80, 86, 90)

    def __init__(self) -> None:
        self.compiled: list[tuple[str, ...]] = []

    def compile(self, source: str, name: str, options: tuple[str, ...]) -> Binary:
        self.compiled.append(options)
        return Binary(CUBIN + " ".join(options).encode(), "")


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeNvrtc:
    fake = FakeNvrtc()
    monkeypatch.setattr(module, "find_nvrtc", lambda: fake)
    monkeypatch.setattr(module, "joined_source", lambda name: f"text of {name}")
    monkeypatch.setattr(cache, "kernels_folder", lambda: tmp_path)
    cache._prebuilt_version.cache_clear()
    return fake


def test_build_compiles_once_and_then_reads(nvrtc: FakeNvrtc, tmp_path: Path) -> None:
    defines = [("HEAD_DIM", 64)]
    first = module.build("k.cu", defines, (8, 9))
    assert module.build("k.cu", defines, (8, 9)) == first
    assert module.build("k.cu", defines, (8, 6)) == first  # the same sm_86 binary
    assert len(nvrtc.compiled) == 1
    assert "--gpu-architecture=sm_86" in nvrtc.compiled[0]
    (entry,) = (tmp_path / "kernels").iterdir()
    entry.write_bytes(entry.read_bytes()[:-1])
    assert module.build("k.cu", defines, (8, 9)) == first
    assert len(nvrtc.compiled) == 2


def test_build_works_without_a_writable_cache(nvrtc: FakeNvrtc, tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("")
    assert module.build("k.cu", [], (8, 0)) == module.build("k.cu", [], (8, 0))
    assert len(nvrtc.compiled) == 2


def test_specific_architectures_are_exact(nvrtc: FakeNvrtc) -> None:
    module.build("k.cu", [], (9, 0), specific=True)
    assert "--gpu-architecture=sm_90a" in nvrtc.compiled[0]
    with pytest.raises(DeviceError, match="does not compile for sm_100a"):
        module.build("k.cu", [], (10, 0), specific=True)


def test_shipped_binaries_serve_a_machine_without_nvrtc(
    nvrtc: FakeNvrtc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prebuild(tmp_path / "prebuilt", "text of k.cu", compile_options("sm_80"), (12, 4))
    assert module.build("k.cu", [], (8, 0)) == CUBIN
    assert nvrtc.compiled == []

    def missing() -> FakeNvrtc:
        raise DeviceError("NVRTC was not found")

    monkeypatch.setattr(module, "find_nvrtc", missing)
    assert module.build("k.cu", [], (8, 9)) == CUBIN  # sm_80 code runs on 8.9
    with pytest.raises(DeviceError, match="NVRTC was not found"):
        module.build("k.cu", [], (9, 0))
    with pytest.raises(DeviceError, match="NVRTC was not found"):
        module.build("k.cu", [("HEAD_DIM", 64)], (8, 0))


def test_the_header_is_80_bytes() -> None:
    assert len(pack_entry(KEY, b"")) == struct.calcsize("<8s32s32sQ") == 80
