"""The table of soprano_cupy/gpu/persistent_choice.py for this GPU, as it should stand: microseconds of a step by graphs
and by the persistent kernel, for 1, 2, 4 and 8 voices, greedy and drawn.

    python benchmarks/persistent_table.py [--context 256] [--repeats 9] [--model FOLDER] [--out FILE]

Both are timed by the engine itself, by events around 50 steps, on a random checkpoint of the 80M shape unless --model
names another. --out writes a result file; the table is printed in any case.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Row, machine_facts, timing, write_results
from soprano_cupy import Qwen3
from soprano_cupy.cuda.module import device_facts
from soprano_cupy.testing import SOPRANO_1_1_80M, make_checkpoint

if TYPE_CHECKING:
    from soprano_cupy.gpu.qwen3 import GpuLanguageModel

STEPS = 50
TEMPERATURES = {"greedy": 0.0, "drawn": 0.3}


def measure(runner: GpuLanguageModel, context: int, repeats: int) -> tuple[list[Row], list[str]]:
    """Rows, and the lines of the table."""
    rows, lines = [], []
    for kind, temperature in TEMPERATURES.items():
        for voices in (1, 2, 4, 8):
            runner.persistent.use("1")
            problem = runner.persistent.problem(voices, drawn=temperature > 0)
            if problem is not None:
                sys.stdout.write(f"{voices} voices: {problem}\n")
                continue
            found = []
            for path, setting in (("graph", "0"), ("persistent", "1")):
                runner.persistent.use(setting)
                samples = [1e6 * s for s in runner.benchmark_step(voices, context, STEPS, repeats, temperature)]
                t = timing(samples)
                rows.append(Row(f"step/B{voices}/{kind}/{path}", t.median, "us", t.repeats, t.p99))
                found.append(median(samples))
            lines.append(f"        ({voices}, {kind == 'drawn'}): StepTimes({found[0]:.1f}, {found[1]:.1f}),")
    return rows, lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--model", help="a checkpoint folder instead of a random one")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        named = options.model or make_checkpoint(folder, config=SOPRANO_1_1_80M, mean_tokens=None)
        model = Qwen3.load(named, "cuda", "auto")
    if not hasattr(model.runner, "persistent"):
        raise SystemExit(f"the GPU engine does not run here: {model.runner.reason}")
    rows, lines = measure(cast("GpuLanguageModel", model.runner), options.context, options.repeats)
    sys.stdout.write("\n".join([f"    {device_facts(0).capability}: {{", *lines, "    },", ""]))
    if options.out:
        write_results(options.out, "persistent_table", machine_facts(gpu=True), {}, rows, len(rows))


if __name__ == "__main__":
    main()
