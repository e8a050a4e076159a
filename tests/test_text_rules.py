"""What rules need: those that are left out would have changed nothing, for any text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import text_differences
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_samples import ANY_TEXT, NUMERIC_TEXT, READ_TEXT, WORDS

from soprano_cupy.text import build_prompts, characters, layout, normalize, punctuation
from soprano_cupy.text.normalizer import PASSES
from soprano_cupy.text.rules import CURRENCY_SIGNS, DEGREE, Look, Rewriter, Rule, replace, rule, rules, say

PROPERTY = settings(max_examples=3000, derandomize=True, deadline=None, database=None)
RULES = [member for row in PASSES for member in row]
PATTERN_RULES = [member for member in RULES if member.pattern is not None]
ASCII = "".join(map(chr, range(32, 127))) + "\n"
AROUND = st.sampled_from(["", " ", "\n", "a", "B", "be ", "No ", "5", "$", "-", ".", ". ", "(", '"', "/"])
FIRST_LOOK = re.compile(
    r"\(\?=\[(?:\\.|[^\\\]])*\]\)(?![)|]|$)"
)  # at the first character of what comes next in a pattern
NEVER, ALWAYS = re.compile("(?!)"), re.compile("")


def with_every_rule(text: str) -> str:
    """`normalize`, nothing left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(characters, "_READABLE_AS_IT_IS", NEVER)
        patch.setattr(layout, "_MARKUP", ALWAYS)
        patch.setattr(punctuation, "_TRIPLE", ALWAYS)
        text = layout.lay_out(characters.to_readable(text))
        for member in RULES:
            text = member.rewrite(text)
    return text


@PROPERTY
@given(st.one_of(READ_TEXT, READ_TEXT, NUMERIC_TEXT, ANY_TEXT))
def test_what_is_left_out_would_change_nothing(text: str) -> None:
    assert normalize(text) == with_every_rule(text)


def test_what_is_left_out_of_known_texts_would_change_nothing(shared_dir: Path) -> None:
    lines = (shared_dir / "golden" / "text.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    texts += [row.text for row in (*text_differences.GOLDEN, *text_differences.FURTHER)]
    for word in WORDS:
        texts += [word, f"{word} 5", f"5 {word}", f"5{word}.", f"a {word}. B", f"the {word} Lee", f"{word}-{word}"]
    assert {text: normalize(text) for text in texts} == {text: with_every_rule(text) for text in texts}


@pytest.mark.parametrize("member", PATTERN_RULES, ids=lambda member: member.pattern.pattern[:30])
def test_every_match_has_what_its_rule_needs(member: Rule) -> None:
    pattern = member.pattern
    assert pattern is not None
    like = re.compile(FIRST_LOOK.sub("", pattern.pattern), pattern.flags)  # examples would hold that character twice
    found = 0

    @settings(PROPERTY, max_examples=80, suppress_health_check=list(HealthCheck))
    @given(AROUND, st.from_regex(like, alphabet=ASCII + CURRENCY_SIGNS + DEGREE), AROUND)
    def check(before: str, text: str, after: str) -> None:
        nonlocal found
        text = f"{before}{text}{after}"
        if pattern.search(text) and member.rewrite(text) != text:
            found += 1
            look = Look(text)
            assert member.possible(look.marks)
            assert member.may_act(look)

    check()
    assert found


def test_the_shape_of_a_text_and_its_words() -> None:
    look = Look("Dr. Lee paid £1,234.50, and ₹5 at 20°C!")
    assert look.shape == "Aa. Aaa aaaa $0,000.00, aaa $0 aa 00°A!"
    assert look.marks == frozenset("0.,$°!".encode("latin-1"))
    assert look.words == {b"dr", b"lee", b"paid", b"and", b"at", b"c"}
    assert Look("").shape == ""
    assert not Look("").words


def test_characters_without_a_shape_of_their_own_stand_for_no_word() -> None:
    look = Look("naïve 北 x")
    assert look.shape == "aaïaa ? a"
    assert look.words == {b"na", b"ve", b"x"}


def acting(member: Rule, text: str) -> bool:
    return member.possible(Look(text).marks) and member.may_act(Look(text))


def test_a_rule_needs_one_piece_or_one_name_and_one_mark_besides() -> None:
    (either,) = rules(rule(str.upper, "0:0 ://", names=["Km"]), marks="0#")
    assert [acting(either, text) for text in ("1:2", "a://b#", "5 KM", "5km")] == [True] * 4
    assert [acting(either, text) for text in ("1: 2", "a://b", "km", "kms 5", "")] == [False] * 5
    assert all(acting(rule(str.upper), text) for text in ("", "a", "1"))
    spaced = rule(str.upper, ["0 0"])
    assert acting(spaced, "1 2")
    assert not acting(spaced, "12")


def test_rules_follow_one_another_and_see_what_the_last_one_wrote() -> None:
    told: list[str] = []

    def note(text: str) -> str:
        told.append(text)
        return text

    run = Rewriter(
        [
            rules(rule(note, "0"), replace(re.compile("b"), "7", names=["b"])),
            rules(rule(note, "0"), rule(note, "$"), say(re.compile("[0-9]"), lambda match: "seven", "0"), marks="0"),
            rules(rule(note, "0"), rule(note, "aaaaa")),
        ]
    )
    assert run("a b-c7") == "a seven-c seven"
    assert told == ["a b-c7", "a 7-c7", "a seven-c seven"]
    assert run("") == ""


def test_plans_are_bounded() -> None:
    run = Rewriter(PASSES)
    assert run._following.cache_info().maxsize == Rewriter.MAX_PLANS
    assert len(run._plan(frozenset())) == len(RULES) + 1
    assert run._plan(frozenset())[-1] == len(RULES)


def test_prompts_of_plain_sentences_pass_most_rules_over() -> None:
    look = Look("The old captain walks along the river bank, thinking of his ship and of his crew.")
    acting_rules = [member for member in RULES if member.possible(look.marks) and member.may_act(look)]
    assert len(acting_rules) < len(RULES) / 6
    assert build_prompts("The ship.") == ["[STOP][TEXT]the ship.[START]"]
