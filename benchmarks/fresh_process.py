"""A process of its own for benchmarks/runtime.py: from its start to the first audio, and the memory it takes.

Job: {"folder", "device", "text", "tokens", "batch", "memory"}. With "memory", CuPy's context is made before anything
else, so that what it takes can be told from what the voice takes; without, nothing is done before the voice is
loaded, as a user's program would.
"""

from __future__ import annotations

import os
import subprocess
from itertools import islice
from typing import Any

from benchmarks.workers import job, tell, tell_first_audio


def speak(asked: dict[str, Any]) -> dict[str, Any]:
    from soprano_cupy import SopranoTTS

    gpu = asked["device"] != "cpu"
    result: dict[str, Any] = {"after_context": free_bytes() if gpu and asked["memory"] else None}
    tts = SopranoTTS(asked["folder"], asked["device"])
    chunks = tts.infer_stream(asked["text"])
    next(chunks)
    tell_first_audio()
    for _ in islice(chunks, asked["tokens"]):
        pass
    if asked["memory"]:
        from benchmarks.random_text import sentences
        from benchmarks.spoken_length import held_to
        from soprano_cupy.cli.bench import resident_mb

        if asked["batch"] > 1:
            with held_to(asked["tokens"]):
                tts.infer_batch(sentences(asked["batch"]))
        result["after"] = free_bytes() if gpu else None
        result["nvidia_smi_mb"] = nvidia_smi_mb() if gpu else None
        result["resident_mb"] = resident_mb()
    return result


def free_bytes() -> int:
    """Free memory of the GPU; makes the context if there is none yet."""
    import cupy

    cupy.cuda.Device().synchronize()
    return int(cupy.cuda.runtime.memGetInfo()[0])


def nvidia_smi_mb() -> float | None:
    """What nvidia-smi counts for this process; None where it does not show this process' number (in containers)."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return used_mb(listing, os.getpid())


def used_mb(listing: str, process: int) -> float | None:
    """MB (10^6 bytes) of `process` in lines "number, MiB"."""
    for line in listing.splitlines():
        number, _, used = line.partition(",")
        if number.strip() == str(process) and used.strip().isdigit():
            return int(used) * 2**20 / 1e6
    return None


if __name__ == "__main__":
    tell(speak(job()))
