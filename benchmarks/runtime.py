"""The whole runtime on one GPU: steps, first audio, sentences, decoder, memory and start-up, beside limits and peers.

    python benchmarks/runtime.py [--quick] [--only PART,...] [--peer graph,upstream] [--model FOLDER] [--profile]
                                 [--plot FILE.png] [--out FILE]

Results are checked before anything is timed (runtime_checks.py says against what); when one is wrong the run ends and
nothing is written. The checkpoint is a random one of Soprano-1.1-80M's shape unless --model names another; sentences
are random words of 20 to 200 characters, held to 128 tokens (8.1 s of sound). Times are medians by the host's clock,
from a call to its result; steps are timed by the engine itself, around replays of its graphs.

Rows: step/B*/ctx256 microseconds for a token of each voice; first_audio; voice/B1 and throughput/B* seconds of sound
in a second, text to samples on the host; of one voice and a few also by graphs alone (/graph) and by the persistent
kernel (/persistent); vocos/B*/T* the decoder alone on the device (T tokens of sound a voice),
vocos_host/* with the copy to the host, vocos_stream/B1 one more token of a stream; memory/B*, of which /context is
CUDA's own and /ours the rest; cold_start/*; with --profile, profile/* the kernels of a step. limit is what the bytes
and the arithmetic take at the rates that this GPU reaches in a large copy and a large matrix product in the same run.
Peers run in processes of their own: graph needs torch, upstream torch and soprano-tts (--peer-python names another
Python that has them). A part that fails is named in the result's "failed"; the exit code is then 1.

--device cpu runs everything at toy size, to try the program itself. CUDA_VISIBLE_DEVICES chooses among several GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import runtime_checks as checking
from benchmarks import runtime_measure as measuring
from benchmarks import runtime_peers as peers
from benchmarks.common import RESULTS, Row, free_memory, gpu_limits, machine_facts, write_results
from benchmarks.runtime_measure import FULL, QUICK, SMOKE, Sizes, Subject
from soprano_cupy import SopranoTTS
from soprano_cupy.errors import SopranoError
from soprano_cupy.runner import DecoderRunner, LanguageModelRunner

if TYPE_CHECKING:
    from soprano_cupy.gpu.persistent_path import PersistentPath

PARTS = ("step", "first_audio", "voice", "vocos", "throughput", "memory", "cold_start")


class Run:
    """Parts in the order of their weight; what was measured is written after each, whatever comes later."""

    def __init__(self, subject: Subject, options: argparse.Namespace, scratch: Path) -> None:
        self.subject, self.options = subject, options
        self.known = scratch / "known.npz"
        self.checks = checking.Checks()
        self.rows: dict[str, Row] = {}
        self.failures: list[str] = []
        self.facts = machine_facts(gpu=subject.gpu) | paths(subject.tts)

    def check(self) -> None:
        """Everything that can be wrong; all of it is told, and what cannot be checked is wrong."""
        tts, sizes, checks = self.subject.tts, self.subject.sizes, self.checks
        for check in (
            self._check_language_model,
            lambda: checking.check_decoder(checks, self.subject.folder, tts, 6),
            lambda: checking.check_stream(checks, tts),
            lambda: checking.check_repeats(checks, tts, sizes.identical),
            lambda: checking.check_goldens(checks, tts.device),
        ):
            try:
                check()
            except Exception as error:
                traceback.print_exc()
                checks.failures.append(f"{type(error).__name__}: {error}")

    def _check_language_model(self) -> None:
        subject, sizes = self.subject, self.subject.sizes
        models = checking.Models.load(subject.folder, subject.tts.engine.language_model)
        checking.check_logits(self.checks, models, sizes.prompts)
        for batch in (1, 8, 64) if sizes is FULL else (1, 8):
            checking.check_generation(self.checks, models, checking.spoken_prompts(subject.tts, batch), 16)
        if "graph" in self.options.peer:
            peers.save_known(subject, models, self.known)

    def parts(self) -> Iterator[tuple[str, Callable[[], Iterable[Row]]]]:
        """Name and measurement of each part; the peers' come where ours are measured."""
        subject, sizes = self.subject, self.subject.sizes
        measured: dict[str, Callable[[], Iterable[Row]]] = {
            "step": self._steps,
            "first_audio": lambda: measuring.ways(subject, 1, lambda: measuring.first_audio(subject)),
            "voice": lambda: measuring.ways(subject, 1, lambda: measuring.voice(subject)),
            "vocos": self._vocos,
            "throughput": lambda: (measuring.throughput(subject, batch) for batch in self._fitting(sizes.throughput)),
            "memory": self._memory,
            "cold_start": lambda: measuring.cold_start(subject),
        }
        yield from ((name, measured[name]) for name in PARTS if name in self.options.only)
        if self.options.profile:
            yield "profile", self._profile
        for peer in peers.PEERS:
            if peer in self.options.peer:
                yield f"peer {peer}", getattr(self, f"_{peer}")

    def measure(self) -> None:
        for name, part in self.parts():
            start = time.perf_counter()
            try:
                for row in part():
                    self.rows[row.case] = row
                    say(line(row))
            except Exception as error:
                traceback.print_exc()
                self.failures.append(f"{name}: {type(error).__name__}: {error}")
            say(f"[{name}: {time.perf_counter() - start:.1f} s]")
            with contextlib.redirect_stdout(io.StringIO()):
                self.write()

    def write(self) -> None:
        """The result file as far as it is known; none for results that are wrong, and none of a CPU unless named."""
        out: Path | None = self.options.out
        if out is None and self.subject.gpu:
            out = RESULTS / f"{self.facts['machine']}-runtime.json"
        if out is None or self.checks.failures:
            return
        facts = {**self.facts, **({"failed": self.failures} if self.failures else {})}
        write_results(out, "runtime", facts, self.subject.limits, list(self.rows.values()), self.checks.passed)

    def _fitting(self, batches: Iterable[int]) -> Iterator[int]:
        for batch in batches:
            if self.subject.fits(batch):
                yield batch
            else:
                say(f"{batch} voices are left out: their caches do not fit into this GPU's free memory")

    def _steps(self) -> Iterator[Row]:
        for batch in self._fitting(self.subject.sizes.steps):
            if batch <= measuring.FEW:
                yield from measuring.ways(self.subject, batch, partial(measuring.steps, self.subject, batch))
            else:
                yield measuring.steps(self.subject, batch)

    def _vocos(self) -> Iterator[Row]:
        for voices, tokens in self.subject.sizes.vocos:
            yield from measuring.vocos(self.subject, voices, tokens)
        yield measuring.vocos_stream(self.subject)

    def _memory(self) -> Iterator[Row]:
        for batch in sorted({1, self.subject.sizes.memory_batch}):
            yield from measuring.memory(self.subject, batch)

    def _profile(self) -> Iterator[Row]:
        for batch in self._fitting(self.subject.sizes.profiles):
            yield from measuring.profile(self.subject, batch)
        if not any(case.startswith("profile/") for case in self.rows):
            say("no profile: this language model does not tell the times of its kernels")

    def _graph(self) -> Iterable[Row]:
        peers.graph(self.subject, self.rows, self.checks, self.options.peer_python, self.known)
        return ()

    def _upstream(self) -> Iterable[Row]:
        peers.upstream(self.subject, self.rows, self.options.peer_python)
        return ()


def paths(tts: SopranoTTS) -> dict[str, str]:
    """Which implementations ran, and why."""
    runners: dict[str, LanguageModelRunner | DecoderRunner] = {
        "language_model": tts.engine.language_model,
        "decoder": tts.engine.decoder,
    }
    facts = {name: f"{type(runner).__name__}, {runner.dtype}: {runner.reason}" for name, runner in runners.items()}
    path: PersistentPath | None = getattr(tts.engine.language_model, "persistent", None)
    return facts if path is None else facts | {"tokens": "; ".join(path.describe())}


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def line(row: Row) -> str:
    """A row as it is printed: value, tail, share of the limit, how many times the peers."""
    tail = "" if row.p99 is None else f"99 % {row.p99:.4g}"
    share = "" if row.share_of_limit is None or row.limit is None else f"{row.share_of_limit:6.1%} of {row.limit:.4g}"
    return f"{row.case:36} {row.value:12.5g} {row.unit:12} {tail:16} {share}".rstrip()


@contextlib.contextmanager
def voice(named: str | None, device: str) -> Iterator[str]:
    """The folder to measure: the one named, or a random one that lasts as long as the context.

    Its sentences never end by themselves, and its tokenizer is described so that the PyTorch package reads it.
    """
    if named is not None:
        yield str(Path(named).resolve())
        return
    from soprano_cupy.testing import SOPRANO_1_1_80M, TINY, make_checkpoint

    described = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[STOP]", "padding_side": "left"}
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder, config=TINY if device == "cpu" else SOPRANO_1_1_80M, mean_tokens=None)
        Path(folder, "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")
        yield folder


def choose_sizes(options: argparse.Namespace) -> Sizes:
    if options.device == "cpu":
        return SMOKE
    return QUICK if options.quick else FULL


def list_of(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
    """An argument of names with commas between them."""

    def read(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        unknown = [name for name in names if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(allowed)}")
        return names

    return read


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats, about half a minute")
    parser.add_argument("--only", type=list_of(PARTS), default=list(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--peer", type=list_of(peers.PEERS), default=[], help=f"some of {', '.join(peers.PEERS)}")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has the peers' packages")
    parser.add_argument("--model", help="a checkpoint folder instead of a random one")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial at toy size")
    parser.add_argument("--profile", action="store_true", help="also the time of each kernel of a step")
    parser.add_argument("--plot", type=Path, help="also draw times and speeds against the number of voices")
    parser.add_argument("--time-anyway", action="store_true", help="go on after a wrong result; nothing is written")
    parser.add_argument("--out", type=Path, help="result file; benchmarks/results/<gpu>-runtime.json by default")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with voice(options.model, options.device) as folder, tempfile.TemporaryDirectory() as scratch:
        try:
            tts = SopranoTTS(folder, options.device)
        except SopranoError as error:
            raise SystemExit(str(error)) from error
        limits: dict[str, float] = {} if tts.device == "cpu" else gpu_limits()
        run = Run(Subject(folder, tts, choose_sizes(options), limits), options, Path(scratch))
        for name, value in (run.facts | limits).items():
            say(f"{name:16} {value if isinstance(value, str) or value is None else format(value, '.4g')}")
        start = time.perf_counter()
        run.check()
        say(f"[checks: {run.checks.passed} passed, {time.perf_counter() - start:.1f} s]")
        if run.checks.failures and not options.time_anyway:
            raise SystemExit(f"WRONG RESULTS, nothing is timed or written: {'; '.join(run.checks.failures)}")
        if run.subject.gpu:
            free_memory()
        run.measure()
        return finish(run, options)


def finish(run: Run, options: argparse.Namespace) -> int:
    """The last lines, the result file and the plot; 1 when something failed."""
    for row in run.rows.values():
        for peer, value in row.peer.items():
            times = row.value / value if row.unit == "x real time" else value / row.value
            say(f"{row.case:36} {times:8.1f} times as good as {peer}")
    run.write()
    if not run.subject.gpu and options.out is None:
        say("nothing is written: --out names a file")
    if options.plot:
        from benchmarks.runtime_plot import plot

        plot(list(run.rows.values()), str(run.facts["gpu"] or run.facts["machine"]), options.plot)
    problems: list[Any] = run.checks.failures + run.failures
    for problem in problems:
        say(f"FAILED {problem}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
