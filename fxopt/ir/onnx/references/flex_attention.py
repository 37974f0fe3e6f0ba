"""FlexAttention: attention whose scores and probabilities pass through bodies.

Source: ai.onnx.preview, version 1; both factors are scaled by the square root of the scale, as in its function body.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxopt.ir.onnx.bodies import Body
from fxopt.ir.onnx.dtypes import TO_TORCH
from fxopt.ir.onnx.lane import to_tensor
from fxopt.ir.onnx.references.common import require
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators("ai.onnx.preview")


@operators.reference("FlexAttention")
def flex_attention(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    softmax_precision: int | None = None,
    score_mod: Body | None = None,
    prob_mod: Body | None = None,
) -> Tensor:
    """prob_mod(softmax(score_mod(q k^T * scale))) v; q [batch, heads, length, size], k and v with heads to share."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    root = math.sqrt(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    precision = _precision(q.dtype, softmax_precision)
    factor = torch.tensor(root, dtype=q.dtype, device=q.device)
    scores = torch.matmul(q * factor, (k * factor).transpose(-1, -2)).to(precision)
    probabilities = torch.softmax(_modified(scores, score_mod, "score_mod"), -1)
    probabilities = _modified(probabilities, prob_mod, "prob_mod")
    return torch.matmul(probabilities, v.to(probabilities.dtype)).to(q.dtype)


def _precision(dtype: torch.dtype, wanted: int | None) -> torch.dtype:
    if dtype == torch.float64:
        return dtype
    require(wanted is None or wanted in TO_TORCH, f"softmax_precision {wanted} has no torch reference")
    return torch.float32 if wanted is None else TO_TORCH[wanted]


def _modified(value: Tensor, body: Body | None, name: str) -> Tensor:
    if body is None:
        return value
    result: Any = to_tensor(body(value)[0])
    require(isinstance(result, Tensor) and result.shape == value.shape, f"{name} changes the shape of its input")
    return result  # type: ignore[no-any-return]
