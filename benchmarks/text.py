"""What a text costs before a model sees it: normal form, prompts, token ids; microseconds of one thread a text.

    python benchmarks/text.py [--model FOLDER] [--seconds 0.5] [--out FILE]

Texts, 100 characters each unless they say otherwise: plain (letters, one comma, a full stop), numbers (amounts, dates,
times, short forms), names (short forms and acronyms, no figures), long (20 sentences, one in ten with numbers). Rows:
normalize; prompts, which normalises, cuts and joins; tokens, the ids of a text's prompts in one call of the tokenizer;
ready, all of it; ready/4_threads, sentences that four threads of one process make ready in a second. Each text's result
is checked before it is timed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Row, machine_facts, time_host, write_results
from benchmarks.random_text import sentences
from soprano_cupy.checkpoint.resolve import BUNDLED_FOLDER
from soprano_cupy.errors import SopranoError
from soprano_cupy.text import build_prompts, normalize
from soprano_cupy.text.punctuation import ALPHABET
from soprano_cupy.tokenizer import Tokenizer

TEXTS_EACH = 60
LENGTH = 100  # characters
THREADS = 4
NUMBERS = {  # text and what is said
    "On 12 March 2024, Dr. Smith paid $1,234.56 for 3 tickets at 10:30 a.m., or about 20% more than in 1999.": (
        "on twelve march twenty twenty-four, doctor smith paid one thousand, two hundred thirty-four dollars, "
        "fifty-six cents for three tickets at ten thirty am, or about twenty percent more than in nineteen ninety-nine."
    ),
    "The train leaves at 8:05 and covers 120 km in 1.5 hours, according to Mr. Jones of Acme Inc. in 2023.": (
        "the train leaves at eight oh five and covers one hundred twenty kilometers in one point five hours, "
        "according to mister jones of acme incorporated in twenty twenty-three."
    ),
    "In the 1990s, approx. 3,500 people lived on the 2nd floor of No. 5, and 40 of them had 2 cars or more.": (
        "in the nineteen nineties, approximately three thousand, five hundred people lived on the second floor of "
        "number five, and forty of them had two cars or more."
    ),
    "There were seven of them in the room that evening, and only 12 chairs, which was more than enough.": (
        "there were seven of them in the room that evening, and only twelve chairs, which was more than enough."
    ),
}
NAMES = {
    "Mr. Lee and Mrs. Park of Acme Inc. met Prof. Gray, whose GPUs were late, in the U.S. Army camp on Monday.": (
        "mister lee and misess park of acme incorporated met professor gray, whose g p u's were late, in the u s army "
        "camp on monday."
    )
}


def plain_texts() -> list[str]:
    """Made-up sentences with a comma in their middle."""
    made = [text.split(" ") for text in sentences(TEXTS_EACH, 0, LENGTH - 1, LENGTH - 1)]
    return [f"{' '.join(words[: len(words) // 2])}, {' '.join(words[len(words) // 2 :])}" for words in made]


def long_texts() -> list[str]:
    """Twenty sentences each, every tenth with numbers."""
    plain, numbers = itertools.cycle(plain_texts()), itertools.cycle(NUMBERS)
    return [" ".join(next(numbers) if i % 10 == 4 else next(plain) for i in range(20)) for _ in range(6)]


def check(texts: dict[str, list[str]], tokenizer: Tokenizer) -> int:
    """How many results were compared; exits where one is not what it should be."""
    expected = {text: text.lower() for text in texts["plain"]} | NUMBERS | NAMES
    for text, said in expected.items():
        if normalize(text) != said:
            raise SystemExit(f"{text!r} became {normalize(text)!r}")
    for text in texts["long"]:
        prompts = build_prompts(text)
        if len(prompts) != 20 or not ALPHABET.issuperset(normalize(text)):
            raise SystemExit(f"{text[:60]!r}... became {len(prompts)} prompts instead of 20")
        if [ids.tolist() for ids in tokenizer.encode_batch(prompts)] != [tokenizer.encode(p).tolist() for p in prompts]:
            raise SystemExit(f"the prompts of {text[:60]!r}... have other ids together than one by one")
    return len(expected) + 2 * len(texts["long"])


def measure(texts: dict[str, list[str]], tokenizer: Tokenizer, seconds: float) -> Iterator[Row]:
    """Every row: means over the texts of a kind, the median of as many rounds as fill the time."""

    def ready(text: str) -> None:
        tokenizer.encode_batch(build_prompts(text))

    for kind, members in texts.items():
        prompts = [build_prompts(text) for text in members]
        yield _row(f"{kind}/normalize", normalize, members, seconds)
        yield _row(f"{kind}/prompts", build_prompts, members, seconds)
        yield _row(f"{kind}/tokens", tokenizer.encode_batch, prompts, seconds)
        yield _row(f"{kind}/ready", ready, members, seconds)
        made = sum(map(len, prompts))
        yield Row(f"{kind}/ready/{THREADS}_threads", _rate(ready, members, made, seconds), "sentences/s", 1)


def _row(case: str, call: Callable[..., object], arguments: Sequence[object], seconds: float) -> Row:
    timing = time_host(lambda: [call(argument) for argument in arguments], seconds=seconds)
    return Row(case, timing.median / len(arguments), "us", timing.repeats, timing.p99 / len(arguments))


def _rate(ready: Callable[[str], None], texts: list[str], sentences_each: int, seconds: float) -> float:
    """Sentences a second of all threads together."""
    end = time.perf_counter() + seconds

    def work() -> int:
        rounds = 0
        while time.perf_counter() < end:
            for text in texts:
                ready(text)
            rounds += 1
        return rounds

    start = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        rounds = sum(job.result() for job in [pool.submit(work) for _ in range(THREADS)])
    return rounds * sentences_each / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED_FOLDER, help="folder of a checkpoint (the bundled voice)")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each row (0.5)")
    parser.add_argument("--out", type=Path, help="result file; without it nothing is written")
    options = parser.parse_args()
    try:
        tokenizer = Tokenizer.load(options.model)
    except SopranoError as error:
        raise SystemExit(str(error)) from None
    texts = {"plain": plain_texts(), "numbers": list(NUMBERS) * 8, "names": list(NAMES) * 20, "long": long_texts()}
    checks = check(texts, tokenizer)
    rows = []
    for row in measure(texts, tokenizer, options.seconds):
        rows.append(row)
        sys.stdout.write(f"{row.case:28} {row.value:10.1f} {row.unit}\n")
    if options.out:
        write_results(options.out, "text", machine_facts(gpu=False), {}, rows, checks)


if __name__ == "__main__":
    main()
