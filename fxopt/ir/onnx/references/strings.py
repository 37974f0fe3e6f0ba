"""Operators on strings: StringConcat, StringSplit, StringNormalizer, RegexFullMatch. They run on numpy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxopt.errors import InvalidInput
from fxopt.ir.onnx.foreign import Array, strings
from fxopt.ir.onnx.re2 import compile_full
from fxopt.ir.onnx.references.common import first, require
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()

_TURKIC_LOWER = str.maketrans({"I": "\u0131", "\u0130": "i"})
_TURKIC_UPPER = str.maketrans({"i": "\u0130", "\u0131": "I"})


@operators.reference("StringConcat", raw=True)
def string_concat(call: Call, x: Array, y: Array) -> Array:
    """Every string of x followed by that of y, with broadcasting."""
    return strings(np.frompyfunc(lambda a, b: a + b, 2, 1)(x, y))


@operators.reference("StringSplit", raw=True)
def string_split(call: Call, x: Array, delimiter: str | None = None, maxsplit: int | None = None) -> Any:
    """The parts of every string along a new last axis, padded with "", and the number of parts [x.shape].

    Without a delimiter strings are split at white space, which is removed at both ends. At most `maxsplit` splits.
    """
    parts = [text.split(delimiter or None, -1 if maxsplit is None else maxsplit) for text in x.reshape(-1)]
    width = max(map(len, parts), default=0)
    padded = np.full((len(parts), width), "", dtype=object)
    for row, found in zip(padded, parts, strict=True):
        row[: len(found)] = found
    counts = torch.tensor([len(found) for found in parts], dtype=torch.int64).reshape(x.shape)
    return first(call, padded.reshape([*x.shape, width]), counts)


def change_case(text: str, action: str, locale: str) -> str:
    """The text in upper or lower case by Unicode's rules, and those of Turkish and Azeri for the letter i."""
    turkic = locale.replace("-", "_").split("_")[0].lower() in ("tr", "az")
    if action == "LOWER":
        return (text.translate(_TURKIC_LOWER) if turkic else text).lower()
    return (text.translate(_TURKIC_UPPER) if turkic else text).upper()


@operators.reference("StringNormalizer", raw=True)
def string_normalizer(
    call: Call,
    x: Array,
    case_change_action: str = "NONE",
    is_case_sensitive: int = 0,
    locale: str = "en_US",
    stopwords: list[str] | None = None,
) -> Array:
    """x ([C] or [1, C]) without stop words, then in upper or lower case; one empty string when nothing is left.

    Raises:
        InvalidInput: another rank, more than one row, or an unknown case.
    """
    action = str(case_change_action)
    if x.ndim not in (1, 2) or (x.ndim == 2 and x.shape[0] != 1):
        raise InvalidInput(f"StringNormalizer takes [C] or [1, C]; an array of shape {list(x.shape)} was given")
    if action not in ("LOWER", "UPPER", "NONE"):
        raise InvalidInput(f"case_change_action {action!r} given; expected 'LOWER', 'UPPER' or 'NONE'")
    language = locale.replace("-", "_").split("_")[0].lower()
    require(action == "NONE" or language != "lt", "StringNormalizer with the case rules of Lithuanian")
    words = [str(word) for word in stopwords or []]
    stops = set(words) if is_case_sensitive else {change_case(word, "LOWER", locale) for word in words}
    texts = [str(text) for text in x.reshape(-1)]
    kept = [text for text in texts if (text if is_case_sensitive else change_case(text, "LOWER", locale)) not in stops]
    if action != "NONE":
        kept = [change_case(text, action, locale) for text in kept]
    result = strings(kept or [""])
    return result if x.ndim == 1 else result[None]


@operators.reference("RegexFullMatch", raw=True)
def regex_full_match(call: Call, x: Array, pattern: str = "") -> Tensor:
    """Whether the whole of every string matches an RE2 pattern."""
    compiled = compile_full(str(pattern))
    found = [compiled.fullmatch(text) is not None for text in x.reshape(-1)]
    return torch.tensor(found, dtype=torch.bool).reshape(x.shape)
