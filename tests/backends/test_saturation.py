"""Kernels of ONNX Runtime are exact on the codes that `quantize_weight` gives for this CPU, on the worst activations."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fxopt.passes.quantize_linear import quantize_weight


def run(node: Any, constants: dict[str, Any], x: Any, result: int) -> Any:
    """The result y of one node on x."""
    body = helper.make_graph(
        [node], "one",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, list(x.shape))],
        [helper.make_tensor_value_info("y", result, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    proto = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, {"x": x})[0]


def worst(codes: Any) -> Any:
    """Activations [2 * out, in] that are 255 where an output's codes [out, in] have one sign, else 0."""
    return np.concatenate([np.where(codes > 0, 255, 0), np.where(codes < 0, 255, 0)]).astype(np.uint8)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize(("inner", "out"), [(64, 32), (63, 33), (7, 17), (385, 40), (1536, 24)])
def test_matrix_products(inner: int, out: int, single: bool) -> None:
    weight = torch.randn(out, inner, generator=torch.Generator().manual_seed(inner))
    codes = quantize_weight(weight, 16)[0].numpy()
    node = helper.make_node("MatMulInteger", ["x", "w", "zero"], ["y"])
    constants = {"w": np.ascontiguousarray(codes.T), "zero": np.uint8(0)}
    x = worst(codes)
    for rows in [x[index : index + 1] for index in range(0, len(x), 7)] if single else [x]:
        assert np.array_equal(
            run(node, constants, rows, TensorProto.INT32), rows.astype(np.int64) @ codes.T.astype(np.int64)
        )


@pytest.mark.parametrize(
    ("channels", "out", "group", "size"),
    [(64, 64, 1, 1), (65, 33, 1, 1), (32, 32, 1, 3), (33, 16, 1, 3), (3, 32, 1, 3), (3, 16, 1, 7), (1, 16, 1, 5),
     (32, 32, 4, 3), (36, 36, 4, 3), (32, 64, 32, 3)],
)  # fmt: skip
def test_convolutions(channels: int, out: int, group: int, size: int) -> None:
    """One position of the output, so that each image can be the worst one of an output channel."""
    inner = channels // group
    weight = torch.randn(out, inner, size, size, generator=torch.Generator().manual_seed(channels * size))
    codes = quantize_weight(weight, 16)[0]
    images = np.zeros((2 * out, channels, size, size), np.uint8)
    for index, found in enumerate(worst(codes.flatten(1).numpy())):
        start = (index % out) // (out // group) * inner
        images[index, start : start + inner] = found.reshape(inner, size, size)
    exact = torch.nn.functional.conv2d(torch.from_numpy(images).double(), codes.double(), groups=group)
    scale = np.float32(exact.abs().max().item() / 120)
    constants = {
        "xs": np.float32(1), "xz": np.uint8(0), "w": codes.numpy(), "ws": np.ones(out, np.float32),
        "wz": np.zeros(out, np.int8), "ys": scale, "yz": np.uint8(128),
    }  # fmt: skip
    inputs = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"]
    node = helper.make_node("QLinearConv", inputs, ["y"], group=group, kernel_shape=[size, size])
    found = run(node, constants, images, TensorProto.UINT8)
    wanted = (torch.round(exact / float(scale)) + 128).clamp(0, 255).numpy()
    assert np.abs(found - wanted).max() <= 1 and (found != wanted).mean() < 0.01
