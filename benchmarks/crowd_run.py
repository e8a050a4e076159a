"""What the benchmarks of crowds share: the voice that they make, and where their rows go."""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, Row, machine_facts, write_results
from soprano_cupy.crowd.processes_worker import SopranoVoice
from soprano_cupy.testing import SOPRANO_1_1_80M, SOPRANO_1_1_80M_DECODER, TINY, make_checkpoint

Save = Callable[[list[Row]], None]
HUSHED = "benchmarks.crowd_run:HushedVoice"


def hush() -> None:
    """Complain of no sentence that does not come to its end: they are held to lengths on purpose, all of them."""
    logging.getLogger("soprano_cupy.crowd.driver").setLevel(logging.ERROR)


class HushedVoice(SopranoVoice):
    """What a device's process opens (`HUSHED`) where the time that complaints take is not to be measured."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        hush()


def run(
    options: argparse.Namespace,
    what: str,
    limits: dict[str, float],
    measure: Callable[[argparse.Namespace, Path, Save], None],
) -> int:
    """Measure with `options.model` or a random checkpoint, a tiny one for `options.smoke`; limits: of an H200."""
    hush()
    gpu = options.device != "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model
        if folder is None:
            config, decoder = (TINY, None) if options.smoke else (SOPRANO_1_1_80M, SOPRANO_1_1_80M_DECODER)
            folder = make_checkpoint(scratch, seed=0, config=config, decoder=decoder, mean_tokens=None)
        facts = machine_facts(gpu=gpu)
        out = options.out or RESULTS / f"{facts['machine'] if gpu else 'cpu'}-{what}.json"
        measure(options, folder, lambda rows: write_results(out, what, facts, limits if gpu else {}, rows, 0))
    return 0
