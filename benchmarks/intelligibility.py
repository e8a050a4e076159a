"""Word error rates of the bundled voice, one for each dtype that the device runs, as pocketsphinx hears it.

    python benchmarks/intelligibility.py [--sentences FILE] [--device cpu] [--out FILE]

Needs `pip install 'soprano-cupy[test]'`. The sentences are those of the reference data (120 held-out ones), greedy,
with a repetition penalty of 1.2. Nothing is written when a dtype is more than one point worse than float32.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
from listening import RECOGNISER_HZ, to_recogniser, word_errors, words

from benchmarks.common import REPOSITORY, RESULTS, Row, machine_facts, write_results
from soprano_cupy import SopranoTTS

SHARED = Path(os.environ.get("SOPRANO_SHARED", REPOSITORY.parent / "shared"))
DTYPES = {"cpu": ("float32", "bfloat16", "int8"), "cuda": ("float32", "bfloat16", "float16")}
ALLOWED_POINTS = 1.0  # of word error rate above float32's


def word_error_rate(sentences: list[str], audio: list[np.ndarray]) -> float:
    """Percent of all words that are heard wrong, missed or invented."""
    import pocketsphinx

    listener = pocketsphinx.Decoder(samprate=RECOGNISER_HZ, loglevel="FATAL")
    errors = total = 0
    for sentence, samples in zip(sentences, audio, strict=True):
        listener.start_utt()
        listener.process_raw(to_recogniser(samples), full_utt=True)
        listener.end_utt()
        heard = words(listener.hyp().hypstr) if listener.hyp() else []
        errors += word_errors(words(sentence), heard)
        total += len(words(sentence))
    return 100 * errors / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=Path, default=SHARED / "voice" / "sentences.txt", help="one a line")
    parser.add_argument("--device", choices=sorted(DTYPES), default="cpu")
    parser.add_argument("--out", type=Path, help="result file; benchmarks/results/<machine>-intelligibility.json")
    options = parser.parse_args()
    sentences = options.sentences.read_text(encoding="utf-8").splitlines()
    rows: list[Row] = []
    for dtype in DTYPES[options.device]:
        audio = SopranoTTS("mini", options.device, dtype=dtype).infer_batch(sentences)
        rate = word_error_rate(sentences, audio)
        limit = rows[0].value + ALLOWED_POINTS if rows else None
        sys.stdout.write(f"intelligibility/{options.device}/{dtype}: {rate:.2f} % of words wrong\n")
        sys.stdout.flush()
        if limit is not None and rate > limit:
            raise SystemExit(f"more than {limit:.2f} %: nothing is written")
        rows.append(Row(f"intelligibility/{options.device}/{dtype}", rate, "% wrong", len(sentences), limit=limit))
    gpu = options.device == "cuda"
    facts = machine_facts(gpu=gpu)
    out = options.out or RESULTS / f"{facts['machine'] if gpu else 'cpu'}-intelligibility.json"
    write_results(out, "intelligibility", facts, {}, rows, len(rows))


if __name__ == "__main__":
    main()
