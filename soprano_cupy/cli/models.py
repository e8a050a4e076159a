"""`soprano-cupy list`, `download`, `cache` and `convert`: the checkpoints on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import settings
from ..errors import CheckpointError, OutputError
from .console import echo, say
from .options import download


def add_commands(commands: Any) -> None:
    _add(commands, "list", run_list, "show the voices that can be used, and which one speaks by default")

    parser = _add(commands, "download", run_download, "fetch a voice from the Hugging Face hub")
    parser.add_argument("model", nargs="?", help="hub id; default: ekwek/Soprano-1.1-80M")

    parser = _add(commands, "cache", run_cache, "show what is stored on disk, and clear it")
    parser.add_argument(
        "--clear", nargs="?", const="", metavar="MODEL", help="delete all downloaded voices and kernels, or one voice"
    )

    parser = _add(commands, "convert", run_convert, "write decoder.safetensors from a checkpoint's decoder.pth")
    parser.add_argument("folder", type=Path, help="the checkpoint's folder")
    parser.add_argument("-o", "--output", type=Path, help="file or folder to write to; default: the same folder")


def run_list(options: argparse.Namespace) -> int:
    from ..checkpoint import hub, resolve

    best = hub.DEFAULT_MODEL if hub.cached_folder(hub.DEFAULT_MODEL) else resolve.BUNDLED
    default = settings.model() or best
    cached = {model.model_id: model for model in hub.cached_models()}
    rows = [(resolve.BUNDLED, f"bundled, {megabytes(_size(resolve.BUNDLED_FOLDER))}")]
    rows += [
        (name, _state(cached.get(name))) for name in [*hub.KNOWN_MODELS, *sorted(cached.keys() - hub.KNOWN_MODELS)]
    ]
    if default not in dict(rows):
        rows.append((default, "named by SOPRANO_MODEL"))
    width = max(len(name) for name, _ in rows)
    for name, state in rows:
        echo(f"{'*' if name == default else ' '} {name:{width}}  {state}")
    say("* speaks when no voice is named")
    return 0


def run_download(options: argparse.Namespace) -> int:
    from ..checkpoint import hub

    echo(str(download(options.model or hub.DEFAULT_MODEL)))
    return 0


def run_cache(options: argparse.Namespace) -> int:
    from ..checkpoint import hub
    from ..cuda import cache as kernels

    if options.clear is not None:
        return _clear(options.clear or None)
    echo(f"voices in {hub.cache_folder()}")
    for model in hub.cached_models():
        echo(f"  {model.model_id}  {_state(model)}")
    folder = kernels.cache_folder()
    files = _kernel_files(folder)
    echo(f"compiled kernels in {folder or 'no folder (set SOPRANO_CACHE_DIR)'}")
    echo(f"  {len(files)} files, {megabytes(sum(file.stat().st_size for file in files))}")
    return 0


def _clear(model_id: str | None) -> int:
    from ..checkpoint import hub
    from ..cuda import cache as kernels

    if model_id is not None and model_id not in {model.model_id for model in hub.cached_models()}:
        raise CheckpointError(f"{model_id} is not in the cache; soprano-cupy cache shows what is")
    freed = hub.clear_cache(model_id)
    if model_id is None:
        for file in _kernel_files(kernels.cache_folder()):
            freed += file.stat().st_size
            try:
                file.unlink()
            except OSError as error:
                raise OutputError(f"cannot delete {file}: {error.strerror or error}; check who owns it") from error
    echo(f"{megabytes(freed)} freed")
    return 0


def run_convert(options: argparse.Namespace) -> int:
    from ..checkpoint import convert

    echo(str(convert(options.folder, options.output)))
    return 0


def megabytes(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1e6:.1f} MB"


def _add(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
    )
    parser.set_defaults(run=run)
    return parser


def _state(model: Any) -> str:
    if model is None:
        return "not downloaded"
    size = megabytes(model.size_bytes)
    return f"{size}, {model.folder}" if model.complete else f"{size}, incomplete: download it again to continue"


def _kernel_files(folder: Path | None) -> list[Path]:
    return sorted(folder.glob("*.cubin")) if folder is not None and folder.is_dir() else []


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*") if file.is_file())
