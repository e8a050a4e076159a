"""Random texts for the text front end: pieces of every kind that some rule reads, and any characters at all."""

from __future__ import annotations

from hypothesis import strategies as st

from soprano_cupy.text import abbreviations, dates, money, units


def cut(text: str) -> list[str]:
    return text.split("|")


FRAGMENTS = [
    *cut("Mr. |Dr |St. |co.|etc.|e.g.|U.S.|p.m.|Ph.D.|Sat|Sun |Mar|Jan |Mon-|No. |Fig. |vs|Ave|w/|24/7|A.I."),
    *cut("1|23|456|1,234|3.14|2024|0|007|.5|10:30|1:2:3|1:30:00|555-1234|(555) 123-4567|2025-01-31|1/2/2025"),
    *cut("$|£|€|¢|km|kg|°C|°|K|M|th|st|s|'s| million|^2|#|@|&|&amp;|%|~|\\|_|`|*|+|=|<|>|<=|->|/"),
    *" .,!?:;-–—()[]{}'\"\n\t\r",
    *cut("http://|www.|a@b.com|file.txt|hello |World|The |camelCase|HTTPServer|CPUs|AAA|iii|sooo"),
    *cut("é|ß|Æ|北京|Ж|ا|か\u3099|ﬁ|½|²|⁶|α|µ|→|≤|😀|👍🏽|\u200b|\u200d|\ufeff|\u0301|\ud800|\x00|\u2028|１|٣"),
]
ANY_TEXT = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=60),
    st.text("".join(map(chr, range(32, 127))), max_size=60),
    st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join),
)
WORDS = [
    *(name for table in (abbreviations._TITLES, abbreviations._SUFFIXES) for name in table),
    *(name.capitalize() for name in abbreviations._TITLES),
    *(
        name
        for table in (abbreviations._CAPITAL_TITLES, abbreviations._REFERENCES, abbreviations._WORDS)
        for name in table
    ),
    *(name for table in (dates._NAMES, units._SYMBOLS, money._ALL, money._MAGNITUDES) for name in table),
    *cut(
        "St|st.|Ave|Blvd|Rd|Jr|Sr|III|viii|AAA|www|iPhone|GPUs|NASA|HelloWorld|the|a|I|He|it's|I'm|we'll|on|in|may|to"
    ),
    *cut("1/2|3 1/2|2:30|9-5|9:00-17:00|-40|-.5|x^2|y-1|5'10\"|#5|C#|A-4|'99|90s|1st|22nd|5k|3.5M|1,5|12,34,567|1.2.3"),
    *cut("5k-.5|5k-$6|5%-6|5-$6|$5-.6|5-€6"),
    *cut("+44 20 7946 0958|555.123.4567|555 123 4567|02134-5678|1-2-3|2024/5/6|2024-05|1/2/99|4 km|5km|20 °|3 m^2/s"),
    *cut('(s)|item(s)|C:\\x|a:/b|x--y|x -- y|a - b|"q"|a"b|a.b|end.Next|.net|.NET|e.x.|=>=|!==|~~|~/|::|&&|soooo'),
    "1" * 40,
    "x." + "2" * 38,
]
READ_TEXT = st.lists(
    st.tuples(
        st.sampled_from([*WORDS, *FRAGMENTS]), st.sampled_from(["", " ", " ", " ", ". ", ".", ", ", "\n", "-", "/"])
    ),
    max_size=14,
).map(lambda pairs: "".join(word + gap for word, gap in pairs))
NUMERIC_TEXT = st.text("0123459.,-/:$%'# aAsStTkm*+^()€°_", max_size=24)
