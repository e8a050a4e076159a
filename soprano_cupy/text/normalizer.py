"""Written English to spoken English: a row of passes, each with one idea."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import ParameterError
from .abbreviations import expand_abbreviations, split_capitals
from .arithmetic import read_hyphens, read_operators, read_powers
from .characters import to_readable
from .dates import read_dates
from .figures import read_figures, shorten_figures
from .layout import lay_out
from .links import read_links
from .money import read_money
from .phones import read_phones
from .punctuation import read_dots, read_signs, tidy
from .times import read_times
from .units import read_units

PASSES: tuple[Callable[[str], str], ...] = (
    to_readable,  # any script → ASCII, newlines, currency signs and degrees
    lay_out,  # lines and paragraphs → sentences with stops
    shorten_figures,  # from here on no run of digits is longer than 36
    read_links,
    read_dates,  # before short forms and figures: a month is known by the figure beside it
    expand_abbreviations,
    read_phones,
    read_hyphens,  # before times, money and units, which may stand on either side of a range or an operator
    read_operators,
    read_times,
    read_money,
    read_units,
    read_powers,
    read_figures,  # from here on there are no digits
    read_dots,
    split_capitals,
    read_signs,
    tidy,
)


def normalize(text: str) -> str:
    """`text` as it is spoken: lower-case words with `'`, `,`, `.`, `!`, `?` and `-`, nothing else.

    Text without anything to say gives a string without letters, possibly empty. Time and size are linear in the
    length of `text`. Raises `ParameterError` when `text` is not a string.
    """
    if not isinstance(text, str):
        raise ParameterError(f"text must be a string, not {type(text).__name__}; decode bytes first")
    for run in PASSES:
        text = run(text)
    return text
