"""Compiled kernels on disk, found again by everything that went into them.

The key is the SHA-256 of the joined source, the options (architecture and constants among them) and the NVRTC
version. Binaries shipped with the package (`kernels/prebuilt`, see tools/prebuild.py) are looked up first, with
the version of the NVRTC that built them, so that a machine without NVRTC runs them too; a changed source never
finds an old binary.

An entry is a header and the cubin. Whatever is not exactly right (another key, a wrong checksum, a short file,
a file of another user) is treated as absent and built again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from .. import settings
from ..errors import ParameterError
from .source import kernels_folder

log = logging.getLogger(__name__)

_MAGIC = b"SOPRANO\x01"
_HEADER = struct.Struct("<8s32s32sQ")  # magic, key, SHA-256 of the cubin, its length in bytes
_ELF_MAGIC = b"\x7fELF"
PREBUILT_FOLDER = "prebuilt"
PREBUILT_INDEX = "index.json"  # {"nvrtc": [12, 9]}


def entry_key(source: str, options: Sequence[str], nvrtc_version: tuple[int, int]) -> str:
    """The hexadecimal SHA-256 that names a binary; each part is preceded by its length."""
    digest = hashlib.sha256()
    for part in (source, *options, "NVRTC {}.{}".format(*nvrtc_version)):
        data = part.encode()
        digest.update(struct.pack("<Q", len(data)))
        digest.update(data)
    return digest.hexdigest()


def cache_folder() -> Path | None:
    """Where entries are kept: under SOPRANO_CACHE_DIR, else XDG_CACHE_HOME, else ~/.cache; None where there is none."""
    try:
        chosen = settings.cache_dir()
        if chosen is not None:
            return chosen / "kernels"
        base = os.environ.get("XDG_CACHE_HOME")
        return (Path(base) if base else Path.home() / ".cache") / "soprano-cupy" / "kernels"
    except ParameterError as error:  # SOPRANO_CACHE_DIR names a file
        _warn_unwritable(os.environ["SOPRANO_CACHE_DIR"], str(error))
    except RuntimeError:
        _warn_unwritable("~/.cache", "there is no home folder")
    return None


def read_entry(key: str, folder: Path | None = None) -> bytes | None:
    """The cubin stored under `key`, or None when there is none that can be trusted."""
    folder = folder or cache_folder()
    return None if folder is None else _read(key, folder, foreign_owner=False)


def _read(key: str, folder: Path, *, foreign_owner: bool) -> bytes | None:
    path = folder / f"{key}.cubin"
    try:
        with path.open("rb") as file:
            owner = os.fstat(file.fileno()).st_uid
            data = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.info("cannot read the compiled kernel %s (%s); it is built again", path, error.strerror or error)
        return None
    if owner not in (os.geteuid(), 0) and not foreign_owner:
        log.info("the compiled kernel %s belongs to another user; it is built again", path)
        return None
    cubin = unpack_entry(key, data)
    if cubin is None:
        log.info("the compiled kernel %s is damaged or foreign; it is built again", path)
    return cubin


def write_entry(key: str, cubin: bytes, folder: Path | None = None) -> bool:
    """Store a cubin: a temporary file in the same folder, synced and renamed. False, logged once, if it cannot be."""
    folder = folder or cache_folder()
    if folder is None:
        return False
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=key[:16], suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(pack_entry(key, cubin))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / f"{key}.cubin")
    except OSError as error:
        if temporary:
            with suppress(OSError):
                os.unlink(temporary)
        _warn_unwritable(str(folder), error.strerror or str(error))
        return False
    return True


def read_prebuilt(source: str, options: Sequence[str], folder: Path | None = None) -> bytes | None:
    """The binary shipped with the package for this source and these options, or None."""
    folder = folder or kernels_folder() / PREBUILT_FOLDER
    version = _prebuilt_version(folder)
    if version is None:
        return None
    return _read(entry_key(source, options, version), folder, foreign_owner=True)  # as trusted as the package


@cache
def _prebuilt_version(folder: Path) -> tuple[int, int] | None:
    """The NVRTC version that built the folder's binaries; None when there are none."""
    try:
        major, minor = json.loads((folder / PREBUILT_INDEX).read_text(encoding="utf-8"))["nvrtc"]
        return int(major), int(minor)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.info("the index of shipped kernels in %s is unreadable (%s); they are not used", folder, error)
        return None


def pack_entry(key: str, cubin: bytes) -> bytes:
    """The bytes of an entry."""
    return _HEADER.pack(_MAGIC, bytes.fromhex(key), hashlib.sha256(cubin).digest(), len(cubin)) + cubin


def unpack_entry(key: str, data: bytes) -> bytes | None:
    """The cubin inside an entry's bytes, or None unless all of it is as it was written for this key."""
    if len(data) < _HEADER.size:
        return None
    magic, stored_key, checksum, length = _HEADER.unpack_from(data)
    cubin = data[_HEADER.size :]
    sound = (
        magic == _MAGIC
        and stored_key == bytes.fromhex(key)
        and length == len(cubin)
        and checksum == hashlib.sha256(cubin).digest()
        and cubin.startswith(_ELF_MAGIC)
    )
    return cubin if sound else None


@cache
def _warn_unwritable(folder: str, why: str) -> None:
    """One line for each folder and reason, however many kernels are compiled."""
    log.warning(
        "compiled kernels cannot be kept in %s (%s), so they are compiled again by every process; "
        "make it writable or set SOPRANO_CACHE_DIR",
        folder,
        why,
    )
