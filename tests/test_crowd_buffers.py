"""Buffers of samples: used again once nobody has them, and never before."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from soprano_cupy.crowd.buffers import SMALLEST, Buffers, _size_for

SIZE = 300_000


def data(seed: int, nbytes: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, nbytes, np.uint8)


def filled(buffers: Buffers, content: np.ndarray) -> np.ndarray:
    """A buffer with this content."""
    found = buffers.empty(len(content))
    found[:] = content
    return found


def address(samples: np.ndarray) -> int:
    return int(samples.__array_interface__["data"][0])


def test_what_nobody_has_is_used_again() -> None:
    buffers = Buffers()
    first = filled(buffers, data(1))
    place = address(first)
    del first
    again = filled(buffers, data(2, SIZE - 100))
    assert address(again) == place
    np.testing.assert_array_equal(again, data(2, SIZE - 100))


@pytest.mark.parametrize(
    "keep",
    [
        lambda samples: samples,
        lambda samples: samples[1000:1010],
        lambda samples: samples.view(np.int16)[::7],
        lambda samples: samples.reshape(2, -1).T,
        memoryview,
        lambda samples: memoryview(samples)[5:9],
        iter,
        lambda samples: np.frombuffer(samples, np.float32),
        lambda samples: np.broadcast_to(samples, (3, SIZE)),
        lambda samples: [samples[:4]],
    ],
)
def test_what_somebody_has_is_left_alone(keep: Callable[[np.ndarray], Any]) -> None:
    """Samples, a part of them, or a view of any kind."""
    buffers = Buffers()
    samples = filled(buffers, data(1))
    place = address(samples)
    kept = keep(samples)
    del samples
    others = [filled(buffers, data(2)) for _ in range(8)]
    assert place not in [address(other) for other in others]
    del kept
    assert place in [address(filled(buffers, data(3))) for _ in range(9)]


def test_a_crowd_of_sizes() -> None:
    """Held and dropped at random, all hold what they were given."""
    rng, buffers = random.Random(1), Buffers(most=20 << 20)
    held: list[tuple[int, np.ndarray]] = []
    for seed in range(400):
        nbytes = rng.choice([10, 1000, SMALLEST, 100_000, 200_000, 200_001, 999_999])
        held.append((seed, filled(buffers, data(seed, nbytes))))
        while len(held) > 30:
            held.pop(rng.randrange(30))
        if seed % 20 == 0:
            for one, samples in held:
                np.testing.assert_array_equal(samples, data(one, len(samples)))
    assert sum(len(queue) * size for size, queue in buffers._of_size.items()) <= 20 << 20


def test_sizes() -> None:
    for nbytes in (SMALLEST, SMALLEST + 1, 100_000, 131_072, 500_000, 3_000_001):
        assert nbytes <= _size_for(nbytes) <= 1.25 * nbytes
    assert len({_size_for(nbytes) for nbytes in range(SMALLEST, 2 * SMALLEST + 1)}) == 5
