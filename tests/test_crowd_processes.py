"""A crowd of several processes: two simulated devices behind one `submit`, with the bits that each has alone; processes
that die or hang, limits, bad input, and an end that leaves nothing."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import heed_signals
from simulated_device import audio_of, sentence

from benchmarks.soak_memory import Traces
from soprano_cupy import Busy, Closed, DeadlineExceeded, DeviceError, ParameterError, SopranoTTS, TextError
from soprano_cupy.crowd import plan
from soprano_cupy.crowd.job import Wish
from soprano_cupy.crowd.processes import ProcessCrowd
from soprano_cupy.crowd.processes_station import Post
from soprano_cupy.crowd.speech import Speech
from soprano_cupy.sampling import SamplingParams
from soprano_cupy.testing import make_checkpoint

PARAMS = SamplingParams(seed=1)
BOOK = 100_000  # tokens: for ever


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No process, thread, open file or shared memory after any test."""
    traces = Traces(gpu=False)
    yield
    assert traces.left() == []


def posts(*options: dict[str, Any]) -> list[Post]:
    return [Post(f"sim:{i}", "simulated_voice:Voice", one) for i, one in enumerate(options)]


def two(**options: Any) -> ProcessCrowd:
    return ProcessCrowd(posts({}, {}), **options)


def ask(crowd: ProcessCrowd, job: int, tokens: int = 20, sentences: int = 2, **wish: Any) -> Speech:
    return crowd.submit_text(f"{job} {sentences} {tokens}", PARAMS, Wish(**wish))


def said(job: int, tokens: int = 20, sentences: int = 2) -> np.ndarray:
    return np.concatenate([audio_of(sentence(job, i, tokens)) for i in range(sentences)])


def right(speech: Speech, job: int, tokens: int = 20, sentences: int = 2) -> None:
    np.testing.assert_array_equal(speech.result(20), said(job, tokens, sentences))


def place_of(crowd: ProcessCrowd, speech: Speech) -> int:
    """The station that has a request."""
    (ticket,) = [ticket for ticket in crowd._ledger.tickets.values() if ticket.speech is speech]
    assert ticket.station is not None
    return crowd._stations.index(ticket.station)


def until(what: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)


def test_everybody_hears_what_is_heard_alone() -> None:
    with two() as crowd:
        assert len(set(crowd.pids)) == 2
        assert [device.slots for device in crowd.devices] == [8, 8]
        speeches = {job: ask(crowd, job, stream=job % 2 == 0) for job in range(60) if job != 7}
        prepared = crowd.submit([sentence(61, i, 20) for i in range(2)], Wish(stream=True))
        for job, speech in speeches.items():
            right(speech, job)
            assert speech.first_audio_s is not None
        right(prepared, 61)
        assert crowd.unfinished == 0


def test_iterators_and_event_loops() -> None:
    with two() as crowd:
        chunks = list(ask(crowd, 3, tokens=60, stream=True))
        assert len(chunks) > 2
        np.testing.assert_array_equal(np.concatenate(chunks), said(3, 60))

        async def listen(job: int) -> np.ndarray:
            return np.concatenate([chunk async for chunk in ask(crowd, job, stream=True)])

        async def everything() -> list[np.ndarray]:
            return await asyncio.gather(*(listen(job) for job in range(8, 16)))

        for job, heard in enumerate(asyncio.run(everything()), 8):
            np.testing.assert_array_equal(heard, said(job))


def test_the_emptier_one_is_next() -> None:
    with ProcessCrowd(posts({"slots": 4}, {"slots": 12})) as crowd:
        book = crowd.submit_text(f"0 1 {BOOK}" + " " * 400, PARAMS, Wish())  # long, as texts go
        other = 1 - place_of(crowd, book)
        assert place_of(crowd, ask(crowd, 1, BOOK)) == other
        placed = [place_of(crowd, ask(crowd, 2, BOOK)) for _ in range(160)]
        first, second = placed[80:].count(0), placed[80:].count(1)
        assert 2 <= second / first <= 4  # as many for each slot


def test_threads_submit_at_once() -> None:
    with two() as crowd:
        found: dict[int, Speech] = {}

        def work(first: int) -> None:
            for job in range(first, first + 8):
                found[job] = ask(crowd, job)

        threads = [threading.Thread(target=work, args=(8 + 8 * i,)) for i in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for job, speech in found.items():
            right(speech, job)
        assert len(found) == 40


def test_a_killed_process(caplog: pytest.LogCaptureFixture) -> None:
    """Its requests go to the other, what was heard of streams is not heard again, and it is started anew."""
    with two() as crowd:
        speeches = {job: ask(crowd, job, tokens=200, sentences=3, stream=job % 2 == 0) for job in range(8, 40)}
        stream = speeches[8]
        next(iter(stream))
        dying = crowd._stations[place_of(crowd, stream)]
        os.kill(dying.facts.pid, signal.SIGKILL)
        for job, speech in speeches.items():
            right(speech, job, 200, 3)
        until(lambda: len(crowd.devices) == 2)
        right(ask(crowd, 41), 41)
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(lines) == 1
    assert "was ended by SIGKILL" in lines[0]
    assert "started anew" in lines[0]


def test_a_process_that_keeps_dying(caplog: pytest.LogCaptureFixture) -> None:
    """A text that kills every process it comes to fails in the end; so does everything once no process is left."""
    with two() as crowd:
        with pytest.raises(DeviceError, match="SIGKILL"):
            crowd.submit_text("die", PARAMS, Wish()).result(20)
        right(ask(crowd, 1), 1)
        waiting = ask(crowd, 2, BOOK)
        until(lambda: len(crowd.devices) == 2 or all(station.out for station in crowd._stations))
        with pytest.raises(DeviceError, match="SIGKILL"):
            crowd.submit_text("die", PARAMS, Wish()).result(20)
        assert "used no more" in caplog.text
        assert isinstance(waiting.exception(20), DeviceError)
        with pytest.raises(DeviceError, match="no device is left"):
            ask(crowd, 3)


def test_a_device_that_fails_for_good_within_its_process() -> None:
    """The process says so and is started anew; the other has its requests meanwhile."""
    with ProcessCrowd(posts({"failing": True}, {})) as crowd:
        speeches = {job: ask(crowd, job, stream=job % 2 == 0) for job in range(8, 30)}
        for job, speech in speeches.items():
            right(speech, job)


def test_poison_fails_alone() -> None:
    with two() as crowd:
        good, bad = ask(crowd, 8), ask(crowd, 7)
        with pytest.raises(DeviceError, match="not finite"):
            bad.result(20)
        right(good, 8)


def test_a_process_that_cannot_start(caplog: pytest.LogCaptureFixture) -> None:
    with ProcessCrowd(posts({"absent": True}, {})) as crowd:
        assert len(crowd.devices) == 1
        right(ask(crowd, 1), 1)
    assert "the device has fallen off); it is used no more" in caplog.text
    with pytest.raises(DeviceError, match="fallen off"):
        ProcessCrowd(posts({"absent": True}, {"absent": True}))
    with pytest.raises(DeviceError, match="ModuleNotFoundError"):
        ProcessCrowd([Post("sim", "no_such_module:Voice", {})])


def test_a_process_that_hangs() -> None:
    with ProcessCrowd(posts({"life_s": 0.1}, {"life_s": 0.1}), stall_s=1.5) as crowd:
        stopped = crowd.submit_text("stop", PARAMS, Wish(deadline_s=0.3))
        speeches = {job: ask(crowd, job) for job in range(8, 20)}
        with pytest.raises(DeadlineExceeded, match=r"not spoken within 0\.3 s"):
            stopped.result(20)
        for job, speech in speeches.items():
            right(speech, job)
        until(lambda: len(crowd.devices) == 2)


def test_nobody_waits_for_a_book_to_be_prepared() -> None:
    with ProcessCrowd(posts({})) as crowd:
        book = crowd.submit_text("slowly" + " " * 5000 + "8 2 20", PARAMS, Wish())
        for job in range(9, 19):
            right(ask(crowd, job), job)
        assert not book.done()
        right(book, 8)


def test_cancelling() -> None:
    with two() as crowd:
        speeches = [ask(crowd, 0, BOOK, stream=True) for _ in range(40)]
        next(iter(speeches[0]))
        for speech in speeches:
            assert speech.cancel()
        assert speeches[0].cancel()
        with pytest.raises(CancelledError):
            speeches[0].result(1)
        assert crowd.unfinished == 0
        assert all(station.load == pytest.approx(0) for station in crowd._stations)
        for job in range(8, 30):
            right(ask(crowd, job), job)  # slots are free again


def test_callbacks_may_take_their_time() -> None:
    """They may submit and wait; nobody else's sound waits for them."""
    with two() as crowd:
        called, release = threading.Event(), threading.Event()
        second: list[Speech] = []

        def go_on(_: object) -> None:
            second.append(ask(crowd, 10))
            called.set()
            release.wait(20)

        ask(crowd, 8).add_done_callback(go_on)
        assert called.wait(20)
        stream = ask(crowd, 9, tokens=60, stream=True)
        chunks = iter(stream)
        np.testing.assert_array_equal(first := next(chunks), said(9, 60)[: len(first)])
        assert not stream.done()  # of ends, that callback is told first
        release.set()
        right(second[0], 10)
        right(stream, 9, 60)


def test_deadlines() -> None:
    with two() as crowd:
        begin = time.monotonic()
        late = [ask(crowd, 0, BOOK, deadline_s=0.2) for _ in range(30)]
        soon = ask(crowd, 1, deadline_s=60)
        for speech in late:
            with pytest.raises(DeadlineExceeded, match=r"0\.2 s"):
                speech.result(20)
        assert time.monotonic() - begin >= 0.2
        right(soon, 1)


def test_a_full_queue() -> None:
    with ProcessCrowd(posts({"slots": 1}, {"slots": 1}), max_queue=4) as crowd:
        begun = [ask(crowd, job, BOOK) for job in (0, 1)]
        until(lambda: sum(station.waiting for station in crowd._stations) == 0)
        waiting = [ask(crowd, 2, BOOK) for _ in range(4)]
        with pytest.raises(Busy, match="try again later"):
            ask(crowd, 3)
        waiting[0].cancel()
        until(lambda: sum(station.waiting for station in crowd._stations) == 3)
        ask(crowd, 4, BOOK)
        assert not any(speech.done() for speech in begun)
    for wrong in (0, True, "many"):
        with pytest.raises(ParameterError, match="max_queue"):
            ProcessCrowd(posts({}), max_queue=wrong)  # type: ignore[arg-type]


def test_bad_input() -> None:
    with two() as crowd:
        for text in ("", "...", "\n\t ", "\udcff?"):
            with pytest.raises(TextError, match="nothing to speak"):
                crowd.submit_text(text, PARAMS, Wish())
        with pytest.raises(ParameterError, match="must be a string"):
            crowd.submit_text(None, PARAMS, Wish())  # type: ignore[arg-type]
        long = sentence(0, 0, 5)
        with pytest.raises(ParameterError, match="65 tokens; at most 64"):
            crowd.submit([type(long)(np.zeros(65, np.int32), long.params)], Wish())
        assert all(station.sent == 0 for station in crowd._stations)  # nothing of that has travelled
        with pytest.raises(TextError, match="nothing to speak"):
            crowd.submit_text("nothing", PARAMS, Wish()).result(20)
        with pytest.raises(DeviceError, match="IndexError: a bug"):
            crowd.submit_text("a bug", PARAMS, Wish()).result(20)
        right(ask(crowd, 1), 1)


def test_closing() -> None:
    crowd = two()
    unfinished = ask(crowd, 0, BOOK)
    drained = two()
    last = ask(drained, 1)
    drained.close(drain_s=20)
    right(last, 1)
    crowd.close()
    crowd.close()
    assert isinstance(unfinished.exception(1), Closed)
    with pytest.raises(Closed):
        ask(crowd, 2)


def test_closing_a_process_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soprano_cupy.crowd.processes_station.END_S", 0.3)
    with two() as crowd:
        crowd.submit_text("stop", PARAMS, Wish())
        until(lambda: any("T (stopped)" in Path(f"/proc/{pid}/status").read_text() for pid in crowd.pids))


FRONT = """
    import sys, time
    from soprano_cupy.crowd.job import Wish
    from soprano_cupy.crowd.processes import ProcessCrowd
    from soprano_cupy.crowd.processes_station import Post
    from soprano_cupy.sampling import SamplingParams

    crowd = ProcessCrowd([Post(f"sim:{i}", "simulated_voice:Voice", {}) for i in range(2)])
    speeches = [crowd.submit_text(f"{i} 2 100000", SamplingParams(seed=1), Wish(stream=True)) for i in range(20)]
    print(*crowd.pids, flush=True)
    try:
        time.sleep(60)
    finally:
        crowd.close()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_whoever_asked_is_killed(how: signal.Signals) -> None:
    """Interrupted or killed, the front takes its processes along."""
    here = Path(__file__).parent
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join((str(here.parent), str(here)))}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(FRONT)], env=paths, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        preexec_fn=heed_signals,
    ) as front:  # fmt: skip
        assert front.stdout is not None
        pids = [int(word) for word in front.stdout.readline().split()]
        assert len(pids) == 2
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)
        front.send_signal(how)
        front.wait(20)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_the_voice_of_two_processes_has_the_bits_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU engine twice, end to end."""
    folder = make_checkpoint(tmp_path, seed=8, mean_tokens=60)
    texts = [f"Number {i} is here, and so are you. Good evening to you all!" for i in range(8)]
    options = [{"stream": i % 2 == 0, "temperature": 0.5 * (i % 3), "seed": i} for i in range(8)]
    with SopranoTTS(folder, device="cpu", max_batch=3) as tts:
        alone = [tts.submit(text, **one).result(60) for text, one in zip(texts, options, strict=True)]  # type: ignore[arg-type]
    monkeypatch.setattr(plan, "device_names", lambda *_: ["cpu", "cpu"])
    monkeypatch.setattr(plan, "wants_processes", lambda names: True)
    with SopranoTTS(folder, device="cpu", max_batch=3) as tts:
        speeches = [tts.submit(text, **one) for text, one in zip(texts, options, strict=True)]  # type: ignore[arg-type]
        for speech, samples in zip(speeches, alone, strict=True):
            np.testing.assert_array_equal(speech.result(60), samples)
        pcm = tts.submit(texts[0], dtype="int16", **options[0]).result(60)  # type: ignore[arg-type]
        assert pcm.dtype == np.int16
        with pytest.raises(TextError):
            tts.submit("!!!")
        with pytest.raises(ParameterError, match="temperature"):
            tts.submit("One.", temperature=-1)
        assert isinstance(tts._opened(), ProcessCrowd)


def test_each_process_sees_its_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, found in ((None, "1"), ("", "1"), ("4, 7", "7"), ("GPU-a,GPU-b,GPU-c", "GPU-b")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert plan.only_this("cuda:1") == {"CUDA_VISIBLE_DEVICES": found}
    assert plan.only_this("cpu") == {}
    wanted = plan.CrowdPlan(Path("voice"), "auto", "auto", 8, None, 16, None)
    post = plan.post(wanted, "cuda:1")
    assert (post.name, post.options["device"], post.environment) == ("cuda:1", "cuda:0", plan.only_this("cuda:1"))


def test_a_process_has_its_environment() -> None:
    with ProcessCrowd([Post("sim", "simulated_voice:Voice", {}, {"SOPRANO_TEST": "here"})]) as crowd:
        environment = Path(f"/proc/{crowd.pids[0]}/environ").read_bytes().split(b"\0")
        assert b"SOPRANO_TEST=here" in environment
        assert {entry.partition(b"=")[0] for entry in environment} >= {name.encode() for name in ("PATH",)}
        assert crowd.devices[0].name == "sim"


def test_several_gpus_get_a_process_each() -> None:
    assert plan.wants_processes(["cuda:0", "cuda:1"])
    assert not plan.wants_processes(["cuda:0"])
    assert not plan.wants_processes(["cpu"])
    assert not plan.wants_processes(["cuda:0", "cpu"])


def test_a_python_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for python, word in (("/nowhere/python", "cannot be started"), ("", "set_executable")):
        monkeypatch.setattr("soprano_cupy.crowd.processes_station.get_executable", lambda python=python: python)
        with pytest.raises(DeviceError, match=word):
            ProcessCrowd(posts({}, {}))
