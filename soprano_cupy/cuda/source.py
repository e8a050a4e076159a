"""The kernels' source text: found, and joined with its own headers into one string.

NVRTC gets a single text, so that the cache key covers every header and no include path is needed; `#line`
keeps its messages pointing at the right file and line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ..errors import DeviceError

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"')


@cache
def kernels_folder() -> Path:
    """`kernels/` inside the installed package, else beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / "attention_params.cuh").is_file():
            return folder
    raise DeviceError(f"the CUDA sources are missing from {package / 'kernels'}; install soprano-cupy again")


@cache
def joined_source(name: str, folder: Path | None = None) -> str:
    """The text of `kernels/<name>` with every `#include "..."` replaced by that file, each at its first mention.

    System headers (`#include <...>`) are left to the compiler. Raises `DeviceError` when a file is missing.
    """
    return "".join(_expand(folder or kernels_folder(), name, "", set()))


def _expand(folder: Path, name: str, included_by: str, seen: set[str]) -> Iterator[str]:
    """The lines of one file and, in place, of the headers that it is the first to include."""
    seen.add(name)
    try:
        text = (folder / name).read_text(encoding="utf-8")
    except OSError as error:
        origin = f", included by {included_by}" if included_by else ""
        raise DeviceError(f"cannot read {folder / name}{origin}; install soprano-cupy again") from error
    yield f'#line 1 "{name}"\n'
    for number, line in enumerate(text.splitlines(), 1):
        match = _INCLUDE.match(line)
        if match is None:
            # the joined text is one file, in which `#pragma once` would only draw a warning
            yield "\n" if line.strip() == "#pragma once" else line + "\n"
        elif match[1] not in seen:
            yield from _expand(folder, match[1], name, seen)
            yield f'#line {number + 1} "{name}"\n'
        else:
            yield "\n"
