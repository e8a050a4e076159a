"""How a pass rewrites text: one compiled pattern, and what each match is said as.

Patterns are compiled once and are bounded: a match is at most some hundred characters wide (or is one run of
one kind of character that cannot fail once begun), so that a pass costs time linear in the text's length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

Reading = Callable[["re.Match[str]"], "str | None"]

DIGITS = r"[0-9]{1,36}"  # longer runs are spelled out before any other pass sees them
WHOLE = (  # 7 and 1,234,567 and 12,34,567 (grouped as in India)
    r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,11}(?![0-9])|[0-9]{1,2}(?:,[0-9]{2}){1,16},[0-9]{3}(?![0-9])|[0-9]{1,36}(?![0-9]))"
)
NUMBER = rf"(?:{WHOLE}(?:\.{DIGITS}(?![0-9]))?|\.{DIGITS}(?![0-9]))"  # with or without decimals
NOT_INSIDE = r"(?<![A-Za-z0-9])(?<![0-9][.,])"  # before a number that is not the tail of a longer one or of a name


def words(text: str) -> tuple[str, ...]:
    """A table of words, written as a line of text."""
    return tuple(text.split())


def alternatives(names: Iterable[str]) -> str:
    """A pattern for any of `names`, the longest first, each taken literally."""
    return "(?:" + "|".join(re.escape(name) for name in sorted(names, key=lambda name: (-len(name), name))) + ")"


def say(pattern: re.Pattern[str], read: Reading, text: str) -> str:
    """`text` with every match said as `read(match)`, kept apart from letters and digits on either side.

    A match for which `read` gives `None` stays as it is.
    """

    def replace(match: re.Match[str]) -> str:
        said = read(match)
        if said is None:
            return match[0]
        before = match.string[match.start() - 1 : match.start()] if match.start() else ""
        after = match.string[match.end() : match.end() + 1]
        return (" " if before.isalnum() else "") + said + (" " if after.isalnum() else "")

    return pattern.sub(replace, text)
