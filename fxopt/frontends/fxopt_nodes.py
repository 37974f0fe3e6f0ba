"""fxopt operators through torch's ONNX exporter: one node of the domain `fxopt` each, and back to the operator.

The node's inputs are the operator's tensors in order (an omitted one stays empty), its attributes the other arguments
by name; attributes of type float hold 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch

from fxopt.ir.graph import Graph
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.op import Op, all_ops

DOMAIN = "fxopt"
_TENSORS = ("Tensor", "Optional[Tensor]", "List[Tensor]")
_Kind = onnx.defs.OpSchema.AttrType
_Option = onnx.defs.OpSchema.FormalParameterOption
_KINDS: dict[str, Any] = {
    "float": _Kind.FLOAT, "int": _Kind.INT, "SymInt": _Kind.INT, "bool": _Kind.INT, "str": _Kind.STRING,
    "List[float]": _Kind.FLOATS, "List[int]": _Kind.INTS, "List[SymInt]": _Kind.INTS,
}  # fmt: skip


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The translation of every fxopt operator, as `torch.onnx.export(custom_translation_table=...)` takes it."""
    return {declared.target: _translation(declared) for declared in all_ops().values()}


def _arguments(declared: Op[..., Any]) -> list[tuple[str, str]]:
    """(name, type) of the operator's arguments in order."""
    return [(argument.name, str(argument.type)) for argument in declared.target._schema.arguments]


def _translation(declared: Op[..., Any]) -> Callable[..., Any]:
    from onnxscript import values as script

    arguments = _arguments(declared)
    operator = script.Op(script.Opset(DOMAIN, 1), declared.name, _schema(declared.name, arguments))

    def translate(*given: Any, **named: Any) -> Any:
        found = {**dict(zip((name for name, _ in arguments), given)), **named}
        tensors: list[Any] = []
        attributes: dict[str, Any] = {}
        for name, kind in arguments:
            value = found.get(name)
            if kind == "List[Tensor]":
                tensors.extend(value or ())
            elif kind in _TENSORS:
                tensors.append(value)
            elif value is not None:
                attributes[name] = int(value) if kind == "bool" else value
        while tensors and tensors[-1] is None:
            tensors.pop()
        return operator(*tensors, **attributes)

    return translate


def _schema(name: str, arguments: list[tuple[str, str]]) -> onnx.defs.OpSchema:
    """The ONNX schema of an fxopt operator."""
    options = {"Tensor": _Option.Single, "Optional[Tensor]": _Option.Optional, "List[Tensor]": _Option.Variadic}
    inputs = [
        onnx.defs.OpSchema.FormalParameter(
            argument, f"T{index}", param_option=options[kind], is_homogeneous=kind != "List[Tensor]"
        )
        for index, (argument, kind) in enumerate(arguments)
        if kind in _TENSORS
    ]
    every = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)", "tensor(int8)", "tensor(uint8)",
             "tensor(int32)", "tensor(int64)"]  # fmt: skip
    return onnx.defs.OpSchema(
        name,
        DOMAIN,
        1,
        inputs=inputs,
        outputs=[onnx.defs.OpSchema.FormalParameter("y", "T")],
        type_constraints=[(parameter.type_str, every, "") for parameter in inputs] + [("T", every, "")],
        attributes=[
            onnx.defs.OpSchema.Attribute(argument, _KINDS[kind], "") for argument, kind in arguments if kind in _KINDS
        ],
    )


def restore(graph: Graph) -> int:
    """Turn the imported nodes of the domain `fxopt` into calls of the operators; returns their number."""
    known = all_ops()
    count = 0
    for node in graph.fx.nodes:
        target = node.target
        if not isinstance(target, OnnxOp) or target.domain != DOMAIN or target.op_type not in known:
            continue
        declared = known[target.op_type]
        tensors = list(node.args)
        arguments: list[Any] = []
        for name, kind in _arguments(declared):
            if kind == "List[Tensor]":
                arguments.append(tensors)
                tensors = []
            elif kind in _TENSORS:
                arguments.append(tensors.pop(0) if tensors else None)
            else:
                value = node.kwargs[name]
                arguments.append(bool(value) if kind == "bool" else value)
        node.target = declared.target
        node.args, node.kwargs = tuple(arguments), {}
        record = node.meta.get("onnx")
        if record is not None:
            node.meta["onnx"] = record.handed_over()
        count += 1
    return count


def holds(exported: torch.export.ExportedProgram) -> bool:
    """True when the program calls an fxopt operator."""
    targets = {declared.target for declared in all_ops().values()}
    return any(node.target in targets for node in exported.graph.nodes)
