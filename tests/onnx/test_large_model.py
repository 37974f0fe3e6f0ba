"""Large external weights stay memory maps: exact passes, verification and writing need no memory of their size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fxopt.ir.onnx.external_writer import refer

LAYERS, WIDTH = 50, 1024  # 4 MiB each, 200 MiB in all
PROGRAM = """
import sys
from pathlib import Path

def anonymous(name="VmHWM"):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return sum(int(lines[key].split()[0]) for key in ("RssAnon", "RssShmem")) / 1024

import threading, time
import fxopt
from fxopt.cost_model.targets import get_target
from fxopt.frontends.onnx import load
from fxopt.ir.onnx.export import save
from fxopt.ir.shapes import infer
from fxopt.ir.verify import NumericCheck, synthetic_sample
from fxopt.passes.base import Context
from fxopt.passes.manager import PassManager
from fxopt.passes.pipelines import exact_pipeline

def work(source, target):
    graph = load(source)
    infer(graph, {"n": 2})
    check = NumericCheck.of(graph, synthetic_sample(graph.inputs, {"n": 2}))
    assert PassManager(exact_pipeline()).run(graph, Context(get_target("x86-avx2")), check)
    save(graph, target)

peak = [0.0]
def sample():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

folder = Path(sys.argv[1])
work(folder / "small.onnx", folder / "small-out.onnx")  # what the libraries themselves need
before = anonymous()
threading.Thread(target=sample, daemon=True).start()
work(folder / "large.onnx", folder / "large-out.onnx")
print(peak[0] - before)
"""


def written(path: Path, layers: int) -> onnx.ModelProto:
    """Layers of MatMul, Relu and an Identity to remove, with their weights in `path`.data."""
    rng = np.random.default_rng(0)
    nodes, weights, data = [], [], Path(f"{path}.data")
    with data.open("wb") as file:
        for index in range(layers):
            tensor = TensorProto(name=f"w{index}", data_type=TensorProto.FLOAT, dims=[WIDTH, WIDTH])
            tensor.doc_string = "kept"
            refer(tensor, data.name, file.tell(), 4 * WIDTH * WIDTH)
            file.write((rng.standard_normal((WIDTH, WIDTH), np.float32) / 32).tobytes())
            weights.append(tensor)
            names = [f"h{index}", f"a{index}", f"r{index}", f"h{index + 1}"]
            nodes.append(helper.make_node("MatMul", [names[0], f"w{index}"], [names[1]], name=f"matmul{index}"))
            nodes.append(helper.make_node("Relu", [names[1]], [names[2]], name=f"relu{index}", doc_string="kept"))
            nodes.append(helper.make_node("Identity", [names[2]], [names[3]], name=f"identity{index}"))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in ("h0", f"h{layers}")]
    body = helper.make_graph(nodes, "large", values[:1], values[1:], doc_string="kept")
    body.initializer.extend(weights)
    body.value_info.append(helper.make_tensor_value_info("a0", TensorProto.FLOAT, ["n", WIDTH]))
    body.value_info.append(helper.make_tensor_value_info("r0", TensorProto.FLOAT, ["n", WIDTH]))
    note = body.quantization_annotation.add(tensor_name="a0")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w0")
    made = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10, doc_string="kept")
    made.metadata_props.add(key="who", value="me")
    made.training_info.add().initialization.name = "kept"
    path.write_bytes(made.SerializeToString())
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("large")
    written(found / "small.onnx", 1)
    written(found / "large.onnx", LAYERS)
    ran = subprocess.run([sys.executable, "-c", PROGRAM, str(found)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    (found / "peak").write_text(ran.stdout)
    return found


def test_memory(folder: Path) -> None:
    peak = float((folder / "peak").read_text())
    assert peak < 60, f"{peak:.0f} MiB for {4 * LAYERS} MiB of weights, of which the largest has 4"


def test_nothing_is_lost(folder: Path) -> None:
    before, after = (onnx.load(folder / name, load_external_data=False) for name in ("large.onnx", "large-out.onnx"))
    for name in ("metadata_props", "training_info", "doc_string", "opset_import"):
        assert getattr(before, name) == getattr(after, name), name
    for name in ("quantization_annotation", "doc_string", "input", "output"):
        assert getattr(before.graph, name) == getattr(after.graph, name), name
    assert "a0" in {item.name for item in after.graph.value_info}
    relu = [node for node in after.graph.node if node.op_type == "Relu"]
    assert len(relu) == LAYERS and all(node.doc_string == "kept" for node in relu)
    assert [tensor.doc_string for tensor in after.graph.initializer] == ["kept"] * LAYERS
    assert not [node for node in after.graph.node if node.op_type == "Identity"]
    old = np.memmap(folder / "large.onnx.data", np.uint8, "r")
    new = np.memmap(folder / "large-out.onnx.data", np.uint8, "r")
    for tensor in after.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        start, size = int(entries["offset"]), int(entries["length"])
        index = int(tensor.name[1:])
        assert np.array_equal(new[start : start + size], old[index * size : (index + 1) * size])
