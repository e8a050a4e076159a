"""NVRTC found and called without CuPy and without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from soprano_cupy.cuda import compiler
from soprano_cupy.cuda.compiler import Nvrtc, architecture_for, compile_options, find_nvrtc
from soprano_cupy.errors import DeviceError

KERNEL = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= FACTOR; }'


@pytest.fixture
def nvrtc() -> Nvrtc:
    try:
        return find_nvrtc()
    except DeviceError as error:
        pytest.skip(str(error))


def test_options() -> None:
    options = compile_options("sm_90a", [("HEAD_DIM", 128), ("CAUSAL", 1)])
    assert options[:2] == ("-std=c++17", "-default-device")
    assert options[-3:] == ("--gpu-architecture=sm_90a", "-DHEAD_DIM=128", "-DCAUSAL=1")


def test_a_kernel_compiles_to_an_elf_file_with_its_log(nvrtc: Nvrtc) -> None:
    architecture = nvrtc.architectures[-1]
    binary = nvrtc.compile(KERNEL, "twice.cu", compile_options(f"sm_{architecture}", [("FACTOR", 2)]))
    assert binary.cubin.startswith(b"\x7fELF")
    assert b"twice" in binary.cubin
    assert "0 bytes spill stores" in binary.log


def test_a_compile_error_names_the_file_and_the_line(nvrtc: Nvrtc) -> None:
    with pytest.raises(DeviceError, match=r'twice\.cu does not compile .*twice\.cu\(1\): error: .*"FACTOR"'):
        nvrtc.compile(KERNEL, "twice.cu", compile_options("sm_80"))


def test_an_architecture_that_does_not_exist(nvrtc: Nvrtc) -> None:
    with pytest.raises(DeviceError, match=r"does not compile .*gpu-architecture"):
        nvrtc.compile(KERNEL, "twice.cu", compile_options("sm_31", [("FACTOR", 2)]))


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), 75), ((8, 0), 80), ((8, 7), 86), ((8, 9), 89), ((9, 0), 90), ((12, 1), 120)]
)
def test_the_architecture_for_a_gpu(capability: tuple[int, int], expected: int) -> None:
    assert architecture_for(capability, (75, 80, 86, 89, 90, 100, 120)) == expected


@pytest.mark.parametrize("capability", [(7, 0), (6, 1), (13, 0)])
def test_a_gpu_that_the_compiler_does_not_know(capability: tuple[int, int]) -> None:
    with pytest.raises(DeviceError, match=r"compute capability {}\.{}.*install the CuPy of".format(*capability)):
        architecture_for(capability, (75, 80, 90))


def test_no_nvrtc_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_found", None)
    monkeypatch.setattr(compiler, "_candidates", lambda: iter(["libnothing.so.12", "/nowhere/libnvrtc.so.12"]))
    with pytest.raises(DeviceError, match="NVRTC, CUDA's run-time compiler, was not found; install it with: pip"):
        find_nvrtc()


def test_a_library_that_is_not_nvrtc_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "libnvrtc.so.12").write_bytes(b"not a library")
    monkeypatch.setattr(compiler, "_found", None)
    monkeypatch.setattr(compiler, "_candidates", lambda: iter([str(tmp_path / "libnvrtc.so.12"), "libm.so.6"]))
    with pytest.raises(DeviceError, match="was not found"):
        find_nvrtc()
