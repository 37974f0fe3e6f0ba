"""References with a symbolic batch dimension: the output's dimension stays symbolic and nothing is specialised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fxopt.ir.onnx.op import OnnxOp


def onnx(op_type: str, version: int, domain: str = "") -> OnnxOp:
    return OnnxOp(domain, op_type, version)


def host(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int64)


def image() -> Tensor:
    return torch.randn(4, 6, 8, 8)


def tokens() -> Tensor:
    return torch.randn(4, 5, 16)


def uint8(*shape: int) -> Tensor:
    return torch.randint(0, 255, shape, dtype=torch.uint8)


def scalar(value: float) -> Tensor:
    return torch.tensor(value)


ZERO = torch.tensor(3, dtype=torch.uint8)
Run = Callable[[Any], Any]
CASES: dict[str, tuple[Callable[[], Tensor], Run]] = {
    "Relu": (tokens, lambda x: onnx("Relu", 14)(x)),
    "Add": (tokens, lambda x: onnx("Add", 14)(x, torch.randn(16))),
    "Clip": (tokens, lambda x: onnx("Clip", 13)(x, scalar(-1.0), scalar(1.0))),
    "Softmax-1": (tokens, lambda x: onnx("Softmax", 1)(x, axis=2)),
    "Softmax-1 over all but the batch": (tokens, lambda x: onnx("Softmax", 1)(x)),
    "Softmax-13": (tokens, lambda x: onnx("Softmax", 13)(x)),
    "MatMul": (tokens, lambda x: onnx("MatMul", 13)(x, torch.randn(16, 3))),
    "Gemm": (lambda: torch.randn(4, 16), lambda x: onnx("Gemm", 13)(x, torch.randn(3, 16), torch.randn(3), transB=1)),
    "MatMulInteger": (
        lambda: uint8(4, 5, 16),
        lambda x: onnx("MatMulInteger", 10)(x, torch.ones(16, 3, dtype=torch.int8), ZERO),
    ),
    "DynamicQuantizeLinear": (tokens, lambda x: onnx("DynamicQuantizeLinear", 11)(x, _outputs=3)[0]),
    "QuantizeLinear": (tokens, lambda x: onnx("QuantizeLinear", 13)(x, torch.rand(16), axis=2)),
    "DequantizeLinear": (lambda: uint8(4, 16), lambda x: onnx("DequantizeLinear", 13)(x, scalar(0.5), ZERO)),
    "Conv": (image, lambda x: onnx("Conv", 11)(x, torch.randn(4, 6, 3, 3), torch.randn(4), pads=[1, 1, 1, 1])),
    "Conv, asymmetric": (image, lambda x: onnx("Conv", 11)(x, torch.randn(4, 6, 3, 3), pads=[0, 1, 1, 0])),
    "Conv, same": (
        image,
        lambda x: onnx("Conv", 11)(x, torch.randn(4, 6, 3, 3), auto_pad="SAME_UPPER", strides=[2, 2]),
    ),
    "ConvTranspose": (image, lambda x: onnx("ConvTranspose", 11)(x, torch.randn(6, 4, 2, 2), strides=[2, 2])),
    "MaxPool": (image, lambda x: onnx("MaxPool", 12)(x, kernel_shape=[3, 3], pads=[1, 1, 1, 1], ceil_mode=1)),
    "MaxPool, indices": (image, lambda x: onnx("MaxPool", 12)(x, kernel_shape=[2, 2], _outputs=2)[1]),
    "AveragePool": (image, lambda x: onnx("AveragePool", 19)(x, kernel_shape=[2, 2], pads=[0, 0, 1, 1])),
    "AveragePool, dilated": (image, lambda x: onnx("AveragePool", 19)(x, kernel_shape=[2, 2], dilations=[2, 2])),
    "GlobalAveragePool": (image, lambda x: onnx("GlobalAveragePool", 1)(x)),
    "LayerNormalization": (tokens, lambda x: onnx("LayerNormalization", 17)(x, torch.ones(16), torch.zeros(16))),
    "LayerNormalization, 3": (tokens, lambda x: onnx("LayerNormalization", 17)(x, torch.ones(16), None, _outputs=3)[1]),
    "RMSNormalization": (tokens, lambda x: onnx("RMSNormalization", 23)(x, torch.ones(16))),
    "GroupNormalization": (
        image,
        lambda x: onnx("GroupNormalization", 18)(x, torch.ones(3), torch.zeros(3), num_groups=3),
    ),
    "InstanceNormalization": (image, lambda x: onnx("InstanceNormalization", 6)(x, torch.ones(6), torch.zeros(6))),
    "BatchNormalization": (
        image,
        lambda x: onnx("BatchNormalization", 15)(x, torch.ones(6), torch.zeros(6), torch.zeros(6), torch.ones(6)),
    ),
    "LRN": (image, lambda x: onnx("LRN", 13)(x, size=3)),
    "Reshape": (tokens, lambda x: onnx("Reshape", 14)(x, host(0, -1))),
    "Flatten": (tokens, lambda x: onnx("Flatten", 13)(x)),
    "Transpose": (tokens, lambda x: onnx("Transpose", 13)(x, perm=[0, 2, 1])),
    "Unsqueeze": (tokens, lambda x: onnx("Unsqueeze", 13)(x, host(1))),
    "Slice": (tokens, lambda x: onnx("Slice", 13)(x, host(1), host(2**63 - 1), host(1))),
    "Slice, backwards": (tokens, lambda x: onnx("Slice", 13)(x, host(-1), host(-(2**63)), host(0), host(-1))),
    "Split": (tokens, lambda x: onnx("Split", 18)(x, axis=2, num_outputs=3, _outputs=3)[2]),
    "Gather": (tokens, lambda x: onnx("Gather", 13)(x, host(0, 2), axis=1)),
    "Gather, one": (tokens, lambda x: onnx("Gather", 13)(x, np.array(0), axis=1)),
    "Embedding": (lambda: torch.zeros(4, 5, dtype=torch.int64), lambda x: onnx("Gather", 13)(torch.randn(9, 3), x)),
    "GatherND": (
        tokens,
        lambda x: onnx("GatherND", 13)(x, torch.tensor([[0, 1]]).expand(x.shape[0], -1), batch_dims=1),
    ),
    "ScatterElements": (
        tokens,
        lambda x: onnx("ScatterElements", 18)(x, torch.zeros_like(x, dtype=torch.int64), x, axis=1, reduction="add"),
    ),
    "Pad": (tokens, lambda x: onnx("Pad", 19)(x, host(0, 1, 0, 0, 1, 0), scalar(2.0))),
    "Pad, reflect": (tokens, lambda x: onnx("Pad", 19)(x, host(0, 1, 0, 0, 1, 0), mode="reflect")),
    "Expand": (lambda: torch.randn(4, 1, 3), lambda x: onnx("Expand", 13)(x, host(1, 5, 1))),
    "Tile": (tokens, lambda x: onnx("Tile", 13)(x, host(1, 2, 1))),
    "Trilu": (tokens, lambda x: onnx("Trilu", 14)(x, np.array(1))),
    "CumSum": (tokens, lambda x: onnx("CumSum", 14)(x, np.array(1), exclusive=1)),
    "TopK": (tokens, lambda x: onnx("TopK", 11)(x, host(2), _outputs=2)[1]),
    "ArgMax": (tokens, lambda x: onnx("ArgMax", 13)(x, axis=-1)),
    "OneHot": (
        lambda: torch.zeros(4, 5, dtype=torch.int64),
        lambda x: onnx("OneHot", 11)(x, host(7), torch.tensor([0.0, 1.0])),
    ),
    "ReduceMean-13": (tokens, lambda x: onnx("ReduceMean", 13)(x, axes=[1])),
    "ReduceSum-13": (tokens, lambda x: onnx("ReduceSum", 13)(x, host(-1), keepdims=0)),
    "ReduceMax-20": (tokens, lambda x: onnx("ReduceMax", 20)(x, host(1, 2))),
    "DepthToSpace": (lambda: torch.randn(4, 8, 3, 3), lambda x: onnx("DepthToSpace", 13)(x, blocksize=2)),
    "Resize": (image, lambda x: onnx("Resize", 19)(x, None, np.array([1, 1, 2, 2], np.float32), mode="linear")),
    "Attention": (
        tokens,
        lambda x: onnx("Attention", 23)(x, x, x, is_causal=1, q_num_heads=4, kv_num_heads=4),
    ),
    "Attention, softcap": (
        tokens,
        lambda x: onnx("Attention", 23)(x, x, x, torch.ones(5, 5).bool(), softcap=2.0, q_num_heads=4, kv_num_heads=4),
    ),
    "RotaryEmbedding": (
        tokens,
        lambda x: onnx("RotaryEmbedding", 23)(
            x, torch.randn(9, 2), torch.randn(9, 2), torch.arange(5).expand(x.shape[0], -1), num_heads=4
        ),
    ),
    "MultiHeadAttention": (
        tokens,
        lambda x: onnx("MultiHeadAttention", 1, "com.microsoft")(x, x, x, torch.zeros(48), num_heads=4),
    ),
    "MatMulNBits": (
        tokens,
        lambda x: onnx("MatMulNBits", 1, "com.microsoft")(
            x, uint8(3, 1, 8), torch.rand(3, 1), K=16, N=3, block_size=16
        ),
    ),
    "SoftmaxCrossEntropyLoss": (
        lambda: torch.randn(4, 6),
        lambda x: onnx("SoftmaxCrossEntropyLoss", 13)(x, x.argmax(1), reduction="none"),
    ),
    "GridSample": (image, lambda x: onnx("GridSample", 20)(x, torch.zeros(1, 3, 3, 2).expand(x.shape[0], -1, -1, -1))),
    "LSTM": (
        tokens,
        lambda x: onnx("LSTM", 14)(x, torch.randn(1, 12, 16), torch.randn(1, 12, 3), layout=1, _outputs=3)[0],
    ),
    "GRU": (
        tokens,
        lambda x: onnx("GRU", 14)(x, torch.randn(2, 9, 16), torch.randn(2, 9, 3), layout=1, direction="bidirectional"),
    ),
    "LinearAttention": (
        tokens,
        lambda x: onnx("LinearAttention", 27)(x, x, x, q_num_heads=4, kv_num_heads=4, update_rule="linear"),
    ),
    "CausalConvWithState": (tokens, lambda x: onnx("CausalConvWithState", 27)(x, torch.randn(5, 1, 3))),
    "DFT": (lambda: torch.randn(4, 8, 1), lambda x: onnx("DFT", 20)(x, onesided=1)),
    "ConstantOfShape": (tokens, lambda x: onnx("ConstantOfShape", 9)(onnx("Shape", 15)(x))),
    "Range": (tokens, lambda x: onnx("Range", 11)(host(0), onnx("Shape", 15)(x, end=1), host(1))),
    "shape arithmetic": (tokens, lambda x: onnx("Reshape", 14)(x, merged_shape(x))),
    "Slice to a dynamic length": (
        lambda: torch.zeros(4, 5),
        lambda x: onnx("Slice", 13)(host(*range(9)), host(0), onnx("Shape", 15)(x, end=1), host(0)),
    ),
    "Where of shapes": (lambda: torch.randn(4, 1), lambda x: onnx("Expand", 13)(x, expanded_shape(x))),
}


def merged_shape(x: Tensor) -> Any:
    """[batch * 5, 16] as exporters write it."""
    shape = onnx("Shape", 15)(x)
    batch, length = (onnx("Gather", 13)(shape, np.array(axis), axis=0) for axis in (0, 1))
    merged = onnx("Unsqueeze", 13)(onnx("Mul", 14)(batch, length), host(0))
    return onnx("Concat", 13)(onnx("Cast", 13)(merged, to=7), host(16), axis=0)


def expanded_shape(x: Tensor) -> Any:
    """[batch, 5]: the given sizes where they are not -1."""
    shape = onnx("Concat", 13)(onnx("Shape", 15)(x, end=1), host(5), axis=0)
    unset = onnx("Equal", 13)(shape, host(-1, -1))
    return onnx("Where", 9)(unset, onnx("ConstantOfShape", 9)(host(2), value=host(1)), shape)


@pytest.mark.parametrize("name", list(CASES))
def test_batch_stays_symbolic(name: str) -> None:
    make, run = CASES[name]
    example = make()
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * (example.dim() - 1))
    x = mode.from_tensor(example, symbolic_context=context)
    with mode:
        y = run(x)
    assert isinstance(x.shape[0], torch.SymInt)
    assert isinstance(y.shape[0], torch.SymInt)
    assert not mode.shape_env.replacements
    assert y.shape == tuple(int(size) for size in run(example).shape)


class Module(nn.Module):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(x)


@pytest.mark.parametrize(
    "name", ["shape arithmetic", "Conv, same", "Slice to a dynamic length", "Slice, backwards", "AveragePool", "OneHot"]
)
def test_export_runs_at_another_batch(name: str) -> None:
    make, run = CASES[name]
    torch.manual_seed(0)
    example = make()

    def fixed(x: Tensor) -> Any:
        torch.manual_seed(1)
        return run(x)

    batch = torch.export.Dim("batch", min=2, max=8)
    program = torch.export.export(Module(run), (example,), dynamic_shapes=({0: batch},), strict=False)
    other = torch.cat([example, example])[:7]
    assert program.module()(other).shape == run(other).shape
