"""Buckets: the sizes of named dimensions that are compiled; every combination becomes an entry point."""

from __future__ import annotations

import ast
import itertools
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from fxopt.errors import InvalidInput, InvalidOption, Unsupported, unknown
from fxopt.ir.graph import Graph, ValueSpec

Buckets = Mapping[str, tuple[int, ...]]
_MOST = 64  # entry points of a function
_SIZE = 2  # of a dimension of which nothing is known
_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
_TEXT = re.compile(r"\s*([^=]+?)\s*=\s*(\d+(?:\s*,\s*\d+)*)\s*")


def parse_buckets(texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """`batch=1,4` per dimension.

    >>> parse_buckets(["batch=1,4", "length=128"])
    {'batch': (1, 4), 'length': (128,)}

    Raises:
        InvalidOption: a text has another form, or a dimension comes twice.
    """
    found: dict[str, tuple[int, ...]] = {}
    for text in texts:
        match = _TEXT.fullmatch(text)
        if match is None:
            raise InvalidOption(f"buckets {text!r}: expected DIMENSION=SIZE,SIZE,..., as in batch=1,4")
        if match[1] in found:
            raise InvalidOption(f"buckets name the dimension {match[1]!r} twice; give all its sizes at once")
        found[match[1]] = tuple(int(size) for size in match[2].split(","))
    return checked_buckets(found)


def checked_buckets(given: Mapping[str, int | Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Buckets with sizes as tuples, in ascending order, each once.

    Raises:
        InvalidOption: a size is not a positive integer, or there are too many combinations.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, sizes in given.items():
        listed = [sizes] if isinstance(sizes, int) else list(sizes)
        if not listed or any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in listed):
            raise InvalidOption(f"buckets of {name!r}: {sizes!r}; expected one or more sizes of at least 1")
        found[name] = tuple(sorted(set(listed)))
    count = math.prod(map(len, found.values()))
    if count > _MOST:
        raise InvalidOption(f"buckets make {count} entry points ({_product(found)}); at most {_MOST} are compiled")
    return found


def _product(buckets: Buckets) -> str:
    return " x ".join(f"{len(sizes)} of {name}" for name, sizes in buckets.items())


def dimensions(graph: Graph) -> dict[str, str]:
    """The dimensions of the inputs that are not fixed, and the input that has each first.

    A size without a name is called `<input>_<axis>`, as in `Graph.lower`. A name that is an expression of others, such
    as `past + 1`, is none of its own.
    """
    found: dict[str, str] = {}
    for spec in graph.inputs:
        for dim in _named(spec):
            if isinstance(dim, str):
                found.setdefault(dim, spec.name)
    return {dim: owner for dim, owner in found.items() if not _uses(dim) or not _uses(dim) <= found.keys()}


def _named(spec: ValueSpec) -> tuple[int | str, ...]:
    """The shape with a name for every size that is not fixed."""
    if spec.dtype is None or spec.shape is None:
        raise Unsupported(f"input {spec.name!r} is no tensor of known type and rank; compiled code takes those only")
    return tuple(f"{spec.name}_{axis}" if dim is None else dim for axis, dim in enumerate(spec.shape))


def _uses(dim: str) -> set[str]:
    """The names in an expression; none when it is a name itself, or no arithmetic."""
    tree = None if dim.isidentifier() else _parsed(dim)
    return set() if tree is None else {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _parsed(dim: str) -> ast.expr | None:
    try:
        tree = ast.parse(dim, mode="eval").body
        names = {node.id: 1 for node in ast.walk(tree) if isinstance(node, ast.Name)}
        _value(tree, names)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return None
    return tree


def _value(node: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        return _ARITHMETIC[type(node.op)](_value(node.left, sizes), _value(node.right, sizes))
    raise ValueError(f"no arithmetic: {ast.dump(node)}")


def _evaluated(dim: str, sizes: Mapping[str, int]) -> int:
    tree = None if dim in sizes else _parsed(dim)
    return sizes[dim] if tree is None else _value(tree, sizes)


def combinations(graph: Graph, buckets: Buckets) -> list[dict[str, int]]:
    """The sizes of each entry point; one without sizes for a graph whose shapes are fixed.

    Raises:
        UnknownName: the inputs have no such dimension.
        Unsupported: a dimension has no sizes.
    """
    known = dimensions(graph)
    for name in buckets:
        if name not in known:
            if not known:
                raise InvalidOption(f"buckets name {name!r}, but all inputs have fixed shapes; leave the buckets out")
            raise unknown("dimension", name, known)
    for name, owner in known.items():
        if name not in buckets:
            raise Unsupported(
                f"input {owner!r} has the dynamic dimension {name!r}, and compiled code has fixed sizes; "
                f"name them: --buckets {name}=1, or several as in {name}=1,4 (in Python buckets={{{name!r}: [1, 4]}})"
            )
    order = [name for name in known if name in buckets]
    return [dict(zip(order, sizes, strict=True)) for sizes in itertools.product(*(buckets[name] for name in order))]


def all_sizes(graph: Graph, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes, and those of the dimensions that are expressions of them."""
    dims = {dim for spec in graph.inputs for dim in _named(spec) if isinstance(dim, str)}
    return {dim: _evaluated(dim, sizes) for dim in sorted(dims)}


def shapes_at(graph: Graph, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], ...]:
    """The shapes of the inputs with sizes for all dimensions."""
    known = all_sizes(graph, sizes)
    return tuple(tuple(dim if isinstance(dim, int) else known[dim] for dim in _named(spec)) for spec in graph.inputs)


def sizes_of(graph: Graph, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """The sizes of the dimensions in given shapes of the inputs.

    Raises:
        InvalidInput: a shape has another rank or another fixed size, or a dimension would have two sizes.
    """
    found: dict[str, int] = {}
    for spec, shape in zip(graph.inputs, shapes, strict=True):
        named = _named(spec)
        fits = len(named) == len(shape) and all(
            size == (found.setdefault(dim, size) if isinstance(dim, str) else dim)
            for dim, size in zip(named, shape, strict=True)
        )
        if not fits:
            shown = [found.get(dim, dim) if isinstance(dim, str) else dim for dim in named]
            raise InvalidInput(f"input {spec.name!r} has shape {list(shape)}, expected {shown}")
    wanted = dimensions(graph)
    return {name: size for name, size in found.items() if name in wanted}


def guessed_sizes(graph: Graph) -> dict[str, int]:
    """A size for every dimension: that for which costs are computed, or a small one."""
    return {name: graph.sizes.get(name, _SIZE) for name in dimensions(graph)}


def suffix(sizes: Mapping[str, int]) -> str:
    """What distinguishes the entry point's name: `_batch1_length128`; "" for fixed shapes."""
    return "".join(f"_{re.sub(r'[^0-9A-Za-z]+', '_', name).strip('_').lower()}{size}" for name, size in sizes.items())
