"""One node of any domain, by ONNX Runtime and by its torch reference, and the comparison of the two."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from fxopt.ir.onnx.op import OnnxOp

Array = np.ndarray[Any, Any]
RANDOM = np.random.default_rng(0)
MICROSOFT = "com.microsoft"


def normal(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> Array:
    return np.asarray(RANDOM.random(shape) * 0.1 + 0.01, np.float32)


def integers(dtype: type, *shape: int, low: int = 0, high: int = 100) -> Array:
    return np.asarray(RANDOM.integers(low, high, shape), dtype)


def scalar(value: float, dtype: type = np.float32) -> Array:
    return np.array(value, dtype)


@dataclass(frozen=True)
class Case:
    """A node: its inputs (None = omitted), which outputs are wanted, and what may differ.

    `constant` names the inputs that the kernel wants as initializers; `steps` is the difference that 8-bit results
    may have, in units of their last digit.
    """

    op_type: str
    inputs: list[Array | None]
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: list[bool] = field(default_factory=lambda: [True])
    domain: str = MICROSOFT
    constant: frozenset[int] = frozenset()
    steps: int = 0
    opset: int = 20
    typed: bool = False  # the outputs are declared float32: the runtime cannot infer their type


def runtime(case: Case) -> list[Array]:
    """The outputs of the node by ONNX Runtime on the CPU."""
    names = [f"x{index}" if value is not None else "" for index, value in enumerate(case.inputs)]
    results = [f"y{index}" if wanted else "" for index, wanted in enumerate(case.outputs)]
    node = helper.make_node(case.op_type, names, results, domain=case.domain, **case.attributes)
    given = {index: value for index, value in enumerate(case.inputs) if value is not None}
    feeds = {names[index]: value for index, value in given.items() if index not in case.constant}
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in feeds.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in results if name],
        [numpy_helper.from_array(given[index], names[index]) for index in case.constant],
    )
    for value in graph.output:
        value.type.Clear()
        if case.typed:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    opsets = [helper.make_opsetid("", case.opset)]
    opsets += [helper.make_opsetid(case.domain, 1)] if case.domain else []
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def reference(case: Case, wide: bool = False) -> list[Array]:
    """The wanted outputs of the node by its torch reference; with `wide`, float32 inputs come as float64."""
    count = {"_outputs": len(case.outputs)} if len(case.outputs) > 1 else {}
    tensors = [None if value is None else torch.from_numpy(np.array(value)) for value in case.inputs]
    if wide:
        tensors = [x.double() if x is not None and x.dtype == torch.float32 else x for x in tensors]
    operator = OnnxOp(case.domain, case.op_type, 1)
    results = operator(*tensors, **case.attributes, **count)
    named = results if isinstance(results, tuple) else (results,)
    return [value.numpy() for value, wanted in zip(named, case.outputs) if wanted]


def assert_same(case: Case, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """The reference gives what ONNX Runtime does, in type, shape and value; and runs in float64, as verification does."""
    for mine, exact, right in zip(reference(case), reference(case, wide=True), runtime(case), strict=True):
        assert (mine.dtype, mine.shape) == (right.dtype, right.shape)
        assert exact.shape == right.shape
        if mine.dtype.kind in "iub":
            assert np.abs(mine.astype(np.int64) - right.astype(np.int64)).max(initial=0) <= case.steps
        else:
            np.testing.assert_allclose(mine, right, rtol=rtol, atol=atol)
            np.testing.assert_allclose(exact, right, rtol=rtol, atol=atol)
