"""`OnnxOp`: one ONNX operator at one version, as a callable fx target."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import numpy as np

from fxopt.errors import MissingReference
from fxopt.ir.onnx import registry
from fxopt.ir.onnx.bodies import Body, visible
from fxopt.ir.onnx.bodies import call as call_body
from fxopt.ir.onnx.foreign import MOVING, holds_foreign, run_on_codes
from fxopt.ir.onnx.lane import int64_if_empty, is_host, to_tensor
from fxopt.ir.subgraphs import CAPTURED, FUNCTION


class OnnxOp:
    """The operator `domain::op_type` with the schema of `since_version`; interned, so identity is equality.

    Inputs are positional arguments (None = omitted), attributes keyword arguments; `_outputs` is the number of outputs
    when it is not one, and then a tuple is returned. Calling it computes the operator's specification in torch, or the
    function `_function` (of the model, or the schema's). Sub-graphs come as bodies (`fxopt.ir.onnx.bodies`).

    Raises:
        MissingReference: the operator has no torch reference; run the graph with an evaluator (`Graph.run`).
    """

    _interned: ClassVar[dict[tuple[str, str, int], OnnxOp]] = {}
    domain: str
    op_type: str
    since_version: int

    def __new__(cls, domain: str, op_type: str, since_version: int) -> OnnxOp:
        key = (domain, op_type, since_version)
        found = cls._interned.get(key)
        if found is None:
            found = super().__new__(cls)
            found.domain, found.op_type, found.since_version = key
            found.__name__ = found.__qualname__ = op_type  # type: ignore[attr-defined]
            found.__module__ = "fxopt.ir.onnx"
            cls._interned[key] = found
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxOp:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return OnnxOp, (self.domain, self.op_type, self.since_version)

    def __repr__(self) -> str:
        return f"onnx({self.domain!r}, {self.op_type!r}, {self.since_version})"

    @property
    def has_reference(self) -> bool:
        """True when the operator has a torch implementation (of its own: calls of functions have none)."""
        return registry.lookup(self.domain, self.op_type) is not None

    def __call__(self, *inputs: Any, _outputs: int = 1, **attributes: Any) -> Any:
        if isinstance(attributes.get(FUNCTION), Body):
            return call_body(attributes[FUNCTION], inputs, attributes, _outputs)
        reference = registry.lookup(self.domain, self.op_type)
        if reference is None:
            raise MissingReference(f"{self!r} has no torch reference")
        call = registry.Call(self.since_version, _outputs)
        if CAPTURED in attributes:
            attributes = visible(attributes)
        if not self.domain and self.op_type in MOVING and any(map(holds_foreign, inputs)):
            return run_on_codes(self.op_type, functools.partial(_on_tensors, reference, call), inputs, attributes)
        if reference.host is not None:
            given = [value for value in inputs if value is not None]
            if given and all(is_host(value) for value in given):
                result = reference.host(call, *inputs, **attributes)
                if result is not NotImplemented:
                    return int64_if_empty(result)
        try:
            return _on_tensors(reference, call, *inputs, **attributes)
        except (TypeError, AttributeError) as error:
            if reference.raw or not any(isinstance(value, np.ndarray) for value in inputs):
                raise
            raise MissingReference(f"{self!r}: torch has no element type for one of its inputs") from error


def _on_tensors(reference: registry.Reference, call: registry.Call, *inputs: Any, **attributes: Any) -> Any:
    """The torch function's result; host arrays become tensors unless the function takes them as they are."""
    if not reference.raw and any(isinstance(value, np.ndarray) for value in inputs):
        inputs = tuple(to_tensor(value) for value in inputs)
    return reference.torch(call, *inputs, **attributes)
