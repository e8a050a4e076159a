"""Kernel sources are found beside or inside the package and joined with their own headers."""

from __future__ import annotations

from pathlib import Path

import pytest

from soprano_cupy.cuda import source
from soprano_cupy.cuda.compiler import compile_options, find_nvrtc
from soprano_cupy.errors import DeviceError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "kernel.cu").write_text('// the kernel\n#include "a.cuh"\n#include "b.cuh"\n#include <system>\nlast\n')
    (tmp_path / "a.cuh").write_text('#pragma once\n#include "b.cuh"\nin a\n')
    (tmp_path / "b.cuh").write_text("#pragma once\nin b\n")
    return tmp_path


def test_headers_are_joined_once_with_their_lines(folder: Path) -> None:
    assert source.joined_source("kernel.cu", folder).split("\n") == [
        '#line 1 "kernel.cu"',
        "// the kernel",
        '#line 1 "a.cuh"',
        "",
        '#line 1 "b.cuh"',
        "",
        "in b",
        '#line 3 "a.cuh"',
        "in a",
        '#line 3 "kernel.cu"',
        "",
        "#include <system>",
        "last",
        "",
    ]


def test_a_missing_header_is_named_with_the_file_that_wants_it(folder: Path) -> None:
    (folder / "b.cuh").unlink()
    with pytest.raises(DeviceError, match=r"cannot read .*b\.cuh, included by a\.cuh; install soprano-cupy again"):
        source.joined_source("kernel.cu", folder)


def test_kernels_inside_the_package_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel carries them inside, a checkout beside the package."""
    inside, beside = tmp_path / "package" / "kernels", tmp_path / "kernels"
    monkeypatch.setattr(source, "__file__", str(tmp_path / "package" / "cuda" / "source.py"))
    find = source.kernels_folder.__wrapped__
    with pytest.raises(DeviceError, match="the CUDA sources are missing"):
        find()
    for folder in (beside, inside):
        folder.mkdir(parents=True)
        (folder / "attention_params.cuh").touch()
        assert find() == folder


def test_an_error_in_a_header_is_reported_at_its_own_line(folder: Path) -> None:
    try:
        nvrtc = find_nvrtc()
    except DeviceError as error:
        pytest.skip(str(error))
    (folder / "kernel.cu").write_text('#include "a.cuh"\nint last;\n')
    (folder / "a.cuh").write_text("#pragma once\nint first;\nint second = wrong;\n")
    with pytest.raises(DeviceError, match=r'kernel\.cu does not compile .*a\.cuh\(3\): error: identifier "wrong"'):
        nvrtc.compile(source.joined_source("kernel.cu", folder), "kernel.cu", compile_options("sm_80"))
