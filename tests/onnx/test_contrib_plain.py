"""Operators of `com.microsoft` without a kernel on the CPU: against numpy in float64, by their documentation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fxopt.errors import MissingReference
from fxopt.ir.onnx.op import OnnxOp
from tests.onnx.node import MICROSOFT, Array, Case, integers, normal, positive, reference, scalar


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def gelu(x: Array) -> Array:
    phi = torch.special.ndtr(torch.from_numpy(np.asarray(x, np.float64))).numpy()
    return np.asarray(x * phi)


def tanh_gelu(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


def softmax(x: Array) -> Array:
    y = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(y / y.sum(-1, keepdims=True))


def group_norm(x: Array, gamma: Array, beta: Array, groups: int, epsilon: float) -> Array:
    """x with its channels last."""
    parts = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    mean, variance = parts.mean((1, 3), keepdims=True), parts.var((1, 3), keepdims=True)
    return np.asarray(((parts - mean) / np.sqrt(variance + epsilon)).reshape(x.shape) * gamma + beta)


def wide(case: Case) -> list[Array]:
    return [np.asarray(x, np.float64) for x in case.inputs if x is not None]


def check(case: Case, *expected: Array, tolerance: float = 1e-5) -> None:
    for mine, right in zip(reference(case), expected, strict=True):
        assert mine.shape == right.shape
        np.testing.assert_allclose(mine, right, rtol=tolerance, atol=tolerance)


def test_bias_add() -> None:
    case = Case("BiasAdd", [normal(2, 3, 4), normal(4), normal(2, 3, 4)])
    x, bias, skip = wide(case)
    check(case, x + bias + skip)


def test_bias_split_gelu() -> None:
    case = Case("BiasSplitGelu", [normal(2, 3, 8), normal(8)])
    x, bias = wide(case)
    check(case, (x + bias)[..., :4] * gelu((x + bias)[..., 4:]))


def test_gemm_fast_gelu() -> None:
    case = Case("GemmFastGelu", [normal(2, 3, 4), normal(4, 5), normal(5)])
    x, w, bias = wide(case)
    check(case, tanh_gelu(x @ w + bias))


@pytest.mark.parametrize(("shape", "inner"), [((2, 1, 5, 6), 1), ((3, 5, 6), 0), ((2, 6), 1)])
def test_bias_softmax(shape: tuple[int, ...], inner: int) -> None:
    """A bias [2, 6] of data [2, 3, 5, 6] lacks the axes before the softmax (inner); [3, 5, 6] lacks the batch."""
    case = Case("BiasSoftmax", [normal(2, 3, 5, 6), normal(*shape)], {"axis": 3, "is_inner_broadcast": inner})
    x, bias = wide(case)
    full = bias if bias.ndim == 4 else bias[:, None, None] if inner else bias[None]
    check(case, softmax(x + full))


@pytest.mark.parametrize("op_type", ["BiasDropout", "BitmaskBiasDropout"])
def test_bias_dropout_at_inference(op_type: str) -> None:
    case = Case(op_type, [normal(2, 3), normal(3), normal(2, 3), scalar(0.5)])
    check(case, sum(wide(case)[:3], np.zeros((2, 3))))


def test_dropout_in_training_is_refused() -> None:
    inputs = [torch.ones(2), torch.ones(2), None, torch.tensor(0.5), torch.tensor(True)]
    with pytest.raises(MissingReference, match="dropout in training mode is random"):
        OnnxOp(MICROSOFT, "BiasDropout", 1)(*inputs)


@pytest.mark.parametrize("activation", [0, 1])
def test_group_norm(activation: int) -> None:
    case = Case("GroupNorm", [normal(2, 3, 5, 8), normal(8), normal(8)], {"groups": 2, "activation": activation})
    y = group_norm(*wide(case), groups=2, epsilon=1e-5)
    check(case, y * sigmoid(y) if activation else y)
    first = Case(
        "GroupNorm",
        [case.inputs[0].transpose(0, 3, 1, 2), *case.inputs[1:]],  # type: ignore[union-attr]
        {**case.attributes, "channels_last": 0},
    )
    np.testing.assert_allclose(reference(first)[0].transpose(0, 2, 3, 1), reference(case)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("skip", [(2, 3, 5, 8), (2, 1, 1, 8), (2, 8)])
def test_skip_group_norm(skip: tuple[int, ...]) -> None:
    case = Case(
        "SkipGroupNorm",
        [normal(2, 3, 5, 8), normal(8), normal(8), normal(*skip), normal(8)],
        {"groups": 4, "activation": 0, "epsilon": 0.1},
        outputs=[True, True],
    )
    x, gamma, beta, added, bias = wide(case)
    total = x + (added[:, None, None] if added.ndim == 2 else added) + bias
    check(case, group_norm(total, gamma, beta, 4, 0.1), total)


@pytest.mark.parametrize("limit", [0.0, 0.6])
@pytest.mark.parametrize("one", [True, False])
def test_swiglu(one: bool, limit: float) -> None:
    gate, up = normal(3, 4), normal(3, 4)
    inputs = [np.concatenate([gate, up], -1)] if one else [gate, up]
    options = {"limit": limit, "activation_alpha": 1.7, "activation_beta": 1.0}
    g, linear = gate.astype(np.float64), up.astype(np.float64)
    if limit:
        g, linear = np.minimum(g, limit), np.clip(linear, -limit, limit)
    check(Case("SwiGLU", inputs, options), g * sigmoid(1.7 * g) * (linear + 1))


@pytest.mark.parametrize(("value", "options", "expected"), [
    (np.inf, {}, False), (np.nan, {}, False), (1.0, {}, True), (np.nan, {"isinf_only": 1}, True),
    (np.inf, {"isnan_only": 1}, True), (-np.inf, {"isinf_only": 1}, False),
])  # fmt: skip
def test_is_all_finite(value: float, options: dict[str, int], expected: bool) -> None:
    case = Case("IsAllFinite", [np.ones(2, np.float32), np.array([1, value], np.float32)], options)
    assert reference(case)[0].item() is expected


def test_complex_products() -> None:
    inputs: list[Array | None] = [normal(3, 2), normal(3, 2)]
    a, b = (x[:, 0] + 1j * x[:, 1] for x in wide(Case("ComplexMul", inputs)))
    for op_type, right in (("ComplexMul", a * b), ("ComplexMulConj", a * b.conj())):
        check(Case(op_type, inputs), np.stack([right.real, right.imag], -1))


def test_mul_integer() -> None:
    case = Case(
        "MulInteger", [integers(np.uint8, 2, 3), scalar(7, np.uint8), integers(np.uint8, 3), scalar(250, np.uint8)]
    )
    a, _, b, _ = wide(case)
    mine = reference(case)[0]
    assert mine.dtype == np.int32
    np.testing.assert_array_equal(mine, (a - 7) * (b - 250))


def test_reduce_sum_integer() -> None:
    case = Case("ReduceSumInteger", [integers(np.int8, 2, 3, 200, low=-128, high=127)], {"axes": [0, 2], "keepdims": 0})
    np.testing.assert_array_equal(reference(case)[0], wide(case)[0].sum((0, 2)))


def test_qlinear_reduce_mean() -> None:
    case = Case(
        "QLinearReduceMean",
        [integers(np.uint8, 2, 3, 4), scalar(0.02), scalar(40, np.uint8), scalar(0.01), scalar(90, np.uint8)],
        {"axes": [1], "keepdims": 1},
    )
    x = wide(case)[0]
    y = np.clip(np.round(((x - 40) * np.float32(0.02)).mean(1, keepdims=True) / np.float32(0.01)) + 90, 0, 255)
    assert np.abs(reference(case)[0].astype(int) - y).max() <= 1


def test_fused_matmul_activation() -> None:
    case = Case(
        "FusedMatMulActivation",
        [normal(2, 3, 4), normal(2, 5, 4)],
        {"alpha": 0.5, "transB": 1, "activation": "Softmax"},
    )
    a, b = wide(case)
    check(case, softmax(0.5 * a @ b.transpose(0, 2, 1)))


def test_nhwc_fused_conv() -> None:
    x, w, bias, z = normal(2, 3, 6, 5), normal(4, 3, 3, 3), normal(4), normal(2, 4, 3, 3)
    options = {"activation": "Relu", "strides": [2, 2], "pads": [1, 1, 1, 1]}
    first = reference(Case("FusedConv", [x, w, bias, z], options))[0]
    last = Case("NhwcFusedConv", [x.transpose(0, 2, 3, 1), w, bias, z.transpose(0, 2, 3, 1)], options)
    check(last, first.transpose(0, 2, 3, 1))


def packed_sequences() -> tuple[Array, Array, list[int], Array, Array]:
    """Tokens [7, 8] of sequences of 1, 2 and 4 tokens; their offsets and cumulated lengths."""
    lengths = [1, 2, 4]
    offset = np.array([[0, 4, 5, 8], [9, 10, 11, 1], [2, 3, 6, 7]], np.int32)
    return normal(7, 8), offset, lengths, np.array([0, 1, 3, 7], np.int32), normal(1, 2, 4, 4)


def own_attention(q: Array, k: Array, v: Array, bias: Array) -> Array:
    """Attention of one sequence with 2 heads of 4."""
    heads = [x.astype(np.float64).reshape(-1, 2, 4).transpose(1, 0, 2) for x in (q, k, v)]
    count = q.shape[0]
    scores = heads[0] @ heads[1].transpose(0, 2, 1) / 2 + bias[0, :, :count, :count]
    return np.asarray((softmax(scores) @ heads[2]).transpose(1, 0, 2).reshape(-1, 8))


def test_packed_attention() -> None:
    x, offset, lengths, cumulative, bias = packed_sequences()
    weight, shift = normal(8, 24), normal(24)
    case = Case("PackedAttention", [x, weight, shift, offset, cumulative, bias], {"num_heads": 2})
    projected = x.astype(np.float64) @ weight + shift
    parts = np.split(projected, np.cumsum(lengths)[:-1])
    check(case, np.concatenate([own_attention(*np.split(part, 3, -1), bias) for part in parts]))


@pytest.mark.parametrize("one", [True, False])
def test_packed_multi_head_attention(one: bool) -> None:
    _, offset, lengths, cumulative, bias = packed_sequences()
    q, k, v = normal(7, 8), normal(7, 8), normal(7, 8)
    packed = [np.stack([x.reshape(7, 2, 4) for x in (q, k, v)], 2), None, None] if one else [q, k, v]
    case = Case("PackedMultiHeadAttention", [*packed, None, offset, cumulative, bias], {"num_heads": 2})
    where = np.cumsum(lengths)[:-1]
    parts = zip(*(np.split(x, where) for x in (q, k, v)))
    check(case, np.concatenate([own_attention(*part, bias) for part in parts]))


@pytest.mark.parametrize("which", ["qkv", "kv"])
def test_multi_head_attention_packed(which: str) -> None:
    q, k, v = normal(2, 5, 8), normal(2, 5, 8), normal(2, 5, 8)
    heads = [x.reshape(2, 5, 2, 4) for x in (q, k, v)]
    packed = [np.stack(heads, 3)] if which == "qkv" else [q, np.stack(heads[1:], 3)]
    plain = reference(Case("MultiHeadAttention", [q, k, v], {"num_heads": 2}))[0]
    check(Case("MultiHeadAttention", list(packed), {"num_heads": 2}), plain)


def test_remove_and_restore_padding() -> None:
    x, lengths = normal(3, 4, 2), np.array([1, 2, 4], np.int32)
    case = Case("RemovePadding", [x, lengths], outputs=[True] * 4)
    tokens, offset, cumulated, longest = reference(case)
    np.testing.assert_array_equal(tokens, np.concatenate([row[:count] for row, count in zip(x, lengths)]))
    np.testing.assert_array_equal(offset.reshape(-1), [0, 4, 5, 8, 9, 10, 11, 1, 2, 3, 6, 7])
    assert (cumulated.tolist(), longest.tolist()) == ([0, 1, 3, 7], [4])
    kept = x * (np.arange(4) < lengths[:, None])[..., None]
    np.testing.assert_array_equal(reference(Case("RestorePadding", [tokens, offset]))[0], kept)


def bucket(distance: int, buckets: int, maximum: int, both: bool) -> int:
    """The bucket of key position minus query position, as T5 counts them."""
    start = 0
    if both:
        buckets //= 2
        start = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return start + distance
    far = exact + int(np.log(np.float32(distance / exact)) / np.log(maximum / exact) * (buckets - exact))
    return start + min(far, buckets - 1)


@pytest.mark.parametrize("both", [0, 1])
def test_relative_position_bias(both: int) -> None:
    """The table is stored heads first, as the fusion of T5 writes it."""
    table = normal(8, 3)
    stored = np.ascontiguousarray(table.T).reshape(8, 3)
    case = Case(
        "RelativePositionBias",
        [stored, scalar(7, np.int64), scalar(7, np.int64)],
        {"max_distance": 5, "is_bidirectional": both},
    )
    expected = [[[table[bucket(j - i, 8, 5, bool(both)), h] for j in range(7)] for i in range(7)] for h in range(3)]
    np.testing.assert_array_equal(reference(case)[0], np.array([expected]))


def test_gated_relative_position_bias() -> None:
    query, bias, rel, weight, shift, eco = (
        normal(2, 5, 8),
        normal(8),
        normal(1, 2, 5, 5),
        normal(4, 6),
        normal(6),
        normal(1, 2, 1, 1),
    )
    case = Case("GatedRelativePositionBias", [query, bias, rel, weight, shift, eco], {"num_heads": 2})
    heads = (query.astype(np.float64) + bias).reshape(2, 5, 2, 4).transpose(0, 2, 1, 3)
    gates = sigmoid((heads @ weight + shift).reshape(2, 2, 5, 2, 3).sum(-1))
    u, r = gates[..., :1], gates[..., 1:]
    check(case, (u * (r * eco - 1) + 2) * rel)


def test_gemma_rotary_embedding() -> None:
    case = Case(
        "GemmaRotaryEmbedding", [normal(2, 5, 4), *(normal(2, 3, 5, 4) for _ in range(4))], outputs=[True, True]
    )
    angle, q, q_rot, k, k_rot = wide(case)
    cosine, sine = np.cos(angle)[:, None], np.sin(angle)[:, None]
    check(case, q * cosine + q_rot * sine, k * cosine + k_rot * sine)


@pytest.mark.parametrize("axes", [1, 2])
def test_fourier(axes: int) -> None:
    case = Case("Rfft", [normal(2, 6, 8)], {"signal_ndim": axes})
    spectrum = np.fft.rfftn(wide(case)[0], axes=tuple(range(-axes, 0)))
    check(case, np.stack([spectrum.real, spectrum.imag], -1))
    back = Case("Irfft", [reference(case)[0]], {"signal_ndim": axes})
    check(back, wide(case)[0])


def test_torch_embedding() -> None:
    weight, index = normal(5, 3), integers(np.int64, 2, 4, high=5)
    np.testing.assert_array_equal(reference(Case("TorchEmbedding", [weight, index]))[0], weight[index])


def unpacked(packed: Array, bits: int) -> Array:
    """Numbers packed in bytes, lowest bits first."""
    every = [(packed[..., None].astype(np.int64) >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return np.concatenate(every, -1).reshape(*packed.shape[:-1], -1)


def few_bits(rows: int, columns: int, bits: int, block: int) -> tuple[Array, Array, Array]:
    """A packed weight, its scales, and the real weight [rows, columns]."""
    blocks = columns // block
    packed, scales = integers(np.uint8, rows, blocks, block * bits // 8, high=256), positive(rows, blocks)
    real = (unpacked(packed, bits) - 2.0 ** (bits - 1)) * scales[..., None]
    return packed, scales, real.reshape(rows, columns)


def rms(x: Array, epsilon: float) -> Array:
    return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon))


def test_matmul_n_bits_mlp() -> None:
    a, skip, norm = normal(2, 32), normal(2, 32), normal(32)
    gate, up = few_bits(6, 32, 4, 16), few_bits(6, 32, 4, 16)
    case = Case(
        "MatMulNBitsMlp",
        [a, skip, norm, *gate[:2], normal(6), *up[:2], None],
        {"K": 32, "N": 6, "block_size": 16, "activation": "silu", "epsilon": 0.1},
        outputs=[True, True],
    )
    total = a.astype(np.float64) + skip
    x = rms(total, 0.1) * norm
    first = x @ gate[2].T + case.inputs[5]  # type: ignore[operator]
    check(case, first * sigmoid(first) * (x @ up[2].T), total)


def test_matmul_n_bits_qkv() -> None:
    a, norm = normal(2, 32), normal(32)
    parts = [few_bits(rows, 32, 8, 16) for rows in (6, 4, 4)]
    inputs = [item for packed, scales, _ in parts for item in (packed, scales, None)]
    case = Case(
        "MatMulNBitsQkv",
        [a, None, norm, *inputs],
        {"K": 32, "Nq": 6, "Nkv": 4, "block_size": 16, "bits": 8},
        outputs=[True] * 3,
    )
    check(case, *(rms(a.astype(np.float64), 1e-6) * norm @ real.T for _, _, real in parts))


def test_matmul_n_bits_qlora() -> None:
    x, base = normal(2, 32), few_bits(6, 32, 4, 16)
    down, up = few_bits(16, 32, 8, 16), few_bits(6, 16, 8, 16)
    case = Case(
        "MatMulNBitsQLoRA",
        [x, *base[:2], *down[:2], *up[:2]],
        {"K": 32, "N": 6, "block_size": 16, "lora_block_size": 16},
    )
    check(case, x @ base[2].T + x @ down[2].T @ up[2].T, tolerance=1e-4)


def test_matmul_block_quantized_fp8() -> None:
    a, scale, bias = normal(3, 20), positive(5, 2), normal(5)
    b = torch.randn(5, 20, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    operator = OnnxOp(MICROSOFT, "MatMulBlockQuantizedFp8Weight", 1)
    y = operator(torch.from_numpy(a), b, torch.from_numpy(scale), None, torch.from_numpy(bias), block_size=16)
    weight = b.double().numpy() * np.repeat(scale, 16, 1)[:, :20]
    np.testing.assert_allclose(y.numpy(), a @ weight.T + bias, rtol=1e-5, atol=1e-5)


CHANNELS_LAST: list[tuple[str, list[Array], dict[str, Any]]] = [
    ("Conv", [normal(4, 3, 3, 2), normal(4)], {"pads": [1, 0, 1, 1], "strides": [2, 1]}),
    ("ConvTranspose", [normal(3, 4, 3, 2)], {"strides": [2, 1]}),
    ("AveragePool", [], {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1]}),
    ("MaxPool", [], {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1]}),
    ("LpPool", [], {"kernel_shape": [3, 2]}),
    ("GlobalAveragePool", [], {}),
    ("GlobalMaxPool", [], {}),
    ("GlobalLpPool", [], {}),
    ("InstanceNormalization", [normal(3), normal(3)], {}),
    ("BatchNormalization", [normal(3), normal(3), normal(3), positive(3)], {}),
    ("LRN", [], {"size": 3}),
    ("SpaceToDepth", [], {"blocksize": 2}),
    ("DepthToSpace", [], {"blocksize": 1}),
    ("GridSample", [normal(2, 3, 2, 2)], {}),
]


@pytest.mark.parametrize("op_type", [name for name, _, _ in CHANNELS_LAST])
def test_channels_last(op_type: str) -> None:
    others, options = next((others, options) for name, others, options in CHANNELS_LAST if name == op_type)
    x = torch.from_numpy(normal(2, 3, 6, 4))
    tensors = [torch.from_numpy(value) for value in others]
    first = OnnxOp("", op_type, 22)(x, *tensors, **options)
    last = OnnxOp("com.ms.internal.nhwc", op_type, 22)(x.movedim(1, -1), *tensors, **options)
    torch.testing.assert_close(last, first.movedim(1, -1))


def test_channels_last_quantized_convolution() -> None:
    x, w = integers(np.uint8, 1, 3, 6, 4), integers(np.int8, 4, 3, 3, 2, low=-60)
    others = [scalar(0.02), scalar(9, np.uint8), w, positive(4), np.zeros(4, np.int8), scalar(0.3), scalar(7, np.uint8)]
    first = reference(Case("QLinearConv", [x, *others], domain=""))[0]
    last = reference(Case("QLinearConv", [x.transpose(0, 2, 3, 1), *others], domain="com.ms.internal.nhwc"))[0]
    np.testing.assert_array_equal(last, first.transpose(0, 2, 3, 1))


def test_decoder_masked_self_attention() -> None:
    """One token after its past is what Attention computes too."""
    x, weight, bias, past = normal(2, 1, 6), normal(6, 24), normal(24), normal(2, 2, 2, 3, 4)
    mask = np.array([[1, 1, 0, 1], [1, 1, 1, 1]], np.int32)
    both = [True, True]
    plain = reference(Case("Attention", [x, weight, bias, mask, past], {"num_heads": 2}, outputs=both))
    check(Case("DecoderMaskedSelfAttention", [x, weight, bias, mask, past], {"num_heads": 2}, outputs=both), *plain)


def test_bitmask_dropout_at_inference() -> None:
    case = Case("BitmaskDropout", [normal(2, 3), scalar(0.5)])
    check(case, *wide(case)[:1])
