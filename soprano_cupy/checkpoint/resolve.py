"""Which checkpoint a name means: a folder, a model of the hub, the bundled voice, or the best one present."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .. import settings
from ..errors import CheckpointError, ParameterError
from . import hub

BUNDLED = "mini"
BUNDLED_FOLDER = Path(__file__).resolve().parents[1] / "voices" / BUNDLED


@dataclass(frozen=True)
class ResolvedModel:
    """A checkpoint that is on this machine. reason: one line that says why this one."""

    name: str
    folder: Path
    reason: str


def resolve_model(model: str | os.PathLike[str] | None = None) -> ResolvedModel:
    """Find the checkpoint that `model` names; a hub id that is not on this machine is downloaded.

    model: a folder, a hub id "owner/name", "mini", or None for SOPRANO_MODEL, else a downloaded
    Soprano-1.1-80M, else mini. Raises `CheckpointError` and `DownloadError`.
    """
    if model is None:
        named = settings.model()
        return _default() if named is None else _named(named, "named by SOPRANO_MODEL")
    if isinstance(model, str):
        if not model.strip():
            raise ParameterError("model is empty; name a checkpoint's folder, a hub id or mini")
        return _named(model, "asked for")
    try:
        return _in_folder(Path(model), "asked for")
    except TypeError:
        raise ParameterError(f"model = {model!r} is neither text nor a path") from None


def _default() -> ResolvedModel:
    folder = hub.cached_folder(hub.DEFAULT_MODEL)
    if folder is not None:
        return ResolvedModel(hub.DEFAULT_MODEL, folder, "the best voice downloaded")
    get = f'"soprano-cupy download {hub.DEFAULT_MODEL}" fetches the larger voice'
    return ResolvedModel(BUNDLED, _bundled_folder(), f"bundled with the program; {get}")


def _named(name: str, why: str) -> ResolvedModel:
    path = Path(name).expanduser()
    if name == BUNDLED:
        return ResolvedModel(BUNDLED, _bundled_folder(), f"{why}, bundled with the program")
    if path.exists() or not re.fullmatch(hub.MODEL_ID, name):
        return _in_folder(path, why)
    folder = hub.cached_folder(name)
    if folder is not None:
        return ResolvedModel(name, folder, f"{why}, downloaded before")
    return ResolvedModel(name, hub.download(name), f"{why}, downloaded now")


def _in_folder(path: Path, why: str) -> ResolvedModel:
    if not path.is_dir():
        wrong = "is a file, not a checkpoint's folder" if path.exists() else "is not a folder on this machine"
        raise CheckpointError(f"model {str(path)!r} {wrong}; name a folder, a hub id like {hub.DEFAULT_MODEL}, or mini")
    return ResolvedModel(str(path), path, f"{why}, a folder")


def _bundled_folder() -> Path:
    if not (BUNDLED_FOLDER / "config.json").is_file():
        raise CheckpointError(f"the bundled voice is missing from {BUNDLED_FOLDER}; install soprano-cupy again")
    return BUNDLED_FOLDER
