"""Escaping of names and reasons, which come from users' models, for each report format."""

from __future__ import annotations

import html
import re

# C0, C1, overrides of the writing direction, surrogates, non-characters: XML refuses most, the others hide text
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
_MARKDOWN = re.compile(r"([\\`*_\[\]|~#@])")


def visible(text: str) -> str:
    r"""Replace control characters by escapes such as ``\x1b``, which every format can hold."""
    return _INVISIBLE.sub(lambda match: ascii(match[0])[1:-1], text)


def markdown(text: str) -> str:
    """Escape text for a Markdown table: one line, without markup, HTML or mentions."""
    # numeric references: a backslash does not keep a mention or an issue's number from becoming a link
    escaped = html.escape(" ".join(visible(text).split()), quote=False)
    return _MARKDOWN.sub(lambda match: f"&#{ord(match[0])};" if match[0] in "|@#~" else rf"\{match[0]}", escaped)


def code(text: str) -> str:
    """Format a name as code in a Markdown table."""
    plain = " ".join(visible(text).split())
    # a code span has no escapes, and a table splits at "|" even in one
    if re.search("[`|]", plain):
        return markdown(plain)
    return f"`{plain}`" if plain else ""
