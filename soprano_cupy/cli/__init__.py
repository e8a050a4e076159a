"""The command line: `soprano-cupy COMMAND`, or `python -m soprano_cupy COMMAND`.

Exit codes: 0 done; 1 failed, one line on stderr says what and what to do; 2 wrong usage; 130 Ctrl-C; 141 the
reader of a pipe has gone; 128 + N after signal N. Nothing is left half-written in any of them.

- generate.py: text to WAV files, pipes and speakers
- models.py: list, download, cache, convert
- doctor.py: doctor, devices
- bench.py: how fast this machine speaks
- serve.py: an HTTP server; speech_api.py answers its requests
- console.py, progress.py, options.py: what they share
"""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Sequence

from .. import __version__
from ..errors import ParameterError, SopranoError
from . import bench, doctor, generate, models, serve
from .console import (
    PROGRAM,
    Terminated,
    abandon_stdout,
    complain,
    flush_stdout,
    log_to_stderr,
    say,
    terminations,
    usable_streams,
)
from .options import flags_over_environment

DONE, FAILED, WRONG_USAGE, INTERRUPTED, NO_READER = 0, 1, 2, 130, 141


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options; imports nothing heavy, so that --help is quick."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Text to speech with Soprano, without PyTorch.",
        epilog=f"{PROGRAM} COMMAND --help tells more about a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for group in (generate, models, doctor, bench, serve):
        group.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; argv defaults to the process's arguments."""
    with usable_streams():
        try:
            with terminations():
                return _run(sys.argv[1:] if argv is None else list(argv))
        except KeyboardInterrupt:
            return INTERRUPTED
        except Terminated as signal:
            return 128 + signal.number
        except BrokenPipeError:
            abandon_stdout()
            return NO_READER


def _run(argv: list[str]) -> int:
    verbose = False
    try:
        try:
            options = build_parser().parse_args(argv)
        except SystemExit as end:  # argparse has said everything
            flush_stdout()
            return int(end.code or 0)
        verbose = getattr(options, "verbose", False)
        with log_to_stderr(logging.INFO if verbose else logging.WARNING), flags_over_environment(options):
            code: int = options.run(options)
            return code
    except ParameterError as error:
        complain(str(error))
        return WRONG_USAGE
    except SopranoError as error:
        complain(str(error))
        return FAILED
    except MemoryError as error:
        complain(
            f"out of memory ({str(error) or 'on the CPU'}); close other programs, or use a smaller --dtype or model"
        )
        return FAILED
    except BrokenPipeError:
        raise
    except OSError as error:
        complain(f"{error.filename or 'the system refuses'}: {error.strerror or error}; check it and try again")
        return FAILED
    except Exception as error:
        if verbose:
            say(traceback.format_exc())
        complain(f"unexpected {type(error).__name__}: {error}; please report it with what -v shows")
        return FAILED
