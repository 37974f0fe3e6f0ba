"""The text form of a graph: a Python file that can be read, run, edited, and parsed back.

    @graph(
        origin="onnx",
        inputs=[("x", "float32", ["batch", 64])],
        outputs=[("y", "float32", ["batch", 10])],
    )
    def main(x):
        w = const("k_w")                  # float32[64, 10]
        y = onnx("", "MatMul", 13)(x, w)  # float32[batch, 10]   /fc/MatMul
        return (y,)

`python graph.py [inputs.npz] [batch=4]` runs it. A variable's annotation is the node's name where Python or one of the
helpers of this module has that name. Constants lie in `constants.safetensors` beside the text. How a torch-born model's
forward is called (`Graph.call_spec`) is not part of the text: a saved folder keeps it in its manifest.

Here are the names that others use, and those that a text imports: `text_writer` writes, `text_parser` reads,
`text_files` has the files, and `text_run` the helpers of a text that runs.
"""

from __future__ import annotations

from fxopt.ir.text_files import constants_of, load_text, save_text
from fxopt.ir.text_parser import from_text
from fxopt.ir.text_run import attribute, const, graph, onnx, opaque, ops, overload, run_file, subgraph
from fxopt.ir.text_writer import DimNames, to_text

__all__ = [
    "DimNames", "attribute", "const", "constants_of", "from_text", "graph", "load_text", "onnx", "opaque", "ops",
    "overload", "run_file", "save_text", "subgraph", "to_text",
]  # fmt: skip
