"""Build small ONNX models in few words, in the forms that ONNX Runtime fuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

FLOAT, UINT8, INT8 = int(TensorProto.FLOAT), int(TensorProto.UINT8), int(TensorProto.INT8)


class Build:
    """A model in the making; values are named by numbers."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.shared: dict[str, tuple[str, str, str]] = {}  # what a value was quantised to

    def input(self, *shape: int, dtype: int = FLOAT) -> str:
        name = f"x{len(self.inputs)}"
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def const(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = numpy_helper.from_array(np.asarray(array), name)
        return name

    def weight(self, *shape: int, scale: float = 1.0) -> str:
        return self.const((self.random.standard_normal(shape) * scale).astype(np.float32))

    def codes(self, *shape: int, dtype: Any = np.int8) -> str:
        return self.const(self.random.integers(-60, 60, shape).astype(np.int8).view(dtype))

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"v{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def model(self, *outputs: str) -> ModelProto:
        ends = [helper.make_value_info(name, helper.make_tensor_type_proto(0, None)) for name in outputs]
        graph = helper.make_graph(self.nodes, "row", self.inputs, ends, list(self.constants.values()))
        for end in graph.output:
            end.ClearField("type")
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opsets, ir_version=10))

    # ---- layers

    def linear(self, x: str, inner: int, out: int) -> str:
        return str(self.op("Add", self.op("MatMul", x, self.weight(inner, out, scale=inner**-0.5)), self.weight(out)))

    def linear_int8(self, x: str, inner: int, out: int) -> str:
        """Linears of one value share its quantisation."""
        if x not in self.shared:
            codes, scale, zero = self.op("DynamicQuantizeLinear", x, outputs=3)
            self.shared[x] = codes, scale, zero
        codes, scale, zero = self.shared[x]
        total = self.op("MatMulInteger", codes, self.codes(inner, out), zero)
        unit = self.op("Mul", scale, self.const(self.random.random(out).astype(np.float32) / inner))
        return str(self.op("Add", self.op("Mul", self.op("Cast", total, to=FLOAT), unit), self.weight(out)))

    def conv(self, x: str, shape: tuple[int, ...], stride: int = 1, group: int = 1) -> str:
        weight = self.weight(*shape, scale=float(np.prod(shape[1:])) ** -0.5)
        pads = [shape[-1] // 2] * 4
        y = self.op("Conv", x, weight, self.weight(shape[0]), pads=pads, strides=[stride] * 2, group=group)
        return str(self.op("Relu", y))

    def conv_int8(self, x: str, shape: tuple[int, ...], stride: int = 1, group: int = 1) -> str:
        """From codes to codes, in the form that becomes QLinearConv."""
        out = shape[0]
        scales, zero = np.full(out, 0.002, np.float32), self.const(np.zeros(out, np.int8))
        weight = self.op("DequantizeLinear", self.codes(*shape), self.const(scales), zero, axis=0)
        integers = self.const(self.random.integers(-99, 99, out).astype(np.int32))
        no_offset = self.const(np.zeros(out, np.int32))
        bias = self.op("DequantizeLinear", integers, self.const(scales * 0.03), no_offset, axis=0)
        pads = [shape[-1] // 2] * 4
        levels = self.dequantized(x)
        y = self.op("Conv", levels, weight, bias, pads=pads, strides=[stride] * 2, group=group)
        return self.quantized(self.op("Relu", y))

    def quantized(self, x: str, zero: int = 0) -> str:
        return str(self.op("QuantizeLinear", x, self.const(np.float32(0.03)), self.const(np.uint8(zero))))

    def dequantized(self, x: str, zero: int = 0) -> str:
        return str(self.op("DequantizeLinear", x, self.const(np.float32(0.03)), self.const(np.uint8(zero))))

    def norm(self, x: str, width: int) -> str:
        return str(self.op("LayerNormalization", x, self.weight(width), self.weight(width)))
