"""Written English to spoken English: the reference's readings, the intended differences, and everyday text."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import text_differences

from soprano_cupy.errors import ParameterError
from soprano_cupy.text import build_prompts, characters, normalize, split_sentences

PROMPT_HEAD, PROMPT_TAIL = "[STOP][TEXT]", "[START]"


@pytest.fixture(scope="module")
def golden_cases(shared_dir: Path) -> list[dict[str, object]]:
    lines = (shared_dir / "golden" / "text.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_agrees_with_the_reference_except_where_intended(golden_cases: list[dict[str, object]]) -> None:
    intended = {row.text for row in text_differences.GOLDEN}
    wrong = {}
    for case in golden_cases:
        text = str(case["text"])
        got = {"clean": normalize(text), "prompts": build_prompts(text)}
        if text not in intended and got != {"clean": case["clean"], "prompts": case["prompts"]}:
            wrong[text] = got
    assert not wrong
    assert len(golden_cases) == 45
    assert len(intended & {str(case["text"]) for case in golden_cases}) == len(text_differences.GOLDEN) == 7


def test_golden_differences_quote_the_reference(golden_cases: list[dict[str, object]]) -> None:
    clean = {case["text"]: case["clean"] for case in golden_cases}
    assert {row.text: row.reference for row in text_differences.GOLDEN} == {
        row.text: clean[row.text] for row in text_differences.GOLDEN
    }


@pytest.mark.parametrize("row", [*text_differences.GOLDEN, *text_differences.FURTHER], ids=lambda row: row.text[:24])
def test_intended_difference(row: text_differences.Difference) -> None:
    assert normalize(row.text) == row.ours
    assert row.ours != row.reference
    assert row.reason
    bodies = [prompt[len(PROMPT_HEAD) : -len(PROMPT_TAIL)] for prompt in build_prompts(row.text)]
    assert " ".join(bodies) == row.ours


def test_documentation_shows_the_same_table() -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "text.md"
    assert text_differences.markdown_table() in page.read_text(encoding="utf-8")


def test_documentation_examples_hold() -> None:
    assert normalize("Dr. Smith paid £3.50.") == "doctor smith paid three pounds, fifty pence."
    assert build_prompts("Hello world!") == ["[STOP][TEXT]hello world![START]"]


MONEY = {
    "$5": "five dollars.",
    "$1": "one dollar.",
    "$0": "zero dollars.",
    "$.50": "fifty cents.",
    "$0.01": "one cent.",
    "£0.01": "one penny.",
    "-$5 and $-5": "minus five dollars and minus five dollars.",
    "$3.999": "three point nine nine nine dollars.",
    "$5M": "five million dollars.",
    "€3bn": "three billion euros.",
    "£20k": "twenty thousand pounds.",
    "$5-10": "five dollars to ten dollars.",
    "$5/month": "five dollars per month.",
    "€1,50": "one euro, fifty cents.",
    "1.234,56 €": "one thousand, two hundred thirty-four euros, fifty-six cents.",
    "20 EUR": "twenty euros.",
    "US$20": "twenty u s dollars.",
    "50¢": "fifty cents.",
    "$x": "dollar x.",
    "¥1.5": "one point five yen.",
    "₹1,00,000": "one hundred thousand rupees.",
    "$" + "9" * 40: "dollar " + "nine nine nine, " * 13 + "nine.",
}
TIMES_AND_DATES = {
    "3pm": "three pm.",
    "3:30pm": "three thirty pm.",
    "at 3 p.m. He left": "at three pm. he left.",
    "3 p.m. on Monday": "three pm on monday.",
    "12:00": "twelve o'clock.",
    "20:00": "twenty hundred.",
    "45:00": "forty-five minutes.",
    "0:00:00": "zero seconds.",
    "1:01:01.5": "one hour, one minute, one point five seconds.",
    "1:23.45": "one twenty-three point four five.",
    "100:1": "one hundred to one.",
    "2025-01-31T14:30": "january thirty-first, twenty twenty-five, fourteen thirty.",
    "2024-05": "may twenty twenty-four.",
    "2025/01/31, 2005-5-9": "january thirty-first, twenty twenty-five, may ninth, two thousand five.",
    "2024-13": "twenty twenty-four to thirteen.",
    "12-31-05": "twelve dash thirty-one dash oh five.",
    "Sat. 5 Mar. 2024": "saturday five march twenty twenty-four.",
    "Mon-Fri, Sat & Sun": "monday-friday, saturday and sunday.",
    "See you Sat. Bye": "see you saturday. bye.",
    "on Sat we": "on saturday we.",
    "Wed the man in the Sun.": "wed the man in the sun.",
    "Sun: closed": "sunday. closed.",
    "in Mar or Jan": "in march or january.",
    "Mar the table": "mar the table.",
    "1999-2001": "nineteen ninety-nine to two thousand one.",
    "in '99": "in ninety-nine.",
    "1010 and 1100": "ten ten and eleven hundred.",
}
FIGURES = {
    "+1 555 123 4567": "plus one, five five five, one two three, four five six seven.",
    "+44 20 7946 0958": "plus four four, two zero, seven nine four six, zero nine five eight.",
    "1-800-555-0199": "one, eight zero zero, five five five, zero one nine nine.",
    "MA 02110-1301": "ma zero two one one zero, one three zero one.",
    "555-1234": "five five five, one two three four.",
    "978-0-306-40615-7": "nine seven eight, zero, three zero six, four zero six one five, seven.",
    "1,234": "one thousand, two hundred thirty-four.",
    "-.5 and -3": "minus point five and minus three.",
    "7-8+3": "seven minus eight plus three.",
    "10 - 20": "ten minus twenty.",
    "10–20 and 10 – 20": "ten to twenty and ten to twenty.",
    "5%-10%": "five percent to ten percent.",
    "n-1": "n minus one.",
    "3 * 4 km - 2 km": "three times four kilometers, two kilometers.",
    "$5 - $3, 9am - 5pm": "five dollars minus three dollars, nine am to five pm.",
    "5--3": "five minus minus three.",
    "B-52, Y2K, H2O": "b fifty-two, y two k, h two o.",
    "2^10 and 10⁶ and 3 m²": "two to the power of ten and ten to the power of six and three square meters.",
    "1½ cups, ¾, ⅞": "one and a half cups, three quarters, seven eighths.",
    "192.168.0.1": "one hundred ninety-two point one six eight point zero point one.",
    "1,000th and 21ST": "one thousandth and twenty-first.",
    "24/7": "twenty-four seven.",
    "6'2\"": "six feet two inches.",
    "1 km, 1.5 m, 1 KB": "one kilometer, one point five meters, one kilobyte.",
    "5 µg at -40°F": "five micrograms at minus forty degrees fahrenheit.",
    "1\u00a0000 and 10_000": "one thousand and ten thousand.",
    "iPhone 5s": "iphone five s.",
    "0." + "1" * 40: "zero point " + "one one one, " * 13 + "one.",
    "١٢٣": "one hundred twenty-three.",
}
WORDS = {
    "Mr Smith, Ms. B, Dr. Who": "mister smith, miss b, doctor who.",
    "St. Paul on Main St. today": "saint paul on main street today.",
    "in the U.S. He left the U.S. Army": "in the u s. he left the u s army.",
    "Acme Co. makes it. By Acme Co.": "acme company makes it. by acme company.",
    "J.R.R. Tolkien, Ph.D.": "j r r tolkien, ph d.",
    "No. Yes, no. 7": "no. yes, number seven.",
    "file.txt and Node.js": "file dot txt and node dot js.",
    "w/o and w/ it": "without and with it.",
    "e-mail, state-of-the-art, pre- and post-": "e-mail, state-of-the-art, pre and post.",
    "a—b, a – b, a--b": "a, b, a, b, a, b.",
    "don't 'quote' rock 'n' roll": "don't 'quote' rock 'n' roll.",
    "hmmmm www": "hmm w w w.",
    "As it Is, US and Us, TPUs, IDs, PhDs": "as it is, us and us, tpu's, id's, ph ds.",
    "std::vector, C<.xs> and /etc/*.c": "std vector, c less than dot xs greater than and slash et cetera slash dot c.",
    "by Acme, Inc. All rights": "by acme, incorporated. all rights.",
    "user_name@my-site.co.uk": "user name at my-site dot co dot uk.",
    "(see https://x.y/z).": ", see h t t p s colon slash slash x dot y slash z.",
    "~/dir and C:\\dir": "tilde slash dir and c colon backslash dir.",
    "a -> b != c": "a to b not equal to c.",
    "word(s)": "words.",
    "[START][STOP][TEXT]": ", start, stop, text.",
}
SHAPES = {
    "": "",
    " \n\t ": "",
    "!!!": "!",
    "...": "...",
    "a\r\nb\rc\n\n\nd": "a. b. c. d.",
    "**bold** _it_ `code` ~~gone~~": "bold it code gone.",
    "# Title\n---\n- one\n* two\n> three": "title. one. two. three.",
    "exam-\nple": "exam-ple.",
    "first,\nsecond": "first, second.",
    "Ingredients:\nEggs": "ingredients. eggs.",
    'He said: "Hi."\n"Really?"': "he said. hi. really?",
    "a\u00a0b\u2003c\u200bd": "a b c d.",
    "so\u00adft zero\u200dwidth \ufeffmark": "soft zerowidth mark.",
    "e\u0301tude か\u3099": "etude ga.",
    "ﬁne Ｆｕｌｌ １２": "fine full twelve.",
    "我们爱NASA的GPU。": "wo men ai nasa de g p u.",
    "한국어 こんにちは": "hangugeo konnichiha.",
    "שלום مرحبا Ελλάδα": "slvm mrhba ellada.",
    "α=5": "alpha equals five.",
    "5 × 3 ≠ 16 ± 2": "five times three not equal to sixteen plus or minus two.",
    "a;b|c": "a, b, c.",
    "end.  \u2026": "end...",
}


@pytest.mark.parametrize(("text", "spoken"), [*MONEY.items(), *TIMES_AND_DATES.items()])
def test_money_times_and_dates(text: str, spoken: str) -> None:
    assert normalize(text) == spoken


@pytest.mark.parametrize(("text", "spoken"), [*FIGURES.items(), *WORDS.items(), *SHAPES.items()])
def test_figures_words_and_shapes(text: str, spoken: str) -> None:
    assert normalize(text) == spoken


@pytest.mark.parametrize(
    "text", ["😀", "🎉👍🏽", "!!!", "...", "—", "()", '""', "\u0301", "\ud800", "\x00\x07", "\ufeff"]
)
def test_text_without_a_word_gives_no_prompt(text: str) -> None:
    assert not any(char.isalpha() for char in normalize(text))
    assert build_prompts(text) == []


@pytest.mark.parametrize("text", [None, b"bytes", 5, ["list"]])
@pytest.mark.parametrize("function", [normalize, build_prompts, split_sentences])
def test_refuses_what_is_not_a_string(function: object, text: object) -> None:
    with pytest.raises(ParameterError, match=f"must be a string, not {type(text).__name__}"):
        function(text)  # type: ignore[operator]


@pytest.fixture
def fresh_characters(monkeypatch: pytest.MonkeyPatch) -> characters.ReadableCharacters:
    """As in a process that has not seen any character yet."""
    table = characters.ReadableCharacters()
    monkeypatch.setattr(characters, "_READABLE", table)
    return table


@pytest.mark.usefixtures("fresh_characters")
def test_unspeakable_characters_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger=characters.__name__):
        assert normalize("Hi 😀😀 there \ud800\x07") == "hi there."
        assert normalize("😀 again") == "again."
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split(" cannot be spoken")[0] for message in messages] == [
        "U+1F600 (GRINNING FACE)",
        "U+D800 (unnamed character)",
        "U+0007 (unnamed character)",
    ]


@pytest.mark.usefixtures("fresh_characters")
def test_ordinary_text_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger=characters.__name__):
        normalize("“Curly” — naïve ½ cup, £5 at 20°C… Москва 北京 مرحبا 👍"[:-1] + "\u200d\ufe0f\ufeff\r\n\t")
    assert caplog.records == []


def test_hostile_text_fills_neither_log_nor_memory(
    fresh_characters: characters.ReadableCharacters, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(characters.ReadableCharacters, "MAX_ENTRIES", len(fresh_characters) + 500)
    with caplog.at_level(logging.WARNING, logger=characters.__name__):
        normalize("".join(map(chr, range(0xE000, 0xE800))))
    assert len(caplog.records) == characters.ReadableCharacters.MAX_NAMED + 1
    assert "further characters" in caplog.records[-1].getMessage()
    assert len(fresh_characters) == characters.ReadableCharacters.MAX_ENTRIES


def test_import_is_light() -> None:
    code = (
        "import sys, soprano_cupy.text as t; t.normalize('Dr. A paid $5 on Jan 5.');"
        "print([m for m in ('anyascii', 'numpy', 'tokenizers', 'html', 'cupy', 'huggingface_hub') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout.strip() == "[]"
