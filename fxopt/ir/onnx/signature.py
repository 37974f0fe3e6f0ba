"""Signature entries from ValueInfoProtos."""

from __future__ import annotations

import onnx

from fxopt.ir.graph import Dim, ValueSpec
from fxopt.ir.onnx.dtypes import FROM_TORCH, TO_TORCH


def value_spec(value: onnx.ValueInfoProto) -> ValueSpec:
    """The signature entry of a ValueInfoProto; -1, which old exporters write, is an unknown size."""
    if not value.type.HasField("tensor_type"):
        return ValueSpec(value.name, None, None)
    tensor = value.type.tensor_type
    dims: tuple[Dim, ...] | None = None
    if tensor.HasField("shape"):
        dims = tuple(
            dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else (dim.dim_param or None)
            for dim in tensor.shape.dim
        )
    return ValueSpec(value.name, TO_TORCH.get(tensor.elem_type), dims)


def value_info(spec: ValueSpec, name: str) -> onnx.ValueInfoProto:
    """The ValueInfoProto of a signature entry, under another name."""
    if spec.dtype is None:
        return onnx.ValueInfoProto(name=name)
    return onnx.helper.make_tensor_value_info(name, FROM_TORCH[spec.dtype], spec.shape)
