"""Maximum and average pooling [N, C, H, W]; windows are clipped to the image."""

from __future__ import annotations

import math
from typing import Any

from fxopt.backends.tvm.emit import Kernel, cast, float32, int32
from fxopt.backends.tvm.kernels.conv import Conv
from fxopt.backends.tvm.kernels.rows import largest
from fxopt.backends.tvm.library import tirx
from fxopt.backends.tvm.machine import Machine


def pool(name: str, size: Conv, average: bool, count_pads: bool, machine: Machine) -> Any:
    """`void NAME(x, y)`; `size.outputs` is the number of channels.

    Args:
        count_pads: an average divides by the whole window, padding included.
    """
    del machine  # windows are small: scalar code
    kernel = Kernel(name)
    planes = size.batch * size.channels
    x = kernel.buffer("x", planes * size.height * size.width)
    y = kernel.buffer("y", planes * size.out_height * size.out_width)
    loops = (planes, size.out_height, size.out_width)
    with kernel.loop(loops[0], "c") as c, kernel.loop(loops[1], "h") as h, kernel.loop(loops[2], "w") as w:
        total = kernel.local(1)
        kernel.store(total, 0, float32(0.0 if average else -math.inf))
        inside = kernel.local(1, "int32")
        kernel.store(inside, 0, int32(0))
        for i in range(size.kernel[0]):
            for j in range(size.kernel[1]):
                row = kernel.let(h * size.stride[0] + (i * size.dilation[0] - size.pads[0]))
                column = kernel.let(w * size.stride[1] + (j * size.dilation[1] - size.pads[1]))
                within = tirx.And(row >= int32(0), row < int32(size.height))
                within = tirx.And(within, tirx.And(column >= int32(0), column < int32(size.width)))
                with kernel.when(within):
                    value = kernel.let(kernel.load(x, (c * size.height + row) * size.width + column))
                    old = kernel.load(total, 0)
                    kernel.store(total, 0, old + value if average else largest(old, value))
                    kernel.store(inside, 0, kernel.load(inside, 0) + int32(1))
        result = kernel.load(total, 0)
        if average:
            window = float32(float(size.kernel[0] * size.kernel[1]))
            result = result / (window if count_pads else cast("float32", kernel.load(inside, 0)))
        kernel.store(y, (c * size.out_height + h) * size.out_width + w, result)
    return kernel.function()
