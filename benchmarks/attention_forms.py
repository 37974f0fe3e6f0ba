"""The operators that ONNX Runtime has for attention, against its parts, in the installed version.

    python -m benchmarks.attention_forms

Each row is a stack of layers of one kind, one thread, alternating bursts in one process. What is clearly faster than
the parts is what fuse-attention-heads writes (`fxopt/backends/onnxruntime/backend.py`); what is not is refused there.
Writes results/attention_forms.json.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.bursts import local, race
from benchmarks.common import write

SECONDS = 6.0  # per row
LAYERS = 4
# batch, length, heads, width
SELF = ((1, 16, 12, 32), (1, 128, 12, 32), (1, 128, 12, 64), (4, 32, 12, 32), (1, 512, 12, 64))
# batch, heads, shared heads, queries, keys, width
GROUPED = ((1, 32, 8, 1, 128, 64), (1, 32, 8, 1, 1024, 64), (1, 16, 4, 128, 128, 64), (1, 8, 1, 256, 256, 64))
CAPPED = ((1, 32, 4, 16), (1, 128, 8, 64), (1, 256, 8, 128))  # batch, length, heads, width
MASKS = ("none", "padding")
FORMS = ("parts", "Attention", "Attention of one product", "MultiHeadAttention", "com.microsoft.Attention")


@dataclass
class Made:
    """Nodes and constants of a model that is being written."""

    nodes: list[onnx.NodeProto]
    constants: dict[str, Any]

    def node(self, op_type: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        """One more node; returns the name of its result."""
        self.nodes.append(helper.make_node(op_type, inputs, [output], domain=domain, **attributes))
        return output

    def constant(self, name: str, value: Any) -> str:
        """A constant; returns its name."""
        self.constants[name] = np.asarray(value)
        return name

    def linear(self, x: str, name: str, output: str) -> str:
        """x @ weight + bias"""
        return self.node("Add", [self.node("MatMul", [x, f"w_{name}"], f"{output}_product"), f"b_{name}"], output)

    def heads(self, x: str, heads: int, width: int, perm: list[int]) -> str:
        """[batch, length, heads * width] with the heads on an axis of their own."""
        shape = self.constant("heads", np.array([0, 0, heads, width], np.int64))
        return self.node("Transpose", [self.node("Reshape", [x, shape], f"{x}_4")], f"{x}_t", perm=perm)


def self_attention(form: str, shape: tuple[int, int, int, int], mask: str) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """LAYERS times: projections of x and attention over them."""
    batch, length, heads, width = shape
    size = heads * width
    generator = np.random.default_rng(0)
    made = Made([], {})
    weights = {name: (generator.normal(size=(size, size)) / np.sqrt(size)).astype(np.float32) for name in "qkv"}
    biases = {name: (0.1 * generator.normal(size=size)).astype(np.float32) for name in "qkv"}
    for name in "qkv":
        made.constant(f"w_{name}", weights[name])
        made.constant(f"b_{name}", biases[name])
    made.constant("w_qkv", np.concatenate([weights[name] for name in "qkv"], 1))
    made.constant("b_qkv", np.concatenate([biases[name] for name in "qkv"]))
    keeps = np.ones((batch, length), bool)
    keeps[:, length - length // 8 :] = False
    whole = np.broadcast_to(keeps[:, None, None], (batch, 1, length, length))
    masks = {"boolean": whole, "added": np.where(whole, 0, -1e30).astype(np.float32), "rows": keeps.astype(np.int32)}
    x = "x"
    for layer in range(LAYERS):
        x = one_layer(made, form, x, "y" if layer == LAYERS - 1 else f"h{layer}", layer, shape, mask)
    feeds = {"x": generator.normal(size=(batch, length, size)).astype(np.float32)}
    taken = {name for node in made.nodes for name in node.input}
    feeds |= {name: np.ascontiguousarray(value) for name, value in masks.items() if name in taken}
    return model(made, feeds, [batch, length, size]), feeds


def one_layer(made: Made, form: str, x: str, y: str, layer: int, shape: tuple[int, int, int, int], mask: str) -> str:
    """One layer in one form."""
    _, _, heads, width = shape
    if form == "com.microsoft.Attention":
        inputs = [x, "w_qkv", "b_qkv", *(["rows"] if mask != "none" else [])]
        return made.node("Attention", inputs, y, "com.microsoft", num_heads=heads)
    if form == "Attention of one product":
        packed = made.linear(x, "qkv", f"packed{layer}")
        made.constant("sizes", np.array([heads * width] * 3, np.int64))
        parts = [f"{name}{layer}" for name in "qkv"]
        made.nodes.append(helper.make_node("Split", [packed, "sizes"], parts, axis=-1))
    else:
        parts = [made.linear(x, name, f"{name}{layer}") for name in "qkv"]
    if form == "MultiHeadAttention":
        inputs = [*parts, *(["", "", "added"] if mask != "none" else [])]
        return made.node("MultiHeadAttention", inputs, y, "com.microsoft", num_heads=heads)
    if form.startswith("Attention"):
        inputs = [*parts, *(["boolean"] if mask != "none" else [])]
        return made.node("Attention", inputs, y, q_num_heads=heads, kv_num_heads=heads)
    q, v = (made.heads(part, heads, width, [0, 2, 1, 3]) for part in (parts[0], parts[2]))
    k = made.heads(parts[1], heads, width, [0, 2, 3, 1])
    scores = made.node("MatMul", [q, k], f"s{layer}")
    scores = made.node("Mul", [scores, made.constant("scale", np.float32(width**-0.5))], f"t{layer}")
    if mask != "none":
        scores = made.node("Add", [scores, "added"], f"a{layer}")
    mixed = made.node("MatMul", [made.node("Softmax", [scores], f"p{layer}"), v], f"m{layer}")
    turned = made.node("Transpose", [mixed], f"n{layer}", perm=[0, 2, 1, 3])
    return made.node("Reshape", [turned, made.constant("joined", np.array([0, 0, heads * width], np.int64))], y)


def grouped(form: str, shape: tuple[int, int, int, int, int, int]) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Attention of heads that share keys and values: repeated before it, or shared in it."""
    batch, heads, shared, queries, keys, width = shape
    generator = np.random.default_rng(0)
    made = Made([], {})
    sizes = {"q": (batch, heads, queries, width), "k": (batch, shared, keys, width), "v": (batch, shared, keys, width)}
    feeds = {name: generator.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    k, v = "k", "v"
    if form != "Attention of shared heads":
        made.constant("two", np.array([2], np.int64))
        made.constant("wide", np.array([batch, shared, heads // shared, keys, width], np.int64))
        made.constant("all", np.array([batch, heads, keys, width], np.int64))
        k, v = (repeated(made, x) for x in "kv")
    if form == "parts of repeated heads":
        made.constant("scale", np.float32(width**-0.5))
        scores = made.node("MatMul", ["q", made.node("Transpose", [k], "kt", perm=[0, 1, 3, 2])], "s")
        made.node("MatMul", [made.node("Softmax", [made.node("Mul", [scores, "scale"], "t")], "p"), v], "y")
    else:
        made.node("Attention", ["q", k, v], "y")
    return model(made, feeds, list(sizes["q"])), feeds


def capped(form: str, shape: tuple[int, int, int, int]) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Attention whose scores have a soft cap of 50."""
    batch, length, heads, width = shape
    generator = np.random.default_rng(0)
    made, size = Made([], {}), (batch, heads, length, width)
    feeds = {name: generator.normal(size=size).astype(np.float32) for name in "qkv"}
    if form == "Attention":
        made.node("Attention", ["q", "k", "v"], "y", softcap=50.0)
        return model(made, feeds, list(size)), feeds
    made.constant("scale", np.float32(width**-0.5 / 50))
    made.constant("cap", np.float32(50))
    scores = made.node("MatMul", ["q", made.node("Transpose", ["k"], "kt", perm=[0, 1, 3, 2])], "s")
    curve = made.node("Tanh", [made.node("Mul", [scores, "scale"], "t")], "c")
    made.node("MatMul", [made.node("Softmax", [made.node("Mul", [curve, "cap"], "f")], "p"), "v"], "y")
    return model(made, feeds, list(size)), feeds


def repeated(made: Made, x: str) -> str:
    """Each head several times in a row."""
    wide = made.node("Expand", [made.node("Unsqueeze", [x, "two"], f"{x}_u"), "wide"], f"{x}_e")
    return made.node("Reshape", [wide, "all"], f"{x}_r")


def model(made: Made, feeds: dict[str, Any], result: list[int]) -> onnx.ModelProto:
    """The model of these nodes."""
    kinds = {"bool": TensorProto.BOOL, "int32": TensorProto.INT32, "float32": TensorProto.FLOAT}
    inputs = [
        helper.make_tensor_value_info(name, kinds[value.dtype.name], list(value.shape)) for name, value in feeds.items()
    ]
    taken = {name for node in made.nodes for name in node.input}
    constants = [numpy_helper.from_array(value, name) for name, value in made.constants.items() if name in taken]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, result)
    body = helper.make_graph(made.nodes, "attention", inputs, [output], constants)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(body, opset_imports=opsets, ir_version=10)


def compare(models: dict[str, tuple[onnx.ModelProto, dict[str, Any]]], base: str, folder: Path) -> dict[str, Any]:
    """The speed of every form over that of `base`, and how far its result is from that of `base`."""
    from fxopt.backends.onnxruntime.session import make_session

    calls, results = {}, {}
    for number, (name, (proto, feeds)) in enumerate(models.items()):
        path = folder / f"{number}.onnx"
        onnx.save(proto, path)
        session = make_session(path, 1)
        results[name] = session.run(None, feeds)[0]
        calls[name] = local(lambda session=session, feeds=feeds: session.run(None, feeds))
    rows = race(calls, base, SECONDS)
    for name, row in rows.items():
        row["largest_difference"] = float(np.abs(results[name] - results[base]).max())
    return rows


def main() -> None:
    """Run, print and write."""
    found: dict[str, Any] = {"self_attention": [], "grouped": [], "capped": []}
    with tempfile.TemporaryDirectory() as scratch:
        for shape in SELF:
            for mask in MASKS:
                models = {form: self_attention(form, shape, mask) for form in FORMS}
                row = {"shape": list(shape), "mask": mask, "speed": compare(models, "parts", Path(scratch))}
                found["self_attention"].append(row)
                show(row)
        for sizes in GROUPED:
            names = ("parts of repeated heads", "Attention of repeated heads", "Attention of shared heads")
            rows = compare({name: grouped(name, sizes) for name in names}, names[0], Path(scratch))
            found["grouped"].append({"shape": list(sizes), "speed": rows})
            show(found["grouped"][-1])
        for capped_shape in CAPPED:
            rows = compare({form: capped(form, capped_shape) for form in FORMS[:2]}, "parts", Path(scratch))
            found["capped"].append({"shape": list(capped_shape), "speed": rows})
            show(found["capped"][-1])
    print(f"written: {write('attention_forms', found)}")


def show(row: dict[str, Any]) -> None:
    """One line per row."""
    speeds = ", ".join(f"{name} {speed['ratio_of_medians']:.2f}" for name, speed in row["speed"].items())
    print(f"{row['shape']} {row.get('mask', '')}: {speeds}", flush=True)


if __name__ == "__main__":
    main()
