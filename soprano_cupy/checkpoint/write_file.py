"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError

FILE_MODE = 0o644


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """A stream into a temporary file beside `path` that takes its name once everything is on disk.

    Whatever interrupts the writing, Ctrl-C included, leaves `path` as it was. `CheckpointError` when the
    folder is missing or not writable, or the disk full.
    """
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, FILE_MODE)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
