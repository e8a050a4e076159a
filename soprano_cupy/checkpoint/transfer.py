"""One file from the hub: resumed where it stopped, verified by its hash, then renamed into place."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DownloadError

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
PIECE_BYTES = 1 << 14  # received at a time; a piece that is cut is lost
ATTEMPTS = 5  # in a row without a single new byte
RETRY_SECONDS = 1.0  # doubled after each attempt in vain
TIMEOUT_SECONDS = 20.0
RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub describes it.

    url: the hub's own address at one commit, which redirects large files to a signed one that soon expires.
    etag: the content's SHA-256, or for small files the SHA-1 of its git blob.
    """

    name: str
    url: str
    size: int
    etag: str
    commit: str


def part_path(blob: Path) -> Path:
    """Where the unfinished content of a blob is kept."""
    return blob.with_name(f"{blob.name}.soprano.part")


def check_space(files: list[RemoteFile], folder: Path) -> None:
    """`DownloadError` before anything is fetched when the disk cannot hold the files that are missing."""
    needed = 0
    for file in files:
        blob = folder / file.etag
        if not blob.is_file():
            part = part_path(blob)
            needed += file.size - (part.stat().st_size if part.is_file() else 0)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"the disk of {folder} has {free / 1e6:.0f} MB free and {needed / 1e6:.0f} MB are needed; "
            "free some space or set SOPRANO_CACHE_DIR"
        )


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Let one process at a time download a checkpoint; the others wait and then find it done."""
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is downloading to %s; waiting for it", path.parent)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def fetch(file: RemoteFile, blob: Path, report: Callable[[int], None] | None = None) -> None:
    """Fetch `file` into `blob`; report: called with the number of bytes that are there so far."""
    part = part_path(blob)
    resumed = part.is_file()
    _fill(file, part, report)
    if not _matches(part, file.etag):
        part.unlink()
        if not resumed:
            raise DownloadError(f"what arrived for {file.name} does not match its hash; run the same again")
        logger.warning("%s does not match its hash after it was continued; fetching all of it", file.name)
        return fetch(file, blob, report)
    os.replace(part, blob)
    return None


def _fill(file: RemoteFile, part: Path, report: Callable[[int], None] | None) -> None:
    """Ask for the rest of the file until all of it is in `part` and on disk."""
    try:
        with part.open("ab") as stream:
            _fill_stream(file, stream, report)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DownloadError(
            f"the disk is full at {part.parent}; free {file.size / 1e6:.0f} MB or set SOPRANO_CACHE_DIR, "
            "then run the same again to continue"
        ) from error


def _fill_stream(file: RemoteFile, stream: BinaryIO, report: Callable[[int], None] | None) -> None:
    attempts, most = 0, stream.seek(0, os.SEEK_END)
    while True:
        start = stream.seek(0, os.SEEK_END)
        if start > file.size:
            start = stream.truncate(0)
        if start == file.size:
            return
        problem = _receive(file, stream, start, report)
        end = stream.seek(0, os.SEEK_END)
        if end == file.size:
            return
        attempts = 1 if end > most else attempts + 1
        most = max(most, end)
        if attempts >= ATTEMPTS:
            raise DownloadError(
                f"the connection broke while fetching {file.name} ({problem}); "
                f"{end / 1e6:.1f} of {file.size / 1e6:.1f} MB are kept, run the same again to continue"
            )
        logger.warning("%s: %s; trying again at byte %d", file.name, problem, end)
        time.sleep(RETRY_SECONDS * 2 ** (attempts - 1))


def _receive(file: RemoteFile, stream: BinaryIO, start: int, report: Callable[[int], None] | None) -> str:
    """Append what one request brings; returns why the file is not complete if it is not.

    A server that ignores the range sends the file from its start, which then replaces what was there.
    """
    with closing(_request(file.url, start)) as answer:
        try:
            first = next(answer)
            if first != start:
                stream.truncate(0)
            if first not in (0, start):
                return f"the server sends byte {first} where {start} was asked for"
            room = file.size - first
            for chunk in answer:
                room -= len(chunk)
                if room < 0:
                    stream.truncate(0)
                    return f"the server sends more than {file.size} bytes"
                stream.write(chunk)
                if report is not None:
                    report(file.size - room)
        except _BrokenError as error:
            return str(error)
    return "the server closed the connection"


class _BrokenError(Exception):
    """A request that failed in a way that another may not."""


def _request(url: str, start: int) -> Generator[Any, None, None]:
    """Yield the offset at which the server begins, then the bytes from there on.

    The user's token goes to the hub only; the HTTP libraries drop it where they are sent to another host.
    Whatever goes wrong on the network becomes `_BrokenError`, whichever HTTP library `huggingface_hub` uses.
    """
    import huggingface_hub.utils

    utils: Any = huggingface_hub.utils  # re-exports that type checkers do not see
    headers = dict(utils.build_hf_headers())
    headers["Accept-Encoding"] = "identity"  # offsets count the file's own bytes
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        with _open(url, headers) as (status, answer_headers, chunks):
            yield _first_byte(status, answer_headers)
            yield from chunks
    except _network_errors() as error:
        raise _BrokenError(type(error).__name__) from error


def _network_errors() -> tuple[type[BaseException], ...]:
    """What sockets and the HTTP library raise; the library's base class is found in huggingface_hub's own errors."""
    from huggingface_hub.errors import HfHubHTTPError

    bases = [base for base in HfHubHTTPError.__mro__ if not base.__module__.startswith("huggingface_hub")]
    return OSError, bases[0]


def _first_byte(status: int, headers: Mapping[str, str]) -> int:
    """The offset of an answer's first byte in the file."""
    if status == 200:
        return 0
    if status == 206:
        match = re.match(r"bytes (\d{1,18})-", headers.get("Content-Range", ""))
        if match:
            return int(match[1])
    if status in RETRY_STATUS:
        raise _BrokenError(f"the server answers {status}")
    raise DownloadError(f"the server answers {status} to the download; try again later")


@contextmanager
def _open(url: str, headers: dict[str, str]) -> Iterator[tuple[int, Mapping[str, str], Iterator[bytes]]]:
    """One streamed GET through huggingface_hub's session: httpx since its version 1, requests before."""
    import huggingface_hub.utils

    utils: Any = huggingface_hub.utils
    session = utils.get_session()
    if callable(getattr(session, "stream", None)):  # requests has a flag of that name
        with session.stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS, follow_redirects=True) as answer:
            yield answer.status_code, answer.headers, answer.iter_bytes()
    else:
        with session.get(url, headers=headers, timeout=TIMEOUT_SECONDS, stream=True) as answer:
            yield answer.status_code, answer.headers, answer.iter_content(PIECE_BYTES)


def _matches(path: Path, etag: str) -> bool:
    """Compare a file with the hub's hash: SHA-256, or the SHA-1 that git gives a blob."""
    if len(etag) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest() == etag
