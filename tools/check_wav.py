"""Check that a file is a WAV with speech-like sound in it: `python check_wav.py FILE`; exit code 1 if it is not."""

from __future__ import annotations

import array
import sys
import wave


def main(path: str) -> int:
    """Mono, 16 bits, 32 kHz, at least half a second, neither silent nor clipped throughout."""
    with wave.open(path) as file:
        layout = (file.getnchannels(), file.getsampwidth(), file.getframerate())
        samples = array.array("h", file.readframes(file.getnframes()))
    loudness = (sum(value * value for value in samples) / max(len(samples), 1)) ** 0.5
    print(f"{path}: {len(samples) / 32000:.2f} s, root mean square {loudness:.0f} of 32767")
    return 0 if layout == (1, 2, 32000) and len(samples) >= 16000 and 100 < loudness < 20000 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
