"""One text spoken by several threads at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from soprano_cupy import SopranoTTS

THREADS = 6


def check_threads(tts: SopranoTTS, text: str, **options: Any) -> None:
    """Each of them gets what one alone gets, to the bit."""
    expected = tts.infer(text, **options)
    with ThreadPoolExecutor(THREADS) as pool:
        for audio in pool.map(lambda _: tts.infer(text, **options), range(THREADS)):
            np.testing.assert_array_equal(audio, expected)
