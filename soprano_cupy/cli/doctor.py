"""`soprano-cupy doctor` and `devices`: what is there, what would be used and why, and what to do about the rest."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__, settings
from ..errors import SopranoError
from .console import echo, one_line
from .options import add_voice_options, tokens_by

WELL, ABSENT, WRONG = "ok", "--", "!!"  # ABSENT: not there, and not needed to speak
SENTENCE = "This machine can speak."


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    state: str
    name: str
    text: str


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check the installation and say a sentence with it",
        description="Check everything that speaking needs, one line each; the last line is an attempt to speak.",
        epilog="exit code: 0 when speech works, 1 when it does not",
        allow_abbrev=False,
    )
    add_voice_options(parser)
    parser.set_defaults(run=run_doctor)
    parser = commands.add_parser(
        "devices",
        help="show the devices that can compute",
        description="Show the devices that can compute; * marks the one that auto takes.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_devices)


def run_doctor(options: argparse.Namespace) -> int:
    """Print each finding as it comes; nothing that breaks on the way ends the report."""
    well = False
    for name, check in (*_CHECKS, ("speech", lambda: _speech(options))):
        for finding in _guarded(name, check):
            echo(f"{finding.state}  {finding.name:<13} {one_line(finding.text)}")
            well = finding.state == WELL  # the last one is the attempt to speak
    return 0 if well else 1


def run_devices(options: argparse.Namespace) -> int:
    from ..device import cuda_problem, resolve_device

    chosen, reason = resolve_device(settings.device())
    rows = [("cpu", f"{processor()}, {len(os.sched_getaffinity(0))} cores usable")]
    problem = cuda_problem()
    if problem is None:
        rows += [(f"cuda:{index}", text) for index, text in enumerate(_gpus())]
    for name, text in rows:
        echo(f"{'*' if name == chosen else ' '} {name:<8} {text}")
    if problem is not None:
        echo(f"  cuda     none: {problem}")
    echo(f"{chosen} is used: {reason}")
    return 0


def _guarded(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except SopranoError as error:
        yield Finding(WRONG, name, str(error))
    except Exception as error:  # a report that dies half-way helps nobody
        yield Finding(WRONG, name, f"{type(error).__name__}: {error}")


def _package() -> Iterator[Finding]:
    folder = Path(__file__).resolve().parents[1]
    yield Finding(WELL, "soprano-cupy", f"{__version__} in {folder}")
    yield Finding(WELL, "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    built = {path.name.partition(".")[0] for part in ("cpu", "gpu") for path in (folder / part).glob("*.so")}
    missing = sorted({path.stem for part in ("cpu", "gpu") for path in (folder / part).glob("*.pyx")} - built)
    if missing or not built:
        text = f"{', '.join(missing) or 'none'} not compiled; install again where there is a C compiler (gcc)"
        yield Finding(WRONG, "C extensions", text)
    else:
        yield Finding(WELL, "C extensions", ", ".join(sorted(built)))


def _libraries() -> Iterator[Finding]:
    for label, name in (("NumPy", "numpy"), ("tokenizers", "tokenizers"), ("hub client", "huggingface_hub")):
        try:
            __import__(name)
            yield Finding(WELL, label, importlib.metadata.version(name))
        except Exception as error:
            yield Finding(WRONG, label, f"cannot be imported ({error}); pip install --force-reinstall {name}")


def _gpu() -> Iterator[Finding]:
    """CuPy, the driver, the GPUs and the CUDA libraries that speaking on them takes."""
    from ..device import cuda_problem

    try:
        import cupy
    except ImportError:
        yield Finding(ABSENT, "CuPy", f"{cuda_problem()}; without it the CPU speaks")
        return
    yield Finding(WELL, "CuPy", cupy.__version__)
    problem = cuda_problem()
    if problem is not None:
        yield Finding(ABSENT, "GPU", f"{problem}; without one the CPU speaks")
        return
    runtime = cupy.cuda.runtime
    driver, built = _version(runtime.driverGetVersion()), _version(runtime.runtimeGetVersion())
    yield Finding(WELL, "driver", f"{_driver_version()}, for CUDA up to {driver}; CuPy was built with CUDA {built}")
    for index, text in enumerate(_gpus()):
        yield Finding(WELL, f"cuda:{index}", text)
    if (count := runtime.getDeviceCount()) > 1:
        names = ", ".join(f'"cuda:{index}"' for index in range(count))
        yield Finding(WELL, "several GPUs", f"SopranoTTS(devices=[{names}]).submit has a process for each")
    yield from _cuda_libraries(cupy)


def _cuda_libraries(cupy: Any) -> Iterator[Finding]:
    extra = f"cuda{cupy.cuda.runtime.runtimeGetVersion() // 1000}"
    advice = f"pip install 'soprano-cupy[{extra}]'"
    try:
        from ..cuda.compiler import find_nvrtc

        nvrtc = find_nvrtc()
        yield Finding(WELL, "NVRTC", "{}.{}, {}".format(*nvrtc.version, nvrtc.path))
    except Exception as error:
        yield Finding(WRONG, "NVRTC", f"{error}; {advice}")
    try:
        ones = cupy.ones((2, 2), "float32")
        if (ones @ ones).sum().item() != 8:
            raise ArithmeticError("a product of two matrices is wrong")
        version = cupy.cuda.cublas.getVersion(cupy.cuda.device.get_cublas_handle())
        yield Finding(WELL, "cuBLAS", f"{version // 10000}.{version // 100 % 100}")
    except Exception as error:
        yield Finding(WRONG, "cuBLAS", f"{error}; {advice}")


def _folders() -> Iterator[Finding]:
    from ..checkpoint import hub
    from ..cuda import cache

    for name, folder in (("voice", hub.cache_folder()), ("kernel", cache.cache_folder())):
        if folder is None:
            yield Finding(WRONG, f"{name} folder", "there is no home folder; set SOPRANO_CACHE_DIR")
            continue
        place = next(path for path in (folder, *folder.parents) if path.exists())
        try:
            with tempfile.TemporaryFile(dir=place):
                yield Finding(WELL, f"{name} folder", f"{folder} can be written to")
        except OSError as error:
            text = f"{folder} cannot be written to ({error.strerror}); set SOPRANO_CACHE_DIR"
            yield Finding(WRONG, f"{name} folder", text)


def _voices() -> Iterator[Finding]:
    from ..checkpoint import hub
    from ..checkpoint.resolve import BUNDLED, resolve_model

    yield Finding(WELL, "voice", f"{resolve_model(BUNDLED).name}: bundled")
    cached = {model.model_id: model for model in hub.cached_models()}
    for name, model in cached.items():
        if model.complete:
            yield Finding(WELL, "voice", f"{name}: downloaded")
        else:
            yield Finding(ABSENT, "voice", f"{name}: incomplete; soprano-cupy download {name} continues")
    if hub.DEFAULT_MODEL not in cached:
        text = f"{hub.DEFAULT_MODEL}: not downloaded; soprano-cupy download fetches it"
        yield Finding(ABSENT, "voice", text)


def _speech(options: argparse.Namespace) -> Iterator[Finding]:
    """What would be used, why, and whether it speaks."""
    from ..pipeline import SopranoTTS

    tts = SopranoTTS(options.model)
    runner = tts.engine.language_model
    yield Finding(WELL, "would use", f"{tts.model.name}: {tts.model.reason}")
    yield Finding(WELL, "device", f"{tts.device}: {tts.device_reason}")
    yield Finding(WELL, "attention", f"{runner.attention}, weights {runner.dtype}: {runner.reason}")
    for line in tokens_by(runner):
        yield Finding(WELL, "tokens", line)
    yield Finding(WELL, "decoder", f"weights {tts.engine.decoder.dtype}: {tts.engine.decoder.reason}")
    audio = tts.infer(SENTENCE)
    loudest = float(abs(audio).max()) if len(audio) else 0.0
    if not 0.0 < loudest < float("inf"):
        yield Finding(WRONG, "speech", "the voice made no sound; download it again, or try --device cpu")
        return
    failure = getattr(getattr(runner, "persistent", None), "failure", None)
    if failure is not None:
        yield Finding(WRONG, "tokens", failure)
    spoken = f"{tts.timings.audio_s:.2f} s of sound made in {tts.timings.total_s:.2f} s"
    yield Finding(WELL, "speech", f"works: {spoken}")


def _gpus() -> Iterator[str]:
    """Name, memory and compute capability of each CUDA device."""
    import cupy

    for index in range(cupy.cuda.runtime.getDeviceCount()):
        properties = cupy.cuda.runtime.getDeviceProperties(index)
        name = properties["name"].decode(errors="replace")
        memory = properties["totalGlobalMem"] / 2**30
        yield f"{name}, {memory:.0f} GiB, compute capability {properties['major']}.{properties['minor']}"


def _version(number: int) -> str:
    """CUDA's 12080 as 12.8."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _driver_version() -> str:
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return "version unknown"


def processor() -> str:
    """The processor's name as Linux gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


_CHECKS: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
    ("package", _package),
    ("libraries", _libraries),
    ("GPU", _gpu),
    ("folders", _folders),
    ("voices", _voices),
)
