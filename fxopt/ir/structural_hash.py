"""What a graph computes, as text that does not depend on names: hash, equality, and the first difference.

Operators are numbered in the order in which the outputs need them (arguments first), so the order of independent nodes
in the list does not matter. A constant is written as its dtype, shape and the SHA-256 of its bytes, wherever it is
kept. Operators that nobody uses count, constants that nobody uses do not.
"""

from __future__ import annotations

import hashlib
import keyword
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils.weak import WeakIdKeyDictionary

from fxopt.errors import Unsupported
from fxopt.ir.graph import Graph, Opaque, ValueSpec
from fxopt.ir.onnx.bodies import AttributeReference
from fxopt.ir.onnx.dtypes import from_numpy
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.subgraphs import CAPTURED_NAMES, Subgraph

_OPERATOR = (
    "abs add and_ eq floordiv ge getitem gt invert le lshift lt mod mul ne neg not_ or_ pos pow rshift sub truediv xor"
)
_MATH = "acos asin atan ceil cos cosh exp floor log log2 sin sinh sqrt tan tanh trunc"
_SYM = "sym_float sym_int sym_ite sym_max sym_min sym_not sym_sqrt sym_sum"
FUNCTIONS: dict[str, Callable[..., Any]] = {  # what a graph may call beside operators: arithmetic on sizes
    f"{prefix}.{name}": getattr(module, name)
    for prefix, module, names in (("operator", operator, _OPERATOR), ("math", math, _MATH), ("torch", torch, _SYM))
    for name in names.split()
    if hasattr(module, name)
}
_FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}
TORCH_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)


# ---- operators and arguments as Python text (shared with the text form)


def quoted(text: str) -> str:
    """A Python string literal, in double quotes where that needs no other escapes."""
    literal = repr(text)
    return f'"{literal[1:-1]}"' if literal[0] == "'" and '"' not in literal and "\\'" not in literal else literal


def expression(value: Any, names: Mapping[fx.Node, str]) -> str:
    """The Python text of an argument; nodes are written as `names` has them.

    Raises:
        Unsupported: the value's type has no text form (a tensor, a SymInt, an object).
    """
    if isinstance(value, fx.Node):
        return names[value]
    kind = type(value)
    if kind is str:
        return quoted(value)
    if value is None or kind is bool or kind is int:
        return repr(value)
    if value is ...:
        return "..."
    if kind is float:
        return repr(value) if math.isfinite(value) else f'float("{value}")'
    if kind is complex:
        return f"complex({expression(value.real, names)}, {expression(value.imag, names)})"
    if isinstance(value, list):
        return f"[{', '.join([expression(item, names) for item in value])}]"
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        inner = ", ".join([expression(item, names) for item in value])
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return f"{{{', '.join([f'{quoted(key)}: {expression(item, names)}' for key, item in value.items()])}}}"
    if isinstance(value, (slice, range)):
        parts = (value.start, value.stop, value.step)
        return f"{kind.__name__}({', '.join([expression(part, names) for part in parts])})"
    if isinstance(value, torch.device):
        return f"torch.device({quoted(str(value))})"
    if isinstance(value, TORCH_CONSTANTS):
        return str(value)
    if isinstance(value, OpOverload):
        return target_text(value)
    if isinstance(value, AttributeReference):
        return f"attribute({quoted(value.name)})"
    raise Unsupported(f"an argument of type {kind.__name__} ({value!r:.80}) has no text form")


def target_text(target: Any) -> str:
    """The Python text of an operator.

    Raises:
        Unsupported: it is no operator overload, ONNX operator, or known function of `operator`, `math` and `torch`.
    """
    if isinstance(target, OnnxOp):
        return f"onnx({quoted(target.domain)}, {quoted(target.op_type)}, {target.since_version})"
    if isinstance(target, OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        parts = (namespace, name, target._overloadname)
        if namespace == "fxopt" and parts[2] == "default":
            return f"ops.{name}"
        if all(part.isidentifier() and not keyword.iskeyword(part) for part in parts):
            return f"torch.ops.{namespace}.{name}.{parts[2]}"
        return f"overload({', '.join(map(quoted, parts))})"
    found = _FUNCTION_NAMES.get(target) if callable(target) else None
    if found is None:
        raise Unsupported(f"operator {target} has no text form")
    return found


# ---- constants

_DIGESTS: Any = WeakIdKeyDictionary()  # tensor or Opaque -> (version, digest)


def constant_digest(value: Any) -> str:
    """Dtype, shape and SHA-256 of a constant, such as `float32[64, 10]#9f86d0...`; cached with the object.

    Raises:
        Unsupported: the constant is neither a dense tensor with data, nor an array, a graph or a protobuf message.
    """
    if isinstance(value, np.ndarray):
        return "host " + _tensor_digest(from_numpy(value))
    if isinstance(value, fx.GraphModule):
        return "graph#" + structural_hash(Graph(value.graph, value, "torch", (), ()))
    if isinstance(value, Graph):
        return "graph#" + structural_hash(value)
    if not isinstance(value, (torch.Tensor, Opaque)):
        return expression(value, {})
    inference = isinstance(value, torch.Tensor) and value.is_inference()
    version = value._version if isinstance(value, torch.Tensor) and not inference else 0
    found = _DIGESTS.get(value)
    if found is None or found[0] != version:
        digest = _tensor_digest(value) if isinstance(value, torch.Tensor) else _opaque_digest(value)
        found = _DIGESTS[value] = (version, digest)
    return str(found[1])


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes in row-major order; shares memory where it can.

    Raises:
        Unsupported: the tensor is sparse, quantized, or has no data (meta or fake).
    """
    if not is_plain(tensor):
        raise Unsupported(f"a {type(tensor).__name__} ({tensor.layout}, {tensor.device}) has no plain bytes")
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if not plain.numel():
        return memoryview(b"")
    flat = plain.reshape(-1) if plain.numel() > 1 else plain.reshape(()).unsqueeze(0)  # whose stride may be anything
    content: memoryview = flat.view(torch.uint8).numpy().data
    return content


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor is dense and has data: not sparse, quantized, meta, fake or of another class."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return False
    return not tensor.is_quantized and not tensor.is_meta


def _tensor_digest(tensor: torch.Tensor) -> str:
    content = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
    return f"{_dtype(tensor.dtype)}{list(tensor.shape)}#{content}"


def _opaque_digest(value: Opaque) -> str:
    """The message without the names that it was stored under."""
    proto = type(value.proto).FromString(value.proto.SerializeToString())
    parts: list[Any] = [proto, *[getattr(proto, name, None) for name in ("t", "values", "indices")]]
    for part in parts:
        for field in ("name", "doc_string", "output"):
            if hasattr(part, "ClearField") and field in part.DESCRIPTOR.fields_by_name:
                part.ClearField(field)
    return f"{type(proto).__name__}#{hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()}"


# ---- the graph


def structural_hash(graph: Graph) -> str:
    """SHA-256 (hex) of operators, argument structure, constants and signature; the same in every process.

    Raises:
        Unsupported: an argument or constant has no text form.
    """
    digest = hashlib.sha256()
    for line in _lines(graph):
        digest.update(line.encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()


def first_difference(a: Graph, b: Graph) -> str:
    """Where two graphs differ first, in words; "" when their structural hashes are equal.

    Raises:
        Unsupported: an argument or constant has no text form.
    """
    left, right = list(_lines(a)), list(_lines(b))
    for mine, other in zip(left, right, strict=False):
        if mine != other:
            counts = [sum(line.startswith("operator") for line in lines) for lines in (left, right)]
            note = f" ({counts[0]} operators, then {counts[1]})" if counts[0] != counts[1] else ""
            what, _, text = mine.partition(": ")
            other_what, _, other_text = other.partition(": ")
            second = other_text if what == other_what else f"{other_what}: {other_text}"
            return re.sub(r"#([0-9a-f]{8})[0-9a-f]{56}", r"#\1", f"{what}: {text}  is not  {second}{note}")
    return ""


def _lines(graph: Graph) -> Iterator[str]:
    """The graph as lines that determine it up to names; the last line is `outputs: ...`.

    The lines of a body come before the operator that it belongs to, with the captured values by their positions there.
    """
    yield f"origin: {graph.origin}"
    bodies: dict[fx.Node, list[Subgraph]] = {}
    for found in graph.subgraphs(recursive=False):
        bodies.setdefault(found.owner, []).append(found)
    for kind, specs in (("input", graph.inputs), ("output", graph.outputs)):
        for index, spec in enumerate(specs):
            yield f"{kind} {index}: {_spec(spec)}"
    names = {node: f"x{index}" for index, node in enumerate(graph.placeholders)}
    number = 0
    for node in _canonical_order(graph):
        if node.op == "get_attr":
            if any(node in map(_constant, bodies.get(user, ())) for user in node.users):
                names[node] = "body"
            else:
                names[node] = constant_digest(graph.attribute(str(node.target)))
            continue
        number += 1
        for found in bodies.get(node, ()):
            where = f"{found.attribute} of operator {number}"
            around: Any = node.kwargs.get(CAPTURED_NAMES, ())
            yield f"{where}, captures: {[list(around).index(name) for name in found.graph.captures]}"
            yield from (f"{where}, {line}" for line in _lines(found.graph))
        names[node] = f"v{number}"
        args = f"({', '.join([expression(value, names) for value in node.args])})"
        kwargs = expression(_keywords(node), names) if node.kwargs else ""
        yield f"operator {number}: {_operator_name(node)}{args}{kwargs}"
    yield f"outputs: {expression(graph.result_nodes, names)}"


def _constant(found: Subgraph) -> fx.Node:
    return found.constant


def _keywords(node: fx.Node) -> dict[str, Any]:
    """The keywords in order; the names of captured values are no part of what is computed."""
    return {key: value for key, value in sorted(node.kwargs.items()) if key != CAPTURED_NAMES}


def _operator_name(node: fx.Node) -> str:
    if node.op != "call_function":
        return f"{node.op} {node.target}"
    if isinstance(node.target, HigherOrderOperator):
        return f"torch.ops.higher_order.{node.target}"
    return target_text(node.target)


def _canonical_order(graph: Graph) -> list[fx.Node]:
    """Constants and operators, arguments first: those that the outputs need, then what is left, in list order."""
    order: list[fx.Node] = []
    seen = set(graph.placeholders)
    left = [node for node in graph.nodes if node.op not in ("get_attr", "placeholder", "output")]
    for root in (*graph.output.all_input_nodes, *left):
        stack = [root]
        while stack:
            node = stack[-1]
            waiting = [] if node in seen else [used for used in _arguments(node) if used not in seen]
            if waiting:
                stack.extend(reversed(waiting))
                continue
            stack.pop()
            if node not in seen:
                seen.add(node)
                order.append(node)
    return order


def _arguments(node: fx.Node) -> list[fx.Node]:
    """The nodes that the arguments hold: positions first, then keywords by name."""
    if len(node.kwargs) < 2:
        return node.all_input_nodes
    found: dict[fx.Node, None] = {}
    for part in (node.args, *[value for _, value in sorted(node.kwargs.items())]):
        fx.map_arg(part, lambda used: found.setdefault(used))
    return list(found)


def _spec(spec: ValueSpec) -> str:
    return f"{_dtype(spec.dtype)}{'' if spec.shape is None else expression(list(spec.shape), {})}"


def _dtype(dtype: torch.dtype | None) -> str:
    return "opaque" if dtype is None else str(dtype).removeprefix("torch.")
