"""Convolutions, pooling, batch norm."""

from __future__ import annotations

from typing import Any

import torch

from fxopt.backends.tvm.kernels.bsr import pack_bsr
from fxopt.backends.tvm.kernels.conv import Conv, conv, pack_conv, pack_conv_bias
from fxopt.backends.tvm.kernels.depthwise import depthwise, depthwise_scratch
from fxopt.backends.tvm.kernels.pool import pool
from fxopt.backends.tvm.kernels.reduce import reduce
from fxopt.backends.tvm.lowering import Call, Lazy, Lowering, Rule
from fxopt.backends.tvm.rules.products import activation
from fxopt.backends.tvm.values import Value
from fxopt.errors import Unsupported

SPARSE_BELOW = 0.6  # density of blocks from which on skipping the others pays


def _pair(given: Any, rank: int) -> tuple[int, int]:
    """Sizes per axis as (rows, columns); one axis becomes columns of one row."""
    values = [given] * rank if isinstance(given, int) else list(given)
    values = values * rank if len(values) == 1 else values
    return (1, int(values[0])) if rank == 1 else (int(values[0]), int(values[1]))


def _convolution(low: Lowering, call: Call) -> Value:
    if call.get("transposed"):
        raise Unsupported("transposed convolutions have no kernel")
    weight = low.weight(call["weight"], "weight")
    rank = weight.dim() - 2
    if rank not in (1, 2):
        raise Unsupported(f"convolves {rank} axes; the kernels take 1 or 2")
    shape = low.shape(call["input"])
    if len(shape) != rank + 2:
        raise Unsupported(f"its input has shape {shape}; expected a batch axis")
    if isinstance(call["padding"], str):
        raise Unsupported(f"has padding={call['padding']!r}; expected numbers")
    pads = _pair(call["padding"], rank) if rank == 2 else (0, _pair(call["padding"], 1)[1])
    bias = None if call["bias"] is None else low.weight(call["bias"], "bias").numpy()
    source = low.dense(call["input"], "float32")
    height, width = (shape[2], shape[3]) if rank == 2 else (1, shape[2])
    kernel = (weight.shape[2], weight.shape[3]) if rank == 2 else (1, weight.shape[2])
    size = Conv(
        batch=shape[0],
        channels=shape[1],
        height=height,
        width=width,
        outputs=weight.shape[0],
        kernel=kernel,
        stride=_pair(call["stride"], rank),
        pads=(pads[0], pads[1], pads[0], pads[1]),
        dilation=_pair(call["dilation"], rank),
        groups=int(call["groups"]),
        activation=activation(low, call.node),
    )
    made = low.program.value(low.shape(call.node))
    if made.count:
        convolved(low, size, source, weight, bias, made)
    return made


def convolved(low: Lowering, size: Conv, source: Value, weight: torch.Tensor, bias: Any, made: Value) -> None:
    """The convolution in floats, in the form that its groups and its weight's zeros allow."""
    matrix = weight.reshape(weight.shape[0], -1).numpy()
    if size.groups == size.channels and size.groups > 1:
        slots = [low.program.constant(item) for item in (matrix, _whole(bias, size.outputs))]
        scratch = low.program.slot(depthwise_scratch(size))
        low.program.call(depthwise, (size,), source.slot, *slots, scratch, made.slot)
        return
    outputs = low.program.machine.outputs
    shift = low.program.constant(pack_conv_bias(bias, size.outputs, size.groups, outputs))
    patches = [low.program.slot(size.scratch)] if size.scratch else []
    packed = pack_bsr(matrix, outputs) if size.groups == 1 else None
    if packed is not None and packed.density < SPARSE_BELOW and len(packed.values):
        slots = [low.program.constant(item) for item in (packed.values, packed.inputs, packed.starts)]
        low.program.call(conv, (size,), source.slot, *slots, shift, *patches, made.slot, kept=len(packed.values))
        return
    panels = low.program.constant(pack_conv(weight.numpy(), size.groups, outputs))
    low.program.call(conv, (size,), source.slot, panels, shift, *patches, made.slot)


def _whole(bias: Any, outputs: int) -> Any:
    return torch.zeros(outputs).numpy() if bias is None else bias


def _pool(*, average: bool) -> Rule:
    def rule(low: Lowering, call: Call) -> Value:
        source = low.dense(call["self"], "float32")
        if len(source.shape) != 4:
            raise Unsupported(f"pools shape {source.shape}; expected [batch, channels, height, width]")
        if call["ceil_mode"] or call.get("divisor_override"):
            raise Unsupported("has ceil_mode or divisor_override, for which there is no kernel")
        kernel = _pair(call["kernel_size"], 2)
        stride = _pair(call["stride"], 2) if call["stride"] else kernel
        pads = _pair(call["padding"], 2)
        batch, channels, height, width = source.shape
        dilation = _pair(call.get("dilation") or 1, 2)
        size = Conv(batch, channels, height, width, channels, kernel, stride, (*pads, *pads), dilation, channels)
        made = low.program.value(low.shape(call.node))
        if made.count:
            counted = bool(call.get("count_include_pad"))
            low.program.call(pool, (size, average, counted), source.slot, made.slot)
        return made

    return rule


def _adaptive(low: Lowering, call: Call) -> Value:
    """To one value per channel, or to sizes that divide the image."""
    source = low.dense(call["self"], "float32")
    batch, channels, height, width = source.shape if len(source.shape) == 4 else (0, 0, 0, 0)
    out = tuple(int(low.number(item)) for item in call["output_size"])
    if not batch or len(out) != 2 or height % out[0] or width % out[1]:
        raise Unsupported(f"pools shape {source.shape} to {out}; expected sizes that divide the image")
    made = low.program.value(low.shape(call.node))
    if out == (1, 1):
        low.program.call(reduce, ("mean", batch * channels, height * width, 1), source.slot, made.slot)
        return made
    window = height // out[0], width // out[1]
    size = Conv(batch, channels, height, width, channels, window, window, groups=channels)
    low.program.call(pool, (size, True, True), source.slot, made.slot)
    return made


def _batch_norm(low: Lowering, call: Call) -> Lazy:
    """x * scale + shift per channel, with both computed now in float64."""
    if call.get("training"):
        raise Unsupported("computes statistics: call model.eval() before")
    mean, variance = low.weight(call["running_mean"], "mean"), low.weight(call["running_var"], "variance")
    scale = (variance.double() + float(call["eps"])).rsqrt()
    if call["weight"] is not None:
        scale = scale * low.weight(call["weight"], "weight").double()
    shift = -mean.double() * scale
    if call["bias"] is not None:
        shift = shift + low.weight(call["bias"], "bias").double()
    value = low.value(call["input"])
    channel = (0, 1, *(0 for _ in value.shape[2:]))
    operands = [value]
    for item in (scale, shift):
        slot = low.program.constant(item.float().numpy())
        operands.append(Value(slot, (1, value.shape[1], *(1 for _ in value.shape[2:])), channel))
    tree = ("add", ("mul", ("load", 0), ("load", 1)), ("load", 2))
    return Lazy(tree, tuple(operands), value.shape, "float32")


def _batch_norm_of_three(low: Lowering, call: Call) -> list[Any]:
    """The result; the batch's statistics that the operator also returns are empty when it does not train."""
    return [_batch_norm(low, call), None, None]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("conv1d", "conv2d", "convolution"), _convolution),
    "max_pool2d": _pool(average=False),
    "avg_pool2d": _pool(average=True),
    **dict.fromkeys(("adaptive_avg_pool2d", "_adaptive_avg_pool2d"), _adaptive),
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm_of_three,
}
