"""How far this package is from the reference's numbers, on a GPU or, where there is none, on the CPU.

    python benchmarks/parity.py [--shared FOLDER] [--out FILE]

Reads the reference data (`../shared` or SOPRANO_SHARED: golden checkpoints and the bundled voice with the outputs of
the PyTorch implementation in float32) and writes the worst distance of each kind over all prompts. Nothing is
written when a distance is over its limit. relative: Frobenius norm of the difference over that of the reference.
Rows: parity/<place>/<dtype>/<what>; place is cpu (the compiled engine), portable (array code on NumPy) or cuda.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from numerics import relative_error, round_to_bfloat16, snr_db
from runners import load_decoder, load_language_model

from benchmarks.common import REPOSITORY, RESULTS, Row, machine_facts, write_results
from soprano_cupy.config import ModelConfig
from soprano_cupy.device import cuda_problem, to_host

SHARED = Path(os.environ.get("SOPRANO_SHARED", REPOSITORY.parent / "shared"))
CHECKPOINTS = ("golden/mqa", "golden/gqa", "voice")
ROUNDED = CHECKPOINTS[:2]  # expected values with rotary frequencies in bfloat16: see tests/test_reference_parity.py
LIMITS = {"float32": 1e-4, "float64": 1e-5}
LEAST_SNR_DB = 90.0


@contextmanager
def frequencies_of(name: str) -> Iterator[None]:
    """The rotary frequencies with which a checkpoint's expected values were made."""
    exact = ModelConfig.rope_frequencies
    if name in ROUNDED:
        ModelConfig.rope_frequencies = lambda self: round_to_bfloat16(exact(self))  # type: ignore[method-assign]
    try:
        yield
    finally:
        ModelConfig.rope_frequencies = exact  # type: ignore[method-assign]


def measure(shared: Path, place: str, dtype: str) -> list[Row]:
    """The worst figures over all checkpoints and prompts."""
    worst = {"states": 0.0, "logits": 0.0, "tokens_that_differ": 0.0}
    audio = {"decoder_snr": np.inf, "audio_snr": np.inf}
    prompts = 0
    for name in CHECKPOINTS:
        expected = np.load(shared / name / "expected.npz")
        with frequencies_of(name):
            model = load_language_model(shared / name, place, dtype)
            decoder = load_decoder(shared / name, place, dtype)
            for i in range(3):
                prompts += 1
                ids, tokens = expected[f"ids{i}"], expected[f"greedy{i}"]
                states, logits = (to_host(array) for array in model.forward(ids))
                worst["states"] = max(worst["states"], relative_error(states, expected[f"hidden{i}"]))
                worst["logits"] = max(worst["logits"], relative_error(logits[-1], expected[f"logits{i}"]))
                out = model.generate(ids, max_new_tokens=len(tokens))
                worst["tokens_that_differ"] += float((out.tokens[: len(tokens)] != tokens[: len(out.tokens)]).sum())
                made = to_host(decoder(expected[f"states{i}"]))
                audio["decoder_snr"] = min(audio["decoder_snr"], snr_db(made, expected[f"audio{i}"]))
                audio["audio_snr"] = min(
                    audio["audio_snr"], snr_db(to_host(decoder(out.states)), expected[f"audio{i}"])
                )
    rows = [_row(place, dtype, what, worst[what], "relative", LIMITS[dtype], prompts) for what in ("states", "logits")]
    rows.append(_row(place, dtype, "tokens_that_differ", worst["tokens_that_differ"], "tokens", 0.0, prompts))
    return rows + [_row(place, dtype, what, value, "dB", LEAST_SNR_DB, prompts) for what, value in audio.items()]


def _row(place: str, dtype: str, what: str, value: float, unit: str, limit: float, prompts: int) -> Row:
    case = f"parity/{place}/{dtype}/{what}"
    if not (value >= limit if unit == "dB" else value <= limit):
        raise SystemExit(f"{case} = {value:.3g} {unit} misses {limit:g}: nothing is written")
    sys.stdout.write(f"{case:44} {value:12.4g} {unit}\n")
    return Row(case, value, unit, prompts, None, limit, None, {}, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder of the reference data")
    parser.add_argument("--out", type=Path, help="result file; benchmarks/results/<machine>-parity.json by default")
    options = parser.parse_args()
    gpu = cuda_problem() is None
    runs = [("portable", "float64"), ("portable", "float32")]
    runs += [("cuda", "float64"), ("cuda", "float32")] if gpu else [("cpu", "float32")]
    rows = [row for place, dtype in runs for row in measure(options.shared, place, dtype)]
    facts: dict[str, Any] = machine_facts(gpu=gpu)
    out = options.out or RESULTS / f"{facts['machine'] if gpu else 'cpu'}-parity.json"
    write_results(out, "parity", facts, {}, rows, len(rows))


if __name__ == "__main__":
    main()
