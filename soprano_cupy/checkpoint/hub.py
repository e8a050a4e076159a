"""Checkpoints from the Hugging Face hub, kept in the hub's own cache layout.

    models--OWNER--NAME/blobs/HASH                a file's content, named by its hash
    models--OWNER--NAME/snapshots/COMMIT/FILE     a link to it
    models--OWNER--NAME/refs/main                 the commit, written once all its files are there

So a checkpoint that another program downloaded is found, and the other way round. `huggingface_hub` knows
addresses, tokens, proxies and certificates; transfer.py moves the bytes.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import settings
from ..errors import DownloadError, ParameterError
from .transfer import RemoteFile, check_space, fetch, file_lock

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "ekwek/Soprano-1.1-80M"
KNOWN_MODELS = (DEFAULT_MODEL, "ekwek/Soprano-80M")
MODEL_ID = r"(?!.*--)[A-Za-z0-9][\w-]*(?:\.[\w-]+)*/[A-Za-z0-9][\w-]*(?:\.[\w-]+)*"
BRANCH = "main"

REQUIRED = ("config.json", "tokenizer.json", "model.safetensors")
OPTIONAL = ("generation_config.json",)
DECODERS = ("decoder.safetensors", "decoder.pth")  # the first that exists is enough

Progress = Callable[[str, int, int], None]  # file being fetched, bytes done and bytes in all, over all files


@dataclass(frozen=True)
class CachedModel:
    """One checkpoint in the cache; folder is None as long as it is not complete."""

    model_id: str
    folder: Path | None
    size_bytes: int

    @property
    def complete(self) -> bool:
        return self.folder is not None


def cache_folder() -> Path:
    """SOPRANO_CACHE_DIR, else where huggingface_hub keeps its files."""
    folder = settings.cache_dir()
    if folder is not None:
        return folder
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in {"1", "ON", "YES", "TRUE"}


def cached_folder(model_id: str) -> Path | None:
    """The folder of a completely downloaded model, else None; asks no network.

    The current commit's, or where that is not complete the newest other that is.
    """
    repository = _repository(model_id)
    snapshots = sorted(repository.glob("snapshots/*"), key=lambda folder: folder.stat().st_mtime, reverse=True)
    with suppress(OSError, UnicodeDecodeError):
        current = (repository / "refs" / BRANCH).read_text(encoding="ascii").strip()
        snapshots.sort(key=lambda folder: folder.name != current)
    return next((folder for folder in snapshots if _is_complete(folder)), None)


def cached_models() -> list[CachedModel]:
    """The Soprano checkpoints in the cache, complete or not, by name; other models there are left out."""
    found = []
    for repository in sorted(cache_folder().glob("models--*--*")):
        model_id = repository.name.removeprefix("models--").replace("--", "/", 1)
        decoders = [path for name in DECODERS for path in repository.glob(f"snapshots/*/{name}")]
        if re.fullmatch(MODEL_ID, model_id) and (decoders or model_id in KNOWN_MODELS):
            found.append(CachedModel(model_id, cached_folder(model_id), _size(repository)))
    return found


def clear_cache(model_id: str | None = None) -> int:
    """Delete one downloaded checkpoint, or every one that `cached_models` lists; returns the bytes freed."""
    freed = 0
    for model in cached_models():
        if model_id in (None, model.model_id):
            repository = _repository(model.model_id)
            try:
                shutil.rmtree(repository)
            except OSError as error:
                raise DownloadError(f"cannot delete {repository}: {error.strerror or error}") from error
            freed += model.size_bytes
    return freed


def download(model_id: str, *, progress: Progress | None = None) -> Path:
    """Fetch a checkpoint's files, as far as they are not there, and return the folder that holds them.

    An interrupted download continues where it stopped, also in another process. Every file is compared
    with the hash that the hub gives before it takes its name. `DownloadError` says what went wrong and what
    to do; what is complete in the cache stays usable.
    """
    if is_offline():
        folder = cached_folder(model_id)
        if folder is None:
            raise DownloadError(f"{model_id} is not downloaded and HF_HUB_OFFLINE forbids it; unset HF_HUB_OFFLINE")
        return folder
    files = _list_files(model_id)
    commit = files[0].commit
    repository = _repository(model_id)
    folder = repository / "snapshots" / commit
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (repository / "blobs").mkdir(exist_ok=True)
        (repository / "refs").mkdir(exist_ok=True)
        with file_lock(repository / ".soprano.lock"):
            _fetch_all(files, repository, folder, progress)
            _write_ref(repository / "refs" / BRANCH, commit)
    except OSError as error:
        raise DownloadError(
            f"cannot write to {repository}: {error.strerror or error}; set SOPRANO_CACHE_DIR"
        ) from error
    return folder


def _fetch_all(files: list[RemoteFile], repository: Path, folder: Path, progress: Progress | None) -> None:
    total = sum(file.size for file in files)
    check_space(files, repository / "blobs")
    done = 0
    for file in files:
        blob = repository / "blobs" / file.etag
        if not blob.is_file():
            logger.info("downloading %s (%.1f MB)", file.name, file.size / 1e6)
            report = None if progress is None else _offset(progress, file.name, done, total)
            fetch(file, blob, report)
        done += file.size
        if progress is not None:
            progress(file.name, done, total)
        _link(blob, folder / file.name)


def _offset(progress: Progress, name: str, before: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(name, before + done, total)


def _list_files(model_id: str) -> list[RemoteFile]:
    """Ask the hub for the checkpoint's files at one commit."""
    first = _describe(model_id, REQUIRED[0], BRANCH)
    if first is None:
        raise DownloadError(f"{model_id} has no {REQUIRED[0]}; is it a Soprano checkpoint?")
    files = [first]
    for name in (*REQUIRED[1:], *OPTIONAL):
        file = _describe(model_id, name, first.commit)
        if file is not None:
            files.append(file)
        elif name in REQUIRED:
            raise DownloadError(f"{model_id} has no {name}; is it a Soprano checkpoint?")
    for name in DECODERS:
        decoder = _describe(model_id, name, first.commit)
        if decoder is not None:
            return [*files, decoder]
    raise DownloadError(f"{model_id} has no {' and no '.join(DECODERS)}; is it a Soprano checkpoint?")


def _describe(model_id: str, name: str, revision: str) -> RemoteFile | None:
    """Address, size and hash of one file; None when the repository exists without it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    endpoint = os.environ.get("HF_ENDPOINT") or None
    _repository(model_id)
    url = hf_hub_url(model_id, name, revision=revision, endpoint=endpoint)
    try:
        metadata: Any = get_hf_file_metadata(url)
    except Exception as error:  # the types differ between versions and their HTTP libraries
        if _is_missing_file(error):
            return None
        raise DownloadError(_explain(model_id, url, error)) from error
    if metadata.size is None or not re.fullmatch(r"[0-9a-f]{40}", metadata.commit_hash or ""):
        raise DownloadError(f"{url} is not answered by a model hub; check HF_ENDPOINT and your proxy")
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", metadata.etag or ""):
        raise DownloadError(
            f"the hub gives no hash for {name} of {model_id}, so it cannot be verified; check HF_ENDPOINT"
        )
    pinned = hf_hub_url(model_id, name, revision=metadata.commit_hash, endpoint=endpoint)
    return RemoteFile(name, pinned, metadata.size, metadata.etag, metadata.commit_hash)


def _is_missing_file(error: Exception) -> bool:
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
        return False
    return isinstance(error, EntryNotFoundError) or _status(error) == 404


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _explain(model_id: str, url: str, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError) or _status(error) == 403:
        return f"{model_id} needs permission; accept its terms on the hub and log in with: hf auth login"
    if isinstance(error, RepositoryNotFoundError) or _status(error) in (401, 404):
        return f"the hub has no model {model_id}, or it is private; known are {' and '.join(KNOWN_MODELS)}"
    if _status(error) is not None:
        return f"the hub answers {_status(error)} for {url}; try again later"
    return f"the hub cannot be reached at {url} ({type(error).__name__}); check the network, then run the same again"


def _repository(model_id: str) -> Path:
    if not isinstance(model_id, str) or not re.fullmatch(MODEL_ID, model_id):
        raise ParameterError(f"{model_id!r} is not a hub id like {DEFAULT_MODEL}")
    return cache_folder() / f"models--{model_id.replace('/', '--')}"


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in REQUIRED) and any((folder / name).is_file() for name in DECODERS)


def _link(blob: Path, target: Path) -> None:
    """Point `target` at the blob, relative so that the cache can be moved; copy where links are not possible."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        os.symlink(os.path.relpath(blob, target.parent), temporary)
    except OSError:
        shutil.copyfile(blob, temporary)
    os.replace(temporary, target)


def _write_ref(path: Path, commit: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(commit, encoding="ascii")
    os.replace(temporary, path)


def _size(folder: Path) -> int:
    """Bytes on disk; links count nothing."""
    paths = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return sum(path.lstat().st_size for path in paths if not path.is_symlink())
