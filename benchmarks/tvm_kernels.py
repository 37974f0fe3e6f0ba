"""Kernels of the TVM backend on this CPU, one thread: dense against torch and ONNX Runtime, sparse against dense.

    python -m benchmarks.tvm_kernels [--rounds 12] [--shapes 3]

Everything of one shape is timed in alternating bursts. The clock is the processor time of the one thread that computes,
so that other load does not count (what it takes from caches and memory does). Figures are medians over rounds, ratios
medians of the rounds' ratios with their 10th and 90th percentiles. WebAssembly kernels run in wasmtime; the call from
Python is part of their times: small shapes show little else. Writes benchmarks/results/tvm_kernels.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

from benchmarks.common import write
from fxopt.backends.tvm.kernels.bsr import bsr, pack_bsr
from fxopt.backends.tvm.kernels.dense import dense, pack_bias, pack_dense
from fxopt.backends.tvm.kernels.dense_int8 import Product, dense_int8, work_space
from fxopt.backends.tvm.kernels.dot import column_sums, in_groups, pack_codes, preferred
from fxopt.backends.tvm.kernels.nm import index_dtype, nm, pack_nm
from fxopt.backends.tvm.link import link
from fxopt.backends.tvm.load import HostLibrary, WasmLibrary, load
from fxopt.backends.tvm.lower import write_object
from fxopt.backends.tvm.machine import Machine, machine_for
from fxopt.backends.tvm.values import tvm_type
from fxopt.cost_model.targets import get_target

SHAPES = [(196, 256, 256), (1, 768, 768), (128, 768, 768), (64, 768, 3072), (128, 3072, 768)]  # rows, inputs, outputs
BURST_SECONDS = 0.01
Calls = dict[str, Callable[[], Any]]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="bursts of each kernel")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for target in ("host", "wasm"):
        for shape in SHAPES[: options.shapes]:
            with tempfile.TemporaryDirectory() as folder:
                calls = kernels(shape, machine_for(get_target(target)), Path(folder))
                calls |= peers(shape) if target == "host" else {}
                row = {"target": target, "shape": list(shape), **measured(calls, options.rounds)}
            results.append(row)
            show(row)
    print(write("tvm_kernels", {"rounds": options.rounds, "threads": 1, "rows": results}))


def arrays(shape: tuple[int, int, int]) -> tuple[Any, Any, Any]:
    """x, weight, bias."""
    rows, inner, outputs = shape
    random = np.random.default_rng(0)
    made = (random.standard_normal(size) for size in ((rows, inner), (outputs, inner), (outputs,)))
    x, w, b = (array.astype(np.float32) for array in made)
    return x, w / np.float32(np.sqrt(inner)), b


def block_sparse(weight: Any, width: int, density: float) -> Any:
    """The weight with only the strongest blocks of `width` outputs x 1 input."""
    blocks = weight.reshape(-1, width, weight.shape[1])
    strength = np.abs(blocks).sum(1)
    limit = np.quantile(strength, 1 - density)
    return (blocks * (strength >= limit)[:, None, :]).reshape(weight.shape)


def shared_pattern(weight: Any, n: int, m: int, width: int) -> Any:
    """The weight with the strongest n of every m inputs of `width` outputs."""
    blocks = weight.reshape(-1, width, weight.shape[1] // m, m)
    order = np.abs(blocks).sum(1).argsort(-1).argsort(-1)
    return (blocks * (order >= m - n)[:, None]).reshape(weight.shape)


def kernels(shape: tuple[int, int, int], machine: Machine, folder: Path) -> Calls:
    """Our kernels, ready to call."""
    rows, inner, outputs = shape
    x, w, b = arrays(shape)
    y = np.zeros((rows, outputs), np.float32)
    bias = pack_bias(b, outputs, machine.columns)
    functions = {"dense": dense("dense", *shape, machine)}
    given: dict[str, list[Any]] = {"dense": [x, pack_dense(w, machine.columns), bias, y]}
    for width in (4, 8, 16):
        for kept in (30, 20, 10):
            name = f"bsr{width}x1_{kept}"
            packed = pack_bsr(block_sparse(w, width, kept / 100), width)
            functions[name] = bsr(name, *shape, len(packed.values), width, machine)
            given[name] = [x, packed.values, packed.inputs, packed.starts, pack_bias(b, outputs, width), y]
    for width in (4, 8):
        name = f"nm24_shared{width}"
        shared = pack_nm(shared_pattern(w, 2, 4, width), 2, 4, width)
        assert str(shared.inputs.dtype) == index_dtype(inner)
        functions[name] = nm(name, *shape, 2, 4, width, machine)
        given[name] = [x, shared.values, shared.inputs, pack_bias(b, outputs, width), y]
    codes = np.random.default_rng(1).integers(-127, 128, (outputs, inner)).astype(np.int8)
    dot, size = preferred(machine), Product(rows, inner, outputs)
    q = np.random.default_rng(2).integers(0, 64, (rows, in_groups(inner, dot))).astype(tvm_type(dot.x.dtype))
    kind, count = work_space(size, dot, machine)
    functions["int8"] = dense_int8("int8", size, dot, machine)
    space = [np.zeros(count, kind)] if count else []
    given["int8"] = [q, pack_codes(codes // 2, machine.columns, dot), column_sums(codes, machine.columns), bias, bias]
    given["int8"] += [*space, y]
    wasm = machine.family == "wasm"
    built = write_object(functions.values(), machine, folder / "k.o")
    library = load(link([built], list(functions), machine, folder / f"k{'.wasm' if wasm else '.so'}"))
    return {name: _caller(library, name, given[name]) for name in functions}


def _caller(library: HostLibrary | WasmLibrary, name: str, given: list[Any]) -> Callable[[], Any]:
    if isinstance(library, HostLibrary):
        function = library.function(name, len(given))
        addresses = [array.ctypes.data for array in given]
        return lambda keep=given: function(*addresses)  # the arrays live as long as the call
    places = library.place(given, keep=True)
    for place, array in zip(places, given, strict=True):
        library.memory.write(library.store, array.tobytes(), place)
    function = library.function(name)

    def call() -> None:
        function(library.store, *places)

    return call


def peers(shape: tuple[int, int, int]) -> Calls:
    """The same product in torch and in ONNX Runtime."""
    x, w, b = arrays(shape)
    tensors = [torch.from_numpy(array) for array in (x, w, b)]
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
    graph = helper.make_graph(
        [node], "gemm", [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [x.shape[0], w.shape[0]])],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(b, "b")],
    )  # fmt: skip
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x))
    binding.bind_output("y")
    return {
        "torch": lambda: torch.nn.functional.linear(*tensors),
        "onnxruntime": lambda: session.run_with_iobinding(binding),
    }


def measured(calls: Calls, rounds: int) -> dict[str, Any]:
    """Milliseconds, and how many times as long `dense` takes."""
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.thread_time()
        call()
        repeats[name] = max(3, int(BURST_SECONDS / max(time.thread_time() - start, 1e-6)))
    bursts: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            bursts[name].append(_burst(call, repeats[name]))
    ratios = {}
    for name, times in bursts.items():
        each = sorted(d / t for d, t in zip(bursts["dense"], times, strict=True))
        low, high = each[len(each) // 10], each[-1 - len(each) // 10]
        ratios[name] = {"median": round(statistics.median(each), 3), "low": round(low, 3), "high": round(high, 3)}
    times_ms = {name: float(f"{1e3 * statistics.median(times):.4g}") for name, times in bursts.items()}
    return {"ms": times_ms, "dense_over": ratios}


def _burst(call: Callable[[], Any], repeats: int) -> float:
    call()
    start = time.thread_time()
    for _ in range(repeats):
        call()
    return (time.thread_time() - start) / repeats


def show(row: dict[str, Any]) -> None:
    """A table of one shape."""
    rows, inner, outputs = row["shape"]
    print(f"\n{row['target']}: {rows} x {inner} x {outputs}")
    for name, milliseconds in row["ms"].items():
        ratio = row["dense_over"][name]
        rate = 2e-6 * rows * inner * outputs / milliseconds
        print(
            f"  {name:16} {milliseconds:9.4f} ms {rate:7.1f} GF/s dense"
            f"   dense / this {ratio['median']:6.2f} ({ratio['low']:.2f} ... {ratio['high']:.2f})"
        )


if __name__ == "__main__":
    main()
