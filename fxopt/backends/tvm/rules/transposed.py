"""Transposed convolutions, as convolutions of an image with zeros between its pixels; pooling by ceiling."""

from __future__ import annotations

from typing import Any

from fxopt.backends.tvm.kernels.conv import Conv
from fxopt.backends.tvm.kernels.pool import pool
from fxopt.backends.tvm.lowering import Call, Lowering, Rule
from fxopt.backends.tvm.rules.products import activation
from fxopt.backends.tvm.rules.spatial import RULES as SPATIAL
from fxopt.backends.tvm.rules.spatial import convolved
from fxopt.backends.tvm.values import Value
from fxopt.errors import Unsupported


def _transposed(low: Lowering, call: Call) -> Value:
    """Stride s puts s - 1 zeros between pixels; the kernel is turned around, padded by dilation * (size - 1) - pad."""
    weight = low.weight(call["weight"], "weight")
    rank = weight.dim() - 2
    if rank not in (1, 2):
        raise Unsupported(f"convolves {rank} axes; the kernels take 1 or 2")
    value = low.value(call["input"])
    if len(value.shape) != rank + 2:
        raise Unsupported(f"its input has shape {value.shape}; expected a batch axis")
    stride, padding, dilation, extra = (
        _listed(call.get(name), rank) for name in ("stride", "padding", "dilation", "output_padding")
    )
    groups = int(call["groups"])
    spread = value
    if any(step > 1 for step in stride):
        sizes = [(size - 1) * step + 1 for size, step in zip(value.shape[2:], stride, strict=True)]
        spread = low.program.value((*value.shape[:2], *sizes))
        low.emit(("constant", 0.0, "float32"), (), spread)
        steps = (*spread.strides[:2], *(s * step for s, step in zip(spread.strides[2:], stride, strict=True)))
        low.copy(value, spread.viewed(value.shape, steps))
    before = [d * (size - 1) - pad for d, size, pad in zip(dilation, weight.shape[2:], padding, strict=True)]
    after = [pad + more for pad, more in zip(before, extra, strict=True)]
    if min(before) < 0 or min(after) < 0:
        raise Unsupported(f"has padding {padding}, more than its kernel reaches")
    inner, outputs = weight.shape[:2]
    turned = weight.view(groups, inner // groups, outputs, *weight.shape[2:]).transpose(1, 2)
    turned = turned.reshape(groups * outputs, inner // groups, *weight.shape[2:])
    turned = turned.flip(tuple(range(2, rank + 2))).contiguous()
    bias = None if call["bias"] is None else low.weight(call["bias"], "bias").numpy()
    source = low.dense(spread, "float32")
    flat = [1] * (2 - rank)
    image, window, apart = [*flat, *source.shape[2:]], [*flat, *turned.shape[2:]], [*flat, *dilation]
    pads = [*(0 for _ in flat), *before, *(0 for _ in flat), *after]
    size = Conv(
        source.shape[0], source.shape[1], image[0], image[1], turned.shape[0], (window[0], window[1]),
        pads=(pads[0], pads[1], pads[2], pads[3]), dilation=(apart[0], apart[1]), groups=groups,
        activation=activation(low, call.node),
    )  # fmt: skip
    made = low.program.value(low.shape(call.node))
    if made.count:
        convolved(low, size, source, turned, bias, made)
    return made


def _max_pool(low: Lowering, call: Call) -> Value:
    """With ceil_mode, windows may reach over the end by more than the padding."""
    source = low.dense(call["self"], "float32")
    if len(source.shape) != 4:
        raise Unsupported(f"pools shape {source.shape}; expected [batch, channels, height, width]")
    kernel, padding, dilation = (_listed(call[name], 2) for name in ("kernel_size", "padding", "dilation"))
    stride = _listed(call["stride"], 2) if call["stride"] else kernel
    meta = low.metas[call.node]
    shape = tuple((meta[0] if isinstance(meta, (tuple, list)) else meta).shape)
    batch, channels, height, width = source.shape
    behind = [
        max(pad, (out - 1) * step + apart * (size - 1) + 1 - length - pad)
        for out, step, apart, size, length, pad in zip(
            shape[2:], stride, dilation, kernel, (height, width), padding, strict=True
        )
    ]
    pads = (padding[0], padding[1], behind[0], behind[1])
    steps = ((kernel[0], kernel[1]), (stride[0], stride[1]), pads, (dilation[0], dilation[1]))
    size = Conv(batch, channels, height, width, channels, *steps, channels)
    made = low.program.value(shape)
    if made.count:
        low.program.call(pool, (size, False, False), source.slot, made.slot)
    return made


def _max_pool_of_two(low: Lowering, call: Call) -> list[Any]:
    """The places of the largest are computed for nobody."""
    if any(user.args[1] == 1 and user.users for user in call.node.users):
        raise Unsupported("gives the places of the largest values, for which there is no kernel")
    return [_max_pool(low, call), None]


def _listed(given: Any, rank: int) -> list[int]:
    values = [given] * rank if isinstance(given, int) else [int(item) for item in given]
    return values * rank if len(values) == 1 else values


def _convolution(low: Lowering, call: Call) -> Value:
    """aten.convolution is both."""
    if call.get("transposed"):
        return _transposed(low, call)
    found: Value = SPATIAL["convolution"](low, call)
    return found


RULES: dict[str, Rule] = {
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d"), _transposed),
    "convolution": _convolution,
    "max_pool2d": _max_pool,
    "max_pool2d_with_indices": _max_pool_of_two,
}
