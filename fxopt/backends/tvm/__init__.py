"""TVM as a code generator: kernels and whole models as C functions. Nothing here imports tvm before it is needed."""

from __future__ import annotations

from fxopt.backends.tvm.backend import Tvm

__all__ = ["Tvm"]
