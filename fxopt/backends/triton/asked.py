"""Answers to what passes ask: is there a kernel for it, and is it predicted to pay?"""

from __future__ import annotations

from typing import Any, Literal

import torch

from fxopt.backends.triton import worth
from fxopt.backends.triton.block_plan import may_renumber
from fxopt.backends.triton.formats import SHIFT4, layout_for, refusal
from fxopt.ir.pattern_work import Tile, work_of
from fxopt.ir.target import Cost, Prediction, Target

_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.bfloat16}
_MANY = 1 << 30  # inputs: a group of all has a layout anyway
_NOT_MEASURED = {"linear_qkv": "one product for queries, keys and values was not measured on a GPU"}
_PLAIN_TILE = Tile(64, 64)
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
        density, renumbered = float(asked.get("density", 1.0)), "renumbered" in asked
        return worth.density_refusal(target, density, heads, length, width, element, renumbered)
    return _no_kernel(op)


def attention_tile(target: Target | None, dtype: str, width: int, renumbered: bool) -> Tile:
    """The tile of pattern-sparse attention; a plain one where no kernel is known."""
    element = _TYPES.get(dtype, torch.float16)
    if target is None or target.kind != "cuda":
        return _PLAIN_TILE
    known = worth.pattern_choice(target, width, element, renumbered)
    return _PLAIN_TILE if known is None else Tile(known["BQ"], known["BK"])


def predicted(cost: Cost, target: Target) -> Prediction | None:
    """The time of a linear with packed weights or of attention with patterns, from the static report of its kernel.

    None for everything else.
    """
    form = dict(cost.form)
    element = _TYPES.get(cost.dtype)
    if form.get("op") == "attention_pattern" and target.kind == "cuda" and element is not None:
        return _predicted_patterns(form, target, element)
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


def _predicted_patterns(form: dict[str, Any], target: Target, element: torch.dtype) -> Prediction | None:
    """The time of pattern-sparse attention; None where no kernel takes it."""
    batch, heads, length, width = form["sizes"]
    renumbered = may_renumber(form["patterns"], length)
    if form["lists"] or worth.pattern_choice(target, width, element, renumbered) is None:
        return None
    tile = attention_tile(target, str(element).removeprefix("torch."), width, renumbered)
    share = work_of(form["patterns"], length, tile=tile).share
    seconds = share * worth.pattern_seconds(target, batch * heads, length, width, element, renumbered)
    seconds += target.launch_seconds
    return Prediction(seconds, seconds * max(0.0, 1 - target.interval), seconds * (1 + target.interval), "compute")


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
