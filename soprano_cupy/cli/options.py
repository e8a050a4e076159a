"""Options that several commands share, and the voice that they name."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import settings
from ..errors import ParameterError
from .console import say
from .progress import Progress

if TYPE_CHECKING:
    from ..pipeline import SopranoTTS
    from ..runner import LanguageModelRunner

_VARIABLES = {
    "device": "SOPRANO_DEVICE",
    "attention": "SOPRANO_ATTENTION",
    "dtype": "SOPRANO_DTYPE",
}


def add_voice_options(parser: argparse.ArgumentParser) -> None:
    """-m, -d, --attention and --dtype: which checkpoint speaks, where and how."""
    group = parser.add_argument_group("voice")
    group.add_argument(
        "-m",
        "--model",
        help='checkpoint folder, hub id or "mini", the bundled voice; default: SOPRANO_MODEL, else the best present',
    )
    group.add_argument("-d", "--device", help="auto, cpu, cuda or cuda:N; default: SOPRANO_DEVICE, else auto")
    group.add_argument(
        "--attention", choices=settings.ATTENTIONS, help="which attention; default: SOPRANO_ATTENTION, else auto"
    )
    group.add_argument(
        "--dtype", choices=settings.DTYPES, help="what weights are kept in; default: SOPRANO_DTYPE, else auto"
    )


def add_devices_option(parser: argparse.ArgumentParser) -> None:
    """--devices: several that share the work, for commands that go through `SopranoTTS.submit`."""
    parser.add_argument(
        "--devices",
        metavar="D,D",
        help="instead of --device: those that share the work, such as cuda:0,cuda:1; several GPUs have a process each",
    )


def named_devices(options: argparse.Namespace) -> list[str] | None:
    """What --devices names, each as `cpu` or `cuda:N`; None where it is not given.

    `ParameterError` for what is no such list, `DeviceError` for a device that is not there.
    """
    text = options.devices
    if text is None:
        return None
    if options.device is not None:
        raise ParameterError("--device and --devices name the same thing; give only one of them")
    words = [word.strip() for word in text.split(",")]
    try:
        for word in words:
            settings.device(word)
    except ParameterError as error:
        raise ParameterError(f"--devices {text!r}: {error}, with commas between, such as cuda:0,cuda:1") from None
    from ..device import resolve_devices

    return resolve_devices(words, f"--devices {text!r}")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are drawn; a value that is left out takes the library's default."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, metavar="T", help="0 (default) always takes the likeliest token")
    group.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that reach P (0.95)")
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1 avoids tokens used before (1.2)")
    group.add_argument("--retries", type=int, metavar="N", help="make a stuck sentence again up to N times (0)")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same voice; default: a fresh one")


def sampling_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments for `SopranoTTS` that were given; `ParameterError` for one out of range."""
    from ..sampling import SamplingParams

    names = ("temperature", "top_p", "repetition_penalty", "seed")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    SamplingParams(**given)
    if options.retries is not None:
        if not 0 <= options.retries <= 100:
            raise ParameterError(f"--retries {options.retries} must be from 0 to 100")
        given["retries"] = options.retries
    return given


@contextlib.contextmanager
def flags_over_environment(options: argparse.Namespace) -> Iterator[None]:
    """Put given flags in the place of their variables, so that an explicit `auto` wins as well."""
    given = {
        variable: getattr(options, flag)
        for flag, variable in _VARIABLES.items()
        if getattr(options, flag, None) is not None
    }
    before = {variable: os.environ.get(variable) for variable in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for variable, value in before.items():
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value


def open_voice(options: argparse.Namespace, devices: Sequence[str] | None = None) -> SopranoTTS:
    """Load the voice; when none was named, one line says which speaks and how to get a better one.

    devices: those of `submit`, where there are several; the first of them is the voice's own.
    """
    settings.device()  # wrong values fail here, before anything heavy is imported
    settings.attention()
    settings.dtype()
    settings.threads()
    named = options.model if options.model is not None else settings.model()
    if named is not None:
        fetch_if_missing(named)
    from ..pipeline import SopranoTTS

    begin = time.perf_counter()
    with _without_info("soprano_cupy.pipeline", "soprano_cupy.qwen3"):  # `describe` says the same in order
        tts = SopranoTTS(options.model, devices[0] if devices else "auto", devices=devices)
    if getattr(options, "verbose", False):
        describe(tts, time.perf_counter() - begin)
    elif named is None:
        say(f"voice {tts.model.name}: {tts.model.reason}")
    return tts


@contextlib.contextmanager
def _without_info(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def describe(tts: SopranoTTS, load_s: float) -> None:
    """What speaks, on what, and why."""
    runner = tts.engine.language_model
    say(f"voice      {tts.model.name}: {tts.model.reason}; loaded in {load_s:.2f} s")
    say(f"device     {tts.device}: {tts.device_reason}")
    say(f"attention  {runner.attention}, weights {runner.dtype}: {runner.reason}")
    say(f"decoder    weights {tts.engine.decoder.dtype}: {tts.engine.decoder.reason}")
    for line in tokens_by(runner):
        say(f"tokens     {line}")
    if tts.device != "cpu" and hasattr(runner, "nbytes"):
        planned = runner.nbytes + getattr(tts.engine.decoder, "nbytes", 0)
        say(f"memory     {planned / 1e6:.0f} MB planned on the GPU, beside CUDA's own")


def tokens_by(runner: LanguageModelRunner) -> list[str]:
    """What computes the tokens of one voice and of a few, and why, where there is a choice."""
    path = getattr(runner, "persistent", None)
    return [] if path is None else list(path.describe())


def fetch_if_missing(name: str) -> None:
    """Download a model of the hub that is not on this machine, with a progress line."""
    from ..checkpoint import hub

    if re.fullmatch(hub.MODEL_ID, name) and not Path(name).exists() and hub.cached_folder(name) is None:
        download(name)


def download(name: str) -> Path:
    """`hub.download` with a progress line on a terminal."""
    from ..checkpoint import hub

    state: list[tuple[float | None, str]] = [(None, f"asking the hub for {name}")]

    def report(file: str, done: int, total: int) -> None:
        state[0] = (done / max(total, 1), f"{file}  {done / 1e6:.1f} of {total / 1e6:.1f} MB")

    with Progress(lambda: state[0]):
        return hub.download(name, progress=report)
