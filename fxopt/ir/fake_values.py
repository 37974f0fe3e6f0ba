"""Fake values of nodes: what is compared of them, and the value that nobody knows."""

from __future__ import annotations

from typing import Any

import torch

UNKNOWN = object()


def same_type(a: Any, b: Any) -> bool:
    """True when two fake values have the same shape and element type (or are equal host values)."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and len(a.shape) == len(b.shape) and all(map(_same_dim, a.shape, b.shape))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(same_type, a, b))
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return False
    if a is UNKNOWN or b is UNKNOWN:
        return a is b
    return str(a) == str(b)


def _same_dim(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return str(a) == str(b)
