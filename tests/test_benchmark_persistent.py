"""The soak of the persistent kernel and the table of who is faster: what they count and say, without a GPU."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks/ lies beside the package, and is no part of it

from benchmarks import persistent_soak, persistent_soak_parts, persistent_table
from benchmarks.persistent_soak import Tally, Worker, difference, digest_of, kernel_seconds, main, parse
from benchmarks.persistent_soak_parts import COUNTED, PROBLEMS, Report, read_earlier, together
from soprano_cupy.errors import DeviceError
from soprano_cupy.generation import Generation, Request
from soprano_cupy.sampling import SamplingParams

VOCAB = 20


@pytest.fixture(autouse=True)
def what_is_logged_stays() -> Iterator[None]:
    """The program hushes the package; the tests that follow want to hear it."""
    logger = logging.getLogger("soprano_cupy")
    level = logger.level
    yield
    logger.setLevel(level)


def made(tokens: list[int], shift: float = 0.0) -> Generation:
    states = np.arange(len(tokens) * 4, dtype=np.float32).reshape(-1, 4) + np.float32(shift)
    return Generation(np.array(tokens, np.int32), states, "length")


def graphs(lead: float) -> Any:
    """A model whose logits are 0.01 apart between the two paths, and whose best score leads by `lead`."""

    def logits(states: np.ndarray) -> np.ndarray:
        scores = np.zeros((2, VOCAB))
        scores[:, 5] = lead
        scores[0] += 0.01
        return scores

    return SimpleNamespace(runner=SimpleNamespace(logits=logits))


REQUEST = Request(np.array([1, 2], np.int32), SamplingParams())


def test_results_that_are_the_same() -> None:
    assert difference(graphs(1.0), REQUEST, made([5, 6, 7]), made([5, 6, 7])) == ""


@pytest.mark.parametrize(("lead", "complaint"), [(0.03, ""), (1.0, "token 1 differs, 1 ahead")])
def test_tokens_may_differ_where_scores_are_close(lead: float, complaint: str) -> None:
    assert difference(graphs(lead), REQUEST, made([6, 8, 7]), made([6, 5, 7])) == complaint


def test_states_may_not_be_far_apart() -> None:
    assert "a state differs by" in difference(graphs(1.0), REQUEST, made([5, 6, 7], 5.0), made([5, 6, 7]))


def test_drawn_tokens_may_differ() -> None:
    drawn = Request(REQUEST.ids, SamplingParams(0.7, seed=1))
    assert difference(graphs(9.0), drawn, made([5, 6, 7]), made([5, 9, 7])) == ""


def test_repeats_must_have_the_first_ones_bits() -> None:
    tally = Tally()
    assert tally.same_as_first((1, 1, 0), digest_of([made([5, 6])]))
    assert tally.same_as_first((1, 1, 0), digest_of([made([5, 6])]))
    assert not tally.same_as_first((1, 1, 0), digest_of([made([5, 6], 1e-6)]) + b"x")
    assert tally.counts["repeats"] == 2
    assert digest_of([made([5, 6])]) != digest_of([made([5, 6], 0.5)])


class Fine:
    failure: str | None = None


def worker(tally: Tally, seed: int = 0) -> Worker:
    runner = SimpleNamespace(persistent=Fine())
    model: Any = SimpleNamespace(runner=runner, config=SimpleNamespace(vocab_size=VOCAB))
    return Worker("worker", seed, model, model, [1, 2], tally)


def test_a_request_depends_on_its_key_alone() -> None:
    one, other = worker(Tally(), 1), worker(Tally(), 2)
    first, second = one._requests((7, 2, 1)), other._requests((7, 2, 1))
    assert [r.params for r in first] == [r.params for r in second]
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
    keys = [one._choose() for _ in range(200)]
    assert len(set(keys)) < 190  # some come again
    assert {voices for _, voices, _ in keys} == {1, 2}


def test_errors_and_fallbacks_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    tally = Tally()
    asked = worker(tally)
    calls = iter([DeviceError("broken"), None])

    def generate(runner: Any, requests: list[Request]) -> list[Generation]:
        error = next(calls)
        if error is not None:
            raise error
        asked.model.runner.persistent.failure = "waited too long"
        return [made([5, 6]) for _ in requests]

    monkeypatch.setattr(persistent_soak, "generate", generate)
    monkeypatch.setattr(persistent_soak, "GIVEN_UP", 0.0)
    monkeypatch.setattr(persistent_soak, "BY_GRAPHS", 0.0)
    asked.run(float("inf"))
    assert tally.counts["errors"] == tally.counts["fallbacks"] == 1
    assert tally.counts["prompts"] >= 1
    assert any("broken" in line for line in tally.complaints)
    assert tally.since == {}


# ---- how long, by how many, of how many runs ----


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models that answer at once, of a machine that has a GPU."""

    class Answering:
        failure: str | None = None

        def problem(self, voices: int, *, drawn: bool) -> str | None:
            return "too many" if voices == 8 else None

    def load(options: argparse.Namespace) -> Any:
        config = SimpleNamespace(vocab_size=VOCAB)
        models = [
            SimpleNamespace(runner=SimpleNamespace(persistent=Answering()), config=config)
            for _ in range(options.side_by_side)
        ]
        return models, models[0]

    def answer(runner: Any, requests: list[Request]) -> list[Generation]:
        time.sleep(0.01)
        return [made([5, 6]) for _ in requests]

    monkeypatch.setattr(persistent_soak, "load", load)
    monkeypatch.setattr(persistent_soak, "generate", answer)
    monkeypatch.setattr(persistent_soak, "GIVEN_UP", 0.0)
    monkeypatch.setattr(persistent_soak, "machine_facts", lambda gpu: FACTS)


FACTS = {"machine": "toy", "gpu": "Toy", "commit": "abc", "date": "2026-01-01"}


def found_in(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_writes_what_it_has_while_it_lasts_and_at_the_end(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(persistent_soak, "PROGRESS_S", 0.0)
    saved: list[Any] = []
    save_partial = Report.save_partial

    def save(report: Report, found: Any) -> None:
        save_partial(report, found)
        saved.append(found_in(tmp_path / "soak.json"))

    monkeypatch.setattr(Report, "save_partial", save)
    out = tmp_path / "soak.json"
    arguments = ["--seconds", "1", "--side-by-side", "2", "--threads", "2", "--voices", "1,8", "--out", str(out)]
    assert main(arguments) == 0
    result = found_in(out)
    assert [part["complete"] for part in saved] == [False] * len(saved)
    assert 0 < saved[0]["prompts"] < saved[-1]["prompts"] <= result["prompts"]
    assert result["complete"]
    assert (result["voices"], result["side_by_side"], result["gpus"]) == ([1], 2, [0])
    assert 2.0 <= result["kernel_seconds"] <= 2 * result["seconds"] + 0.1  # two models for a second, and rounding
    assert [run["prompts"] for run in result["runs"]] == [result["prompts"]]
    assert list(tmp_path.iterdir()) == [out]


def test_kernels_are_counted_until_their_last_worker_ended() -> None:
    workers = [worker(Tally()) for _ in range(4)]
    workers[1].model = workers[0].model
    for one, ended in zip(workers, (3.0, 5.0, None, 7.0), strict=True):
        one.ended = ended
    assert kernel_seconds(workers, 1.0, 11.0) == (5 - 1) + (11 - 1) + (7 - 1)


def test_each_run_has_prompts_of_its_own() -> None:
    assert parse([])[0].seed != parse([])[0].seed
    assert parse(["--seed", "7"])[0].seed == 7


COPY = """
import argparse, json, os, pathlib, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--out", type=pathlib.Path)
options, rest = parser.parse_known_args()
gpu = int(os.environ["CUDA_VISIBLE_DEVICES"])
names = {names!r}
found = dict.fromkeys(names, 0) | {{"prompts": 10 + gpu, "seconds": 3.0 + gpu, "kernel_seconds": 6.0,
    "voices": [1, 2 + gpu], "complaints": [" ".join(rest)], "complete": gpu != {broken}}}
options.out.with_suffix(".new").write_text(json.dumps(found))
options.out.with_suffix(".new").rename(options.out)
sys.exit(3 if gpu == {broken} else 0)
"""


@pytest.mark.parametrize("broken", [None, 5])
def test_processes_on_several_gpus(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: int | None
) -> None:
    """Each sees its GPU alone and has a seed of its own; what they find is summed; one that dies is an error."""
    program, out = tmp_path / "copy.py", tmp_path / "soak.json"
    program.write_text(COPY.format(names=COUNTED, broken=broken), encoding="ascii")
    monkeypatch.setattr(persistent_soak, "PROGRAM", program)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    arguments = ["--gpus", "0,1", "--processes", "2", "--seconds", "3", "--seed", "9", "--out", str(out)]
    assert main(arguments) == (0 if broken is None else 1)
    result = found_in(out)
    assert (result["prompts"], result["kernel_seconds"], result["seconds"]) == (2 * (14 + 15), 24.0, 8.0)
    assert result["voices"] == [1, 6, 7]
    assert result["complete"] == (broken is None)
    assert result["errors"] == (0 if broken is None else 2)
    parts = result["complaints"][:4]
    for number, name in enumerate(("GPU 0, process 0", "GPU 0, process 1", "GPU 1, process 0", "GPU 1, process 1")):
        assert f"--seed {9 + 10**6 * number} --part {name}" in parts[number]
        assert "--seconds 3.0 --threads 1 --side-by-side 1 --voices 1" in parts[number]
    if broken is not None:
        assert result["complaints"][4:] == [
            f"GPU 1, process {copy}: the process ended with code 3 before its time" for copy in range(2)
        ]


def test_what_processes_have_found_is_saved_before_they_end(tmp_path: Path) -> None:
    """And a process that does not end at all counts as hanging."""
    program = tmp_path / "copy.py"
    program.write_text(
        COPY.format(names=COUNTED, broken=None).replace("sys.exit", "time.sleep(60) #"), encoding="ascii"
    )
    saved: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(persistent_soak_parts, "LATE_S", 3.0)
        patch.setattr(persistent_soak_parts, "LOOK_S", 0.05)
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        found = persistent_soak_parts.in_processes(program, [], [0, 1], 1, 0, 0.0, saved.append)
    assert (saved[-1]["prompts"], saved[-1]["complete"]) == (10 + 11, False)
    assert (found["prompts"], found["hangs"], found["complete"]) == (10 + 11, 2, False)
    assert found["complaints"][2:] == ["GPU 0: the process did not end", "GPU 1: the process did not end"]


def earlier(path: Path, **changes: Any) -> Path:
    result = {"what": "persistent_soak", **FACTS, "threads": 1, "side_by_side": 3, "processes": 2, "seconds": 50.0}
    result |= {"voices": [4], "complaints": []} | dict.fromkeys(COUNTED, 0) | {"prompts": 100} | changes
    path.write_text(json.dumps({name: value for name, value in result.items() if value is not None}), encoding="utf-8")
    return path


def test_earlier_runs_are_added(no_gpu: None, tmp_path: Path) -> None:
    """Also those that are sums, and into the file of such a sum; one from before kernel seconds were told has them."""
    old, out = earlier(tmp_path / "old.json"), tmp_path / "sum.json"
    new = earlier(tmp_path / "new.json", kernel_seconds=70.0, seconds=20.0, complete=False, commit="def")
    arguments = ["--seconds", "0.3", "--voices", "2", "--out", str(out)]
    assert main([*arguments, "--add", str(old), str(new)]) == 0
    first = found_in(out)
    assert main([*arguments, "--add", str(out)]) == 0
    result = found_in(out)
    for total, own in ((first, [300.0, 70.0]), (result, [300.0, 70.0, first["runs"][-1]["kernel_seconds"]])):
        runs = total["runs"]
        assert [run["kernel_seconds"] for run in runs[:-1]] == own
        for name in ("seconds", "kernel_seconds", "prompts"):
            assert total[name] == pytest.approx(sum(run[name] for run in runs))
        assert total["voices"] == [2, 4]
        assert total["complete"]
    assert [run["commit"] for run in result["runs"]] == ["abc", "def", "abc", "abc"]
    assert [run["complete"] for run in result["runs"]] == [True, False, True, True]
    assert len({run["seed"] for run in result["runs"][2:]}) == 2


def test_problems_of_earlier_runs_remain(no_gpu: None, tmp_path: Path) -> None:
    bad = earlier(tmp_path / "bad.json", mismatches=1, complaints=["other bits"])
    out = tmp_path / "sum.json"
    assert main(["--seconds", "0.3", "--add", str(bad), "--out", str(out)]) == 1
    assert [found_in(out)[name] for name in PROBLEMS] == [0, 1, 0, 0]
    assert found_in(out)["complaints"] == ["other bits"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"what": "runtime"}, "is no result of this program: its `what` is 'runtime', not 'persistent_soak'"),
        ({"tokens": None, "complaints": "none"}, "lacks what a result of this program tells: tokens, complaints"),
        ({"seconds": "long"}, "lacks what a result of this program tells: seconds, kernel_seconds"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=r"other\.json") as refused:
        read_earlier([earlier(tmp_path / "other.json", **changes)])
    assert complaint in str(refused.value)


def test_files_that_are_none_are_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(persistent_soak, "load", None)
    (tmp_path / "text.json").write_text("hello", encoding="ascii")
    (tmp_path / "list.json").write_text("[1]", encoding="ascii")
    fine = earlier(tmp_path / "fine.json")
    for arguments, complaint in (
        (["--add", tmp_path / "missing.json"], "missing.json cannot be read: No such file or directory"),
        (["--add", tmp_path / "text.json"], "text.json is no result file: "),
        (["--add", tmp_path / "list.json"], "its `what` is None"),
        (["--add", fine, fine], "a run comes twice"),
        (["--out", tmp_path / "no" / "soak.json"], "does not exist"),
        (["--gpus", "0,0"], "'0,0' names one twice"),
        (["--gpus", "0,x"], "'x' is not a whole number from 0 on"),
        (["--processes", "0"], "'0' is not a whole number from 1 on"),
    ):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        assert end.value.code == 2
        assert complaint in capsys.readouterr().err


def test_nothing_found_is_nothing_in_sum() -> None:
    assert together([], max) == {
        "complete": True, "seconds": 0.0, "kernel_seconds": 0, "voices": [], "complaints": [],
        **dict.fromkeys(COUNTED, 0),
    }  # fmt: skip


def test_the_table_is_printed_as_it_stands_in_the_source() -> None:
    class Path:
        def use(self, setting: str) -> None:
            self.setting = setting

        def problem(self, voices: int, *, drawn: bool) -> str | None:
            return "8 voices are too many" if voices == 8 else None

    class Runner:
        persistent = Path()

        def benchmark_step(
            self, voices: int, context: int, steps: int, repeats: int, temperature: float
        ) -> list[float]:
            return [1e-6 * (100 * voices + (self.persistent.setting == "1") + 10 * (temperature > 0))] * repeats

    rows, lines = persistent_table.measure(Runner(), 256, 3)
    assert lines[0] == "        (1, False): StepTimes(100.0, 101.0),"
    assert lines[-1] == "        (4, True): StepTimes(410.0, 411.0),"
    assert len(lines) == 6
    assert len(rows) == 12
    assert (rows[1].case, rows[1].value) == ("step/B1/greedy/persistent", pytest.approx(101.0))
