"""Answers to what passes ask: is there a kernel for it, and is it predicted to pay?"""

from __future__ import annotations

from typing import Literal

import torch

from fxopt.backends.triton import worth
from fxopt.backends.triton.formats import SHIFT4, layout_for, refusal
from fxopt.ir.target import Cost, Prediction, Target

_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.bfloat16}
_MANY = 1 << 30  # inputs: a group of all has a layout anyway
_NOT_MEASURED = {"linear_qkv": "one product for queries, keys and values was not measured on a GPU"}
_EVERYWHERE = (
    *("linear_w8a8", "linear_w8a8_dynamic", "linear_fp8"),
    *("scaled_dot_product_attention", "attention", "Attention"),  # torch has fast ones
)


def answer(target: Target | None, op: str, dtype: str, pattern: str) -> str:
    """ "" for yes, else the reason."""
    if op in _EVERYWHERE:
        return ""
    if op in _NOT_MEASURED:
        return _NOT_MEASURED[op]
    if op == "linear_sparse":
        return "" if pattern == "2:4" and dtype in ("float16", "bfloat16") else _no_sparse(dtype, pattern)
    asked = dict(item.split("=", 1) for item in pattern.split(",") if "=" in item)
    if op == "attention_pattern" and "blocks" in asked:
        return "the triton backend's kernel takes patterns, not lists of blocks"
    sizes = _sizes(asked)
    if op == "linear_nbits":
        bits = int(dtype.removeprefix("int"))
        group = int(asked.get("group", 128))
        if asked.get("activations", "float") != "float":
            return "the triton backend's kernels take activations as they are; use activations=float"
        return refusal(bits, group, _MANY)
    if target is None or sizes is None:
        return "" if op in ("linear_24", "linear_shift", "attention_pattern") else _no_kernel(op)
    element = _TYPES.get(asked.get("type", dtype), torch.float16)
    if op == "linear_24":
        return worth.sparse_24_refusal(target, *sizes, element)
    if op == "linear_shift":
        return worth.shift_refusal(target, *sizes, int(asked.get("group", 128)), element)
    if op == "attention_pattern":
        heads, length, width = sizes
        return worth.density_refusal(target, float(asked.get("density", 1.0)), heads, length, width, element)
    return _no_kernel(op)


def predicted(cost: Cost, target: Target) -> Prediction | None:
    """The time of a linear with packed weights, from the static report of its kernel; None for everything else."""
    form = dict(cost.form)
    element = _TYPES.get(cost.dtype)
    layout = SHIFT4 if form.get("op") == "linear_shift" else layout_for(form.get("bits", 0))
    if target.kind != "cuda" or form.get("op") not in ("linear_nbits", "linear_shift"):
        return None
    if layout is None or element is None or refusal(layout.bits, form["group"], form["in"]):
        return None
    rows = form["rows"] * (2 if cost.dtype == "float32" else 1)  # two terms
    found = worth.packed_linear(target, rows, form["out"], form["in"], layout, form["group"], element)
    if found is None:
        return None
    seconds = found.kernel + target.launch_seconds
    bound: Literal["compute", "memory"] = "memory" if found.bound in ("bandwidth", "latency") else "compute"
    shares = (max(0.0, 1 - target.interval), 1 + target.interval)
    return Prediction(seconds, seconds * shares[0], seconds * shares[1], bound)


def _sizes(asked: dict[str, str]) -> tuple[int, int, int] | None:
    """Rows, outputs and inputs, or heads, length and width."""
    for names in (("rows", "out", "in"), ("heads", "length", "width")):
        if all(name in asked for name in names):
            first, second, third = (int(asked[name]) for name in names)
            return first, second, third
    return None


def _no_sparse(dtype: str, pattern: str) -> str:
    return f"GPUs skip zeros of the pattern 2:4 in 16-bit floats; the weight is {pattern} in {dtype}"


def _no_kernel(op: str) -> str:
    return f"operator {op} has no kernel in the triton backend"
