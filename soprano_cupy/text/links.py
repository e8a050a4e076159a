"""Web and mail addresses, read so that they can be written down."""

from __future__ import annotations

import re

from .rules import replace, rules, say

_URL = re.compile(r"(?<![A-Za-z0-9])(?P<scheme>[A-Za-z]{2,10})://(?P<rest>[^\s<>\"]{0,2000})")
_MAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}")
_WWW = re.compile(r"(?<![A-Za-z0-9.])www\.(?=[A-Za-z0-9])", re.IGNORECASE)
_SPELLED_SCHEMES = frozenset(("http", "https", "ftp", "ftps", "sftp", "ssh"))
_CLOSING = ".,!?;:'\")]}*_"
_SIGNS = str.maketrans(
    {
        ".": " dot ",
        "/": " slash ",
        ":": " colon ",
        "?": " question mark ",
        "#": " hash ",
        "~": " tilde ",
        "!": " exclamation mark ",
        ",": " comma ",
        ";": " semicolon ",
    }
)


def _read_url(match: re.Match[str]) -> str:
    scheme = match["scheme"].lower()
    said = " ".join(scheme) if scheme in _SPELLED_SCHEMES else match["scheme"]
    rest = match["rest"].rstrip(_CLOSING)
    tail = match["rest"][len(rest) :]
    rest = _WWW.sub("w w w.", rest)
    return f"{said} colon slash slash {rest.translate(_SIGNS)}".rstrip() + tail


LINKS = rules(
    say(_URL, _read_url, "://"),
    say(_MAIL, lambda match: match[0].translate(_SIGNS), "@"),
    replace(_WWW, "w w w dot ", ".a .A .0"),
)
"""URLs and mail addresses with their dots, slashes and colons in words; other signs are left to later passes."""
