"""The ONNX Runtime backend: `.onnx` is its artifact."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import onnx
from torch import fx

from fxopt.backends.base import Backend, Executable
from fxopt.backends.onnxruntime.providers import CPU, PROVIDERS, find_provider, others
from fxopt.backends.onnxruntime.session import OnnxExecutable
from fxopt.backends.onnxruntime.sparse_forms import opening_bytes, opening_notes
from fxopt.errors import Unsupported
from fxopt.ir.graph import Graph
from fxopt.ir.memory import give_back_freed, is_large, limit
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.ops.linear_u8s8 import linear_u8s8
from fxopt.ir.ops.sparse_linear_u8s8 import sparse_linear_u8s8
from fxopt.ir.sparsity import Pattern
from fxopt.ir.target import Target

# Fusions that ONNX Runtime makes by itself and that are slower than what they replace, by the first version in which
# that was measured (benchmarks/ort_fusions.py).
_SLOW_FUSIONS = {"SkipLayerNormalization": ((1, 32), "slower than Add followed by LayerNormalization")}

# Operators that were measured to be faster than their parts, by the first version in which they were, and their types.
_FAST_FUSIONS = {"Attention": ((1, 32), ("float32",))}

# What was measured to be no faster than what a pass would put it in the place of (benchmarks/attention_forms.py).
_SLOWER = {
    "linear_qkv": "one product for queries, keys and values is no faster in ONNX Runtime than three",
    "Attention with a soft cap": "with a soft cap, Attention of ONNX Runtime is several times slower than its parts",
}

_BESIDE_BYTES = 1 << 24  # weights of more bytes lie beside a temporary model: written in a stream, read as a memory map


class OnnxRuntime(Backend):
    """ONNX Runtime on the CPU, in its own kernels or in another provider of the installed build.

    Options:
        provider: "cpu", "openvino", or "auto": the result is measured in every one that is installed.
    """

    needs = ("onnxruntime",)
    options = ("provider",)

    def __init__(self, provider: str = "auto") -> None:
        self.measures = provider == "auto"
        self.provider = CPU if self.measures else find_provider(provider)

    @property
    def name(self) -> str:
        """The name on the command line."""
        return "onnxruntime"

    def refuses(self, node: fx.Node, target: Target) -> str:
        """Operators without an ONNX form."""
        from fxopt.backends.onnxruntime.forms import FORMS

        if isinstance(node.target, OnnxOp) or node.target in FORMS:
            return ""
        return f"{node.target} has no ONNX form"

    def supports(self, op: str, dtype: str, pattern: str = "") -> str:
        """The fxopt operators that have an ONNX form which ONNX Runtime fuses into an integer kernel."""
        from fxopt.backends.onnxruntime.forms import FORMS

        known = {target.name().removeprefix("fxopt::") for target in FORMS}
        if op == "linear_nbits":
            return _nbits(dtype, pattern)
        if op == "linear_fp8":
            return "ONNX Runtime on the CPU has no fp8 kernel"
        if op in _FAST_FUSIONS:
            return _fusion(op, dtype)
        if op in _SLOWER:
            return _SLOWER[op]
        return "" if op in known else f"operator {op} has no ONNX form that ONNX Runtime runs fast"

    def skips_zeros(self, target: Target, dtype: str, pattern: str, shape: tuple[int, int] | None = None) -> str:
        """Never: its kernels are dense."""
        found = Pattern.parse(pattern)
        if found.outputs == 1:
            family = "x86" if target.arch.startswith("x86") else target.arch
            return f"{pattern} gives no time on {target.name}: no {family} instruction skips zeros chosen per output"
        return f"ONNX Runtime has no kernel that skips zeros in blocks of {pattern}"

    def prefers(self, op: str) -> str:
        """The reason to avoid a fusion of ONNX Runtime, in the versions in which it was measured to be slow."""
        since = _SLOW_FUSIONS.get(op)
        if since is None or version() < since[0]:
            return ""
        return f"{op} of ONNX Runtime {'.'.join(map(str, version()))} is {since[1]}"

    def alternatives(self, executable: Executable) -> Iterator[Callable[[], Executable]]:
        """The other providers of the installed ONNX Runtime, unless one was asked for."""
        if self.measures and isinstance(executable, OnnxExecutable):
            for provider in others():
                yield partial(executable.moved, provider)

    @classmethod
    def runtimes(cls) -> dict[str, str]:
        """Its providers."""
        return {name: provider.missing for name, provider in PROVIDERS.items()}

    def open(self, path: Path, threads: int | None) -> Executable:
        """A model file as it is."""
        made = OnnxExecutable(path, threads, provider=self.provider)
        give_back_freed()  # of constants that were folded
        return made

    def compile(self, graph: Graph, target: Target, *, threads: int | None = None) -> Executable:
        """Write the graph to a temporary file and open it; what exceeds half of the memory is never loaded whole.

        Nor is what would not fit while it is opened.
        """
        from fxopt.backends.onnxruntime.forms import FORMS
        from fxopt.ir.onnx.export import save

        if graph.origin != "onnx":
            raise Unsupported("the onnxruntime backend takes graphs of ONNX origin; export the PyTorch model first")
        self.require()
        opening = opening_bytes(graph)
        if is_large(graph) or opening + graph.size_bytes() > limit() // 2:
            from fxopt.backends.onnxruntime.streamed import Streamed

            return Streamed(graph.copy(), opening_notes(graph))
        scratch = tempfile.TemporaryDirectory(prefix="fxopt-")
        path = Path(scratch.name) / "model.onnx"
        save(graph, path, FORMS, external=graph.size_bytes() > _BESIDE_BYTES)
        if any(node.target in (linear_u8s8.target, sparse_linear_u8s8.target) for node in graph.calls()):
            from fxopt.backends.onnxruntime.library import SUFFIX, build_library

            build_library(onnx.load(path, load_external_data=False), path.with_suffix(SUFFIX))
        made = OnnxExecutable(path, threads, scratch, self.provider)
        if opening:
            give_back_freed()
        made.opening = opening_notes(graph)
        return made


def _fusion(op: str, dtype: str) -> str:
    """The reason why an operator is not put in the place of its parts; "" where it is faster."""
    since, dtypes = _FAST_FUSIONS[op]
    if version() < since:
        since_text, this = (".".join(map(str, found)) for found in (since, version()))
        return f"{op} was measured to be fast since ONNX Runtime {since_text}; this is {this}"
    return "" if dtype in dtypes else f"{op} of ONNX Runtime is fast in {', '.join(dtypes)}, not in {dtype}"


def _nbits(dtype: str, pattern: str) -> str:
    """The reason why MatMulNBits does not take a form `int4`, `group=32,activations=int8`; "" when it does."""
    options = dict(part.split("=") for part in pattern.split(",") if part)
    group = int(options.get("group", 32))
    if group < 16 or group & (group - 1):
        nearest = max(16, 1 << (group.bit_length() - 1))
        return f"MatMulNBits takes groups of a power of two of at least 16, not {group}; try group={nearest}"
    if options.get("activations") == "float" and dtype in ("int2", "int8"):
        return f"MatMulNBits with {dtype} weights and float activations takes up to 25 times as long as float weights"
    return ""


def version() -> tuple[int, int]:
    """Major and minor version of the installed ONNX Runtime."""
    for name in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"):
        try:
            major, minor, *_ = importlib.metadata.version(name).split(".")
        except importlib.metadata.PackageNotFoundError:
            continue
        return int(major), int(minor)
    return (0, 0)
