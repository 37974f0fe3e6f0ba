"""Run `fxopt::attention_pattern` on CPU tensors as dense attention over slices, which skips what is not seen.

    register()  # from now on CPU tensors go there

Measured with the alternatives in benchmarks/attention_patterns.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from fxopt.ir.ops.attention_pattern import attention_pattern
from fxopt.ir.sliced_attention import sliced_attention


@cache
def register() -> None:
    """Take over the operator's CPU tensors, once."""
    _library().impl(attention_pattern.name, sliced_attention, "CPU")


@cache
def _library() -> Any:
    return torch.library.Library("fxopt", "IMPL", "CPU")  # type: ignore[no-untyped-call]
