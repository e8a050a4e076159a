"""`soprano-cupy generate`: text from an argument, a file or stdin to WAV files, pipes and speakers."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ParameterError
from .console import say
from .options import add_sampling_options, add_voice_options, open_voice, sampling_arguments
from .outputs import Output, StandardOutput, WavFile, WavFolder
from .progress import Progress
from .sources import read_lines, read_text

if TYPE_CHECKING:
    from ..engine import Timings
    from ..pipeline import SopranoTTS

LINES_AT_ONCE = 64  # texts given to the voice together: their sound is in memory until their files are written
SECONDS_PER_CHARACTER = 0.065  # of English read aloud: for the progress bar only

EPILOG = """\
examples:
  soprano-cupy generate -t "Hello there." -o hello.wav
  soprano-cupy generate -f book.txt -o book.wav -m ekwek/Soprano-1.1-80M
  soprano-cupy generate -f sentences.txt --lines -o folder/
  echo "Hello." | soprano-cupy generate -o - > hello.wav
  soprano-cupy generate -t "Hello." --stream -o - | aplay -f S16_LE -r 32000 -c 1
"""


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="speak text into a WAV file, a pipe or the speakers",
        description="Speak text. The result is mono sound at 32 kHz.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    text = parser.add_argument_group("text").add_mutually_exclusive_group()
    text.add_argument("-t", "--text", help="the text itself; without -t and -f it is read from standard input")
    text.add_argument("-f", "--file", help="a UTF-8 text file; - is standard input")
    output = parser.add_argument_group("output (-o, --play or both)")
    output.add_argument(
        "-o",
        "--output",
        help="a WAV file, replaced if it is there; a folder, which gets 0.wav; - for standard output",
    )
    output.add_argument("--lines", action="store_true", help="one sample a line: -o FOLDER gets 0.wav, 1.wav, ...")
    output.add_argument("--float", action="store_true", help="32-bit floats instead of 16-bit integers")
    output.add_argument(
        "--stream", action="store_true", help="hand out sound as it is made; with -o - as raw samples without a header"
    )
    output.add_argument("--play", action="store_true", help="play through the speakers (needs sounddevice)")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is used, why, and how long it took")
    add_voice_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Everything that can be wrong with the request is found before a model is loaded."""
    _check_usage(options)
    sampling = sampling_arguments(options)
    if options.lines:
        _speak_lines(options, sampling)
    else:
        _speak_text(options, sampling)
    return 0


def _check_usage(options: argparse.Namespace) -> None:
    if options.output is None and not options.play:
        raise ParameterError("say where the sound goes: -o FILE.wav, -o FOLDER/, -o - for standard output, or --play")
    if options.output == "":
        raise ParameterError("-o is empty; name a file, a folder or -")
    if options.text is None and options.file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise ParameterError('give a text: -t "Hello.", -f FILE, or pipe one in')
    if options.lines and (options.stream or options.play or options.output == "-"):
        raise ParameterError("--lines writes one file a line; use it with -o FOLDER and without --stream and --play")
    if options.lines and options.output.lower().endswith(".wav") and not Path(options.output).is_dir():
        raise ParameterError(f"--lines writes several files: -o {options.output} must be a folder")


def _speak_text(options: argparse.Namespace, sampling: dict[str, Any]) -> None:
    text = read_text(options)
    outputs = _outputs(options)
    with ExitStack() as stack:
        if options.play:
            from ..playback import Player

            outputs.append(stack.enter_context(Player()))
        tts = open_voice(options)
        meter = _Meter(tts, len(text) * SECONDS_PER_CHARACTER)
        with Progress(meter.state):
            for chunk in _chunks(tts, text, sampling, stream=options.stream):
                meter.made_s += len(chunk) / _rate_hz()
                for output in outputs:
                    output.write(chunk)
        for output in outputs:
            output.finish()
    if options.verbose:
        _report(tts.timings)
        for output in outputs:
            say(f"written    {output}")


def _chunks(tts: SopranoTTS, text: str, sampling: dict[str, Any], *, stream: bool) -> Iterator[Any]:
    if stream:
        yield from tts.infer_stream(text, **sampling)
    else:
        yield tts.infer(text, **sampling)


def _outputs(options: argparse.Namespace) -> list[Output]:
    if options.output is None:
        return []
    if options.output == "-":
        return [StandardOutput(raw=options.stream, as_float=options.float)]
    path = Path(options.output)
    if options.output.endswith("/") or path.is_dir():
        return [WavFolder(path, as_float=options.float)]
    return [WavFile(path, as_float=options.float)]


def _speak_lines(options: argparse.Namespace, sampling: dict[str, Any]) -> None:
    """Line by line, in groups that the voice speaks together; each file is whole when it appears."""
    from ..engine import Timings

    lines = read_lines(options)
    folder = WavFolder(Path(options.output), as_float=options.float)
    tts = open_voice(options)
    total = Timings()
    with Progress(
        lambda: (folder.count / len(lines), f"{folder.count} of {len(lines)} lines, {total.audio_s:.0f} s of sound")
    ):
        for start in range(0, len(lines), LINES_AT_ONCE):
            for samples in tts.infer_batch(lines[start : start + LINES_AT_ONCE], **sampling):
                folder.write(samples)
                folder.finish()
            _add(total, tts.timings)
    if options.verbose:
        _report(total)
        say(f"written    {folder}")


def _add(total: Timings, part: Timings) -> None:
    total.text_s += part.text_s
    total.language_model_s += part.language_model_s
    total.decoder_s += part.decoder_s
    total.tokens += part.tokens
    total.samples += part.samples


class _Meter:
    """What the progress line says while one text is spoken; its end is a guess from the text's length."""

    def __init__(self, tts: SopranoTTS, expected_s: float) -> None:
        self._tts, self._expected_s = tts, expected_s
        self._begin = time.perf_counter()
        self.made_s = 0.0

    def state(self) -> tuple[float | None, str]:
        made_s = max(self.made_s, self._tts.timings.audio_s)
        if made_s == 0:
            return None, f"speaking, {time.perf_counter() - self._begin:.1f} s"
        return min(made_s / self._expected_s, 0.99), f"{made_s:.0f} of about {self._expected_s:.0f} s of sound"


def _report(timings: Timings) -> None:
    rate = timings.tokens / timings.language_model_s if timings.language_model_s else 0.0
    say(f"text       {timings.text_s * 1e3:.1f} ms")
    say(f"language   {timings.language_model_s:.3f} s for {timings.tokens} tokens: {rate:.0f} tokens/s")
    say(f"decoder    {timings.decoder_s:.3f} s for {timings.samples} samples")
    if timings.first_audio_s is not None:
        say(f"first      sound after {timings.first_audio_s * 1e3:.0f} ms")
    say(
        f"sound      {timings.audio_s:.2f} s made in {timings.total_s:.2f} s: "
        f"{timings.real_time_factor:.1f} times real time"
    )


def _rate_hz() -> int:
    from ..config import SAMPLE_RATE_HZ

    return SAMPLE_RATE_HZ
