"""The feed-forward part of an encoder block in 8 bits on this CPU, one thread: fused kernels against stock ones.

    python -m benchmarks.fused_int8 [--rounds 20]

Both sides take bytes and a float residual and give the block's float result and its bytes: product, bias, GELU,
rounding; product, bias, residual, layer norm, rounding. ONNX Runtime runs them as MatMulIntegerToFloat, Gelu,
QuantizeLinear and MatMulIntegerToFloat, Sum, LayerNormalization, QuantizeLinear (static scales; `Sum`, since its fused
SkipLayerNormalization is slower in some versions). Alternating bursts; medians over rounds of each round's least time.
Writes benchmarks/results/fused_int8.json.
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
from onnx import TensorProto, helper, numpy_helper

from benchmarks.common import write
from fxopt.backends.tvm.kernels.fused_int8 import PARAMETERS, Form, fused_int8, pack, starts_of, tile_for
from fxopt.backends.tvm.link import link
from fxopt.backends.tvm.load import HostLibrary
from fxopt.backends.tvm.lower import write_object
from fxopt.backends.tvm.machine import machine_for
from fxopt.cost_model.targets import get_target

ZERO, SCALE = 120, 0.02  # of every tensor of bytes
SHAPES = ((128, 384, 1536), (1024, 384, 1536), (128, 768, 3072))  # rows, size, inner
Arrays = dict[str, Any]


def operands(rows: int, size: int, inner: int) -> Arrays:
    """Bytes, residual, two weights with scales and biases, gamma and beta."""
    random = np.random.default_rng(0)
    made: Arrays = {
        "q": random.integers(0, 256, (rows, size)).astype(np.uint8),
        "residual": random.standard_normal((rows, size)).astype(np.float32),
        "gamma": random.uniform(0.5, 1.5, size).astype(np.float32),
        "beta": random.standard_normal(size).astype(np.float32),
    }
    for name, outputs, inputs in (("1", inner, size), ("2", size, inner)):
        made["c" + name] = random.integers(-127, 128, (outputs, inputs)).astype(np.int8)
        made["s" + name] = (random.uniform(0.5, 1, outputs) / 60 / np.sqrt(inputs)).astype(np.float32)
        made["b" + name] = random.standard_normal(outputs).astype(np.float32)
    return made


def fused(given: Arrays, folder: Path) -> tuple[dict[str, Callable[[], None]], list[Any]]:
    """Our two calls, and the arrays they write: hidden bytes, y, bytes of y."""
    (rows, size), inner = given["q"].shape, given["c1"].shape[0]
    host = machine_for(get_target("host"))
    forms = {"up": Form(size, inner, "gelu", False, True), "down": Form(inner, size, "layer_norm", True, True)}
    built = write_object([fused_int8(name, form, host) for name, form in forms.items()], host, folder / "k.o")
    library = HostLibrary(link([built], list(forms), host, folder / "k.so"))
    hidden, y = np.zeros((rows, inner), np.uint8), np.zeros((rows, size), np.float32)
    codes = np.zeros((rows, size), np.uint8)
    calls = {}
    for (name, form), digit, q, result in zip(forms.items(), "12", (given["q"], hidden), (hidden, codes), strict=True):
        weight, tile = given["c" + digit], tile_for(form.outputs, host)
        arrays = {
            **given, "rows": np.array([rows], np.int32), "q": q, "w": pack(weight, tile),
            "starts": starts_of(weight, ZERO, tile), "scales": given["s" + digit] * np.float32(SCALE),
            "bias": given["b" + digit], "y": y, "codes": result, "zero": np.array([ZERO], np.float32),
            "inverse": np.full(form.outputs, 1 / SCALE, np.float32),
        }  # fmt: skip
        kept = [arrays[key] for key in PARAMETERS]
        function = library.function(name, len(kept))
        addresses = [array.ctypes.data for array in kept]
        calls[name] = lambda f=function, a=addresses, keep=kept: f(*a)
    return calls, [hidden, y, codes]


def stock(given: Arrays) -> dict[str, Callable[[], Any]]:
    """ONNX Runtime's kernels of the same two halves."""
    initial = {"scale": np.float32(SCALE), "zero": np.uint8(ZERO), "gamma": given["gamma"], "beta": given["beta"]}
    calls: dict[str, Callable[[], Any]] = {}
    for name, digit in (("up", "1"), ("down", "2")):
        weight = np.ascontiguousarray(given["c" + digit].T)
        zeros = np.zeros(weight.shape[1], np.int8)
        held = {**initial, "w": weight, "ws": given["s" + digit], "wz": zeros, "b": given["b" + digit]}
        names = ["q", "w", "scale", "ws", "zero", "wz", "b"]
        nodes = [helper.make_node("MatMulIntegerToFloat", names, ["m"], domain="com.microsoft")]
        if name == "up":
            nodes.append(helper.make_node("Gelu", ["m"], ["y"]))
        else:
            nodes.append(helper.make_node("Sum", ["m", "residual"], ["t"]))
            nodes.append(helper.make_node("LayerNormalization", ["t", "gamma", "beta"], ["y"], axis=-1, epsilon=1e-5))
        nodes.append(helper.make_node("QuantizeLinear", ["y", "scale", "zero"], ["codes"]))
        used = {item for node in nodes for item in node.input}
        value = helper.make_tensor_value_info
        inputs = [value("q", TensorProto.UINT8, [None, weight.shape[0]])]
        outputs = [value("codes", TensorProto.UINT8, None)]
        if name == "down":
            inputs.append(value("residual", TensorProto.FLOAT, [None, weight.shape[1]]))
            outputs.append(value("y", TensorProto.FLOAT, None))
        tensors = [numpy_helper.from_array(np.asarray(array), key) for key, array in held.items() if key in used]
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, tensors), opset_imports=opsets)
        model.ir_version = 10
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = 1
        session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
        feed = {"q": given["q"]} if name == "up" else {"q": calls["up"]()[0], "residual": given["residual"]}
        calls[name] = lambda s=session, f=feed: s.run(None, f)
    return calls


def least(call: Callable[[], Any], repeats: int = 10) -> float:
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def compared(shape: tuple[int, int, int], rounds: int, folder: Path) -> dict[str, Any]:
    """Microseconds of the halves on both sides, their ratio, and how far the results lie apart."""
    given = operands(*shape)
    ours, (hidden, y, codes) = fused(given, folder)
    theirs = stock(given)
    calls = {("fused", name): call for name, call in ours.items()}
    calls |= {("stock", name): call for name, call in theirs.items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            times[key].append(least(call))
    medians = {key: 1e6 * statistics.median(values) for key, values in times.items()}
    their_hidden, (their_codes, their_y) = theirs["up"]()[0], theirs["down"]()
    operations = 2 * shape[0] * shape[1] * shape[2]
    row: dict[str, Any] = {"shape": list(shape)}
    for name in ours:
        here, there = medians["fused", name], medians["stock", name]
        row[name] = {"fused_us": here, "stock_us": there, "ratio": there / here, "fused_gops": operations / here / 1e3}
    row["ratio"] = sum(medians["stock", name] for name in ours) / sum(medians["fused", name] for name in ours)
    row["difference"] = {
        "hidden_bytes": int(np.abs(hidden.astype(int) - their_hidden).max()),
        "bytes": int(np.abs(codes.astype(int) - their_codes).max()),
        "y": float(np.abs(y - their_y).max()),
    }
    return row


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    rows = []
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            row = compared(shape, options.rounds, Path(folder))
        rows.append(row)
        for name in ("up", "down"):
            half = row[name]
            print(
                f"{shape} {name:5} fused {half['fused_us']:8.1f} us ({half['fused_gops']:.0f} GOP/s)"
                f"  stock {half['stock_us']:8.1f} us  {half['ratio']:.2f}x"
            )
        print(f"{shape} both  {row['ratio']:.2f}x, differences {row['difference']}", flush=True)
    print(write("fused_int8", {"threads": 1, "rounds": options.rounds, "rows": rows}))


if __name__ == "__main__":
    main()
