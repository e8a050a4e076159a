"""Where `generate` takes its text from, checked before anything else starts."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from ..errors import ParameterError, TextError
from .console import log_only_success

MAX_TEXT_BYTES = 16 << 20  # about twelve days of speech


def read_text(options: argparse.Namespace) -> str:
    """The whole text of -t, -f or standard input; `TextError` unless something in it can be spoken."""
    text, name = _read(options)
    check_speakable(text, name)
    return text


def read_lines(options: argparse.Namespace) -> list[str]:
    """The lines that are not blank; `TextError` names the first that cannot be spoken, counted from 1."""
    text, name = _read(options)
    lines = []
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if line.strip():
            check_speakable(line, f"line {number} of {name}")
            lines.append(line)
    if not lines:
        raise TextError(f"{name} is empty; give at least one line with a word or number")
    return lines


def check_speakable(text: str, name: str) -> None:
    """`TextError` when the front end makes no prompt of the text."""
    from ..text import build_prompts

    if not text.strip():
        raise TextError(f"{name} is empty; give at least one word or number")
    with log_only_success():
        if not build_prompts(text):
            raise TextError(f"{name} holds nothing that can be spoken; give at least one word or number")


def _read(options: argparse.Namespace) -> tuple[str, str]:
    """The text and what to call it in messages."""
    if options.text is not None:
        try:
            options.text.encode()
        except UnicodeEncodeError:  # bytes of the command line that are no characters
            raise TextError("the text of -t is not valid UTF-8; set a UTF-8 locale or use -f") from None
        return options.text, "the text of -t"
    if options.file in (None, "-"):
        return _decode(_read_stdin(), "standard input"), "standard input"
    return _decode(_read_file(options.file), options.file), options.file


def _read_stdin() -> bytes:
    if sys.stdin is None:
        raise ParameterError('standard input is closed; give a text with -t "Hello." or -f FILE')
    try:
        return sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise TextError(f"cannot read standard input: {error.strerror or error}; use -t or -f") from error


def _read_file(name: str) -> bytes:
    if not name:
        raise ParameterError("-f is empty; name a text file, or - for standard input")
    try:
        with Path(name).open("rb") as file:
            return file.read(MAX_TEXT_BYTES + 1)
    except FileNotFoundError:
        raise TextError(f"there is no file {name}; check its name, or give the text itself with -t") from None
    except IsADirectoryError:
        raise TextError(f"{name} is a folder; name a text file in it") from None
    except (OSError, ValueError) as error:
        raise TextError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}; check the file") from error


def _decode(data: bytes, name: str) -> str:
    if len(data) > MAX_TEXT_BYTES:
        raise TextError(f"{name} holds more than {MAX_TEXT_BYTES >> 20} MB; split the text over several runs")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise TextError(f"{name} is UTF-16, not UTF-8; convert it with: iconv -f UTF-16 -t UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TextError(
            f"{name} is not valid UTF-8 (line {line}, byte {error.start}); convert it, for example with: "
            "iconv -f LATIN1 -t UTF-8"
        ) from None
