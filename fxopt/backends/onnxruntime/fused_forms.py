"""The ONNX form of linears on codes: nodes of our own custom-operator library (`fxopt.backends.tvm.custom_ops`).

`fxopt::FusedLinearInt8` gives floats, codes, or both: who takes them decides. Other codes are made by
`fxopt::QuantizeRows` and `fxopt::LayerNormQuantizeRows`, or by QuantizeLinear where all channels have one factor.
`fxopt::SparseLinearInt8` is the same for block-sparse weights; codes that one of them makes and only such linears take
lie as panels (backends/tvm/sparse_int8.c), so that nobody has to turn them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.ir.onnx.export import Emitter, Forms
from fxopt.ir.ops.attention_u8 import attention_u8
from fxopt.ir.ops.linear_u8s8 import EPILOGUES, layer_norm_u8, linear_u8s8, quantize_u8
from fxopt.ir.ops.sparse_linear_u8s8 import sparse_linear_u8s8

DOMAIN = "fxopt"
SPARSE = "SparseLinearInt8"
LINEAR, QUANTIZE, NORM = "FusedLinearInt8", "QuantizeRows", "LayerNormQuantizeRows"
ATTENTION = "AttentionInt8"


def _key(node: fx.Node) -> tuple[Any, ...]:
    """What names the codes that a `quantize_u8` makes."""
    return ("codes", *node.args)


def _in_panels(codes: fx.Node) -> bool:
    """Whether codes lie as panels: a sparse linear makes them, and all that take them are sparse linears."""
    source = codes.args[0] if codes.target is quantize_u8.target else None
    if not isinstance(source, fx.Node) or source.target is not sparse_linear_u8s8.target:
        return False
    made = [user for user in source.users if user.target is quantize_u8.target]
    alike = [user for user in made if _key(user) == _key(made[0])]  # those that the linear makes
    return codes in alike and all(taker.target is sparse_linear_u8s8.target for each in alike for taker in each.users)


def _linear(emitter: Emitter, node: fx.Node) -> str:
    arguments: Any = node.args
    q, codes, scales, bias, zero, epilogue, residual, gamma, beta, eps = arguments[:10]
    is_sparse = node.target is sparse_linear_u8s8.target
    taker = next((user for user in node.users if user.target is quantize_u8.target), None)
    inverse, y_zero = "", 0
    if taker is not None:
        inverse, y_zero = emitter.value(taker.args[1]), taker.args[2]  # type: ignore[assignment]
    inputs = [*(emitter.value(operand) for operand in (q, codes, scales, bias)), inverse]
    inputs += ["" if operand is None else emitter.value(operand) for operand in (residual, gamma, beta)]
    while not inputs[-1]:
        inputs.pop()
    y = emitter.output(node)
    floats = taker is None or epilogue == "layer_norm" or any(_key(user) != _key(taker) for user in node.users)
    outputs = [y if floats else ""]
    if taker is not None:
        outputs.append(emitter.fresh(f"{y}_codes"))
        emitter.shared[_key(taker)] = outputs[-1]
    operator = SPARSE if is_sparse else LINEAR
    layouts = {"x_panels": int(_in_panels(q)), "codes_panels": int(taker is not None and _in_panels(taker))}
    emitter.node(
        operator, inputs, outputs, domain=DOMAIN, name=f"{y}/{operator}", x_zero=zero, y_zero=y_zero,
        epilogue=EPILOGUES.index(epilogue), floats=int(floats), codes=int(taker is not None), eps=float(eps),
        **(layouts if is_sparse else {}),
    )  # fmt: skip
    return y


def _quantize(emitter: Emitter, node: fx.Node) -> str:
    known = emitter.shared.get(_key(node))
    if known:
        return str(known)
    x, inverse, zero = node.args
    factors = emitter.graph.constant(inverse)
    assert factors is not None
    y = emitter.output(node)
    if not bool((factors == factors[0]).all()):
        emitter.node(QUANTIZE, [emitter.value(x), emitter.value(inverse)], [y], domain=DOMAIN, zero=zero)
        return y
    scale = emitter.initializer((1 / factors[0].double()).float(), f"{y}_scale")
    zero_point = emitter.initializer(torch.tensor(zero, dtype=torch.uint8), f"{y}_zero_point")
    emitter.node("QuantizeLinear", [emitter.value(x), scale, zero_point], [y])
    return y


def _norm(emitter: Emitter, node: fx.Node) -> str:
    x, gamma, beta, eps, inverse, zero = node.args
    y = emitter.output(node)
    inputs = [emitter.value(operand) for operand in (x, inverse, gamma, beta)]
    emitter.node(NORM, inputs, [y], domain=DOMAIN, zero=zero, eps=eps)
    return y


def _attention(emitter: Emitter, node: fx.Node) -> str:
    *operands, mask, heads, factor, zero = node.args
    y = emitter.output(node)
    inputs = [emitter.value(operand) for operand in operands]
    inputs += [] if mask is None else [emitter.value(mask)]
    emitter.node(ATTENTION, inputs, [y], domain=DOMAIN, num_heads=heads, factor=factor, zero=zero)
    return y


FUSED_FORMS: Forms = {
    attention_u8.target: _attention,
    linear_u8s8.target: _linear,
    sparse_linear_u8s8.target: _linear,
    quantize_u8.target: _quantize,
    layer_norm_u8.target: _norm,
}
