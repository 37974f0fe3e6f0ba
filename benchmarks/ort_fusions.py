"""Fusions that ONNX Runtime makes by itself, against what they replace, in the installed version.

    python -m benchmarks.ort_fusions

SkipLayerNormalization against Add followed by LayerNormalization, one thread, alternating bursts in one process. The
backend avoids a fusion whose ratio is clearly above 1 (`fxopt/backends/onnxruntime/backend.py`).
Writes results/ort_fusions.json.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.common import write

SHAPES = ((1, 128, 384), (8, 128, 384), (1, 128, 768), (1, 512, 1024), (1, 16, 64))
REPEATS = 12  # layers in a row, so that the session's overhead does not count


def model(shape: tuple[int, int, int], fused: bool) -> onnx.ModelProto:
    """REPEATS times: h = LayerNorm(h + skip)."""
    width = shape[-1]
    generator = np.random.default_rng(0)
    weights = {
        "g": generator.normal(size=width).astype(np.float32),
        "b": generator.normal(size=width).astype(np.float32),
    }
    nodes = []
    for index in range(REPEATS):
        source, result = ("x" if index == 0 else f"h{index}"), ("y" if index == REPEATS - 1 else f"h{index + 1}")
        if fused:
            nodes.append(
                helper.make_node(
                    "SkipLayerNormalization", [source, "skip", "g", "b"], [result], domain="com.microsoft", epsilon=1e-5
                )
            )
        else:
            nodes.append(helper.make_node("Sum", [source, "skip"], [f"s{index}"]))
            nodes.append(helper.make_node("LayerNormalization", [f"s{index}", "g", "b"], [result], epsilon=1e-5))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name in ("x", "skip", "y")]
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    body = helper.make_graph(nodes, "norms", values[:2], values[2:], constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(body, opset_imports=opsets, ir_version=10)


def compare(shape: tuple[int, int, int], folder: Path) -> dict[str, Any]:
    """The ratio of SkipLayerNormalization to its parts."""
    from fxopt.backends.onnxruntime.session import make_session
    from fxopt.guard import measure

    generator = np.random.default_rng(1)
    feeds = {name: generator.normal(size=shape).astype(np.float32) for name in ("x", "skip")}
    calls = []
    for fused in (True, False):
        path = folder / f"{fused}.onnx"
        onnx.save(model(shape, fused), path)
        session = make_session(path, 1)
        calls.append(lambda s=session: s.run(None, feeds))  # type: ignore[misc]
    timing = measure(calls[0], calls[1], 3.0)
    return {"shape": list(shape), "fused_over_parts": timing.ratio, "low": timing.low, "high": timing.high}


def main() -> None:
    """Run, print and write."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = [compare(shape, Path(scratch)) for shape in SHAPES]
    for row in rows:
        print(f"SkipLayerNormalization {row['shape']}: {row['fused_over_parts']:.2f}x of Sum + LayerNormalization")
    print(f"written: {write('ort_fusions', {'skip_layer_normalization': rows})}")


if __name__ == "__main__":
    main()
