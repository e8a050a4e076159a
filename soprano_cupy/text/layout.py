"""Lines and paragraphs to sentences: every line ends in a stop, wrapped lines are joined, markup is taken off."""

from __future__ import annotations

import re

_LINE_MARKUP = re.compile(r"(?:(?:[-*+]|#{1,6}|>{1,8}) ){1,8}")  # bullets, headings, quoted mail
_DRAWN_LINE = re.compile(r"[-=_*~#+<>^|\\/` ]{3,}")
_DRAWN_RUN = re.compile(r"([-=_*~#+<>^|\\`])\1{2,}")
_MARKUP = re.compile(r"[-=_*~#+<>^|\\`/]")  # whatever is taken off holds one of these
_WRAP_LENGTH = 40  # a line at least this long that goes on in lower case was wrapped by an editor


def lay_out(text: str) -> str:
    """The lines that are spoken, each ending in `.`, `!` or `?`, with single spaces; lines that go on are joined."""
    pieces: list[str] = []
    previous = ""
    for raw in text.split("\n"):
        line = _clean_line(raw)
        if previous:
            pieces.append(_joint(previous, line))
        pieces.append(line)
        previous = line
    if previous:
        pieces.append(_joint(previous, ""))
    return "".join(pieces).rstrip("\n")


def _clean_line(line: str) -> str:
    line = " ".join(line.split())
    if not _MARKUP.search(line):
        return line
    if _DRAWN_LINE.fullmatch(line):
        return ""
    line = line[match.end() :] if (match := _LINE_MARKUP.match(line)) else line
    return " ".join(_DRAWN_RUN.sub(" ", line).split())


def _joint(line: str, following: str) -> str:
    """What stands between two lines: nothing in a divided word, a space in a wrapped sentence, else a stop."""
    if following[:1].islower():
        if line[-1] == "-" and line[-2:-1].isalpha():
            return ""
        if line[-1] in ",;-" or (len(line) >= _WRAP_LENGTH and line[-1] not in ".!?:"):
            return " "
    return "\n" if line[-1] in ".!?" else ".\n"
