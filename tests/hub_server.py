"""A model hub on the loopback interface: the part of the hub's protocol that downloads use.

    HEAD, GET  /OWNER/NAME/resolve/REVISION/FILE   small files, with the SHA-1 of their git blob as ETag
    ... large files redirect to /storage/SHA256, with X-Linked-ETag and X-Linked-Size
    GET        /storage/SHA256                     the content; ranges are honoured

Its faults can be chosen: connections cut, content damaged, ranges ignored, statuses.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE_BYTES = 10_000


@dataclass
class Faults:
    """What goes wrong, and how often."""

    cuts: dict[str, list[int]] = field(default_factory=dict)  # file: bytes its coming downloads send before the end
    damage: set[str] = field(default_factory=set)  # files with one bit flipped
    too_long: set[str] = field(default_factory=set)  # files with extra bytes
    ignore_range: bool = False
    wrong_range: bool = False
    statuses: dict[str, list[int]] = field(default_factory=dict)  # file: what its coming downloads answer
    refuse_models: int = 0  # answers every request for a model's file with this
    no_etag: bool = False
    no_commit: bool = False


class HubServer:
    """Serves models: {"owner/name": {"file": content}}. A context manager; `url` is its address."""

    def __init__(self, models: dict[str, dict[str, bytes]]) -> None:
        self.models = models
        self.commit = COMMIT
        self.faults = Faults()
        self.downloads: list[tuple[str, int, int]] = []  # file, first byte, bytes sent
        self.requests: list[str] = []  # method and path
        self.headers: list[dict[str, str]] = []
        server = self

        class Handler(_Handler):
            hub = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def bytes_sent(self, name: str) -> int:
        return sum(sent for file, _, sent in self.downloads if file == name)


def model_files(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint folder, as a hub would hold them."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} | {"README.md": b"# A model\n"}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        self.hub.headers.append({key.lower(): value for key, value in self.headers.items()})
        parts = self.path.strip("/").split("/")
        if parts[0] == "storage":
            for files in self.hub.models.values():
                for name, content in files.items():
                    if hashlib.sha256(content).hexdigest() == parts[1]:
                        return self.send_content(name, content, {}, body=body)
            return self.send_status(404)
        owner, model, _, _revision, name = parts
        if self.hub.faults.refuse_models:
            return self.send_status(self.hub.faults.refuse_models)
        files = self.hub.models.get(f"{owner}/{model}")
        if files is None:
            return self.send_status(401, {"X-Error-Code": "RepoNotFound"})
        headers = {} if self.hub.faults.no_commit else {"X-Repo-Commit": self.hub.commit}
        if name not in files:
            return self.send_status(404, {"X-Error-Code": "EntryNotFound", **headers})
        return self.send_file(name, files[name], headers, body=body)

    def send_file(self, name: str, content: bytes, headers: dict[str, str], *, body: bool) -> None:
        if self.hub.faults.no_etag:
            return self.send_content(name, content, headers | {"ETag": '"weak"'}, body=body)
        if len(content) < LARGE_BYTES:
            digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            return self.send_content(name, content, headers | {"ETag": f'"{digest}"'}, body=body)
        digest = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        other_host = self.hub.url.replace("127.0.0.1", "localhost")
        return self.send_status(302, headers | {"Location": f"{other_host}/storage/{digest}"})

    def send_status(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": "0"}.items():
            self.send_header(key, value)
        self.end_headers()

    def send_content(self, name: str, content: bytes, headers: dict[str, str], *, body: bool) -> None:
        faults = self.hub.faults
        if body and faults.statuses.get(name):
            return self.send_status(faults.statuses[name].pop(0))
        size = len(content)
        first = 0
        wanted = self.headers.get("Range")
        if body and wanted and not faults.ignore_range:
            first = int(wanted.removeprefix("bytes=").split("-")[0]) - faults.wrong_range
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        else:
            self.send_response(200)
        if name in faults.damage:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if name in faults.too_long:
            content += b"more"
        for key, value in {**headers, "Content-Length": str(len(content) - first)}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.send_body(name, first, content[first:])
        return None

    def send_body(self, name: str, first: int, content: bytes) -> None:
        cuts = self.hub.faults.cuts.get(name)
        if cuts:
            content = content[: cuts.pop(0)]
            self.close_connection = True
        self.hub.downloads.append((name, first, len(content)))
        self.wfile.write(content)
