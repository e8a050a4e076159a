"""`soprano-cupy serve --devices`: several devices share the requests, and what cannot work is said at once."""

from __future__ import annotations

import http.client
import json
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import command_line
import pytest
from command_line import run

from soprano_cupy import device, pipeline
from soprano_cupy.audio import wav_bytes
from soprano_cupy.cli import speech_api
from soprano_cupy.crowd import plan
from soprano_cupy.crowd.processes import ProcessCrowd
from soprano_cupy.crowd.processes_station import Post
from soprano_cupy.testing import make_checkpoint

TEXT = "Hello there, how are you this fine morning?"


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("voice"), seed=5)


def asked(server: speech_api.SpeechServer, method: str, path: str, body: str | None = None) -> bytes:
    """What the server answers, which must be in order."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200
        return answer.read()
    finally:
        connection.close()


@pytest.fixture
def two_gpus(voice: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """cuda:0 and cuda:1 are there, and compute on the CPU."""
    for name, value in command_line.quiet_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SOPRANO_MODEL", str(voice))
    real_post = plan.post

    def resolved(name: str) -> tuple[str, str]:
        return {"cuda": "cuda:0"}.get(name, name), "asked for"

    def post(wanted: plan.CrowdPlan, name: str) -> Post:
        return replace(real_post(wanted, "cpu"), name=name)

    monkeypatch.setattr(device, "resolve_device", resolved)
    monkeypatch.setattr(plan, "post", post)
    monkeypatch.setattr(pipeline, "resolve_device", lambda name: ("cpu", f"{name} was asked for"))


def test_several_devices_have_a_process_each(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are there before the server listens, speak what one speaks, and are gone at the end."""
    serve_forever = speech_api.SpeechServer.serve_forever
    seen: dict[str, Any] = {}

    def serve(server: speech_api.SpeechServer) -> None:
        crowd = server.tts._crowd
        assert isinstance(crowd, ProcessCrowd)
        seen["pids"], seen["names"] = crowd.pids, [one.name for one in crowd.devices]
        thread = threading.Thread(target=serve_forever, args=(server, 0.01))
        thread.start()
        seen["health"] = json.loads(asked(server, "GET", "/health"))
        seen["spoken"] = asked(server, "POST", "/v1/audio/speech", json.dumps({"input": TEXT}))
        seen["expected"] = wav_bytes(server.tts.infer(TEXT))
        server.shutdown()
        thread.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(speech_api.SpeechServer, "serve_forever", serve)
    result = run("serve", "--port", 0, "--devices", "cuda, cuda:1")
    assert result.code == 0, result.err
    assert re.fullmatch(r"listening on http://127\.0\.0\.1:\d+; Ctrl-C stops\nstopping\n", result.err)
    assert seen["names"] == seen["health"]["devices"] == ["cuda:0", "cuda:1"]
    assert seen["spoken"] == seen["expected"]
    assert len(set(seen["pids"])) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in seen["pids"])


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("", "--devices '': device = '' is not known; use auto, cpu, cuda or cuda:N, with commas between"),
        ("cuda:0,", "device = '' is not known"),
        ("cuda:0;cuda:1", "device = 'cuda:0;cuda:1' is not known"),
        ("cuda:0,gpu1", "--devices 'cuda:0,gpu1': device = 'gpu1' is not known"),
        ("0,1", "device = '0' is not known"),
        ("cuda,cuda:1,cuda:0", "names the same device twice (cuda:0, cuda:1, cuda:0); name each once"),
    ],
)
def test_devices_that_make_no_sense(two_gpus: None, value: str, complaint: str) -> None:
    result = run("serve", "--port", 0, "--devices", value)
    assert (result.code, result.out) == (2, b"")
    assert complaint in result.only_line


def test_device_and_devices(two_gpus: None) -> None:
    result = run("serve", "--port", 0, "-d", "cpu", "--devices", "cuda:0,cuda:1")
    assert result.code == 2
    assert "--device and --devices name the same thing" in result.only_line


def test_devices_that_are_not_there(voice: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in command_line.quiet_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(device, "cuda_problem", lambda: "no NVIDIA GPU is visible; check nvidia-smi")
    result = run("serve", "-m", voice, "--port", 0, "--devices", "cuda:0,cuda:1")
    assert result.code == 1
    assert "device cuda:0 cannot be used: no NVIDIA GPU is visible" in result.only_line


def test_devices_that_cannot_be_started(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the server listens, not to the first who asks."""
    monkeypatch.setattr("soprano_cupy.crowd.processes_station.get_executable", lambda: "/nowhere/python")
    result = run("serve", "--port", 0, "--devices", "cuda:0,cuda:1")
    assert result.code == 1
    assert "listening" not in result.err
    assert "a process cannot be started" in result.err.splitlines()[-1]
