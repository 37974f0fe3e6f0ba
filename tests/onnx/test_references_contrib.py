"""References of `com.microsoft` operators against the kernels of ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from fxopt.ir.onnx.op import OnnxOp

Array = np.ndarray[Any, Any]
RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> Array:
    return np.asarray(RANDOM.random(shape) * 0.1 + 0.01, np.float32)


def integers(dtype: type, *shape: int, low: int = 0, high: int = 100) -> Array:
    return np.asarray(RANDOM.integers(low, high, shape), dtype)


def runtime(op_type: str, inputs: list[Array | None], outputs: list[bool], attributes: dict[str, Any]) -> list[Array]:
    """The outputs of one node by ONNX Runtime; False in `outputs` leaves one out."""
    names = [f"x{index}" if value is not None else "" for index, value in enumerate(inputs)]
    results = [f"y{index}" if wanted else "" for index, wanted in enumerate(outputs)]
    node = helper.make_node(op_type, names, results, domain="com.microsoft", **attributes)
    feeds = {name: value for name, value in zip(names, inputs) if value is not None}
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in feeds.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in results if name],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    for value in graph.output:
        value.type.Clear()
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


H, T = 8, 5  # hidden size, tokens
CASES: dict[str, tuple[str, list[Array | None], list[bool], dict[str, Any]]] = {
    "Gelu": ("Gelu", [normal(3, H)], [True], {}),
    "BiasGelu": ("BiasGelu", [normal(3, H), normal(H)], [True], {}),
    "FastGelu": ("FastGelu", [normal(3, H)], [True], {}),
    "FastGelu with bias": ("FastGelu", [normal(3, H), normal(H)], [True], {}),
    "QuickGelu": ("QuickGelu", [normal(3, H)], [True], {}),
    "QuickGelu with alpha": ("QuickGelu", [normal(3, H)], [True], {"alpha": 1.0}),
    "SkipLayerNormalization": (
        "SkipLayerNormalization",
        [normal(2, T, H), normal(2, T, H), normal(H), normal(H), normal(H)],
        [True, False, False, True],
        {"epsilon": 1e-5},
    ),
    "SkipLayerNormalization without beta, skip broadcast": (
        "SkipLayerNormalization",
        [normal(2, T, H), normal(T, H), normal(H)],
        [True],
        {},
    ),
    "SkipSimplifiedLayerNormalization": (
        "SkipSimplifiedLayerNormalization",
        [normal(2, T, H), normal(2, T, H), normal(H), normal(H)],
        [True, False, False, True],
        {"epsilon": 1e-5},
    ),
    "FusedMatMul": ("FusedMatMul", [normal(2, 3, 4), normal(2, 4, 5)], [True], {"alpha": 0.5}),
    "FusedMatMul transposed": (
        "FusedMatMul",
        [normal(2, 4, 3), normal(2, 5, 4)],
        [True],
        {"alpha": 0.5, "transA": 1, "transB": 1},
    ),
    "FusedMatMul with batches inside": (
        "FusedMatMul",
        [normal(3, 2, 4), normal(4, 2, 5)],
        [True],
        {"transBatchA": 1, "transBatchB": 1},
    ),
    "FusedMatMul with batches inside, transposed": (
        "FusedMatMul",
        [normal(4, 2, 3), normal(5, 2, 4)],
        [True],
        {"transA": 1, "transB": 1, "transBatchA": 1, "transBatchB": 1},
    ),
    "MatMulIntegerToFloat": (
        "MatMulIntegerToFloat",
        [
            *(integers(np.uint8, 2, 3, 4), integers(np.int8, 4, 5), positive(), positive(5)),
            *(integers(np.uint8), integers(np.int8, 5), normal(5)),
        ],
        [True],
        {},
    ),
    "DynamicQuantizeMatMul": (
        "DynamicQuantizeMatMul",
        [normal(2, 3, 4), integers(np.int8, 4, 5, low=-100), positive(5), None, normal(5)],
        [True],
        {},
    ),
    "MatMulNBits, 4 bits": (
        "MatMulNBits",
        [normal(2, 3, 40), integers(np.uint8, 6, 3, 8, high=256), positive(6, 3)],
        [True],
        {"K": 40, "N": 6, "bits": 4, "block_size": 16},
    ),
    "MatMulNBits, 4 bits, zero points and bias": (
        "MatMulNBits",
        [
            *(normal(2, 40), integers(np.uint8, 6, 3, 8, high=256), positive(6, 3)),
            *(integers(np.uint8, 6, 2, high=256), None, normal(6)),
        ],
        [True],
        {"K": 40, "N": 6, "bits": 4, "block_size": 16},
    ),
    "MatMulNBits, 8 bits": (
        "MatMulNBits",
        [normal(2, 32), integers(np.uint8, 6, 1, 32, high=256), positive(6, 1), integers(np.uint8, 6, 1, high=256)],
        [True],
        {"K": 32, "N": 6, "bits": 8, "block_size": 32},
    ),
    "MultiHeadAttention": (
        "MultiHeadAttention",
        [normal(2, T, H), normal(2, 6, H), normal(2, 6, H), normal(3 * H)],
        [True],
        {"num_heads": 2},
    ),
    "MultiHeadAttention with masks": (
        "MultiHeadAttention",
        [
            *(normal(2, T, H), normal(2, T, H), normal(2, T, H), normal(3 * H)),
            *(integers(np.int32, 2, T, high=2), normal(2, 2, T, T)),
        ],
        [True],
        {"num_heads": 2, "scale": 0.3},
    ),
    "MultiHeadAttention, causal with past": (
        "MultiHeadAttention",
        [
            *(normal(2, T, H), normal(2, T, H), normal(2, T, H), None, None, None),
            *(normal(2, 2, 3, 4), normal(2, 2, 3, 4)),
        ],
        [True, True, True],
        {"num_heads": 2, "unidirectional": 1},
    ),
    "MultiHeadAttention, cross with key and value by heads": (
        "MultiHeadAttention",
        [normal(2, T, H), normal(2, 2, 6, 4), normal(2, 2, 6, 4)],
        [True],
        {"num_heads": 2},
    ),
    **{
        f"GroupQueryAttention, {name}": (
            "GroupQueryAttention",
            [
                *(normal(2, count, 4 * 16), normal(2, count, 2 * 16), normal(2, count, 2 * 16)),
                *((normal(2, 2, past, 16), normal(2, 2, past, 16)) if past else (None, None)),
                *(np.array(lengths, np.int32) - 1, np.array(total, np.int32)),
                *((normal(9, 8), normal(9, 8)) if "do_rotary" in attributes else ()),
            ],
            [True, True, True],
            {"num_heads": 4, "kv_num_heads": 2, **attributes},
        )
        for name, count, past, lengths, total, attributes in [
            ("prompt", 5, 0, [5, 5], 5, {}),
            ("prompt with rotary embedding", 5, 0, [5, 5], 5, {"do_rotary": 1}),
            ("next token", 1, 4, [5, 5], 5, {"do_rotary": 1}),
            ("next token after uneven pasts", 1, 4, [3, 5], 5, {"do_rotary": 1, "rotary_interleaved": 1}),
            ("window", 6, 0, [6, 6], 6, {"local_window_size": 2}),
            ("softcap and scale", 1, 4, [5, 5], 5, {"softcap": 1.5, "scale": 0.3}),
        ]
    },
    "RotaryEmbedding": (
        "RotaryEmbedding",
        [normal(2, T, H), integers(np.int64, 2, T, high=9), normal(9, 2), normal(9, 2)],
        [True],
        {},
    ),
    "RotaryEmbedding, interleaved with an offset": (
        "RotaryEmbedding",
        [normal(2, 2, T, 4), np.array([2], np.int64), normal(9, 2), normal(9, 2)],
        [True],
        {"interleaved": 1},
    ),
    "RotaryEmbedding, partial": (
        "RotaryEmbedding",
        [normal(2, T, H), integers(np.int64, 2, T, high=9), normal(9, 1), normal(9, 1)],
        [True],
        {"num_heads": 2, "rotary_embedding_dim": 2},
    ),
    "QuantizeLinear, 16 bits": (
        "QuantizeLinear",
        [normal(3, 4), positive(4), integers(np.uint16, 4, high=60000)],
        [True],
        {"axis": 1},
    ),
    "DequantizeLinear": ("DequantizeLinear", [integers(np.int8, 3, 4), positive(), np.array(3, np.int8)], [True], {}),
}


@pytest.mark.parametrize("name", list(CASES))
def test_equals_onnxruntime(name: str) -> None:
    op_type, inputs, wanted, attributes = CASES[name]
    expected = runtime(op_type, inputs, wanted, attributes)
    count = {"_outputs": len(wanted)} if len(wanted) > 1 else {}
    tensors = [None if value is None else torch.from_numpy(np.asarray(value)) for value in inputs]
    results = OnnxOp("com.microsoft", op_type, 1)(*tensors, **attributes, **count)
    named = results if isinstance(results, tuple) else (results,)
    for result, reference in zip([value for value, keep in zip(named, wanted) if keep], expected, strict=True):
        assert result.numpy().dtype == reference.dtype
        np.testing.assert_allclose(result.numpy(), reference, rtol=1e-4, atol=1e-5)
