"""ONNX files compressed by gzip (`*.onnx.gz`)."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import onnx

from fxopt.frontends import onnx as onnx_frontend
from fxopt.ir.graph import Graph


def accepts(model: Any) -> bool:
    """True for the path of such a file."""
    return isinstance(model, (str, Path)) and str(model).endswith(".onnx.gz")


def load(model: str | Path) -> Graph:
    """The graph of the file."""
    return onnx_frontend.load(onnx.load_from_string(gzip.decompress(Path(model).read_bytes())))
