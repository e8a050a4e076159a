"""The decoder's kernels compile for every architecture, without spills and within their registers; no GPU needed."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from soprano_cupy.config import DecoderConfig
from soprano_cupy.cuda.compiler import Nvrtc, compile_options
from soprano_cupy.cuda.source import joined_source
from soprano_cupy.gpu.launch import Launch
from soprano_cupy.gpu.vocos_plan import Facts, unsupported, variants
from soprano_cupy.testing import SOPRANO_1_1_80M_DECODER, SOPRANO_80M_DECODER

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
SMALL = DecoderConfig(16, 40, 72, 1, 1, 7, 64, 16)
LARGE = DecoderConfig(512, 1024, 4096, 1, 5, 7, 4096, 1024)

REGISTERS = 65_536  # of one multiprocessor
KERNEL = re.compile(r"Compiling entry function '(\w+)'")
USED = re.compile(r"Used (\d+) registers")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
WARNINGS = re.compile(r"warning", re.IGNORECASE)

# Warps that a multiprocessor must hold at once, for enough loads to be under way: 16 with the 10 of 16 bytes that each
# thread of a convolution has asked for are 80 KB.
RESIDENT_WARPS = 16
RESIDENT_WARPS_OF_TRANSFORM_FROM_100 = 16
RESIDENT_WARPS_OF_TRANSFORM = 32


def launches(config: DecoderConfig, architecture: int) -> list[Launch]:
    """Every kernel of a decoder but its products."""
    both = variants(config, Facts(divmod(architecture, 10), 132))
    return [launch for launch in both if launch.source.startswith("vocos_")]


def cases() -> Iterator[tuple[int, str, Launch]]:
    """(architecture, decoder, a launch of each module); the odd decoders where the compiler differs most."""
    for architecture in ARCHITECTURES:
        named = {"1.1-80M": SOPRANO_1_1_80M_DECODER}
        if architecture in (75, 90, 120):
            named |= {"80M": SOPRANO_80M_DECODER, "small": SMALL, "large": LARGE}
        seen = set()
        for name, config in named.items():
            for launch in launches(config, architecture):
                if (launch.source, launch.defines) not in seen:
                    seen.add((launch.source, launch.defines))
                    yield architecture, name, launch


CASES = list(cases())


@pytest.mark.parametrize(
    ("architecture", "name", "launch"),
    CASES,
    ids=[f"sm_{a}-{n}-{x.source}-{dict(x.defines).get('STREAM', '')}" for a, n, x in CASES],
)
def test_compiles_within_its_registers(nvrtc: Nvrtc, architecture: int, name: str, launch: Launch) -> None:
    if architecture not in nvrtc.architectures:
        pytest.skip("NVRTC {}.{} does not compile for {}".format(*nvrtc.version, architecture))
    options = compile_options(f"sm_{architecture}", launch.defines)
    log = nvrtc.compile(joined_source(launch.source), launch.source, options).log
    kernels, registers, frames = KERNEL.findall(log), USED.findall(log), SPILLS.findall(log)
    assert len(kernels) == len(registers) == len(frames) == (1 if "istft" in launch.source else 5)
    assert set(frames) == {("0", "0", "0")}, log
    assert not WARNINGS.search(log), log
    warps = RESIDENT_WARPS
    if launch.kernel == "vocos_istft":
        warps = RESIDENT_WARPS_OF_TRANSFORM_FROM_100 if architecture >= 100 else RESIDENT_WARPS_OF_TRANSFORM
    if name in ("small", "large") or dict(launch.defines).get("STREAM"):
        warps = -(-max(launch.threads, 128) // 32)  # one thread block at least
    for kernel, used in zip(kernels, registers, strict=True):
        assert int(used) <= min(255, REGISTERS // 32 // warps // 8 * 8), (kernel, used)


def test_launches_of_the_published_decoder() -> None:
    """A block is three launches, of which two are products; three more and two products stand around the blocks."""
    every = variants(SOPRANO_1_1_80M_DECODER, Facts((9, 0), 132), streams=())
    whole = [x for x in every if x.source.startswith("vocos_")]
    kernels = [x.kernel for x in whole]
    assert kernels.count("vocos_convolution") == 8
    assert [k for k in kernels if k != "vocos_convolution"] == [
        "vocos_states",
        "vocos_embed",
        "vocos_norm",
        "vocos_istft",
    ]
    (transform,) = [x for x in whole if x.kernel == "vocos_istft"]
    assert (transform.threads, transform.shared_bytes) == (512, 36_864)
    assert {x.threads for x in whole} == {128, 192, 512}


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (DecoderConfig(20, 40, 72, 1, 1), "input size 20"),
        (DecoderConfig(16, 44, 72, 1, 1), "dim 44"),
        (DecoderConfig(16, 40, 70, 1, 1), "inner 70"),
        (DecoderConfig(16, 8192, 72, 1, 1), "dim 8192"),
        (DecoderConfig(16, 40, 72, 1, 1, 3, 96, 24), "n_fft 96"),
        (DecoderConfig(16, 40, 72, 1, 1, 3, 8192, 2048), "n_fft 8192"),
        (DecoderConfig(16, 40, 72, 1, 1, 3, 64, 32), "hop 32"),
        (DecoderConfig(16, 40, 72, 300, 1), "300 frames"),
    ],
)
def test_decoders_that_the_kernels_cannot_run(config: DecoderConfig, problem: str) -> None:
    reason = unsupported(config)
    assert reason is not None
    assert problem in reason
    assert unsupported(SOPRANO_80M_DECODER) is None
