"""Random sentences of made-up words that can be read aloud, the same for the same seed."""

from __future__ import annotations

import random

SHORTEST, LONGEST = 20, 200  # characters
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
MOST_LETTERS = 9


def sentences(count: int, seed: int = 0, shortest: int = SHORTEST, longest: int = LONGEST) -> list[str]:
    """`count` sentences of `shortest` to `longest` characters, all lengths alike, the full stop included."""
    generator = random.Random(seed)
    return [sentence(generator, generator.randint(shortest, longest)) for _ in range(count)]


def sentence(generator: random.Random, length: int) -> str:
    """One sentence of exactly `length` characters, 3 or more."""
    words, left = [], length - 1
    while left:
        letters = generator.randint(2, MOST_LETTERS)
        if left <= MOST_LETTERS + 1:
            letters = left
        elif left - letters == 2:  # a space and one letter would be left
            letters -= 1
        words.append(word(generator, letters))
        left = max(0, left - letters - 1)
    return f"{' '.join(words).capitalize()}."


def word(generator: random.Random, letters: int) -> str:
    """Consonants and vowels in turn: no abbreviation that a text front end might spell out looks like that."""
    first = generator.randrange(2)
    return "".join(generator.choice(VOWELS if (i + first) % 2 else CONSONANTS) for i in range(letters))
