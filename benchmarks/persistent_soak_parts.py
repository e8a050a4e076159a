"""What the soak of the persistent kernel found, put together: of several processes, and of several runs.

A part is what one process found: COUNTED, `seconds`, `kernel_seconds`, `voices`, `complaints`, and whether it came to
its end (`complete`). Result files of runs hold the sum of their parts, and list the runs that they are made of.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import REPOSITORY
from soprano_cupy.checkpoint.write_file import replace_file
from soprano_cupy.crowd.plan import only_this

WHAT = "persistent_soak"
PROBLEMS = ("hangs", "mismatches", "errors", "fallbacks")
COUNTED = ("prompts", "tokens", "repeats", "checked against graphs", "given up", *PROBLEMS)
RUN = ("commit", "date", "gpu", "gpus", "threads", "side_by_side", "processes", "seed", "complete", "seconds",
       "kernel_seconds", "prompts")  # fmt: skip
LOOK_S = 0.5
LATE_S = 900.0  # that a process may take beside its soaking: to load and compile, and to end

Found = dict[str, Any]
Save = Callable[[Found], None]


def together(parts: Sequence[Found], seconds: Callable[[Iterable[float]], float]) -> Found:
    """The parts' counts and kernel seconds in sum; seconds: `max` of parts beside each other, `sum` of others."""
    return {
        "complete": all(part["complete"] for part in parts),
        "seconds": round(seconds([part["seconds"] for part in parts]), 1) if parts else 0.0,
        "kernel_seconds": round(sum(part["kernel_seconds"] for part in parts), 1),
        "voices": sorted({voices for part in parts for voices in part["voices"]}),
        **{name: sum(part[name] for part in parts) for name in COUNTED},
        "complaints": [complaint for part in parts for complaint in part["complaints"]],
    }


# ---- earlier runs ----


def read_earlier(paths: Sequence[Path]) -> list[Found]:
    """Result files of earlier runs; `ValueError`, in one line, for anything else and for a run that comes twice."""
    found = [_read(path) for path in paths]
    runs = [json.dumps(run, sort_keys=True) for result in found for run in result["runs"]]
    if len(set(runs)) < len(runs):
        raise ValueError("a run comes twice in the files to add; name each result once, and no sum with a part of it")
    return found


def _read(path: Path) -> Found:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no result file: {error}") from None
    what = result.get("what") if isinstance(result, dict) else None
    if what != WHAT:
        raise ValueError(f"{path} is no result of this program: its `what` is {what!r}, not {WHAT!r}")
    if "kernel_seconds" not in result:  # results had neither these nor several GPUs before
        shares = [result.get(name) for name in ("seconds", "side_by_side", "processes")]
        if all(_is_number(share) for share in shares):
            result["kernel_seconds"] = shares[0] * shares[1] * shares[2]
    result.setdefault("complete", True)
    result.setdefault("runs", [run_of(result)])
    wrong = [name for name in ("seconds", "kernel_seconds", *COUNTED) if not _is_number(result.get(name))]
    wrong += [name for name in ("voices", "complaints", "runs") if not isinstance(result.get(name), list)]
    if wrong:
        raise ValueError(f"{path} lacks what a result of this program tells: {', '.join(wrong)}")
    return dict(result)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


def run_of(result: Found) -> Found:
    """A run, as results list it."""
    return {name: result[name] for name in RUN if name in result}


@dataclass
class Report:
    """The result of a run, with earlier ones added; on disk, at `out`, as often as it is saved."""

    head: Found  # the machine, and what was asked for
    earlier: list[Found]
    out: Path | None

    def of(self, found: Found) -> Found:
        """The whole result, `found` being this run's."""
        total = together([found, *self.earlier], sum) | {"complete": found["complete"]}
        runs = [run for result in self.earlier for run in result["runs"]]
        return {"what": WHAT, **self.head, **total, "runs": [*runs, run_of({**self.head, **found})]}

    def save(self, found: Found) -> None:
        """Write the result, whole or not at all."""
        if self.out is not None:
            with replace_file(self.out) as file:
                file.write(f"{json.dumps(self.of(found), indent=1)}\n".encode())

    def save_partial(self, found: Found) -> None:
        """The same while the run goes on, which a full disk does not end."""
        try:
            self.save(found)
        except Exception as error:
            logging.warning("what there is so far is not saved: %s", error)


# ---- several processes ----


@dataclass
class Part:
    """A process, and the file that it writes."""

    name: str
    process: subprocess.Popen[bytes]
    out: Path
    written_ns: int = 0

    def found(self) -> Found | None:
        """What it has written so far."""
        return json.loads(self.out.read_text(encoding="utf-8")) if self.out.exists() else None

    def news(self) -> bool:
        """Whether it has written since this was asked last."""
        before, self.written_ns = self.written_ns, self.out.stat().st_mtime_ns if self.out.exists() else 0
        return self.written_ns != before

    def problem(self) -> str:
        """What is wrong with how it ended; empty where it told all that it had found."""
        found = self.found()
        if found is None or not found["complete"]:
            return f"{self.name}: the process ended with code {self.process.returncode} before its time"
        return ""


def in_processes(
    program: Path, arguments: Sequence[str], gpus: Sequence[int], each: int, seed: int, seconds: float, save: Save
) -> Found:
    """Run `each` copies of a program on each GPU, which soak for `seconds`, and put together what they find.

    A copy gets the arguments, a seed of its own, the name that its lines begin with, and the file to write to. What
    there is is saved whenever one has written.
    """
    with tempfile.TemporaryDirectory() as folder:
        parts: list[Part] = []
        try:
            for gpu in gpus:
                for copy in range(each):
                    name = f"GPU {gpu}" + (f", process {copy}" if each > 1 else "")
                    out = Path(folder, f"{len(parts)}.json")
                    given = [*arguments, "--seed", seed + 10**6 * len(parts), "--part", name, "--out", out]
                    environment = {**os.environ, **only_this(f"cuda:{gpu}")}
                    command = [sys.executable, str(program), *map(str, given)]
                    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
                    parts.append(Part(name, process, out))
            _wait(parts, time.monotonic() + seconds + LATE_S, save)
            return _result(parts)
        finally:
            for part in parts:
                if part.process.poll() is None:
                    part.process.kill()
                part.process.wait()


def _wait(parts: Sequence[Part], until: float, save: Save) -> None:
    """Until all have ended, or should have long ago."""
    while any(part.process.poll() is None for part in parts) and time.monotonic() < until:
        time.sleep(LOOK_S)
        if any(part.news() for part in parts):
            save(together([found for part in parts if (found := part.found()) is not None], max) | {"complete": False})


def _result(parts: Sequence[Part]) -> Found:
    late = [part.name for part in parts if part.process.poll() is None]
    problems = [problem for part in parts if part.name not in late and (problem := part.problem())]
    total = together([found for part in parts if (found := part.found()) is not None], max)
    total["hangs"] += len(late)
    total["errors"] += len(problems)
    total["complaints"] += [f"{name}: the process did not end" for name in late] + problems
    return total | {"complete": not late and not problems}
