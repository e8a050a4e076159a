"""What holds for any text: the alphabet, the shape of prompts, and work that grows no faster than the text."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from text_samples import ANY_TEXT

import soprano_cupy.text
from soprano_cupy.text import abbreviations, build_prompts, money, normalize
from soprano_cupy.text.characters import to_readable
from soprano_cupy.text.layout import lay_out
from soprano_cupy.text.normalizer import PASSES
from soprano_cupy.text.punctuation import ALPHABET
from soprano_cupy.text.rules import CURRENCY_SIGNS, Rewriter
from soprano_cupy.text.sentences import MAX_LENGTH

parser = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

PROPERTY = settings(max_examples=400, derandomize=True, deadline=None, database=None)


SHORT_FORMS = {
    *abbreviations._TITLES,
    *abbreviations._SUFFIXES,
    *(name.lower() for name in abbreviations._WORDS),
    "st",
}


def patterns() -> dict[str, re.Pattern[str]]:
    found = {}
    for info in pkgutil.iter_modules(soprano_cupy.text.__path__):
        module = importlib.import_module(f"soprano_cupy.text.{info.name}")
        found.update(
            {f"{info.name}.{key}": value for key, value in vars(module).items() if isinstance(value, re.Pattern)}
        )
    return found


@PROPERTY
@given(ANY_TEXT)
def test_normal_text_holds_only_the_alphabet(text: str) -> None:
    clean = normalize(text)
    assert ALPHABET.issuperset(clean)
    assert clean == " ".join(clean.split())
    assert not re.search(r"[.,!?] *,|,[.!?]| [.,!?]|([a-z])\1\1(?<!iii)", clean)


@PROPERTY
@given(ANY_TEXT)
def test_prompts_are_well_formed_and_hold_every_word(text: str) -> None:
    bodies = []
    for prompt in build_prompts(text):
        match = re.fullmatch(r"\[STOP\]\[TEXT\]([a-z ',.!?-]+)\[START\]", prompt)
        assert match, prompt
        assert len(match[1]) <= MAX_LENGTH
        bodies.append(match[1])
    assert re.sub("[^a-z]", "", "".join(bodies)) == re.sub("[^a-z]", "", normalize(text))


@PROPERTY
@given(ANY_TEXT)
def test_normal_text_is_its_own_normal_form(text: str) -> None:
    clean = normalize(text)
    assume(not SHORT_FORMS.intersection(re.findall("[a-z]+", clean)))  # "co" alone, then a stop: now a company
    assert normalize(clean) == clean


@PROPERTY
@given(ANY_TEXT, st.sampled_from(["\n\n", "\n", "\r\n"]))
def test_lines_are_read_one_by_one(text: str, newline: str) -> None:
    line = " ".join(text.split())
    both = normalize(f"{line}{newline}Next line.")
    assert both == f"{normalize(line)} next line.".lstrip()


@pytest.mark.parametrize("separator", ["", " ", " 5", "a"])
def test_every_character_of_the_basic_plane(separator: str) -> None:
    clean = normalize(separator.join(map(chr, range(0x10000))))
    assert ALPHABET.issuperset(clean)


def test_greek_letters_standing_alone_are_named() -> None:
    assert normalize("Α β Γ μ Σ σ Ω ω") == "alpha beta gamma mu sigma sigma omega omega."
    assert normalize("τὸ καλόν ή ο") == "to kalon i o."


def test_the_alphabet_is_in_every_vocabulary(shared_dir: Path) -> None:
    files = sorted(shared_dir.glob("**/tokenizer.json"))
    assert len(files) >= 3
    for file in files:
        tokens = json.loads(file.read_text(encoding="utf-8"))
        assert set(tokens["model"]["vocab"]) >= ALPHABET


def test_prompts_tokenize_as_the_reference_does(shared_dir: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(shared_dir / "soprano-1.1-80m" / "tokenizer.json"))
    compared = 0
    for line in (shared_dir / "golden" / "text.jsonl").read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        prompts = build_prompts(case["text"])
        ids = [tokenizer.encode(prompt).ids for prompt in prompts]
        assert not any(tokenizer.token_to_id("[UNK]") in row for row in ids)
        if prompts == case["prompts"]:
            assert ids == case["ids"]
            compared += 1
    assert compared == 38


PIECES = [
    "1",
    "a",
    "A",
    "1,",
    ",234",
    "1.",
    "1-",
    "1:",
    "a.",
    "a@",
    "a.b@",
    "www.",
    "http://",
    " ",
    "\n",
    "a\n",
    "a-\n",
]
PIECES += [
    "(",
    "()",
    "$",
    "$1",
    "-",
    " -",
    "Aa",
    "+1 ",
    "+",
    "\u0301",
    "\u0301\u0316",
    "你",
    "😀",
    "&",
    "&amp;",
    "Sat ",
]
PIECES += [
    "Sat,",
    "Mr.",
    ".",
    ". ",
    "'",
    "1 ",
    "1K",
    "1 m/",
    "2^",
    "iii",
    "111 ",
    "111-",
    "(111) ",
    "1_000",
    "6'2",
    "#",
]
PIECES += [
    "⁰",
    "½",
    "α ",
    "> ",
    "\r",
    "ᄀ",
    "1" * 36 + ",",
    "1" * 36 + ".",
    "1" * 36 + "-",
    "$" + "1" * 36,
    "[",
    "~",
    "ﷺ",
]


@pytest.mark.parametrize("piece", PIECES)
def test_repetition_of_anything_grows_in_proportion(piece: str) -> None:
    text = piece * (4000 // len(piece))
    size = 0
    for run in (to_readable, lay_out, *(Rewriter([rules]) for rules in PASSES)):
        text = run(text)
        size = max(size, len(text))
    assert size <= 40 * 4000
    prompts = build_prompts(piece * (4000 // len(piece)))
    assert len(prompts) <= 4000 * 40 // 100


def test_long_text_keeps_every_word() -> None:
    text = "The quick brown fox jumps over the lazy dog, and runs away! " * 5000
    prompts = build_prompts(text)
    assert len(prompts) == 5000
    assert set(prompts) == {"[STOP][TEXT]the quick brown fox jumps over the lazy dog, and runs away![START]"}


def unbounded_repeats_that_can_fail(items: Any, last: bool = True) -> list[str]:
    """Repeats without an upper bound after which something else must match: each could make a pass quadratic."""
    found = []
    for i, (op, argument) in enumerate(items):
        name, ends = str(op), last and i == len(items) - 1
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            low, high, inner = argument
            if high == parser.MAXREPEAT:
                single = len(inner) == 1 and str(inner[0][0]) in ("IN", "LITERAL", "NOT_LITERAL", "ANY", "GROUPREF")
                if not (ends and single):
                    found.append(f"{name} from {low}")
            else:
                found += unbounded_repeats_that_can_fail(inner, False)
        elif name == "SUBPATTERN":
            found += unbounded_repeats_that_can_fail(argument[-1], ends)
        elif name == "BRANCH":
            for branch in argument[1]:
                found += unbounded_repeats_that_can_fail(branch, ends)
        elif name in ("ASSERT", "ASSERT_NOT"):
            found += unbounded_repeats_that_can_fail(argument[1], False)
    return found


def test_the_check_for_unbounded_repeats_finds_them() -> None:
    for bad in (r"a*b", r"(a+)+", r"(?=a+)", r"\w+@", r"(?:ab)*", r"(a|b+)c", r"x(?!\s*y)"):
        assert unbounded_repeats_that_can_fail(parser.parse(bad)), bad
    for good in (r"ab*", r"(a)\1{2,}", r"a{1,9}b", r"x(?:a|b+)", r"[ab]+"):
        assert not unbounded_repeats_that_can_fail(parser.parse(good)), good


def test_every_pattern_costs_time_linear_in_the_text() -> None:
    found = patterns()
    assert len(found) > 50
    for name, pattern in found.items():
        parsed = parser.parse(pattern.pattern, pattern.flags)
        assert not unbounded_repeats_that_can_fail(parsed), name
        width = parsed.getwidth()[1]
        assert width < 4096 or width >= parser.MAXREPEAT, name


def test_every_currency_sign_has_a_name() -> None:
    assert set(CURRENCY_SIGNS) == set(money.SIGNS)
    for sign in CURRENCY_SIGNS:
        assert re.fullmatch("five [a-z]+[.]", normalize(f"{sign}5")), sign
        assert re.fullmatch("[a-z]+[.]", normalize(sign)), sign
