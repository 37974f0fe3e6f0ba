"""Names and texts of a model as a terminal may show them: a file must not move the cursor or colour what follows."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    r"""The text with characters that are not printed (escapes, new lines, marks of direction) written as in Python.

    >>> printable("a\x1b[31m\nb"), printable("a\x1b\nb", keep="\n")
    ('a\\x1b[31m\\nb', 'a\\x1b\nb')
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode("ascii") for char in text
    )
