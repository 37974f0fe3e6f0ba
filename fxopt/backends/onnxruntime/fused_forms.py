"""The ONNX form of linears on codes: nodes of our own custom-operator library (`fxopt.backends.tvm.custom_ops`).

`fxopt::FusedLinearInt8` gives floats, codes, or both: who takes them decides. Codes that no such node makes are made by
standard operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.ir.onnx.export import Emitter, Forms
from fxopt.ir.ops.linear_u8s8 import EPILOGUES, layer_norm_u8, linear_u8s8, quantize_u8

DOMAIN, OPERATOR = "fxopt", "FusedLinearInt8"
# Attribute values of the custom operator.
_NUMBERS = {"none": 0, "relu": 1, "gelu": 2, "layer_norm": 3, "gelu_tanh": 4, "residual": 5, "norm_codes": 6}
assert set(EPILOGUES) <= set(_NUMBERS)


def _key(node: fx.Node) -> tuple[Any, ...]:
    """What names the codes that `quantize_u8` or `layer_norm_u8` makes."""
    return ("codes", node.target, *node.args)


def _codes_of(node: fx.Node) -> fx.Node | None:
    """The user that makes codes of the linear's result in the same node: the first that can."""
    wanted = layer_norm_u8.target if node.args[5] == "residual" else quantize_u8.target
    found = [user for user in node.users if user.target is wanted and user.args[0] is node]
    if not found and node.args[5] == "residual":
        found = [user for user in node.users if user.target is quantize_u8.target]
    return found[0] if found else None


def _linear(emitter: Emitter, node: fx.Node) -> str:
    arguments: Any = node.args
    q, codes, scales, bias, zero, epilogue, residual, gamma, beta, eps = arguments
    taker = _codes_of(node)
    inverse, y_zero = "", 0
    if taker is not None:
        inverse, y_zero = emitter.value(taker.args[-2]), taker.args[-1]  # type: ignore[assignment]
        if taker.target is layer_norm_u8.target:
            epilogue, gamma, beta, eps = "norm_codes", *taker.args[1:4]
    inputs = [*(emitter.value(operand) for operand in (q, codes, scales, bias)), inverse]
    inputs += ["" if operand is None else emitter.value(operand) for operand in (residual, gamma, beta)]
    y = emitter.output(node)
    floats = taker is None or epilogue in ("layer_norm", "norm_codes") or any(user is not taker for user in node.users)
    outputs = [y if floats else ""]
    if taker is not None:
        outputs.append(emitter.fresh(f"{y}_codes"))
        emitter.shared[_key(taker)] = outputs[-1]
    while inputs and not inputs[-1]:
        inputs.pop()
    emitter.node(
        OPERATOR, inputs, outputs, domain=DOMAIN, name=f"{y}/{OPERATOR}",
        x_zero=zero, y_zero=y_zero, epilogue=_NUMBERS[epilogue], floats=int(floats), codes=int(taker is not None),
        eps=float(eps),
    )  # fmt: skip
    return y


def _quantize(emitter: Emitter, node: fx.Node) -> str:
    return str(emitter.shared.get(_key(node)) or _rounded(emitter, node, emitter.value(node.args[0])))


def _rounded(emitter: Emitter, node: fx.Node, x: str) -> str:
    """QuantizeLinear; where channels have factors of their own, behind a product."""
    inverse, zero = node.args[-2:]
    value = emitter.graph.constant(inverse)
    assert value is not None
    scale = torch.ones(())
    if bool((value == value[0]).all()):
        scale = (1 / value[0].double()).float()
    else:
        scaled = emitter.fresh(f"{x}_scaled")
        emitter.node("Mul", [x, emitter.value(inverse)], [scaled])
        x = scaled
    y = emitter.output(node)
    names = [
        emitter.initializer(scale, f"{y}_scale"),
        emitter.initializer(torch.tensor(zero, dtype=torch.uint8), "zero"),
    ]
    emitter.node("QuantizeLinear", [x, *names], [y])
    return y


def _norm(emitter: Emitter, node: fx.Node) -> str:
    known = emitter.shared.get(_key(node))
    if known:
        return str(known)
    x, gamma, beta, eps = node.args[:4]
    normal = emitter.fresh(f"{emitter.value(x)}_normal")
    inputs = [emitter.value(operand) for operand in (x, gamma, beta)]
    emitter.node("LayerNormalization", inputs, [normal], axis=-1, epsilon=eps)
    return _rounded(emitter, node, normal)


FUSED_FORMS: Forms = {
    linear_u8s8.target: _linear,
    quantize_u8.target: _quantize,
    layer_norm_u8.target: _norm,
}
