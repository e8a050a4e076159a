"""Word error rates of the bundled voice, one for each dtype that the device runs, as pocketsphinx hears it.

    python benchmarks/intelligibility.py [--sentences FILE] [--device cpu] [--out FILE]
    python benchmarks/intelligibility.py --device cuda --dtypes bfloat16,float16 --save FOLDER
                                                                          speak only, where there is a GPU
    python benchmarks/intelligibility.py --heard FOLDER                   listen to that, where pocketsphinx is

Needs `pip install 'soprano-cupy[test]'`. The sentences are those of the reference data (120 held-out ones), greedy,
with a repetition penalty of 1.2. Nothing is written when a dtype is more than one point worse than float32, which is
the CPU's of benchmarks/results/cpu-intelligibility.json where it is not among the dtypes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
from listening import RECOGNISER_HZ, to_recogniser, word_errors, words

from benchmarks.common import REPOSITORY, RESULTS, Row, machine_facts, write_results
from soprano_cupy import SopranoTTS

SHARED = Path(os.environ.get("SOPRANO_SHARED", REPOSITORY.parent / "shared"))
DTYPES = {"cpu": ("float32", "bfloat16", "int8"), "cuda": ("float32", "bfloat16", "float16")}
ALLOWED_POINTS = 1.0  # of word error rate above float32's


Spoken = tuple[str, list[bytes]]  # a dtype and its sentences, as the recogniser takes them


def word_error_rate(sentences: list[str], audio: list[bytes]) -> float:
    """Percent of all words that are heard wrong, missed or invented."""
    import pocketsphinx

    listener = pocketsphinx.Decoder(samprate=RECOGNISER_HZ, loglevel="FATAL")
    errors = total = 0
    for sentence, samples in zip(sentences, audio, strict=True):
        listener.start_utt()
        listener.process_raw(samples, full_utt=True)
        listener.end_utt()
        heard = words(listener.hyp().hypstr) if listener.hyp() else []
        errors += word_errors(words(sentence), heard)
        total += len(words(sentence))
    return 100 * errors / total


def spoken(sentences: list[str], device: str, dtypes: Sequence[str]) -> Iterator[Spoken]:
    for dtype in dtypes:
        tts = SopranoTTS("mini", device, dtype=dtype)
        yield dtype, [to_recogniser(samples) for samples in tts.infer_batch(sentences)]


def save(folder: Path, found: Iterator[Spoken], facts: dict[str, Any]) -> None:
    """Everything that `load` needs on another machine."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for dtype, audio in found:
        names.append(dtype)
        arrays: dict[str, Any] = {str(i): np.frombuffer(samples, "<i2") for i, samples in enumerate(audio)}
        np.savez_compressed(folder / f"{dtype}.npz", **arrays)
    (folder / "facts.json").write_text(json.dumps({"facts": facts, "dtypes": names}))


def load(folder: Path) -> tuple[Iterator[Spoken], dict[str, Any]]:
    """What `save` left: the sentences of each dtype, and the facts of the machine that spoke them."""
    saved = json.loads((folder / "facts.json").read_text())

    def found() -> Iterator[Spoken]:
        for dtype in saved["dtypes"]:
            with np.load(folder / f"{dtype}.npz") as arrays:
                yield dtype, [arrays[str(i)].tobytes() for i in range(len(arrays.files))]

    return found(), saved["facts"]


def listen(sentences: list[str], found: Iterator[Spoken], device: str) -> list[Row]:
    """Word error rates; ends the run when one is too far above float32's."""
    rows: list[Row] = []
    for dtype, audio in found:
        rate = word_error_rate(sentences, audio)
        limit = None if dtype == "float32" else float32_rate(rows) + ALLOWED_POINTS
        sys.stdout.write(f"intelligibility/{device}/{dtype}: {rate:.2f} % of words wrong\n")
        sys.stdout.flush()
        if limit is not None and rate > limit:
            raise SystemExit(f"more than {limit:.2f} %: nothing is written")
        rows.append(Row(f"intelligibility/{device}/{dtype}", rate, "% wrong", len(sentences), limit=limit))
    return rows


def float32_rate(rows: list[Row]) -> float:
    """That of this run, else the CPU's."""
    if rows and rows[0].case.endswith("/float32"):
        return rows[0].value
    record = json.loads((RESULTS / "cpu-intelligibility.json").read_text(encoding="utf-8"))
    return float(next(row["value"] for row in record["rows"] if row["case"].endswith("/float32")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=Path, default=SHARED / "voice" / "sentences.txt", help="one a line")
    parser.add_argument("--device", choices=sorted(DTYPES), default="cpu")
    parser.add_argument("--dtypes", help="some of the device's, separated by commas; default: all")
    parser.add_argument("--save", type=Path, help="only speak, into this folder")
    parser.add_argument("--heard", type=Path, help="listen to what --save left in this folder")
    parser.add_argument("--out", type=Path, help="result file; benchmarks/results/<machine>-intelligibility.json")
    options = parser.parse_args()
    sentences = options.sentences.read_text(encoding="utf-8").splitlines()
    if options.heard:
        found, facts = load(options.heard)
    else:
        dtypes = options.dtypes.split(",") if options.dtypes else DTYPES[options.device]
        found, facts = spoken(sentences, options.device, dtypes), machine_facts(gpu=options.device == "cuda")
    if options.save:
        save(options.save, found, facts)
        return
    gpu = facts["gpu"] is not None
    rows = listen(sentences, found, "cuda" if gpu else "cpu")
    out = options.out or RESULTS / f"{facts['machine'] if gpu else 'cpu'}-intelligibility.json"
    write_results(out, "intelligibility", facts, {}, rows, len(rows))


if __name__ == "__main__":
    main()
