"""Texts read together are what each is alone, and one text's trouble is not the others'."""

from __future__ import annotations

import numpy as np
import pytest

from soprano_cupy import ParameterError, TextError
from soprano_cupy.generation import Request
from soprano_cupy.reader import Reader
from soprano_cupy.sampling import SamplingParams
from soprano_cupy.testing import TINY, make_checkpoint
from soprano_cupy.tokenizer import Tokenizer

TEXTS = ["Hello there, my friend.", "One sentence is enough here. Another one follows it, as they do.", "1,024 voices!"]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    folder = make_checkpoint(tmp_path_factory.mktemp("voice"), seed=0, config=TINY)
    return Reader(Tokenizer.load(folder), 40)


def same(found: list[Request], expected: list[Request]) -> None:
    assert [(r.params, r.stream) for r in found] == [(r.params, r.stream) for r in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)


def test_many_are_each_alone(reader: Reader) -> None:
    params = [SamplingParams(seed=i) for i in range(len(TEXTS))]
    found = reader.read_many(TEXTS, params)
    assert [len(some) for some in found if isinstance(some, list)] == [1, 2, 1]
    for text, one, some in zip(TEXTS, params, found, strict=True):
        assert isinstance(some, list)
        assert [request.stream for request in some] == list(range(len(some)))
        same(some, reader.read(text, one))
    assert reader.read_many([], []) == []


def test_each_has_its_own_trouble(reader: Reader) -> None:
    params = SamplingParams(seed=1)
    found = reader.read_many([TEXTS[0], "...", 7, TEXTS[1]], [params] * 4)
    same(found[0], reader.read(TEXTS[0], params))  # type: ignore[arg-type]
    same(found[3], reader.read(TEXTS[1], params))  # type: ignore[arg-type]
    assert isinstance(found[1], TextError)
    assert str(found[1]) == "nothing to speak in '...'; give at least one word or number"
    assert isinstance(found[2], ParameterError)
    assert str(found[2]) == "text must be a string, not int"
    for text, error in (("...", TextError), (7, ParameterError)):
        with pytest.raises(error):
            reader.read(text, params)


def test_a_text_that_cannot_be_tokenised_is_named(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Tokenizer.encode_batch

    def refuse(self: Tokenizer, prompts: list[str]) -> list[np.ndarray]:
        if any("1,024" in prompt or "voices" in prompt for prompt in prompts):
            raise TextError("the text cannot be tokenised")
        return encode(self, prompts)

    monkeypatch.setattr(Tokenizer, "encode_batch", refuse)
    params = SamplingParams(seed=1)
    first, second, third = reader.read_many(TEXTS, [params] * 3)
    same(first, reader.read(TEXTS[0], params))  # type: ignore[arg-type]
    same(second, reader.read(TEXTS[1], params))  # type: ignore[arg-type]
    assert isinstance(third, TextError)
