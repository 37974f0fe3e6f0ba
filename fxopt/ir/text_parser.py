"""Read the text form of a graph.

The reader parses with `ast` and never executes: only the form that `fxopt.ir.text.to_text` writes is accepted, so a
text from somebody else can name registered operators and data, and nothing besides.
"""

from __future__ import annotations

import ast
import base64
import gc
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any

import onnx
import torch
from google.protobuf.message import DecodeError, Message
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from fxopt.errors import GraphSyntaxError, InvalidOption, unknown
from fxopt.ir.graph import Graph, Opaque, set_attribute
from fxopt.ir.onnx.bodies import AttributeReference
from fxopt.ir.onnx.dtypes import to_numpy
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.sparsity import Mark
from fxopt.ir.structural_hash import FUNCTIONS, TORCH_CONSTANTS
from fxopt.ir.text_header import dotted, read_header, refused, shown, torch_constant

HELPERS = frozenset([  # names that a text uses, and that no variable of it may have
    "attribute", "const", "graph", "onnx", "opaque", "ops", "overload", "run_file", "subgraph",
    "torch", "operator", "math", "float", "complex", "slice", "range",
])  # fmt: skip
_MAKERS: dict[str, Any] = {  # arguments that are spelled as a call
    "attribute": AttributeReference, "float": float, "complex": complex, "slice": slice, "range": range,
    "torch.device": torch.device,
}  # fmt: skip
BODY_NAME = re.compile(r"body_\d+")
_MAIN = ast.dump(ast.parse("if __name__ == '__main__':\n    run_file(main, __file__)").body[0])


def from_text(text: str, constants: Mapping[str, torch.Tensor]) -> Graph:
    """The graph that `to_text` wrote; linear in the length of the text.

    Args:
        constants: the tensor of each `const(...)`, by its name; they are shared, not copied.

    Raises:
        GraphSyntaxError: the text is not of this form; the message names the line.
    """
    collecting = gc.isenabled()
    gc.disable()  # hundreds of objects per line and no cycles: collecting doubles the time
    try:
        return _module(ast.parse(text), constants)
    except SyntaxError as error:
        raise GraphSyntaxError(f"line {error.lineno}: the text does not parse: {error.msg}") from error
    except (RecursionError, MemoryError) as error:
        raise GraphSyntaxError(f"the text does not parse: nested too deeply ({error or 'no memory'})") from error
    except ValueError as error:
        if isinstance(error, GraphSyntaxError):
            raise
        raise GraphSyntaxError(f"the text does not parse: {error}") from error
    finally:
        if collecting:
            gc.enable()


def _not_an_argument(node: ast.AST) -> GraphSyntaxError:
    return refused(node, f"{shown(node)!r} is not an argument that a graph can hold")


def _module(module: ast.Module, constants: Mapping[str, torch.Tensor]) -> Graph:
    """The graph of the function main; the functions before it are bodies."""
    bodies: dict[str, Graph] = {}
    taken: set[str] = set()
    found: Graph | None = None
    for index, node in enumerate(module.body):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            _check_import(node)
        elif isinstance(node, ast.FunctionDef):
            is_body = BODY_NAME.fullmatch(node.name) is not None and node.name not in bodies
            if found is not None or not (node.name == "main" or is_body):
                raise refused(node, f"function {node.name!r}: a text holds one function, main, and bodies before it")
            made = _Reader(constants, bodies, taken).function(node)
            if is_body:
                bodies[node.name] = made
            else:
                found = made
        elif not (index == 0 and _is_docstring(node)) and ast.dump(node) != _MAIN:
            raise refused(node, f"{shown(node)!r} is not part of the form")
    if found is None:
        raise refused(module, "there is no function main")
    return found


class _Reader:
    """Reads one function; `at` is what the names of its constants begin with in the file."""

    def __init__(self, constants: Mapping[str, torch.Tensor], bodies: Mapping[str, Graph], taken: set[str]) -> None:
        self.constants = constants
        self.bodies = bodies
        self.taken = taken  # the bodies that a constant holds
        self.at = ""
        self.fx = fx.Graph()
        self.root = torch.nn.Module()
        self.values: dict[str, fx.Node] = {}  # by variable
        self.targets: dict[Any, Any] = {}  # operators, by their spelling
        self.registered: set[str] = set()

    def function(self, node: ast.FunctionDef) -> Graph:
        decorator = node.decorator_list[0] if node.decorator_list else node
        if len(node.decorator_list) != 1 or not isinstance(decorator, ast.Call):
            raise refused(decorator, "main needs @graph(...) as its only decorator")
        header = read_header(decorator)
        self.at = header.pop("at", "")
        marks = header.pop("sparsity", {})
        given = node.args
        if given.posonlyargs or given.kwonlyargs or given.vararg or given.kwarg or given.defaults:
            raise refused(node, "main takes plain parameters only")
        if len(given.args) != len(header["inputs"]):
            raise refused(node, f"{len(given.args)} parameters, inputs declares {len(header['inputs'])}")
        for parameter in given.args:
            name = self.new_name(parameter, parameter.arg, parameter.annotation)
            self.values[parameter.arg] = self.fx.create_node("placeholder", name, name=name)
        for statement in node.body[:-1]:
            self.statement(statement)
        result = node.body[-1]
        if not isinstance(result, ast.Return) or not isinstance(result.value, ast.Tuple):
            raise refused(result, f"the last statement must return a tuple, got {shown(result)!r}")
        count, declared = len(result.value.elts), len(header["outputs"])
        if count != declared:
            raise refused(result, f"{count} values are returned, outputs declares {declared}")
        self.fx.output(self.value(result.value))
        if len(header.get("captures", ())) > len(header["inputs"]):
            raise refused(node, f"{len(header['captures'])} captures of {len(header['inputs'])} inputs")
        self.mark(node, marks)
        return Graph(self.fx, self.root, **header)

    def mark(self, node: ast.FunctionDef, marks: Mapping[str, str]) -> None:
        """Give nodes the marks of their weights."""
        named = {value.name: value for value in self.values.values()}
        for name, text in marks.items():
            if name not in named:
                raise refused(node, f"sparsity names {name!r}, which is no node")
            try:
                named[name].meta["sparsity"] = Mark.parse(text)
            except InvalidOption as error:
                raise refused(node, f"sparsity of {name!r}: {error}") from error

    def new_name(self, node: ast.AST, variable: str, annotation: ast.expr | None) -> str:
        """The node's name: the variable's, or the string annotation where Python or a helper uses that name."""
        if variable in HELPERS or variable in self.bodies:
            raise refused(node, f"{variable!r} is the name of a helper")
        if variable in self.values:
            raise refused(node, f"{variable!r} is assigned twice")
        if annotation is None:
            return variable
        if not isinstance(annotation, ast.Constant) or not isinstance(annotation.value, str):
            raise refused(node, f"the annotation of {variable!r} must be a string, the node's name")
        return annotation.value

    def statement(self, node: ast.stmt) -> None:
        target, annotation = None, None
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
        elif isinstance(node, ast.AnnAssign):
            target, annotation = node.target, node.annotation
        value = getattr(node, "value", None)
        if not isinstance(target, ast.Name) or not isinstance(value, (ast.Call, ast.Subscript)):
            raise refused(node, f"expected `name = operator(...)` or a final return, got {shown(node)!r}")
        name = self.new_name(node, target.id, annotation)
        self.values[target.id] = self.node(name, value)

    def node(self, name: str, node: ast.Call | ast.Subscript) -> fx.Node:
        if isinstance(node, ast.Subscript):
            args = (self.value(node.value), self.value(node.slice))
            return self.fx.create_node("call_function", operator.getitem, args, name=name)
        if isinstance(node.func, ast.Name) and node.func.id in ("const", "opaque"):
            return self.constant(name, node, node.func.id)
        if isinstance(node.func, ast.Name) and node.func.id == "subgraph":
            return self.body(name, node)
        target = self.target(node.func)
        kwargs: dict[str, Any] = {}
        for item in node.keywords:
            named = self.dictionary(item.value) if item.arg is None else {item.arg: self.value(item.value)}
            if not kwargs.keys().isdisjoint(named):
                raise refused(item, f"the keyword {min(kwargs.keys() & named.keys())!r} is given twice")
            kwargs.update(named)
        return self.fx.create_node("call_function", target, tuple(map(self.value, node.args)), kwargs, name=name)

    def constant(self, name: str, node: ast.Call, kind: str) -> fx.Node:
        target, *literals = _literals(node) or [""]
        options = [(item.arg, getattr(item.value, "value", None)) for item in node.keywords]
        host = options == [("host", True)]
        value: Any
        if kind == "opaque" and len(literals) == 2 and not options:
            value = _opaque(node, *literals)
        elif kind == "opaque" or literals or (options and not host):
            raise refused(node, "expected const(name), const(name, host=True) or opaque(name, message type, base64)")
        elif target not in self.constants or not target.startswith(self.at):
            raise refused(node, f"constant {target!r} is not among the {len(self.constants)} given")
        else:
            value = to_numpy(self.constants[target]) if host else self.constants[target]
        return self.held(name, node, target.removeprefix(self.at), value)

    def body(self, name: str, node: ast.Call) -> fx.Node:
        target, function = (*node.args, None, None)[:2]
        held = function.id if isinstance(function, ast.Name) else ""
        again = isinstance(target, ast.Constant) and target.value in self.registered
        wrong = held not in self.bodies or (held in self.taken and not again)
        if len(node.args) != 2 or node.keywords or not isinstance(target, ast.Constant) or wrong:
            raise refused(node, "expected subgraph(name, body), a function above that no other constant holds")
        self.taken.add(held)
        return self.held(name, node, str(target.value), self.bodies[held])

    def held(self, name: str, node: ast.AST, target: str, value: Any) -> fx.Node:
        if target not in self.registered:
            try:
                set_attribute(self.root, target, value)
            except (KeyError, AttributeError, TypeError) as error:
                raise refused(node, f"{target!r} cannot be the name of a constant: {error}") from error
            self.registered.add(target)
        return self.fx.create_node("get_attr", target, name=name)

    def target(self, node: ast.expr) -> Any:
        """The operator that an expression spells: a dotted name, or a call of `onnx` or `overload` with literals."""
        key: Any = (dotted(node.func), *_literals(node)) if isinstance(node, ast.Call) else dotted(node)
        if key not in self.targets:
            self.targets[key] = _called(node, key) if isinstance(node, ast.Call) else _named(node, key)
        return self.targets[key]

    def value(self, node: ast.expr) -> Any:
        """The argument that an expression spells."""
        if isinstance(node, ast.Name):
            if node.id not in self.values:
                raise refused(node, f"{node.id!r} is not defined above")
            return self.values[node.id]
        if isinstance(node, ast.Constant) and not isinstance(node.value, (bytes, complex)):
            return node.value
        if isinstance(node, ast.List):
            return [self.value(item) for item in node.elts]
        if isinstance(node, ast.Tuple):
            return tuple([self.value(item) for item in node.elts])
        if isinstance(node, ast.Dict):
            return self.dictionary(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            operand = getattr(node.operand, "value", None)
            if type(operand) in (int, float):
                return -operand  # type: ignore[operator]
        spelled = dotted(node.func if isinstance(node, ast.Call) else node)
        if isinstance(node, ast.Attribute) and isinstance(found := torch_constant(spelled), TORCH_CONSTANTS):
            return found
        if spelled.startswith("torch.ops.") or spelled == "overload":
            return self.target(node)
        if isinstance(node, ast.Call) and spelled in _MAKERS and not node.keywords:
            args = [self.value(argument) for argument in node.args]
            try:
                return _MAKERS[spelled](*args)
            except (TypeError, ValueError, RuntimeError) as error:
                raise _not_an_argument(node) from error
        raise _not_an_argument(node)

    def dictionary(self, node: ast.expr) -> dict[str, Any]:
        if not isinstance(node, ast.Dict):
            raise _not_an_argument(node)
        found: dict[str, Any] = {}
        for key, item in zip(node.keys, node.values, strict=True):
            if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
                raise _not_an_argument(node)
            if key.value in found:
                raise refused(node, f"the key {key.value!r} is given twice")
            found[key.value] = self.value(item)
        return found


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _literals(node: ast.Call) -> list[Any]:
    values = [getattr(argument, "value", None) for argument in node.args]
    if any(type(value) not in (str, int) for value in values):
        raise refused(node, f"{shown(node)!r}: expected literal strings and numbers")
    return values


def _called(node: ast.Call, key: tuple[Any, ...]) -> Any:
    name, *literals = key
    kinds = [type(item) for item in literals]
    if name == "onnx" and kinds == [str, str, int] and not node.keywords:
        return OnnxOp(*literals)
    if name == "overload" and kinds == [str, str, str] and not node.keywords:
        return _overload(node, *literals)
    raise refused(node, f"expected onnx(domain, op_type, since_version) or overload(...), got {shown(node)!r}")


def _named(node: ast.expr, key: str) -> Any:
    path = key.split(".")
    if len(path) == 2 and path[0] == "ops":
        from fxopt.ir.op import all_ops

        if path[1] not in all_ops():
            raise refused(node, str(unknown("fxopt operator", path[1], all_ops())))
        return all_ops()[path[1]].target
    if len(path) == 5 and path[:2] == ["torch", "ops"]:
        return _overload(node, *path[2:])
    if key not in FUNCTIONS:
        raise refused(node, f"{shown(node)!r} is not an operator that a graph can hold")
    return FUNCTIONS[key]


def _overload(node: ast.expr, namespace: str, name: str, overload: str) -> OpOverload[..., Any]:
    packet = None if namespace.startswith("_") else getattr(getattr(torch.ops, namespace, None), name, None)
    found = getattr(packet, overload, None) if isinstance(packet, OpOverloadPacket) else None
    if not isinstance(found, OpOverload):
        spelled = f"torch.ops.{namespace}.{name}.{overload}"
        raise refused(node, f"no operator {spelled}; is the library that registers it loaded?")
    return found


def _opaque(node: ast.AST, kind: Any, content: Any) -> Opaque:
    message: Any = getattr(onnx, str(kind), None)
    if not isinstance(message, type) or not issubclass(message, Message):
        raise refused(node, f"{kind!r} is not a protobuf message of onnx")
    try:
        return Opaque(message.FromString(base64.b64decode(str(content), validate=True)))
    except (ValueError, DecodeError) as error:
        raise refused(node, f"{content!r:.80} is not a base64 text of a {kind}: {error}") from error


def _check_import(node: ast.Import | ast.ImportFrom) -> None:
    allowed: Iterable[str] = ("torch", "operator", "math")
    if isinstance(node, ast.ImportFrom):
        allowed = HELPERS if node.module == "fxopt.ir.text" else ()
    for alias in node.names:
        if alias.name not in allowed or alias.asname is not None:
            raise refused(node, f"import of {alias.name}: only the helpers of fxopt.ir.text, torch, operator and math")
