"""Kernels for NVIDIA GPUs. Nothing here imports triton before it is needed."""

from __future__ import annotations

from fxopt.backends.triton.backend import Triton

__all__ = ["Triton"]
