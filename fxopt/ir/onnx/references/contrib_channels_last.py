"""Operators of ONNX with their channels last: the domain `com.ms.internal.nhwc` of ONNX Runtime.

Inputs and the output that have an axis per image dimension are [batch, space..., channels]; weights are as in ONNX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fxopt.ir.onnx.references import arrange, conv, norm, norm_plain, pool, sample
from fxopt.ir.onnx.references.common import require
from fxopt.ir.onnx.references.contrib_fused import to_channels_first, to_channels_last
from fxopt.ir.onnx.references.integer import qlinear_conv
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators("com.ms.internal.nhwc")

# operator -> (its channels-first definition, the opset whose rules it follows)
_FIRST: dict[str, tuple[Callable[..., Any], int]] = {
    "AveragePool": (pool.average_pool, 19),
    "BatchNormalization": (norm.batch_normalization, 15),
    "Conv": (conv.conv, 11),
    "ConvTranspose": (conv.conv_transpose, 11),
    "DepthToSpace": (arrange.depth_to_space, 13),
    "GlobalAveragePool": (pool.global_average_pool, 1),
    "GlobalLpPool": (pool.global_lp_pool, 2),
    "GlobalMaxPool": (pool.global_max_pool, 1),
    "InstanceNormalization": (norm.instance_normalization, 6),
    "LRN": (norm_plain.lrn, 13),
    "LpPool": (pool.lp_pool, 18),
    "MaxPool": (pool.max_pool, 12),
    "QLinearConv": (qlinear_conv, 10),
    "SpaceToDepth": (arrange.space_to_depth, 13),
}


def _channels_last(function: Callable[..., Any], version: int) -> Callable[..., Tensor]:
    def channels_last(call: Call, x: Tensor, *inputs: Any, **attributes: Any) -> Tensor:
        require(call.outputs == 1, "a channels-last operator with several outputs has no torch reference")
        y: Tensor = function(Call(version), to_channels_first(x), *inputs, **attributes)
        return to_channels_last(y)

    return channels_last


for _name, (_function, _version) in _FIRST.items():
    operators.reference(_name)(_channels_last(_function, _version))


@operators.reference("GridSample")
def grid_sample(call: Call, x: Tensor, grid: Tensor, **attributes: Any) -> Tensor:
    """GridSample of images with their channels last; the grid is as in ONNX."""
    y: Tensor = sample.grid_sample(Call(20), to_channels_first(x), grid, **attributes)
    return to_channels_last(y)
