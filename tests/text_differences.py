"""Where the text front end reads otherwise than the reference, on purpose, and why.

`reference` is what the reference makes of `text` (or "(fails)" where it raises), `ours` what we make of it. The
rows whose text stands in the golden file are the only ones in it that may differ. `docs/text.md` shows this table;
a test keeps the two equal. `python tests/text_differences.py` prints it.
"""

from __future__ import annotations

import json
from typing import NamedTuple


class Difference(NamedTuple):
    text: str
    reference: str
    ours: str
    reason: str


GOLDEN = (
    Difference(
        "The price rose from $2.47 to $1,234.56, or £20, in 1999; it was $0.27 in 1905 and $1.00 in 2000.",
        "the price rose from two dollars, forty-seven cents to twelve thirty-four dollars, fifty-six cents, or ps"
        " twenty, in nineteen ninety-nine, it was twenty-seven cents in nineteen oh five and one dollar in two"
        " thousand.",
        "the price rose from two dollars, forty-seven cents to one thousand, two hundred thirty-four dollars,"
        " fifty-six cents, or twenty pounds, in nineteen ninety-nine, it was twenty-seven cents in nineteen oh five"
        " and one dollar in two thousand.",
        "a pound is not the letters p s, and an amount is not a year",
    ),
    Difference(
        "Call (555) 123-4567 or 555-987-6543 before 8:05, 12:00, 13:00 or 0:00.",
        "call five five five, one two three, four five six seven or five five five, nine eight seven, six five four"
        " three before eight oh five, twelve o'clock, thirteen minutes or zero.",
        "call five five five, one two three, four five six seven or five five five, nine eight seven, six five four"
        " three before eight oh five, twelve o'clock, thirteen hundred or zero hundred.",
        "13:00 and 0:00 are times of day, as 14:30 is",
    ),
    Difference(
        "It took 1:30:00 on the first run.",
        "it took one, 'thirty', on the first run.",
        "it took one hour, thirty minutes on the first run.",
        "hours, minutes and seconds are a duration; the quotes come from a set printed by mistake",
    ),
    Difference(
        "Mail me at someone@example.com or visit https://www.example.com/path_to/page?x=1&y=2.",
        "mail me at someone at example dot com or visit h t t p s colon slash slash ww dot example dot com slash path"
        " to slash page?x equals one and y equals two.",
        "mail me at someone at example dot com or visit h t t p s colon slash slash w w w dot example dot com slash"
        " path to slash page question mark x equals one and y equals two.",
        "www loses a letter, and the question mark of an address is no end of a sentence",
    ),
    Difference(
        "naïve café résumé Zürich Ærøskøbing Dvořák 北京 Москва",
        "naive cafe resume zurich a eroskobing dvorak bei jing moskva.",
        "naive cafe resume zurich aeroskobing dvorak bei jing moskva.",
        "a ligature does not divide its word",
    ),
    Difference(
        "   Leading and trailing spaces   and\ttabs\ttoo.   ",
        "leading and trailing spaces andtabstoo.",
        "leading and trailing spaces and tabs too.",
        "a tab is a space",
    ),
    Difference(
        "A.B.C. and U.S.A. and e.g. and i.e. and p.m.",
        "a dot b.c. and u dot s.a. and e dot g. and i dot e. and p dot m.",
        "a b c and u s a and for example and that is and pm.",
        "initials and short forms hold no dots to be read and end no sentence",
    ),
)

FURTHER = (
    Difference(
        "It costs £3.50 and €20.",
        "it costs ps three point five zero and eur twenty.",
        "it costs three pounds, fifty pence and twenty euros.",
        "signs of currencies other than the dollar",
    ),
    Difference(
        "It costs ¥500 or ₹99.50.",
        "it costs y equals five hundred or rs ninety-nine point five zero.",
        "it costs five hundred yen or ninety-nine rupees, fifty paise.",
        "signs of currencies other than the dollar",
    ),
    Difference(
        "It raised $1.5 million.",
        "it raised one dollar, five cents million.",
        "it raised one point five million dollars.",
        "a magnitude belongs to the amount",
    ),
    Difference(
        "A $1.5 fee.", "a one dollar, five cents fee.", "a one dollar, fifty cents fee.", "one decimal is tens of cents"
    ),
    Difference("The ratio is 16:9.", "the ratio is sixteen.nine.", "the ratio is sixteen to nine.", "a ratio"),
    Difference(
        "Pages 10-20 and GPT-4.",
        "pages ten minus twenty and gpt minus four.",
        "pages ten to twenty and gpt four.",
        "a hyphen is minus only in sums and before negative numbers",
    ),
    Difference(
        "Open 9:00-17:00.",
        "open nine o'clock minus seventeen minutes.",
        "open nine o'clock to seventeen hundred.",
        "a range of times",
    ),
    Difference("Sat down.", "saturday down.", "sat down.", "a day only where the context is a date"),
    Difference("Jan went home.", "january went home.", "jan went home.", "a month only where the context is a date"),
    Difference(
        "See http://example.com.",
        "see h t t p s colon slash slash example dot com.",
        "see h t t p colon slash slash example dot com.",
        "http is not https",
    ),
    Difference(
        "«Hello»",
        "less than less than hello greater than greater than.",
        "hello.",
        "quotation marks of other languages",
    ),
    Difference("¿Qué?", "?que?", "que?", "an opening mark ends nothing"),
    Difference(
        "1" * 37,
        "(fails)",
        "one one one, " * 12 + "one.",
        "numbers beyond decillions are read digit by digit",
    ),
    Difference("1,2,3", "one hundred twenty-three.", "one, two, three.", "only commas before three digits group them"),
    Difference(
        "Call 02134 or 007.",
        "call twenty-one thirty-four or seven.",
        "call zero two one three four or zero zero seven.",
        "leading zeros mean a code, which is read digit by digit",
    ),
    Difference(
        "2025-01-31",
        "twenty twenty-five dash one dash thirty-one.",
        "january thirty-first, twenty twenty-five.",
        "an ISO date is never ambiguous",
    ),
    Difference("Main St.", "main saint", "main street.", "a street after its name, and the sentence keeps its stop"),
    Difference("6 ft. tall", "six fort tall.", "six feet tall.", "a unit after a number"),
    Difference(
        "100 km/h at 20°C.",
        "one hundred km slash h at twenty degc.",
        "one hundred kilometers per hour at twenty degrees celsius.",
        "units of measurement",
    ),
    Difference("No. 5", "no. five.", "number five.", "no end of a sentence before a number"),
    Difference("World War III", "world war ii.", "world war iii.", "a Roman numeral keeps its letters"),
    Difference("AAA batteries", "aa batteries.", "a a a batteries.", "a size or a grade keeps its letters"),
    Difference("the 1990s", "the nineteen ninety s.", "the nineteen nineties.", "decades"),
    Difference(".5 liters", ".five liters.", "point five liters.", "decimals without a whole number"),
    Difference("1 1/2", "one one over two.", "one and one over two.", "a whole number and a fraction"),
    Difference("5*-3", "five minus three.", "five times minus three.", "the operator before a negative number"),
    Difference("x^2", "xtwo.", "x squared.", "powers"),
    Difference("(a)b", ", a.", ", a, b.", "what follows a bracket is not swallowed"),
    Difference("C# #tag", "c tag.", "c sharp hashtag tag.", "signs that are spoken"),
    Difference("hello.World", "hello dot world.", "hello. world.", "a space forgotten after a stop"),
    Difference("HTML &amp; CSS", "html and amp, css.", "html and css.", "HTML entities"),
    Difference(
        "this is a long line that an editor wrapped\nand it goes on here",
        "this is a long line that an editor wrapped. and it goes on here.",
        "this is a long line that an editor wrapped and it goes on here.",
        "a wrapped line is no end of a sentence",
    ),
)


def markdown_table() -> str:
    """All rows as a Markdown table."""
    rows = ["| Text | Reference | Here | Why |", "|---|---|---|---|"]
    for row in (*GOLDEN, *FURTHER):
        text = json.dumps(row.text, ensure_ascii=False)[1:-1].replace("|", "\\|")
        rows.append(f"| `{text}` | {row.reference} | {row.ours} | {row.reason} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(markdown_table(), end="")
