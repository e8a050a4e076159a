"""The requests that `soprano-cupy serve` answers, in the shape of OpenAI's speech API.

    POST /v1/audio/speech   {"input": "Hello.", "response_format": "wav" or "pcm", "stream": true or false, ...}
    GET  /health

Sound is mono at 32 kHz; pcm is 16-bit little-endian. Errors are {"error": {"message", "type", "param", "code"}}.
"""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .. import __version__
from ..audio import encode, wav_bytes, wav_header
from ..config import SAMPLE_RATE_HZ
from ..errors import Busy, ParameterError, SopranoError, TextError
from ..pipeline import SopranoTTS

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 1 << 20
MAX_REQUESTS = 256  # for each device, being answered or waiting for the voice; further ones are sent away
SOCKET_SECONDS = 30.0  # how long a client may keep silent or not listen
LINGER_SECONDS = 1.0
SAMPLING = ("temperature", "top_p", "repetition_penalty", "retries", "seed")
CONTENT_TYPES = {"wav": "audio/wav", "pcm": f"audio/pcm; rate={SAMPLE_RATE_HZ}; channels=1"}


class ApiError(Exception):
    """A request that cannot be answered: the HTTP status, and the field that is wrong if one is."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


@dataclass(frozen=True)
class SpeechRequest:
    """What a client asked for. `model`, `voice` and `instructions` are accepted and change nothing."""

    text: str
    format: str = "wav"
    stream: bool = False
    sampling: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, body: bytes) -> SpeechRequest:
        """Read a JSON body; `ApiError` names the first field that is wrong."""
        try:
            value = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise ApiError(400, "the body must be a JSON object")
        text = value.get("input")
        if not isinstance(text, str) or not text.strip():
            raise ApiError(400, "input must be a text that is not empty", "input")
        if value.get("response_format", "wav") not in tuple(CONTENT_TYPES):
            raise ApiError(400, f"response_format must be one of {', '.join(CONTENT_TYPES)}", "response_format")
        if value.get("stream_format", "audio") != "audio":
            raise ApiError(400, "stream_format must be audio", "stream_format")
        if not isinstance(value.get("stream", False), bool):
            raise ApiError(400, "stream must be true or false", "stream")
        if value.get("speed", 1) != 1:
            raise ApiError(400, "speed must be 1: this voice has one speed", "speed")
        return cls(
            text,
            value.get("response_format", "wav"),
            value.get("stream", "stream_format" in value),
            {name: value[name] for name in SAMPLING if value.get(name) is not None},
        )


class SpeechServer(ThreadingHTTPServer):
    """One thread a connection; one voice, which speaks for all requests side by side, on its own device or several."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, tts: SopranoTTS, devices: Sequence[str] | None = None) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.tts, self.devices = tts, list(devices or [tts.device])
        self.stopping = False
        self._answering = 0
        self._changed = threading.Condition()
        super().__init__((host, port), Handler)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request in; `ApiError` 503 when there are too many or the server is stopping."""
        with self._changed:
            if self.stopping or self._answering >= MAX_REQUESTS * len(self.devices):
                raise ApiError(503, "the server is stopping" if self.stopping else "too many requests; try again later")
            self._answering += 1
        try:
            yield
        finally:
            with self._changed:
                self._answering -= 1
                self._changed.notify_all()

    def drain(self, seconds: float) -> bool:
        """Take no further requests and wait for those under way; streams end at their next chunk."""
        with self._changed:
            self.stopping = True
            return self._changed.wait_for(lambda: self._answering == 0, seconds)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that failed outside of a request: one line for the log."""
        error = sys.exc_info()[1]
        logger.info("%s: connection lost (%s)", client_address[0], type(error).__name__)


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    server_version = f"soprano-cupy/{__version__}"
    sys_version = ""
    timeout = SOCKET_SECONDS
    server: SpeechServer

    def answer(self) -> None:
        """Route one request; whatever goes wrong becomes a JSON error unless sound is on its way already."""
        self._begun = False
        try:
            path = self.path.partition("?")[0]
            if (method := {"/health": "GET", "/v1/audio/speech": "POST"}.get(path)) is None:
                raise ApiError(404, f"there is no {path}; use POST /v1/audio/speech or GET /health")
            if self.command != method:
                raise ApiError(405, f"{path} answers {method}, not {self.command}")
            if method == "GET":
                self._health()
            else:
                self._speech()
        except (ConnectionError, TimeoutError) as error:
            logger.info("%s: the client has gone (%s)", self.client_address[0], type(error).__name__)
            self.close_connection = True
        except Exception as error:
            self._fail(error)

    do_GET = do_POST = do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer  # noqa: N815

    def _health(self) -> None:
        tts = self.server.tts
        state = {"status": "ok", "version": __version__, "model": tts.model.name, "device": tts.device}
        self._send(200, "application/json", json.dumps({**state, "devices": self.server.devices}).encode())

    def _speech(self) -> None:
        with self.server.admitted():
            request = SpeechRequest.parse(self._body())
            if request.stream:
                self._stream(request)
            else:
                with self.server.tts.submit(request.text, **request.sampling) as speech:
                    samples = speech.result()
                data = wav_bytes(samples) if request.format == "wav" else encode(samples)
                self._send(200, CONTENT_TYPES[request.format], data)

    def _stream(self, request: SpeechRequest) -> None:
        """Send chunks as they are made. The first is awaited, so that most errors still have their status."""
        with self.server.tts.submit(request.text, stream=True, **request.sampling) as speech:
            chunks = iter(speech)
            first = next(chunks, None)
            self._begin_stream(CONTENT_TYPES[request.format])
            if request.format == "wav":
                self._chunk(wav_header(None))
            if first is not None:
                self._chunk(encode(first))
            for samples in chunks:
                if self.server.stopping:
                    raise ApiError(503, "the server is stopping")
                self._chunk(encode(samples))
            if self.request_version != "HTTP/1.0":
                self.wfile.write(b"0\r\n\r\n")

    def _begin_stream(self, content_type: str) -> None:
        self._begun = True
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        if self.request_version == "HTTP/1.0":  # the end of the connection is the end of the sound
            self.close_connection = True
        else:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(data if self.request_version == "HTTP/1.0" else b"%x\r\n%b\r\n" % (len(data), data))

    def _body(self) -> bytes:
        """The request's body, read only once its declared size and type are acceptable."""
        declared = self.headers.get("Content-Length")
        if declared is None:
            raise ApiError(411, "send the body with a Content-Length")
        if not (declared.isascii() and declared.isdigit()):
            raise ApiError(400, "Content-Length must be a whole number")
        length = int(declared[:20])
        if length > MAX_BODY_BYTES:
            raise ApiError(413, f"the body has {length} bytes; at most {MAX_BODY_BYTES} are read: split the text")
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionAbortedError
        if self.headers.get_content_type() != "application/json":  # so that no web page can post here unasked
            raise ApiError(415, "send the header Content-Type: application/json")
        return body

    def _fail(self, error: Exception) -> None:
        """Answer with an error and close: what is left of a body is not read."""
        self.close_connection = True
        if self._begun:
            logger.warning("a stream broke off: %s", error)
            return
        status, message, param = 500, str(error), None
        if isinstance(error, ApiError):
            status, param = error.status, error.param
        elif isinstance(error, (ParameterError, TextError)):
            status = 400
        elif isinstance(error, Busy):
            status = 503
        elif not isinstance(error, SopranoError):
            logger.error("%s: %s", type(error).__name__, error, exc_info=error)
            message = "internal error; the server's log tells more"
        self._send_error_object(status, message, param)

    def _send_error_object(self, status: int, message: str, param: str | None = None) -> None:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        data = json.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}}).encode()
        try:
            self._send(status, "application/json", data)
            self._linger()
        except OSError as error:
            logger.info("%s: the client has gone (%s)", self.client_address[0], type(error).__name__)

    def _linger(self) -> None:
        """Read what is still being sent, for a moment: closing at once could destroy the answer on its way."""
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(LINGER_SECONDS)
        left = 8 * MAX_BODY_BYTES
        while left > 0 and (data := self.connection.recv(65536)):
            left -= len(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Requests that the base class refuses get a JSON error too."""
        self.close_connection = True
        if not hasattr(self, "request_version") or not self.request_version:
            self.request_version = "HTTP/1.1"
        self._send_error_object(int(code), message or self.responses.get(code, ("error",))[0])

    def _send(self, status: int, content_type: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        if status == 503:
            self.send_header("Retry-After", "1")
        if status == 405:
            self.send_header("Allow", "GET" if self.path.startswith("/health") else "POST")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        logger.info("%s %s", self.client_address[0], format % args)
