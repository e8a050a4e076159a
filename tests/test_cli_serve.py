"""`soprano-cupy serve` over loopback: sound, errors, streams, clients that leave, and a clean end."""

from __future__ import annotations

import http.client
import io
import json
import re
import signal
import socket
import subprocess
import threading
import time
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
from command_line import run

from soprano_cupy import Busy, SopranoTTS
from soprano_cupy.audio import to_pcm16, wav_bytes
from soprano_cupy.cli import speech_api
from soprano_cupy.crowd.runner_device import RunnerDevice
from soprano_cupy.testing import make_checkpoint

TEXT = "Hello there, how are you this fine morning?"
SPEECH = "/v1/audio/speech"


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("voice"), seed=5)


@pytest.fixture(scope="module")
def tts(voice: Path) -> Iterator[SopranoTTS]:
    with SopranoTTS(voice, device="cpu") as tts:
        yield tts


@pytest.fixture
def server(tts: SopranoTTS) -> Iterator[speech_api.SpeechServer]:
    with speech_api.SpeechServer("127.0.0.1", 0, tts) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield running
        finally:
            running.shutdown()
            thread.join()
            assert running.drain(10)


class Client:
    """One connection to the server."""

    def __init__(self, server: speech_api.SpeechServer) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, bytes]:
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        self.connection.request(method, path, data, given)
        answer = self.connection.getresponse()
        return answer.status, answer.headers, answer.read()

    def speak(self, **body: Any) -> tuple[int, Any, bytes]:
        return self.ask("POST", SPEECH, body)


@pytest.fixture
def client(server: speech_api.SpeechServer) -> Iterator[Client]:
    with Client(server) as one:
        yield one


def once(server: speech_api.SpeechServer, method: str, path: str, body: Any = None, **headers: str) -> Any:
    """Status, headers and body of one request on a connection of its own."""
    with Client(server) as client:
        return client.ask(method, path, body, **headers)


def test_health(client: Client, voice: Path) -> None:
    status, headers, body = client.ask("GET", "/health")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    state = json.loads(body)
    assert (state["status"], state["model"], state["device"]) == ("ok", str(voice), "cpu")
    assert state["devices"] == ["cpu"]


def test_wav_and_pcm(client: Client, tts: SopranoTTS) -> None:
    samples = tts.infer(TEXT)
    status, headers, body = client.speak(input=TEXT, model="tts-1", voice="alloy")
    assert (status, headers["Content-Type"], body) == (200, "audio/wav", wav_bytes(samples))
    status, headers, body = client.speak(input=TEXT, response_format="pcm")
    assert (status, headers["Content-Type"]) == (200, "audio/pcm; rate=32000; channels=1")
    assert body == to_pcm16(samples).tobytes()


def test_sampling(client: Client, tts: SopranoTTS) -> None:
    sampling = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1, "retries": 1, "seed": 11}
    assert client.speak(input=TEXT, **sampling)[2] == wav_bytes(tts.infer(TEXT, **sampling))


@pytest.mark.parametrize("asked", [{"stream": True}, {"stream_format": "audio"}])
def test_stream(client: Client, tts: SopranoTTS, asked: dict[str, Any]) -> None:
    """Chunked, and sample for sample what is spoken at once; the connection stays usable."""
    expected = to_pcm16(tts.infer(TEXT)).astype(int)
    for _ in range(2):
        status, headers, body = client.speak(input=TEXT, response_format="pcm", **asked)
        assert (status, headers["Transfer-Encoding"]) == (200, "chunked")
        samples = np.frombuffer(body, "<i2").astype(int)
        assert samples.shape == expected.shape
        assert np.abs(samples - expected).max() <= 1
    status, _, body = client.speak(input=TEXT, **asked)
    with wave.open(io.BytesIO(body)) as file:
        assert file.getparams()[:3] == (1, 2, 32000)
        np.testing.assert_array_equal(np.frombuffer(file.readframes(len(samples)), "<i2"), samples)


def test_stream_to_an_http_1_0_client(server: speech_api.SpeechServer, tts: SopranoTTS) -> None:
    body = json.dumps({"input": TEXT, "stream": True, "response_format": "pcm"}).encode()
    head = f"POST {SPEECH} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    answer = raw(server, head.encode() + body)
    headers, _, data = answer.partition(b"\r\n\r\n")
    assert b"chunked" not in headers
    assert len(data) == 2 * len(tts.infer(TEXT))


def raw(server: speech_api.SpeechServer, data: bytes) -> bytes:
    """Everything that the server answers to these bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[" * 100_000, None),
        (b"\xff\xfe", None),
        ([], None),
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": " \n"}, "input"),
        ({"input": ["Hello."]}, "input"),
        ({"input": "!!!"}, None),
        ({"input": "\ud800"}, None),
        ({"input": TEXT, "response_format": "mp3"}, "response_format"),
        ({"input": TEXT, "response_format": ["wav"]}, "response_format"),
        ({"input": TEXT, "stream_format": "sse"}, "stream_format"),
        ({"input": TEXT, "stream": "yes"}, "stream"),
        ({"input": TEXT, "speed": 2}, "speed"),
        ({"input": TEXT, "temperature": -1}, None),
        ({"input": TEXT, "temperature": "hot"}, None),
        ({"input": TEXT, "top_p": 0, "stream": True}, None),
        ({"input": TEXT, "seed": 1.5}, None),
        ({"input": TEXT, "retries": -1, "stream": True}, None),
    ],
)
def test_wrong_requests(client: Client, body: Any, param: str | None) -> None:
    status, headers, data = client.ask("POST", SPEECH, body)
    assert (status, headers["Content-Type"]) == (400, "application/json")
    error = json.loads(data)["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert len(error["message"].splitlines()) == 1


def test_wrong_paths_methods_and_types(server: speech_api.SpeechServer) -> None:
    for method, path, status in (
        ("GET", "/", 404),
        ("POST", "/v1/audio", 404),
        ("GET", SPEECH, 405),
        ("DELETE", SPEECH, 405),
        ("POST", "/health", 405),
    ):
        answer = once(server, method, path, b"{}")
        assert answer[0] == status
        assert json.loads(answer[2])["error"]["code"] == status
    assert once(server, "GET", SPEECH)[1]["Allow"] == "POST"
    assert once(server, "POST", SPEECH, {"input": TEXT}, Content_Type="text/plain")[0] == 415
    assert once(server, "GET", "/health?now=1")[0] == 200


def test_broken_heads(server: speech_api.SpeechServer) -> None:
    for data, status in (
        (b"nonsense\r\n\r\n", 400),
        (b"GET " + b"/" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"BREW /health HTTP/1.1\r\n\r\n", 501),
        (b"POST /v1/audio/speech HTTP/1.1\r\n\r\n", 411),
        (b"POST /v1/audio/speech HTTP/1.1\r\nContent-Length: -5\r\n\r\n", 400),
        (b"POST /v1/audio/speech HTTP/1.1\r\nContent-Length: five\r\n\r\n", 400),
        (b"POST /v1/audio/speech HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"POST /v1/audio/speech HTTP/1.1\r\nContent-Length: " + b"9" * 40 + b"\r\n\r\n", 413),
    ):
        answer = raw(server, data)
        assert f" {status} ".encode() in answer.splitlines()[0] or b'"code": %d' % status in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2] or answer)["error"]["code"] == status


def test_too_large_a_body(client: Client) -> None:
    status, _, data = client.ask("POST", SPEECH, bytes(speech_api.MAX_BODY_BYTES + 1))
    assert status == 413
    assert str(speech_api.MAX_BODY_BYTES) in json.loads(data)["error"]["message"]


def test_requests_at_once_share_the_voice(
    server: speech_api.SpeechServer, tts: SopranoTTS, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long text comes first and short ones while it is spoken: they are done before it, each as it is alone."""
    book = " ".join([TEXT] * 40)
    texts = [book, *(f"Number {i}." for i in range(6))]
    answers: dict[str, bytes] = {}
    order: list[str] = []
    all_there = threading.Event()
    submit, advance = SopranoTTS.submit, RunnerDevice.advance

    def submitted(self: SopranoTTS, text: str, **options: Any) -> Any:
        speech = submit(self, text, **options)
        speech.add_done_callback(lambda _: order.append(text))
        return speech

    def advanced(self: RunnerDevice) -> None:
        all_there.wait(30)
        advance(self)

    def ask(text: str) -> None:
        answers[text] = once(server, "POST", SPEECH, {"input": text, "response_format": "pcm"})[2]

    def wait_for(count: int) -> None:
        while tts._crowd is None or tts._crowd.scheduler.unfinished < count:
            time.sleep(0.001)

    monkeypatch.setattr(SopranoTTS, "submit", submitted)
    monkeypatch.setattr(RunnerDevice, "advance", advanced)
    threads = [threading.Thread(target=ask, args=(text,)) for text in texts]
    threads[0].start()
    wait_for(1)
    for thread in threads[1:]:
        thread.start()
    wait_for(len(texts))
    all_there.set()
    for thread in threads:
        thread.join()
    assert order[-1] == book
    for text in texts:
        expected, found = to_pcm16(tts.infer(text)), np.frombuffer(answers[text], "<i2")
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_full_queue_of_the_voice(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: Any, **__: Any) -> None:
        raise Busy("too much is waiting; try again later")

    monkeypatch.setattr(SopranoTTS, "submit", busy)
    for stream in (False, True):
        status, headers, data = client.speak(input=TEXT, stream=stream)
        assert (status, headers["Retry-After"]) == (503, "1")
        assert b"try again later" in data


def test_too_many_requests(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech_api, "MAX_REQUESTS", 0)
    status, headers, data = client.speak(input=TEXT)
    assert (status, headers["Retry-After"]) == (503, "1")
    assert json.loads(data)["error"]["type"] == "server_error"


class Told:
    """What `submit` gives, with chunks that are told beforehand."""

    def __init__(self, chunks: Iterator[np.ndarray]) -> None:
        self.chunks, self.left = chunks, threading.Event()

    def __enter__(self) -> Told:
        return self

    def __exit__(self, *_: object) -> None:
        self.left.set()

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.chunks

    def result(self) -> np.ndarray:
        return np.concatenate(list(self.chunks))


def test_a_client_that_leaves_frees_the_voice(
    server: speech_api.SpeechServer, tts: SopranoTTS, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream without an end goes on only as long as somebody listens."""
    speech = Told(np.zeros(32000, np.float32) for _ in iter(int, 1))
    monkeypatch.setattr(SopranoTTS, "submit", lambda *_, **__: speech)
    body = json.dumps({"input": TEXT, "stream": True}).encode()
    head = f"POST {SPEECH} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
        connection.sendall(head.encode() + body)
        assert connection.recv(1000)
    assert speech.left.wait(30)
    monkeypatch.undo()
    assert once(server, "POST", SPEECH, {"input": TEXT})[2] == wav_bytes(tts.infer(TEXT))


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_the_server_is_a_500_without_details(
    client: Client, monkeypatch: pytest.MonkeyPatch, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Iterator[np.ndarray]:
        raise RuntimeError("secret")
        yield

    monkeypatch.setattr(SopranoTTS, "submit", lambda *_, **__: Told(broken()))
    status, _, data = client.speak(input=TEXT, stream=stream)
    assert status == 500
    assert b"secret" not in data
    assert "RuntimeError: secret" in caplog.text


def test_a_stream_that_breaks_is_cut_off(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client sees that the end is missing."""

    def broken() -> Iterator[np.ndarray]:
        yield np.zeros(2048, np.float32)
        raise RuntimeError("broken")

    monkeypatch.setattr(SopranoTTS, "submit", lambda *_, **__: Told(broken()))
    with pytest.raises(http.client.IncompleteRead):
        client.speak(input=TEXT, stream=True)


def test_a_stopping_server_finishes_what_it_began(server: speech_api.SpeechServer) -> None:
    assert server.drain(1)
    status, _, data = once(server, "POST", SPEECH, {"input": TEXT})
    assert status == 503
    assert b"stopping" in data


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_cleanly(signal_number: int, voice: Path, tmp_path: Path) -> None:
    environment = command_line.environment(**command_line.quiet_environment(tmp_path))
    arguments = ("serve", "--port", "0", "-m", voice)
    with command_line.started(*arguments, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stderr is not None
        line = child.stderr.readline().decode()
        port = int(re.fullmatch(r"listening on http://127\.0\.0\.1:(\d+); Ctrl-C stops\n", line)[1])  # type: ignore[index]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/health")
        assert connection.getresponse().read().startswith(b'{"status": "ok"')
        child.send_signal(signal_number)
        out, err = child.communicate(timeout=60)
        connection.close()
    assert (child.returncode, out, err) == (0, b"", b"stopping\n")


def test_places_that_cannot_be_listened_on(voice: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in command_line.quiet_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", "-m", voice, "--port", port)
    assert result.code == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in result.only_line
    assert run("serve", "-m", voice, "--port", 70000).code == 2
    result = run("serve", "-m", voice, "--host", "no.such.host.invalid", "--port", 0)
    assert result.code == 1
    assert "no.such.host.invalid" in result.only_line


def test_each_device_has_room_for_requests(server: speech_api.SpeechServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech_api, "MAX_REQUESTS", 1)
    with server.admitted():
        with pytest.raises(speech_api.ApiError, match="too many"), server.admitted():
            raise AssertionError
        monkeypatch.setattr(server, "devices", ["cuda:0", "cuda:1"])
        with server.admitted(), pytest.raises(speech_api.ApiError, match="too many"), server.admitted():
            raise AssertionError
