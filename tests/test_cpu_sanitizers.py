"""The engine's C code at odd sizes: under AddressSanitizer, UBSan and ThreadSanitizer, and on an emulated aarch64.

`cpu_kernels.c` checks products against exact sums, and that states and audio depend on neither threads, batch nor
how they are cut into calls; each test compiles it with the engine's sources.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numerics import relative_error

from soprano_cupy.cpu import _engine

TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "soprano_cupy/cpu/csrc"
FLAGS = ["-std=gnu11", "-g0", "-fno-math-errno", "-pthread"]
MAX_DIFFERENCE = {"float32": 1e-6, "bfloat16": 1e-3, "int8": 1e-3}  # relative; what is rounded may fall the other way


def build(folder: Path, compiler: str, *flags: str) -> Path:
    """The compiled driver; skips where there is no such compiler, or it lacks the flags' libraries."""
    if not SOURCES.is_dir() or shutil.which(compiler) is None:
        pytest.skip(f"needs a checkout and {compiler}")
    empty, program = folder / "empty.c", folder / "cpu_kernels"
    empty.write_text("int main(void) { return 0; }\n")
    if subprocess.run([compiler, *flags, str(empty), "-o", str(program)], capture_output=True).returncode:
        pytest.skip(f"{compiler} cannot link {' '.join(flags)}")
    sources = [str(path) for path in sorted(SOURCES.glob("*.c")) if path.name != "gelu.c"]
    command = [
        compiler,
        *FLAGS,
        *flags,
        f"-I{SOURCES}",
        str(TESTS / "cpu_kernels.c"),
        *sources,
        "-lm",
        "-o",
        str(program),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return program


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this system's address space layout is too random for ThreadSanitizer")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def read_outputs(path: Path) -> list[np.ndarray]:
    """What the driver wrote: runs of values, each behind its length."""
    values, outputs, at = np.fromfile(path, np.float32), [], 0
    while at < len(values):
        count = int(values[at])
        outputs.append(values[at + 1 : at + 1 + count])
        at += 1 + count
    return outputs


def test_memory_and_arithmetic(tmp_path: Path) -> None:
    """AddressSanitizer and UBSan on every instruction set of this machine."""
    sanitizers = "-fsanitize=address,undefined"
    program = build(tmp_path, "gcc", "-O1", sanitizers, "-fno-sanitize-recover=undefined")
    said = run(str(program), "all")
    assert [line.split(":")[0] for line in said.splitlines()] == _engine.instruction_sets()


def test_threads(tmp_path: Path) -> None:
    """ThreadSanitizer; what the instruction sets differ in does not touch the team."""
    program = build(tmp_path, "gcc", "-O1", "-fsanitize=thread")
    assert run(str(program), "portable") == "portable: checked\n"


def test_aarch64(tmp_path: Path) -> None:
    """NEON under qemu: the checks, and the outputs of this machine's portable kernels."""
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("needs qemu-aarch64 (apt install qemu-user gcc-aarch64-linux-gnu)")
    program = build(tmp_path, "aarch64-linux-gnu-gcc", "-O2", "-static")
    assert run("qemu-aarch64", str(program), "all", str(tmp_path / "aarch64")) == "portable: checked\n"
    native = build(tmp_path, "gcc", "-O2")
    run(str(native), "portable", str(tmp_path / "native"))
    there, here = read_outputs(tmp_path / "aarch64"), read_outputs(tmp_path / "native")
    assert [len(output) for output in there] == [len(output) for output in here]
    dtypes = ["float32"] * 9 + ["bfloat16"] * 9 + ["int8"] * 8  # 6 products, states, logits, audio (not of int8)
    for dtype, ours, expected in zip(dtypes, there, here, strict=True):
        assert relative_error(ours, expected) <= MAX_DIFFERENCE[dtype]
