"""Forms of an 8-bit embedding table in the installed ONNX Runtime, against the float table.

    python -m benchmarks.embeddings

Random rows at every call, one thread, alternating bursts in one process. The backend writes the form "gather, cast,
mul" (`fxopt/backends/onnxruntime/embedding_forms.py`). Writes results/embeddings.json.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.common import write

TABLES = ((512, 384), (30522, 384), (50257, 768))
LOOKUPS = (1, 128, 1024)
BLOCK = 128  # columns per scale of GatherBlockQuantized, which takes powers of two
Form = tuple[list[Any], dict[str, Any]]


def forms(table: Any) -> dict[str, Form]:
    """Nodes and constants of each form; all but the first give the same numbers."""
    scales = np.abs(table).max(1, keepdims=True) / 127
    codes = np.round(table / scales).astype(np.int8)
    blocks = np.repeat(scales, table.shape[1] // BLOCK, 1)
    node = helper.make_node
    whole = node("DequantizeLinear", ["codes", "row_scales"], ["table"], axis=0)
    blocked = node(
        "GatherBlockQuantized", ["codes", "x", "scales"], ["y"], domain="com.microsoft",
        bits=8, block_size=BLOCK, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    lookups = [node("Gather", ["codes", "x"], ["c"]), node("Gather", ["scales", "x"], ["s"])]
    return {
        "float": ([node("Gather", ["table", "x"], ["y"])], {"table": table}),
        "gather, cast, mul": (
            [*lookups, node("Cast", ["c"], ["f"], to=TensorProto.FLOAT), node("Mul", ["f", "s"], ["y"])],
            {"codes": codes, "scales": scales},
        ),
        "gather, dequantize": (
            [*lookups, node("DequantizeLinear", ["c", "s"], ["y"], axis=0)],
            {"codes": codes, "scales": scales[:, 0]},
        ),
        "GatherBlockQuantized": (
            [blocked],
            {"codes": (codes.astype(np.int16) + 128).astype(np.uint8), "scales": blocks},
        ),
        "dequantize the table, gather": (
            [whole, node("Gather", ["table", "x"], ["y"])],
            {"codes": codes, "row_scales": scales[:, 0]},
        ),
    }


def session(form: Form, folder: Path) -> Any:
    """A session of one thread."""
    from fxopt.backends.onnxruntime.session import make_session

    nodes, weights = form
    body = helper.make_graph(
        nodes,
        "lookup",
        [helper.make_tensor_value_info("x", TensorProto.INT64, [None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    path = folder / "lookup.onnx"
    onnx.save(helper.make_model(body, opset_imports=opsets, ir_version=10), path)
    return make_session(path, 1)


def lookup(runs: Any, rows: int, count: int) -> Callable[[], object]:
    """A call on new random rows each time."""
    generator = np.random.default_rng(0)
    return lambda: runs.run(None, {"x": generator.integers(0, rows, count)})


def compare(shape: tuple[int, int], folder: Path) -> list[dict[str, Any]]:
    """The time of every form over that of the float table."""
    from fxopt.guard import measure

    table = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    sessions = {name: session(form, folder) for name, form in forms(table).items()}
    plain = sessions.pop("float")
    found = []
    for name, runs in sessions.items():
        for count in LOOKUPS:
            timing = measure(lookup(runs, shape[0], count), lookup(plain, shape[0], count), 1.0)
            found.append(
                {
                    "table": list(shape), "lookups": count, "form": name, "over_float": timing.ratio,
                    "microseconds": timing.baseline * 1e6, "float_microseconds": timing.result * 1e6,
                }
            )  # fmt: skip
    return found


def main() -> None:
    """Run, print and write."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = [row for shape in TABLES for row in compare(shape, Path(scratch))]
    for row in rows:
        print(
            f"{row['table']}, {row['lookups']} rows, {row['form']}: {row['microseconds']:.1f} us,"
            f" {row['over_float']:.2f}x of {row['float_microseconds']:.1f} us"
        )
    print(f"written: {write('embeddings', {'embeddings': rows})}")


if __name__ == "__main__":
    main()
