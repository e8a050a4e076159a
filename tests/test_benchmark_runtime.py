"""The benchmark of the runtime: its checks, workers, peers and result file; how fast is no matter of a test."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks/ lies beside the package, and is no part of it

from benchmarks import fresh_process, least_work, runtime, runtime_checks, runtime_plot, workers
from benchmarks import runtime_measure as measuring
from benchmarks.common import Row, timing
from benchmarks.spoken_length import held_to
from soprano_cupy import SopranoTTS
from soprano_cupy.config import MAX_NEW_TOKENS
from soprano_cupy.cpu.qwen3 import CpuLanguageModel
from soprano_cupy.cpu.vocos import CpuDecoder
from soprano_cupy.gpu.qwen3 import GpuLanguageModel
from soprano_cupy.gpu.vocos import GpuDecoder
from soprano_cupy.testing import (
    TINY,
    TINY_DECODER,
    make_checkpoint,
)

PROJECT = Path(__file__).resolve().parents[1]
H200 = {"copy_tb_s": 4.14, "matmul_tflop_s": 783.0}


# ---- rows ----


def test_rows_say_their_share() -> None:
    row = measuring.time_row("step/B1/ctx256", timing([100.0, 200.0, 300.0]), "us", 50.0)
    assert (row.value, row.p99, row.repeats, row.share_of_limit) == (200.0, 300.0, 3, 0.25)
    assert measuring.rate_row("voice/B1", [10.0, 20.0, 30.0], 80.0).share_of_limit == 0.25
    assert measuring.rate_row("voice/B1", [10.0], None).share_of_limit is None
    assert runtime.line(row).split() == ["step/B1/ctx256", "200", "us", "99", "%", "300", "25.0%", "of", "50"]
    assert runtime.line(Row("memory/B1", 12.0, "MB", 1)).split() == ["memory/B1", "12", "MB"]


def test_lines_of_the_plot() -> None:
    rows = [
        Row("step/B64/ctx256", 2.0, "us", 1, limit=1.0, peer={"torch_graph": 9.0}),
        Row("step/B8/ctx256", 1.5, "us", 1, limit=0.5),
        Row("throughput/B8", 7.0, "x real time", 1),
        Row("voice/B1", 3.0, "x real time", 1),
    ]
    assert runtime_plot.series(rows, r"step/B(\d+)/ctx\d+") == {
        "soprano_cupy": {8: 1.5, 64: 2.0},
        "limit": {8: 0.5, 64: 1.0},
        "torch_graph": {64: 9.0},
    }
    assert runtime_plot.series(rows, r"(?:voice|throughput)/B(\d+)") == {"soprano_cupy": {1: 3.0, 8: 7.0}}


def test_a_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runtime_plot.plot([Row("step/B8/ctx256", 1.5, "us", 1, limit=0.5)], "some GPU", tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")


# ---- checks ----


def test_what_is_not_a_number_never_passes(capsys: pytest.CaptureFixture[str]) -> None:
    checks = runtime_checks.Checks()
    checks.require("small", 1.0, 1.0)
    checks.require("large", 50.0, 50.0, at_least=True)
    assert (checks.passed, checks.failures) == (2, [])
    checks.require("small", 1.1, 1.0)
    checks.require("large", 49.0, 50.0, at_least=True)
    checks.require("nan", float("nan"), 1.0)
    checks.require("nan", float("nan"), 1.0, at_least=True)
    assert (checks.passed, len(checks.failures)) == (2, 4)
    assert capsys.readouterr().out.count("WRONG") == 4


def test_errors_over_several_arrays() -> None:
    errors = runtime_checks.Errors()
    for values in ([1.0, -3.0], [], [2.0]):
        errors.add(np.array(values))
    assert (errors.largest, errors.mean) == (3.0, 2.0)
    errors.add(np.array([np.nan]))
    errors.add(np.array([1.0]))
    assert np.isnan(errors.largest)
    assert np.isnan(errors.mean)


def test_signal_to_noise() -> None:
    ones = np.ones(100, np.float32)
    assert runtime_checks.snr_db(ones * np.float32(0.99), ones) == pytest.approx(40, abs=1e-4)
    assert runtime_checks.snr_db(ones, ones) == 300
    assert runtime_checks.snr_db(ones[1:], ones) == -np.inf


def test_score_lost_by_a_choice() -> None:
    """Ids that were seen count less; the second token is 0.5 under the best one."""
    logits = np.array([[1.2, 1.1, -1.0, 0.0], [3.0, 2.5, 2.9, 0.0]])
    assert runtime_checks._shortfall(logits[:1], np.array([0]), np.array([1])) == 0
    assert runtime_checks._shortfall(logits[:1], np.array([0]), np.array([0])) == pytest.approx(1.1 - 1.0)
    assert runtime_checks._shortfall(logits, np.array([3]), np.array([0, 0])) == pytest.approx(2.9 - 2.5)


def test_groups() -> None:
    assert list(runtime_checks.groups(list(range(5)), 2)) == [[0, 1], [2, 3], [4]]


# ---- processes of their own ----

WORKER = """
import sys
sys.path.insert(0, {project!r})
from benchmarks.workers import job, tell, tell_first_audio
print("noise")
tell_first_audio()
tell_first_audio()
tell({{"doubled": 2 * job()["number"]}})
"""


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


def test_a_worker_answers(tmp_path: Path) -> None:
    answer = workers.ask(script(tmp_path, WORKER.format(project=str(PROJECT))), {"number": 21})
    assert answer.result == {"doubled": 42}
    assert answer.first_audio_s is not None
    assert answer.first_audio_s > 0


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(workers.WorkerError, match=r"ended with code 1: .*ValueError: no such thing"):
        workers.ask(script(tmp_path, "raise ValueError('no such thing')"), {})


def test_a_worker_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(workers.WorkerError, match="ended with code -9 after 0 s"):
        workers.ask(script(tmp_path, "import time; time.sleep(60)"), {}, seconds=0.3)


@pytest.mark.parametrize("said", ["", "not JSON", "[1]"])
def test_a_worker_that_answers_nothing(tmp_path: Path, said: str) -> None:
    with pytest.raises(workers.WorkerError, match="instead of JSON"):
        workers.ask(script(tmp_path, f"print({said!r})"), {})


def test_what_nvidia_smi_counts() -> None:
    listing = "12, 100\n34, 512\n56, [N/A]\n"
    assert fresh_process.used_mb(listing, 34) == pytest.approx(536.870912)
    assert fresh_process.used_mb(listing, 56) is None
    assert fresh_process.used_mb(listing, 7) is None
    assert fresh_process.used_mb("", 7) is None


# ---- the whole program at toy size ----


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("voice"), mean_tokens=None)


def test_sentences_held_to_a_length(endless: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "A sentence of some length."
    tts = SopranoTTS(endless, "cpu")
    with held_to(9):
        assert len(tts.infer(text)) == 8 * 2048
        assert [len(samples) for samples in tts.infer_batch([text, text])] == [8 * 2048] * 2
        assert sum(map(len, tts.infer_stream(text))) == 8 * 2048
    assert caplog.messages == []
    assert len(tts.infer(text)) == (MAX_NEW_TOKENS - 1) * 2048
    assert len(caplog.messages) == 1  # that it was cut off


def test_what_is_looked_up_by_name_is_there() -> None:
    """Benchmarks leave out what an engine does not have, so that a name of the GPU engine's may not change alone."""
    for name in ("persistent", "profile", "benchmark_step"):
        assert hasattr(GpuLanguageModel, name)
    assert hasattr(GpuDecoder, "decode_pcm16")


def test_context_that_a_stream_needs(endless: Path) -> None:
    """Two blocks of three frames and the overlap of the windows: a token of sound is whole with the third state."""
    subject = measuring.Subject(str(endless), SopranoTTS(endless, "cpu"), measuring.SMOKE, {})
    assert (subject.model, subject.decoder) == (TINY, TINY_DECODER)
    assert measuring.states_before_sound(subject) == 3


def test_memory_is_told_apart(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = measuring.Subject(str(endless), SopranoTTS(endless, "cpu"), measuring.SMOKE, {})
    subject.gpu = True
    told = {"after_context": 7_000_000, "after": 4_000_000, "nvidia_smi_mb": 5.5}
    monkeypatch.setattr(measuring, "_free_bytes", lambda: 9_000_000)
    monkeypatch.setattr(measuring, "ask", lambda *_, **__: workers.Answer(told, 1.0))
    rows = {row.case: row for row in measuring.memory(subject, 1)}
    values = {"": 5.0, "/context": 2.0, "/ours": 3.0, "/nvidia_smi": 5.5}
    assert {case: row.value for case, row in rows.items()} == {f"memory/B1{name}": mb for name, mb in values.items()}
    weights = (endless / "model.safetensors").stat().st_size  # all in 16 bits
    decoder = least_work.decoder_work(TINY_DECODER, 0, 0).moved
    assert rows["memory/B1"].limit == pytest.approx((weights + decoder) / 1e6, rel=0.05)


def test_cold_starts(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run of a folder finds its caches empty, the others do not."""
    seconds, folders = iter([9.0, 2.0, 3.0]), []

    def ask(*_: Any, environment: dict[str, str], **__: Any) -> workers.Answer:
        folders.append(environment["SOPRANO_CACHE_DIR"])
        return workers.Answer({}, next(seconds))

    monkeypatch.setattr(measuring, "ask", ask)
    subject = measuring.Subject(str(endless), SopranoTTS(endless, "cpu"), measuring.SMOKE, {})
    rows = {row.case: (row.value, row.repeats) for row in measuring.cold_start(subject)}
    assert rows == {"cold_start/warm_cache": (2.5, 2), "cold_start/empty_cache": (9.0, 1)}
    assert len(set(folders)) == 1


def test_the_decoder_alone(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the host in 16 bits where the decoder rounds itself; one voice stays on the device."""
    monkeypatch.setattr(CpuDecoder, "decode_pcm16", CpuDecoder.decode_many, raising=False)
    subject = measuring.Subject(str(endless), SopranoTTS(endless, "cpu"), measuring.SMOKE, H200)
    rows = [*measuring.vocos(subject, 2, 3), *measuring.vocos(subject, 1, 1)]
    assert [row.case for row in rows] == [
        "vocos/B2/T3", "vocos_host/B2/T3/float32", "vocos_host/B2/T3/int16", "vocos/B1/T1",
    ]  # fmt: skip
    limit = 2 * 3 * 0.064 / least_work.decoder_work(TINY_DECODER, 2, 3).seconds(H200)
    assert [row.limit for row in rows[:3]] == [pytest.approx(limit)] * 3


def test_kernels_of_a_step(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = measuring.Subject(str(endless), SopranoTTS(endless, "cpu"), measuring.SMOKE, {})
    assert measuring.profile(subject, 4) == []
    kernels = lambda _, batch, context: [("short", 1.0), ("long", float(batch + context))]  # noqa: E731
    monkeypatch.setattr(CpuLanguageModel, "profile", kernels, raising=False)
    rows = {row.case: row.value for row in measuring.profile(subject, 4)}
    assert rows == {"profile/B4/ctx24/long": 28.0, "profile/B4/ctx24/short": 1.0}
    assert list(rows) == ["profile/B4/ctx24/long", "profile/B4/ctx24/short"]


SPOKEN = ["first_audio", "voice/B1", "throughput/B3"]
ALL = ["step/B1/ctx24", "step/B4/ctx24", *SPOKEN[:2], "vocos/B2/T8", "vocos_host/B2/T8/float32", "vocos/B1/T1"]


def test_the_program(endless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    only = "step,first_audio,voice,vocos,throughput"
    assert runtime.main(["--device", "cpu", "--model", str(endless), "--only", only, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [row["case"] for row in result["rows"]] == [*ALL, "vocos_stream/B1", "throughput/B3"]
    assert all(row["value"] > 0 for row in result["rows"])
    assert result["what"] == "runtime"
    assert result["language_model"].startswith("CpuLanguageModel, bfloat16: compiled engine")
    assert int(result["checks"].removeprefix("passed ")) >= 14
    assert "failed" not in result
    assert "WRONG" not in capsys.readouterr().out


def test_a_part_that_fails_leaves_the_others(
    endless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(subject: Any) -> Row:
        raise ArithmeticError("no voice")

    monkeypatch.setattr(measuring, "voice", fail)
    out = tmp_path / "results.json"
    arguments = ["--device", "cpu", "--model", str(endless), "--only", "voice,first_audio,throughput"]
    assert runtime.main([*arguments, "--out", str(out)]) == 1
    result = json.loads(out.read_text())
    assert [row["case"] for row in result["rows"]] == ["first_audio", "throughput/B3"]
    assert result["failed"] == ["voice: ArithmeticError: no voice"]
    assert "FAILED voice: ArithmeticError: no voice" in capsys.readouterr().out


def test_wrong_results_are_not_timed(
    endless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = CpuLanguageModel.logits
    monkeypatch.setattr(CpuLanguageModel, "logits", lambda self, states: exact(self, states) * np.float32(1.02))
    out = tmp_path / "results.json"
    arguments = ["--device", "cpu", "--model", str(endless), "--only", "first_audio", "--out", str(out)]
    with pytest.raises(SystemExit, match="WRONG RESULTS, nothing is timed or written: logits of 10 prompts"):
        runtime.main(arguments)
    assert not out.exists()
    assert runtime.main([*arguments, "--time-anyway"]) == 1
    assert not out.exists()
    assert "first_audio  " in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--only", "steps"], ["--peer", "torch"], ["--device", "tpu"]])
def test_wrong_usage(words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        runtime.parse(words)
    assert end.value.code == 2


def test_sizes() -> None:
    chosen = [runtime.choose_sizes(runtime.parse(words)) for words in ([], ["--quick"], ["--device", "cpu"])]
    assert chosen == [measuring.FULL, measuring.QUICK, measuring.SMOKE]
    for sizes in chosen:
        assert set(sizes.graph) <= set(sizes.steps)  # a peer's value needs a row of ours
        assert set(sizes.upstream) <= {1, *sizes.throughput}


# ---- peers and tables ----


def test_the_peer_computes_the_same(endless: Path, tmp_path: Path) -> None:
    """In float32 it is the oracle within rounding, and so are its samples."""
    pytest.importorskip("torch")
    from benchmarks import peer_graph, runtime_peers

    tts = SopranoTTS(endless, "cpu")
    models = runtime_checks.Models.load(endless, tts.engine.language_model)
    runtime_peers.save_known(measuring.Subject(str(endless), tts, measuring.SMOKE, {}), models, tmp_path / "known.npz")
    job = {"folder": str(endless), "device": "cpu", "dtype": "float32", "context": 8, "batches": [2], "steps": 1}
    told = peer_graph.measure({**job, "repeats": 1, "voices": [[1, 2]], "check": str(tmp_path / "known.npz")})
    assert told["logits_error"] < 1e-5
    assert told["audio_error"] < 1e-5
    assert told["step_us"][2] > 0
    assert told["vocos"]["B1/T2"] > 0


def test_a_peer_joins_our_row() -> None:
    from benchmarks import runtime_peers

    rows = {"voice/B1": Row("voice/B1", 100.0, "x real time", 1)}
    runtime_peers.join(rows, "voice/B1", "torch_upstream", 4.0)
    runtime_peers.join(rows, "throughput/B2", "torch_upstream", 4.0)
    assert rows.keys() == {"voice/B1"}
    assert rows["voice/B1"].peer == {"torch_upstream": 4.0}


def test_peers_answers(endless: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each value finds its row; a peer that computes something else is left out."""
    from benchmarks import runtime_peers

    subject = measuring.Subject(str(endless), SopranoTTS(endless, "cpu"), measuring.SMOKE, {})
    cases = ["step/B4/ctx24", "vocos/B1/T1", "first_audio", "voice/B1", "throughput/B3", "cold_start/warm_cache"]
    rows = {case: Row(case, 1.0, "us", 1) for case in cases}
    answers: dict[str, dict[str, Any]] = {
        "graph": {"logits_error": 1e-6, "audio_error": 1e-6, "step_us": {"4": 7.0}, "vocos": {"B1/T1": 8.0}},
        "upstream": {"first_audio_s": 0.5, "batch": {"1": 2.0, "3": 3.0}},
        "start": {"after": None},
    }

    def ask(script: str, job: dict[str, Any], **_: Any) -> workers.Answer:
        json.dumps(job)
        name = "start" if job.get("start") else script.removeprefix("peer_").removesuffix(".py")
        return workers.Answer(answers[name], 4.0)

    monkeypatch.setattr(runtime_peers, "ask", ask)
    checks = runtime_checks.Checks()
    runtime_peers.graph(subject, rows, checks, "python", tmp_path)
    runtime_peers.upstream(subject, rows, "python")
    assert checks.passed == 2
    assert [row.peer for row in rows.values()] == [
        {"torch_graph": 7.0},
        {"torch_float32": 8.0},
        *({"torch_upstream": value} for value in (500.0, 2.0, 3.0, 4.0)),
    ]
    answers["graph"] |= {"logits_error": 0.3, "step_us": {"4": 1.0}}
    with pytest.raises(ValueError, match="the peer is wrong"):
        runtime_peers.graph(subject, rows, checks, "python", tmp_path)
    assert (rows["step/B4/ctx24"].peer, checks.passed, checks.failures) == ({"torch_graph": 7.0}, 2, [])


def test_the_readme_table() -> None:
    tables = runpy.run_path(str(PROJECT / "tools" / "readme_tables.py"))
    record = {
        "gpu": "Some GPU",
        "checks": "passed 20",
        "failed": ["memory: WorkerError: ended", "peer upstream: WorkerError: ended"],
        "rows": [
            {"case": "step/B1/ctx256", "value": 201.0, "unit": "us", "share_of_limit": 0.19, "peer": {"torch": 900.0}},
            {"case": "profile/B1/ctx256/qkv", "value": 2.0, "unit": "us"},
        ],
    }
    assert tables["table"](record, "h200-runtime.json", ("step/", "voice/")).splitlines() == [
        "From `benchmarks/results/h200-runtime.json`, Some GPU, checks passed 20, without memory, peer upstream, "
        "which failed:",
        "",
        "| case | result | share of limit | torch |",
        "| --- | ---: | ---: | ---: |",
        "| `step/B1/ctx256` | 201 us | 19 % | 900 |",
    ]


def test_help_needs_no_gpu() -> None:
    command = [sys.executable, str(PROJECT / "benchmarks" / "runtime.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--peer-python" in done.stdout
