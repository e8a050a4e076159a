"""Sentences, their cutting and joining, and the prompts made of them."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soprano_cupy.errors import ParameterError
from soprano_cupy.text import build_prompts, split_sentences
from soprano_cupy.text.sentences import MAX_LENGTH, MIN_LENGTH, merge_short

PROPERTY = settings(max_examples=300, derandomize=True, deadline=None, database=None)
WORDS = st.lists(st.text("abc'-", min_size=1, max_size=12).filter(lambda word: re.search("[abc]", word)), max_size=120)
CLEAN = st.lists(st.tuples(WORDS.map(" ".join), st.sampled_from(["", ".", "!", "?", "...", ","])), max_size=6).map(
    lambda parts: " ".join(body + stop for body, stop in parts if body)
)
LENGTHS = st.integers(MIN_LENGTH, 400)


def body(prompt: str) -> str:
    match = re.fullmatch(r"\[STOP\]\[TEXT\]([^\[\]]+)\[START\]", prompt)
    assert match, prompt
    return match[1]


def test_sentences_end_at_stops_before_a_space() -> None:
    assert split_sentences("one. two! three? four... five, six") == ["one.", "two!", "three?", "four...", "five, six"]
    assert split_sentences("version one.two stays") == ["version one.two stays"]
    assert split_sentences("") == split_sentences("... ! ?") == split_sentences(", . -") == []


def test_long_sentence_is_cut_at_its_last_comma_else_at_its_last_space() -> None:
    words = "word " * 100
    assert [len(piece) for piece in split_sentences(words)] == [299, 199]
    with_comma = "word " * 40 + "end, " + "word " * 60
    assert split_sentences(with_comma)[0] == ("word " * 40 + "end,")
    early_comma = "end, " + "word " * 100
    assert split_sentences(early_comma)[0] == ("end, " + "word " * 59).strip()


def test_sentence_of_exactly_the_limit_stays_whole() -> None:
    whole = "a" * 149 + " " + "b" * 149 + "."
    assert len(whole) == MAX_LENGTH
    assert split_sentences(whole) == [whole]
    assert split_sentences("a" + whole) == ["a" * 150, "b" * 149 + "."]


def test_unbroken_word_of_700_letters_makes_three_prompts() -> None:
    word = "abcdefg" * 100
    assert [body(prompt) for prompt in build_prompts(word)] == [word[:300], word[300:600], word[600:] + "."]


def test_many_short_sentences_fill_prompts_up_to_the_limit() -> None:
    bodies = [body(prompt) for prompt in build_prompts("No. " * 1000)]
    assert max(map(len, bodies)) <= MAX_LENGTH
    assert len(bodies) == -(-1000 // 75)  # 75 times "no." and the spaces between are 299 characters
    assert " ".join(bodies) == " ".join(["no."] * 1000)


def test_short_sentences_join_the_one_before_and_the_first_the_one_after() -> None:
    long = "this sentence is long enough to stand."
    assert merge_short(["hi.", long, "ok.", "yes.", long]) == [f"hi. {long} ok. yes.", long]
    assert merge_short(["hi."]) == ["hi."]
    assert merge_short(["hi.", "ho."]) == ["hi. ho."]
    assert merge_short([]) == []
    assert merge_short(["hi.", "a" * 298]) == ["hi.", "a" * 298]
    assert merge_short([long, long]) == [long, long]


def test_markers_in_the_text_stay_text() -> None:
    assert build_prompts("[START] a [STOP][TEXT] b") == ["[STOP][TEXT], start, a, stop, text, b.[START]"]


def test_shorter_pieces_on_request() -> None:
    bodies = [body(prompt) for prompt in build_prompts("some words " * 60, max_length=120)]
    assert max(map(len, bodies)) <= 120
    assert " ".join(bodies) == ("some words " * 60).strip() + "."


@pytest.mark.parametrize("max_length", [0, -1, MIN_LENGTH - 1, 50.0, True, None, "300"])
def test_refuses_a_length_that_is_none(max_length: object) -> None:
    with pytest.raises(ParameterError, match="max_length"):
        build_prompts("hello", max_length=max_length)  # type: ignore[arg-type]


@PROPERTY
@given(CLEAN, LENGTHS)
def test_no_word_is_lost_and_the_order_stays(clean: str, max_length: int) -> None:
    sentences = split_sentences(clean, max_length)
    merged = merge_short(sentences, max_length=max_length)
    assert all(0 < len(piece) <= max_length for piece in [*sentences, *merged])
    assert " ".join(merged) == " ".join(sentences)
    letters = re.sub("[^abc]", "", clean)
    assert re.sub("[^abc]", "", "".join(merged)) == letters
    if all(len(word) < max_length // 2 for word in clean.split()):  # then no word is cut either
        assert " ".join(merged).split() == [word for word in clean.split() if re.search("[abc]", word)]


@PROPERTY
@given(CLEAN)
def test_only_pieces_that_do_not_fit_stay_short(clean: str) -> None:
    merged = merge_short(split_sentences(clean))
    for first, second in itertools.pairwise(merged):
        if min(len(first), len(second)) < MIN_LENGTH:
            assert len(first) + 1 + len(second) > MAX_LENGTH
