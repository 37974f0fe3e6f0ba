"""Mixtures of experts of the domain `com.microsoft`: MoE, and QMoE with integer weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.errors import MissingReference
from fxopt.ir.onnx.references.common import require
from fxopt.ir.onnx.references.contrib_matmul import unpack
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators("com.microsoft")

_PLAIN: dict[str, Any] = {
    "relu": torch.relu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),  # what the kernels compute
    "silu": F.silu,
    "identity": lambda x: x,
}


def _swiglu(gate: Tensor, linear: Tensor, options: dict[str, Any]) -> Tensor:
    """g * sigmoid(alpha * g) * (l + beta), with g at most the limit and l within it."""
    limit = options.get("swiglu_limit")
    if limit is not None:
        gate, linear = gate.clamp(max=limit), linear.clamp(-limit, limit)
    alpha, beta = options.get("activation_alpha", 1.0), options.get("activation_beta", 0.0)
    result: Tensor = gate * torch.sigmoid(alpha * gate) * (linear + beta)
    return result


def _hidden(x: Tensor, fc1: tuple[Tensor, Any], fc3: tuple[Tensor | None, Any], options: dict[str, Any]) -> Tensor:
    """The activated first layer of all experts, [experts, tokens, inner]."""
    kind, fusion = str(options.get("activation_type", "relu")), options.get("swiglu_fusion", 0)
    y = _layer(x, *fc1)
    if kind in _PLAIN:
        gated = y if fc3[0] is None else None
        require(gated is not None, f"a mixture of experts with {kind} and a third layer has no torch reference")
        result: Tensor = _PLAIN[kind](y)
        return result
    require(kind == "swiglu", f"a mixture of experts with activation {kind!r} has no torch reference")
    if fusion == 1:
        return _swiglu(y[..., 0::2], y[..., 1::2], options)
    if fusion == 2:
        gate, linear = y.chunk(2, -1)
        return _swiglu(gate, linear, options)
    require(fc3[0] is not None, "swiglu that is not fused needs a third layer")
    assert fc3[0] is not None
    return _swiglu(y, _layer(x, fc3[0], fc3[1]), options)


def _layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight' + bias for every expert: [experts or 1, tokens, in] by [experts, out, in]."""
    y = torch.matmul(x, weight.transpose(1, 2))
    return y if bias is None else y + bias.unsqueeze(1)


def _mixing(router: Tensor, weights: Tensor | None, k: int, normalize: int) -> Tensor:
    """The weight of every expert for every token, [tokens, experts]; zero beyond the `k` largest of the router."""
    chosen = torch.topk(router, k, -1).indices
    if weights is not None:
        values = weights.gather(-1, chosen)
        if normalize:
            values = values / values.sum(-1, keepdim=True)
    elif normalize:
        values = torch.softmax(router.gather(-1, chosen), -1)
    else:
        values = torch.softmax(router, -1).gather(-1, chosen)
    return torch.zeros_like(router).scatter(-1, chosen, values.to(router.dtype))


def _mixture(
    x: Tensor,
    mixing: Tensor,
    fc1: tuple[Tensor, Tensor | None],
    fc2: tuple[Tensor, Tensor | None],
    fc3: tuple[Tensor | None, Tensor | None],
    options: dict[str, Any],
) -> Tensor:
    require(not options.get("use_sparse_mixer"), "a mixture of experts with the sparse mixer has no torch reference")
    require(not options.get("swiglu_limit_after_activation"), "a mixture of experts that clamps after the activation")
    tokens = x.reshape(-1, x.shape[-1]).unsqueeze(0)
    y = _layer(_hidden(tokens, fc1, fc3, options), *fc2)
    return (y * mixing.t().unsqueeze(-1)).sum(0).to(x.dtype).reshape(x.shape)


@operators.reference("MoE")
def moe(
    call: Call,
    x: Tensor,
    router_probs: Tensor,
    fc1_weights: Tensor,
    fc1_bias: Tensor | None,
    fc2_weights: Tensor,
    fc2_bias: Tensor | None = None,
    fc3_weights: Tensor | None = None,
    fc3_bias: Tensor | None = None,
    k: int = 1,
    normalize_routing_weights: int = 0,
    **options: Any,
) -> Tensor:
    """The sum of the `k` best experts' two-layer networks of every token, weighted by the softmax of the router.

    All experts are computed for all tokens, and those not chosen have weight zero.
    """
    mixing = _mixing(router_probs, None, k, normalize_routing_weights)
    return _mixture(x, mixing, (fc1_weights, fc1_bias), (fc2_weights, fc2_bias), (fc3_weights, fc3_bias), options)


def _dequantized(
    weight: Tensor | None, scales: Tensor | None, zero_points: Tensor | None, bits: int, block_size: int
) -> Tensor | None:
    """(number - zero_point) * scale of weights [experts, out, in * bits / 8], per row or per block of a row."""
    if weight is None or scales is None:
        return None
    require(bits in (2, 4, 8), f"QMoE with {bits} bits has no torch reference")
    numbers = unpack(weight, bits).to(scales.dtype)
    blocks = scales if scales.dim() == 3 else scales.unsqueeze(-1)
    size = block_size or numbers.shape[-1]
    zero: Any = float(2 ** (bits - 1))
    if zero_points is not None:
        count = blocks.shape[-1] if scales.dim() == 3 else numbers.shape[1]
        unpacked = unpack(zero_points, bits)[..., :count]
        per_block = (unpacked if scales.dim() == 3 else unpacked.unsqueeze(-1)).to(scales.dtype)
        zero = per_block.repeat_interleave(size, -1)[..., : numbers.shape[-1]]
    result: Tensor = (numbers - zero) * blocks.repeat_interleave(size, -1)[..., : numbers.shape[-1]]
    return result


@operators.reference("QMoE")
def qmoe(
    call: Call,
    x: Tensor,
    router_probs: Tensor,
    fc1_weights: Tensor,
    fc1_scales: Tensor | None,
    fc1_bias: Tensor | None,
    fc2_weights: Tensor,
    fc2_scales: Tensor | None,
    fc2_bias: Tensor | None = None,
    fc3_weights: Tensor | None = None,
    fc3_scales: Tensor | None = None,
    fc3_bias: Tensor | None = None,
    fc1_zero_points: Tensor | None = None,
    fc2_zero_points: Tensor | None = None,
    fc3_zero_points: Tensor | None = None,
    router_weights: Tensor | None = None,
    *others: Tensor | None,
    k: int = 1,
    normalize_routing_weights: int = 0,
    expert_weight_bits: int = 4,
    block_size: int = 0,
    quant_type: str = "int",
    weights_prepacked: int = -1,
    **options: Any,
) -> Tensor:
    """MoE with weights of 2, 4 or 8 bits, by row or by block of a row."""
    require(str(quant_type) == "int", f"QMoE with {quant_type!r} weights has no torch reference")
    require(all(other is None for other in others), "QMoE with global or activation scales has no torch reference")
    require(weights_prepacked != 1, "QMoE with weights in a packed layout has no torch reference")

    def real(name: str, weight: Tensor | None, scales: Tensor | None, zeros: Tensor | None) -> Tensor | None:
        return _dequantized(
            weight, scales, zeros, options.get(f"{name}_expert_weight_bits", expert_weight_bits), block_size
        )

    fc1 = real("fc1", fc1_weights, fc1_scales, fc1_zero_points)
    fc2 = real("fc2", fc2_weights, fc2_scales, fc2_zero_points)
    fc3 = real("fc3", fc3_weights, fc3_scales, fc3_zero_points)
    if fc1 is None or fc2 is None:
        raise MissingReference("QMoE without scales has no torch reference")
    mixing = _mixing(router_probs, router_weights, k, normalize_routing_weights)
    return _mixture(x, mixing, (fc1, fc1_bias), (fc2, fc2_bias), (fc3, fc3_bias), options)
