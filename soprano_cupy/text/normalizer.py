"""Written English to spoken English: a row of passes, each with one idea."""

from __future__ import annotations

from ..errors import ParameterError
from .abbreviations import CAPITALS, SHORT_FORMS
from .arithmetic import HYPHENS, OPERATORS, POWERS
from .characters import to_readable
from .dates import DATES
from .figures import FIGURES, LONG_FIGURES
from .layout import lay_out
from .links import LINKS
from .money import MONEY
from .phones import PHONES
from .punctuation import DOTS, MARKS, TIDY
from .rules import Rewriter
from .times import TIMES
from .units import UNITS

PASSES = (
    LONG_FIGURES,  # from here on no run of digits is longer than 36
    LINKS,
    DATES,  # before short forms and figures: a month is known by the figure beside it
    SHORT_FORMS,
    PHONES,
    HYPHENS,  # before times, money and units, which may stand on either side of a range or an operator
    OPERATORS,
    TIMES,
    MONEY,
    UNITS,
    POWERS,
    FIGURES,  # from here on there are no digits
    DOTS,
    CAPITALS,
    MARKS,
    TIDY,
)
_rewrite = Rewriter(PASSES)


def normalize(text: str) -> str:
    """`text` as it is spoken: lower-case words with `'`, `,`, `.`, `!`, `?` and `-`, nothing else.

    Text without anything to say gives a string without letters, possibly empty. Time and size are linear in the
    length of `text`. Raises `ParameterError` when `text` is not a string.
    """
    if not isinstance(text, str):
        raise ParameterError(f"text must be a string, not {type(text).__name__}; decode bytes first")
    lines = lay_out(to_readable(text))  # any script → ASCII and few signs more, lines and paragraphs → sentences
    return _rewrite(lines)
