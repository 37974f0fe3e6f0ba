"""What the ONNX file says beside the computation: names, doc strings, metadata, and how constants were stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import onnx


@dataclass
class NodeRecord:
    """One ONNX node. `proto` is emitted verbatim while inputs, `kwargs` and outputs are unchanged; None: a new node."""

    name: str
    outputs: tuple[str, ...]  # "" = omitted
    proto: onnx.NodeProto | None = None
    target: Any = None  # operator and attributes at import
    kwargs: Any = None

    def handed_over(self) -> NodeRecord:
        """The record of a node that replaces this one: same value names, nothing to emit verbatim."""
        return NodeRecord(self.name, self.outputs)


@dataclass
class ConstantRecord:
    """One constant: an initializer, a sparse initializer, a `Constant` node or a tensor attribute.

    `proto` is the message without the bytes that `tensor` holds (`stripped`), or whole.
    """

    name: str
    kind: Literal["initializer", "sparse", "node", "attribute"]
    proto: Any
    tensor: Any = None  # the object at import; another one at export means that a pass changed the constant
    stripped: bool = False

    def handed_over(self) -> ConstantRecord:
        """The record of a constant that replaces this one."""
        return ConstantRecord(self.name, self.kind, None)


@dataclass
class InputRecord:
    """One graph input; its ValueInfoProto stays in the model record."""

    name: str

    def handed_over(self) -> InputRecord:
        """Inputs are not replaced; here for symmetry."""
        return self


@dataclass
class ModelRecord:
    """The model message without nodes, initializers and weights."""

    proto: onnx.ModelProto
    folder: Path | None = None  # where external data lies
    external: bool = False  # the file kept its weights beside it
    dangling: frozenset[str] = frozenset()  # names with a value_info that no value of the file had
    files: frozenset[Path] = frozenset()  # that hold external data; never written to
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def opsets(self) -> dict[str, int]:
        """Opset version per domain ("" for ai.onnx)."""
        return {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in self.proto.opset_import}
