"""Compile the attention kernels ahead, into kernels/prebuilt, for a wheel that runs where NVRTC is missing.

    python tools/prebuild.py [--architectures 75,80,86,89,90,100,120] [--dtypes ...] [--head-dims ...] [--groups ...]

Needs NVRTC and no GPU. Binaries are looked up by the same key as the cache on disk (source, options, NVRTC version),
so one that no longer fits its source is never used. The folder is emptied first.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from soprano_cupy.attention.probe import ShapeClass
from soprano_cupy.attention.variants import architecture_facts, variants
from soprano_cupy.cuda.cache import PREBUILT_FOLDER, PREBUILT_INDEX, entry_key, write_entry
from soprano_cupy.cuda.compiler import compile_options, find_nvrtc
from soprano_cupy.cuda.source import joined_source, kernels_folder
from soprano_cupy.errors import DeviceError


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def prebuild(folder: Path, architectures: list[int], shapes: list[ShapeClass]) -> int:
    """Fill `folder`; returns the number of binaries."""
    nvrtc = find_nvrtc()
    missing = sorted(set(architectures) - set(nvrtc.architectures))
    if missing:
        raise DeviceError(f"NVRTC {nvrtc.version[0]}.{nvrtc.version[1]} does not compile for {missing}")
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.cubin"), folder / PREBUILT_INDEX):
        old.unlink(missing_ok=True)
    count = 0
    for number, shape in product(architectures, shapes):
        for path, plan in variants(shape, architecture_facts(number)):
            options = compile_options(f"sm_{number}{'a' if path == 'hopper' else ''}", plan.defines)
            text = joined_source(plan.source)
            binary = nvrtc.compile(text, plan.source, options)
            if not write_entry(entry_key(text, options, nvrtc.version), binary.cubin, folder):
                raise DeviceError(f"cannot write to {folder}")
            count += 1
        sys.stdout.write(f"sm_{number} {shape}: {count} binaries so far\n")
    (folder / PREBUILT_INDEX).write_text(json.dumps({"nvrtc": list(nvrtc.version)}) + "\n", encoding="utf-8")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", type=numbers, default=[75, 80, 86, 89, 90, 100, 120])
    parser.add_argument("--dtypes", default="bfloat16,float16")
    parser.add_argument("--head-dims", type=numbers, default=[128])
    parser.add_argument("--groups", type=numbers, default=[4], help="query heads of one KV head")
    parser.add_argument("--out", type=Path, default=kernels_folder() / PREBUILT_FOLDER)
    options = parser.parse_args()
    shapes = [
        ShapeClass("cuda:0", dtype, head_dim, group, causal=True)
        for dtype, head_dim, group in product(options.dtypes.split(","), options.head_dims, options.groups)
    ]
    try:
        count = prebuild(options.out, options.architectures, shapes)
    except DeviceError as error:
        raise SystemExit(str(error)) from error
    size = sum(path.stat().st_size for path in options.out.iterdir())
    sys.stdout.write(f"{count} binaries, {size / 1e6:.1f} MB, in {options.out}\n")


if __name__ == "__main__":
    main()
