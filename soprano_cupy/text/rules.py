"""How a text is rewritten: rules in their order, each one pattern and what its matches are said as.

Patterns are compiled once and are bounded: a match is at most some hundred characters wide (or is one run of
one kind of character that cannot fail once begun), so that a rule costs time linear in the text's length.

Most rules have nothing to do in most texts. Each therefore names what it cannot do without: `needs`, pieces of a
text's *shape* of which one must be there, or `names`, of which one must be a word of the text. The shape is the text
with `a` for every small letter, `A` for every capital, `0` for every digit and `$` for every sign of a currency:

    "Dr. Lee paid £1,234.50!"  →  "Aa. Aaa aaaa $0,000.00!"

A pattern that begins with a digit, a colon and a digit needs "0:0", and the shape is searched for just that. What a
rule needs changes no reading: it says in which texts the rule would find nothing, and is left out.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from functools import lru_cache, partial

Reading = Callable[["re.Match[str]"], "str | None"]

CURRENCY_SIGNS = "$¢£¥€₩₪₫₱₴₦₹₺₽₿฿"
DEGREE = "°"

DIGITS = r"[0-9]{1,36}"  # longer runs are spelled out before any other pass sees them
WHOLE = (  # 7 and 1,234,567 and 12,34,567 (grouped as in India)
    r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,11}(?![0-9])|[0-9]{1,2}(?:,[0-9]{2}){1,16},[0-9]{3}(?![0-9])|[0-9]{1,36}(?![0-9]))"
)
NUMBER = rf"(?:{WHOLE}(?:\.{DIGITS}(?![0-9]))?|\.{DIGITS}(?![0-9]))"  # with or without decimals
# Before a number that is not the tail of a longer one or of a name. What comes first decides how soon a pattern gives
# a character up: a look at the character itself takes a third of the time of two looks at what stands before it.
NOT_INSIDE = r"(?=[.0-9])(?<![A-Za-z0-9])(?<![0-9][.,])"


def words(text: str) -> tuple[str, ...]:
    """A table of words, written as a line of text."""
    return tuple(text.split())


def alternatives(names: Iterable[str]) -> str:
    """A pattern for any of `names`, the longest first, each taken literally.

    It looks at the first character alone before it tries one name after the other.
    """
    ordered = sorted(names, key=lambda name: (-len(name), name))
    first = re.escape("".join(sorted({name[0] for name in ordered})))
    return f"(?=[{first}])(?:{'|'.join(map(re.escape, ordered))})"


# ---- what a text looks like ----

_ENCODING = "latin-1"  # one byte a character: bytes are translated in a fraction of a string's time
_ONE_SIGN = str.maketrans(dict.fromkeys(CURRENCY_SIGNS, "$"))


def _kind(char: str) -> str:
    if not char.isascii():
        return char
    return "a" if char.islower() else "A" if char.isupper() else "0" if char.isdigit() else char


_CHARACTERS = tuple(map(chr, range(256)))
_SHAPES = "".join(map(_kind, _CHARACTERS)).encode(_ENCODING)
_LETTERS = "".join(char.lower() if _kind(char) in "aA" else " " for char in _CHARACTERS).encode(_ENCODING)
_EVERYWHERE = b"aA "  # kinds of character that most texts hold


def _marks(shape: str) -> frozenset[int]:
    return frozenset(shape.encode(_ENCODING).translate(None, _EVERYWHERE))


class Look:
    """What a text looks like: its shape, the kinds of character in it that are not in every text, and its words."""

    __slots__ = ("_bytes", "_words", "marks", "shape")

    def __init__(self, text: str) -> None:
        if not text.isascii():
            text = text.translate(_ONE_SIGN)
        self._bytes = text.encode(_ENCODING, "replace")
        self._words: set[bytes] | None = None
        self.shape = self._bytes.translate(_SHAPES).decode(_ENCODING)  # a string is searched in less time than bytes
        self.marks = _marks(self.shape)

    @property
    def words(self) -> set[bytes]:
        """Runs of letters, in lower case."""
        if self._words is None:
            self._words = set(self._bytes.translate(_LETTERS).split())
        return self._words


# ---- rules ----


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a text becomes, and what `Look` must show for it to become anything else than it was.

    Of `needs` and `names` together, one must be in the shape or among the words; of `marks`, if there are any, one
    must be in the shape besides.
    """

    rewrite: Callable[[str], str]
    needs: tuple[str, ...]
    names: frozenset[bytes]
    marks: frozenset[int] = frozenset()
    pattern: re.Pattern[str] | None = None

    def may_act(self, look: Look) -> bool:
        """Whether the text may hold something for this rule; `possible` has been asked before."""
        shape = look.shape
        for need in self.needs:  # a loop: `any` takes twice as long
            if need in shape:
                return True
        return bool(self.names) and not self.names.isdisjoint(look.words)

    def possible(self, marks: frozenset[int]) -> bool:
        """Whether a text of these marks may hold something for this rule."""
        if self.marks and self.marks.isdisjoint(marks):
            return False
        return bool(self.names) or any(marks.issuperset(_marks(need)) for need in self.needs)


def rule(rewrite: Callable[[str], str], needs: str | Iterable[str] = "", names: Iterable[str] = ()) -> Rule:
    """A rule that is a function; `needs` is a line of pieces of shape, or an iterable where one holds a space.

    Without needs and names it stands for itself in every text.
    """
    pieces = tuple(needs.split() if isinstance(needs, str) else needs)
    known = frozenset(name.lower().encode(_ENCODING) for name in names)
    return Rule(rewrite, pieces if pieces or known else ("",), known)


def replace(
    pattern: re.Pattern[str],
    reading: str | Callable[[re.Match[str]], str],
    needs: str | Iterable[str] = "",
    names: Iterable[str] = (),
) -> Rule:
    """The rule that puts `reading` (a template, or what it makes of a match) in the place of every match."""
    return dataclasses.replace(rule(partial(pattern.sub, reading), needs, names), pattern=pattern)


def say(pattern: re.Pattern[str], read: Reading, needs: str | Iterable[str] = "", names: Iterable[str] = ()) -> Rule:
    """The rule that says every match as `read(match)`, kept apart from letters and digits on either side.

    A match for which `read` gives `None` stays as it is.
    """

    def reading(match: re.Match[str]) -> str:
        said = read(match)
        if said is None:
            return match[0]
        text, (start, end) = match.string, match.span()
        before = " " if start and text[start - 1].isalnum() else ""
        after = " " if text[end : end + 1].isalnum() else ""
        return before + said + after

    return replace(pattern, reading, needs, names)


def rules(*members: Rule, marks: str = "") -> tuple[Rule, ...]:
    """A pass: rules of one idea in their order, all of which need one of `marks` in the shape too."""
    return tuple(dataclasses.replace(member, marks=_marks(marks)) for member in members)


class Rewriter:
    """Rules one after the other; those that cannot act on a text are passed over.

    Which ones the marks of a text leave is worked out once for each set of marks, since few sets occur.
    """

    MAX_PLANS = 1 << 12  # hostile texts cannot fill the memory

    def __init__(self, passes: Iterable[Iterable[Rule]]) -> None:
        self.rules = tuple(member for row in passes for member in row)
        self._following = lru_cache(self.MAX_PLANS)(self._plan)

    def __call__(self, text: str) -> str:
        """`text` after every rule."""
        look = Look(text)
        following = self._following(look.marks)
        index = following[0]
        while index < len(self.rules):
            member = self.rules[index]
            if member.may_act(look):
                before, text = text, member.rewrite(text)
                if text != before:
                    look = Look(text)
                    following = self._following(look.marks)
            index = following[index + 1]
        return text

    def _plan(self, marks: frozenset[int]) -> tuple[int, ...]:
        """For every rule the first one from there on that is possible; the number of rules where there is none."""
        following = [len(self.rules)]
        for index in range(len(self.rules) - 1, -1, -1):
            following.append(index if self.rules[index].possible(marks) else following[-1])
        return tuple(reversed(following))
