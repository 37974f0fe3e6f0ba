"""Sizes of dynamic dimensions: texts, combinations, names of entry points."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from fxopt.backends.tvm.buckets import (
    checked_buckets,
    combinations,
    dimensions,
    parse_buckets,
    shapes_at,
    sizes_of,
    suffix,
)
from fxopt.errors import InvalidInput, InvalidOption, UnknownName, Unsupported
from fxopt.ir.graph import Dim, Graph, ValueSpec


def graph(*shapes: tuple[Dim, ...] | None) -> Graph:
    inputs = tuple(ValueSpec(f"x{index}", torch.float32, shape) for index, shape in enumerate(shapes))
    return Graph(fx.Graph(), torch.nn.Module(), "torch", inputs, ())


def test_every_combination_is_an_entry_point() -> None:
    model = graph(("batch", 3), ("batch", "length"))
    sizes = combinations(model, {"length": (8,), "batch": (1, 4)})
    assert sizes == [{"batch": 1, "length": 8}, {"batch": 4, "length": 8}]
    assert suffix(sizes[1]) == "_batch4_length8"
    assert shapes_at(model, sizes[1]) == ((4, 3), (4, 8))
    assert combinations(graph((2, 3)), {}) == [{}]


def test_a_dimension_that_is_an_expression_follows() -> None:
    model = graph(("past", 8), ("past + 1",), ("2*past",))
    assert dimensions(model) == {"past": "x0"}
    assert shapes_at(model, {"past": 5}) == ((5, 8), (6,), (10,))
    assert sizes_of(model, [(5, 8), (6,), (10,)]) == {"past": 5}
    assert dimensions(graph(("past + 1",))) == {"past + 1": "x0"}
    assert dimensions(graph(("a", "b"), ("a ** b",))).keys() == {"a", "b", "a ** b"}


def test_unnamed_sizes_are_called_after_the_input() -> None:
    assert combinations(graph((None, 3)), {"x0_0": (2,)}) == [{"x0_0": 2}]


def test_a_dimension_without_sizes_is_named_with_the_option() -> None:
    with pytest.raises(
        Unsupported, match=r"input 'x0' has the dynamic dimension 'batch'.*--buckets batch=1.*batch=1,4"
    ):
        combinations(graph(("batch", 3)), {})


@pytest.mark.parametrize(
    ("shape", "buckets", "error", "reason"),
    [
        (("batch", 3), {"bach": (1,)}, UnknownName, "unknown dimension 'bach'; did you mean 'batch'"),
        ((2, 3), {"batch": (1,)}, InvalidOption, "all inputs have fixed shapes"),
        (None, {}, Unsupported, "no tensor of known type and rank"),
    ],
)
def test_buckets_that_do_not_fit_are_refused(
    shape: tuple[Dim, ...] | None, buckets: dict[str, tuple[int, ...]], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        combinations(graph(shape), buckets)


def test_texts() -> None:
    assert parse_buckets(["batch=4,1", " length = 128 "]) == {"batch": (1, 4), "length": (128,)}
    assert checked_buckets({"batch": 2}) == {"batch": (2,)}


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (["batch"], "expected DIMENSION=SIZE"),
        (["batch=1,x"], "expected DIMENSION=SIZE"),
        (["batch=0"], "sizes of at least 1"),
        (["batch=1", "batch=2"], "twice"),
        (["a=1,2,3,4,5,6,7,8,9", "b=1,2,3,4,5,6,7,8"], r"72 entry points \(9 of a x 8 of b\); at most 64"),
    ],
)
def test_texts_that_are_none_are_refused(texts: list[str], reason: str) -> None:
    with pytest.raises(InvalidOption, match=reason):
        parse_buckets(texts)


def test_shapes_that_contradict_are_refused() -> None:
    model = graph(("batch", 3), ("batch",))
    with pytest.raises(InvalidInput, match=r"input 'x1' has shape \[4\], expected \[2\]"):
        sizes_of(model, [(2, 3), (4,)])
    with pytest.raises(InvalidInput, match=r"input 'x0' has shape \[2, 4\], expected \[2, 3\]"):
        sizes_of(model, [(2, 4), (2,)])
