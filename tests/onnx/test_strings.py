"""String operators against ONNX Runtime, which uses RE2, and against the specification's words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.errors import InvalidInput, MissingReference
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.onnx.re2 import compile_full
from tests.onnx.one_node import assert_same, by_runtime, by_torch, feeds_of, model_of

PATTERNS = [
    r"a$", r"(?m)a$", r"a|b+", r"\d+", r"\D+", r"\w*", r"\W", r"[\d_]+", r"[^\w]+", r"\s", r"\S+", r"[[:alpha:]]+",
    r"[[:^digit:]]", r"[[:punct:]]*", r"\x41", r"\x{e9}", r"\Q.*+\E", r"\Aab\z", r"(?P<n>a)(?<m>b)", r"a{2,3}", r"(?i)É",
    r"(?i:AB)c?", r"(?U)a+", r"[]a]+", r"[a\]]", r"\.", r"\101", r"[a-c-]+", r"a{,2}", r"x{", r"\ba\b", r"[\W_]", r".",
    r"(?s).", r"[[]+", r"(a|b)*?c", r"", r"[\S]", r"(?:ab|a)(?:c|bcd)", r"[a&&b]+", r"\t|\n",
]  # fmt: skip
TEXTS = [
    *("a", "a\n", "b", "bbb", "0", "12", "٣", "é", "É", "_", "", " ", "\v", "A", ".*+", "ab", "aa", "aaaa", "AB"),
    *("abc", "]", "]a", "-", "a{,2}", "x{", "!", "[", "[[", "\n", "abcd", "a&", "\t", "ABc", "\u2003", "c"),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_full_matches_are_those_of_re2(pattern: str) -> None:
    inputs = [np.array(TEXTS, dtype=object)]
    model = model_of("RegexFullMatch", 20, inputs, 1, {"pattern": pattern})
    (expected,) = by_runtime(model, feeds_of(inputs))
    (actual,) = by_torch(model, feeds_of(inputs))
    differ = [text for text, a, b in zip(TEXTS, actual, expected) if a != b]
    assert not differ


@pytest.mark.parametrize(
    "pattern", [r"(?=a)", r"(a)\1", r"a++", r"a**", r"\Z", r"a{1001}", r"[[:word", r"[[:no:]]", "\\"]
)
def test_what_re2_refuses_is_refused(pattern: str) -> None:
    inputs = [np.array(["a"], dtype=object)]
    with pytest.raises(Exception):  # noqa: B017  (the runtime's exceptions share no public class)
        by_runtime(model_of("RegexFullMatch", 20, inputs, 1, {"pattern": pattern}), feeds_of(inputs))
    with pytest.raises(InvalidInput, match="RegexFullMatch: .* is not"):
        compile_full(pattern)


@pytest.mark.parametrize("pattern", [r"\p{Greek}", r"\C", r"a(?i)b"])
def test_what_python_cannot_express_says_so(pattern: str) -> None:
    with pytest.raises(MissingReference, match="no counterpart in Python"):
        compile_full(pattern)


WORDS = st.text(alphabet="ab ,;é", min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=4), st.sampled_from([",", "; ", "", None]), st.sampled_from([None, 1, 2]))
def test_string_split_equals_onnxruntime(texts: list[str], delimiter: str | None, maxsplit: int | None) -> None:
    inputs = [np.array(texts, dtype=object)]
    attributes: dict[str, Any] = {"delimiter": delimiter} if delimiter is not None else {}
    if delimiter and maxsplit:  # at white space the runtime strips the end of the last part as well
        attributes["maxsplit"] = maxsplit
    model = model_of("StringSplit", 20, inputs, 2, attributes)
    assert_same(by_torch(model, feeds_of(inputs)), by_runtime(model, feeds_of(inputs)))


def test_string_split_of_what_the_runtime_does_otherwise() -> None:
    op = OnnxOp("", "StringSplit", 20)
    parts, counts = op(np.array(["", "a,", ","], dtype=object), delimiter=",", _outputs=2)
    assert (parts.tolist(), counts.tolist()) == ([["", ""], ["a", ""], ["", ""]], [1, 2, 2])
    parts, counts = op(np.array([[" a\tb ", "  "]], dtype=object), _outputs=2)
    assert (parts.tolist(), counts.tolist()) == ([[["a", "b"], ["", ""]]], [[2, 0]])


@settings(max_examples=30, deadline=None)
@given(st.lists(WORDS, min_size=2, max_size=2), st.lists(WORDS, min_size=3, max_size=3))
def test_string_concat_equals_onnxruntime(rows: list[str], columns: list[str]) -> None:
    inputs = [np.array(rows, dtype=object)[:, None], np.array(columns, dtype=object)]
    model = model_of("StringConcat", 20, inputs, 1, {})
    assert_same(by_torch(model, feeds_of(inputs)), by_runtime(model, feeds_of(inputs)))


LOCALE = "C.UTF-8"  # every Linux has it
NAMES = np.array(["Monday", "tuesday", "monday", "WEDNESDAY", "école", "Monday"], dtype=object)


@pytest.mark.parametrize("action", ["LOWER", "UPPER", "NONE"])
@pytest.mark.parametrize("sensitive", [0, 1])
@pytest.mark.parametrize("stopwords", [None, ["monday"], ["Monday", "École"]])
@pytest.mark.parametrize("x", [NAMES, NAMES[None]], ids=["C", "1C"])
def test_string_normalizer_equals_onnxruntime(action: str, sensitive: int, stopwords: Any, x: Any) -> None:
    attributes = {"case_change_action": action, "is_case_sensitive": sensitive, "locale": LOCALE}
    attributes |= {"stopwords": stopwords} if stopwords else {}
    model = model_of("StringNormalizer", 10, [x], 1, attributes)
    assert_same(by_torch(model, feeds_of([x])), by_runtime(model, feeds_of([x])))


def test_string_normalizer_by_language() -> None:
    def run(text: str, action: str, locale: str) -> str:
        op = OnnxOp("", "StringNormalizer", 10)
        return str(op(np.array([text], dtype=object), case_change_action=action, locale=locale)[0])

    assert run("I\u0130", "LOWER", "tr_TR") == "\u0131i"
    assert run("i\u0131", "UPPER", "tr-TR") == "\u0130I"
    assert run("straße", "UPPER", "de_DE") == "STRASSE"
    assert run("i", "UPPER", "en_US") == "I"
    with pytest.raises(MissingReference, match="Lithuanian"):
        run("i", "UPPER", "lt_LT")


def test_string_normalizer_without_anything_left() -> None:
    op = OnnxOp("", "StringNormalizer", 10)
    assert op(np.array([["a"]], dtype=object), stopwords=["A"]).tolist() == [[""]]
    with pytest.raises(InvalidInput, match=r"takes \[C\] or \[1, C\]; an array of shape \[2, 1\]"):
        op(np.array([["a"], ["b"]], dtype=object))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=5, max_size=5), min_size=1, max_size=3),
    st.integers(0, 3),
    st.integers(1, 3),
    st.integers(0, 2),
    st.sampled_from(["TF", "IDF", "TFIDF"]),
    st.booleans(),
)
def test_tfidf_equals_onnxruntime(rows: Any, skip: int, least: int, more: int, mode: str, text: bool) -> None:
    pool = [0, 1, 2, 3, 0, 1, 1, 2, 3, 3, 0, 1, 2]  # four 1-grams, three 2-grams, one 3-gram
    inputs = [np.array(rows).astype(str).astype(object) if text else np.array(rows)]
    attributes = {
        "max_gram_length": min(least + more, 3), "min_gram_length": least, "max_skip_count": skip, "mode": mode,
        "ngram_counts": [0, 4, 10], "ngram_indexes": [7, 6, 5, 4, 3, 2, 1, 0],
        "weights": [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0],
        **({"pool_strings": [str(item) for item in pool]} if text else {"pool_int64s": pool}),
    }  # fmt: skip
    model = model_of("TfIdfVectorizer", 9, inputs, 1, attributes)
    assert_same(by_torch(model, feeds_of(inputs)), by_runtime(model, feeds_of(inputs)))
