r"""RE2 patterns as patterns of Python's `re`, for full matches.

The two agree on most of the syntax. What differs is rewritten (ASCII-only \d \s \w \b, \z, \x{..}, \Q..\E, POSIX
classes, `$` only at the very end) or refused: what only Python has (look-around, back-references, possessive and atomic
groups) is no valid RE2, and \p{..}, \C and flags in the middle of a pattern have no counterpart in `re`.
Source: https://github.com/google/re2/wiki/Syntax.
"""

from __future__ import annotations

import re

from fxopt.errors import InvalidInput, MissingReference

_CLASSES = {"d": "0-9", "s": r"\t\n\f\r ", "w": "0-9A-Za-z_"}
_COMPLEMENTS = {
    "D": r"\x00-/:-\U0010ffff",
    "S": r"\x00-\x08\x0b\x0e-\x1f!-\U0010ffff",
    "W": r"\x00-/:-@\[-\^`{-\U0010ffff",
}
_POSIX = {
    "alnum": "0-9A-Za-z",
    "alpha": "A-Za-z",
    "ascii": r"\x00-\x7f",
    "blank": r"\t ",
    "cntrl": r"\x00-\x1f\x7f",
    "digit": "0-9",
    "graph": r"!-~",
    "lower": "a-z",
    "print": r" -~",
    "punct": r"!-/:-@\[-`{-~",
    "space": r"\t\n\v\f\r ",
    "upper": "A-Z",
    "word": "0-9A-Za-z_",
    "xdigit": "0-9A-Fa-f",
}
_LETTERS = "afnrtv"  # escapes that mean the same in both
_MAX_REPEAT = 1000


def compile_full(pattern: str) -> re.Pattern[str]:
    """The pattern for `fullmatch`.

    Raises:
        InvalidInput: it is not valid RE2.
        MissingReference: it is valid RE2 that `re` cannot express.
    """
    translated = _Translator(pattern).run()
    try:
        return re.compile(translated)
    except re.error as error:
        raise InvalidInput(f"RegexFullMatch: {pattern!r} is not a valid pattern: {error}") from error


class _Translator:
    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0
        self.multiline = False

    def run(self) -> str:
        parts = []
        while self.at < len(self.pattern):
            parts.append(self.item())
        return "".join(parts)

    def refuse(self, what: str) -> InvalidInput:
        return InvalidInput(f"RegexFullMatch: {self.pattern!r} is not valid RE2 at position {self.at}: {what}")

    def missing(self, what: str) -> MissingReference:
        return MissingReference(f"RegexFullMatch: {what} of RE2 has no counterpart in Python, in {self.pattern!r}")

    def take(self, count: int = 1) -> str:
        taken = self.pattern[self.at : self.at + count]
        self.at += count
        return taken

    def item(self) -> str:
        rest = self.pattern[self.at :]
        if rest.startswith("\\"):
            return self.escape(in_class=False)
        if rest.startswith("(?"):
            return self.group()
        if rest.startswith("["):
            return self.character_class()
        if rest[0] in "*+?" or (rest[0] == "{" and re.match(r"\{\d+(,\d*)?\}", rest)):
            return self.repeat()
        character = self.take()
        if character == "{":
            return r"\{"
        return r"\Z" if character == "$" and not self.multiline else character

    def repeat(self) -> str:
        counted = re.match(r"\{(\d+)(?:,(\d*))?\}", self.pattern[self.at :])
        if counted and any(int(count) > _MAX_REPEAT for count in counted.groups() if count):
            raise self.refuse(f"a repeat of more than {_MAX_REPEAT}")
        operator = self.take(counted.end() if counted else 1)
        if self.pattern[self.at : self.at + 1] == "?":
            operator += self.take()
        if self.pattern[self.at : self.at + 1] in ("*", "+", "?"):
            raise self.refuse("a repeat of a repeat")
        return operator

    def group(self) -> str:
        named = re.match(r"\(\?P?<(\w+)>", self.pattern[self.at :])
        if named:
            self.take(named.end())
            return f"(?P<{named[1]}>"
        flags = re.match(r"\(\?([imsU]*)(?:-([imsU]+))?([:)])", self.pattern[self.at :])
        if not flags:
            raise self.refuse(f"{self.pattern[self.at : self.at + 4]!r}; look-around and back-references are not RE2")
        on, off, end = flags[1].replace("U", ""), (flags[2] or "").replace("U", ""), flags[3]
        if end == ")" and (self.at or off) and (on or off):
            raise self.missing("a flag that changes in the middle of a pattern")
        if "m" in on + off and end == ":":
            raise self.missing("(?m:...)")
        self.multiline = self.multiline or (end == ")" and "m" in on)
        self.take(flags.end())
        if end == ")":
            return f"(?{on})" if on else ""
        return f"(?{on}{'-' + off if off else ''}:"

    def escape(self, in_class: bool) -> str:
        self.take()
        if self.at == len(self.pattern):
            raise self.refuse("a backslash at the end")
        letter = self.take()
        if letter in _CLASSES or letter in _COMPLEMENTS:
            content = _CLASSES.get(letter) or _COMPLEMENTS[letter]
            return content if in_class else f"[{content}]"
        if letter == "x":
            return self.hexadecimal()
        octal = re.match(r"[0-7]{1,3}", letter + self.pattern[self.at :])
        if octal and (letter == "0" or octal.end() == 3):
            self.take(octal.end() - 1)
            return re.escape(chr(int(octal[0], 8)))
        if letter in _LETTERS:
            return "\\" + letter
        if not letter.isalnum():
            return re.escape(letter)
        if not in_class:
            return self.assertion(letter)
        raise self.unknown(letter)

    def assertion(self, letter: str) -> str:
        if letter == "Q":
            end = self.pattern.find("\\E", self.at)
            literal = self.take((len(self.pattern) if end < 0 else end) - self.at)
            self.take(2)
            return re.escape(literal)
        known = {"A": r"\A", "z": r"\Z", "b": r"(?a:\b)", "B": r"(?a:\B)"}
        if letter in known:
            return known[letter]
        raise self.unknown(letter)

    def unknown(self, letter: str) -> Exception:
        if letter in "pPC":
            return self.missing(f"\\{letter}")
        return self.refuse(f"the escape \\{letter}")

    def hexadecimal(self) -> str:
        found = re.match(r"\{([0-9A-Fa-f]{1,6})\}|([0-9A-Fa-f]{2})", self.pattern[self.at :])
        if not found or int(found[1] or found[2], 16) > 0x10FFFF:
            raise self.refuse("\\x without a character's number")
        self.take(found.end())
        return re.escape(chr(int(found[1] or found[2], 16)))

    def character_class(self) -> str:
        opening = "[^" if self.pattern.startswith("[^", self.at) else "["
        self.take(len(opening))
        parts = [opening]
        while len(parts) == 1 or not self.pattern.startswith("]", self.at):
            if self.at >= len(self.pattern):
                raise self.refuse("a missing ]")
            parts.append(self.class_item())
        return "".join(parts) + self.take()

    def class_item(self) -> str:
        posix = re.match(r"\[:(\^?)(\w+):\]", self.pattern[self.at :])
        if posix:
            if posix[2] not in _POSIX:
                raise self.refuse(f"the character class {posix[0]}")
            self.take(posix.end())
            return _outside(_POSIX[posix[2]]) if posix[1] else _POSIX[posix[2]]
        if self.pattern.startswith("\\", self.at):
            return self.escape(in_class=True)
        character = self.take()
        return "\\" + character if character in "[]&~|" else character


def _outside(content: str) -> str:
    """The ASCII ranges' complement, as the inside of a class."""
    inside = re.compile(f"[{content}]")
    kept = "".join(re.escape(chr(code)) for code in range(128) if not inside.match(chr(code)))
    return kept + r"\x80-\U0010ffff"
