"""Measurements in processes of their own: a script gets a job as JSON and answers with a line of JSON.

A script that tells "audio" on a line of its own has its time from the start of the process to that line taken.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
FIRST_AUDIO = "audio"


class WorkerError(RuntimeError):
    """The script failed, or ran past its time; the message ends with what it said last. stderr has all of it."""


@dataclass(frozen=True)
class Answer:
    """What the script answered, and seconds from its process' start to its first audio if it told."""

    result: dict[str, Any]
    first_audio_s: float | None


def ask(
    script: str,
    job: Mapping[str, Any],
    *,
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
    seconds: float = 200.0,
) -> Answer:
    """Run benchmarks/`script` with `job`; it is ended after `seconds`."""
    command = [python, str(REPOSITORY / "benchmarks" / script), json.dumps(job)]
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    variables = {**os.environ, **(environment or {}), "PYTHONPATH": path}
    first: float | None = None
    lines = [""]
    with tempfile.TemporaryFile("w+") as complaints:
        start = time.perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=complaints, text=True, env=variables, cwd=tempfile.gettempdir()
        ) as process:
            alarm = threading.Timer(seconds, process.kill)
            alarm.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    if line.strip() == FIRST_AUDIO and first is None:
                        first = time.perf_counter() - start
                    lines.append(line)
            finally:
                alarm.cancel()
        if process.returncode:
            complaints.seek(0)
            told = complaints.read().strip()
            sys.stderr.write(f"{told}\n")
            said = " | ".join(told.splitlines()[-3:])
            late = f" after {seconds:.0f} s" if process.returncode == -9 else ""
            raise WorkerError(f"{script} ended with code {process.returncode}{late}: {said}")
    return Answer(parse(lines, script), first)


def parse(lines: list[str], script: str) -> dict[str, Any]:
    """The last line, which must be a JSON object, whatever others were printed before."""
    try:
        result = json.loads(lines[-1])
    except json.JSONDecodeError:
        result = None
    if not isinstance(result, dict):
        raise WorkerError(f"{script} answered {lines[-1].strip()[:80]!r} instead of JSON")
    return result


def tell(result: Mapping[str, Any]) -> None:
    """In the script: the answer, as its last line."""
    sys.stdout.write(f"\n{json.dumps(result)}\n")
    sys.stdout.flush()


def tell_first_audio() -> None:
    """In the script: the first samples are here."""
    sys.stdout.write(f"{FIRST_AUDIO}\n")
    sys.stdout.flush()


def job() -> dict[str, Any]:
    """In the script: what is asked."""
    asked: dict[str, Any] = json.loads(sys.argv[1])
    return asked
