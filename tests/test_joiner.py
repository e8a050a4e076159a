"""Sentences become texts: in order, in memory of their own, however they come."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from soprano_cupy import joiner
from soprano_cupy.joiner import Joiner


def cut(count: int, sizes: Iterator[int]) -> Iterator[tuple[int, int]]:
    start = 0
    while start < count:
        end = min(count, start + next(sizes))
        yield start, end
        start = end


@given(
    counts=st.lists(st.integers(1, 5), max_size=12), seed=st.integers(0, 99), portion=st.sampled_from([1, 300, 1 << 20])
)
def test_texts_are_their_sentences(counts: list[int], seed: int, portion: int) -> None:
    """With threads and without, taken in portions of any size, some of them empty; sentences may be empty, too."""
    with mock.patch.object(joiner, "PORTION_BYTES", portion):
        check_texts(counts, seed)


def check_texts(counts: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal(40 * sum(counts) + 1).astype(np.float32)
    places = np.sort(rng.integers(0, len(shared), sum(counts) + 1))
    sentences = [shared[a:b] for a, b in pairwise(places)]
    with Joiner(counts) as joined:
        for start, end in cut(len(sentences), iter(lambda: int(rng.integers(0, 5)), None)):
            joined.take(sentences[start:end])
        texts = joined.results()
    ends = np.cumsum(counts)
    assert len(texts) == len(counts)
    for text, end, count in zip(texts, ends, counts, strict=True):
        np.testing.assert_array_equal(text, np.concatenate(sentences[end - count : end]))
        assert text.flags.owndata


def test_threads_do_not_outlive_an_error() -> None:
    before = threading.active_count()

    def fail() -> None:
        with Joiner([1] * joiner.FROM_SENTENCES) as joined:
            joined.take([np.zeros(joiner.PORTION_BYTES, np.float32)])
            assert threading.active_count() > before
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert threading.active_count() == before
