"""ONNX Runtime: the default backend for CPUs. Nothing here imports onnxruntime before it is needed."""

from __future__ import annotations

from fxopt.backends.onnxruntime.backend import OnnxRuntime

__all__ = ["OnnxRuntime"]
