"""Export a trained example model to one ONNX file, check it, and record how it was made."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxscript.optimizer
import torch
from torch import Tensor, nn

OPSET = 20
TOLERANCE = 1e-4
# Exporter metadata that quotes source files by their absolute path.
_STACK_TRACE = "pkg.torch.onnx.stack_trace"


def export_onnx(
    model: nn.Module,
    input_name: str,
    inputs: Sequence[Tensor],
    dynamic: dict[int, Any],
    path: Path,
    *,
    fold_batch_norm: bool = True,
) -> None:
    """Write `model`, whose output is named "logits", to `path` and check that ONNX Runtime agrees with torch.

    The first of `inputs` is traced; the check runs on all of them. `dynamic` maps axes of the input to
    `torch.export.Dim`s. With `fold_batch_norm` false, constants are folded but the exporter's rewrites are left out:
    they would merge batch normalisation into the convolutions.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    model = model.eval()
    program = torch.onnx.export(
        model,
        (inputs[0],),
        dynamo=True,
        opset_version=OPSET,
        input_names=[input_name],
        output_names=["logits"],
        dynamic_shapes=(dynamic,),
        optimize=fold_batch_norm,
        verbose=False,
    )
    assert program is not None
    if not fold_batch_norm:
        onnxscript.optimizer.fold_constants(program.model)
        onnxscript.optimizer.remove_unused_nodes(program.model)
    program.save(path, external_data=False)
    _remove_stack_traces(path)
    _check(model, input_name, inputs, path)


def write_record(path: Path, record: dict[str, Any], model: nn.Module) -> None:
    """Write `record`, the model's parameter count and the versions that made it to the JSON file `path`."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxscript": onnxscript.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
    parameters = sum(parameter.numel() for parameter in model.parameters())
    path.write_text(json.dumps({**record, "parameters": parameters, "versions": versions}, indent=2) + "\n")


def _metadata_owners(model: onnx.ModelProto) -> Iterator[Any]:
    """Yield every part of the model that can carry metadata_props."""
    yield model
    graphs: list[Any] = [model.graph, *model.functions]
    for graph in graphs:
        yield graph
        yield from graph.node
        yield from graph.value_info
    yield from model.graph.input
    yield from model.graph.output
    yield from model.graph.initializer


def _remove_stack_traces(path: Path) -> None:
    """Drop the exporter's stack traces from the file: they name paths of the machine that exported it."""
    model = onnx.load(path)
    for owner in _metadata_owners(model):
        kept = [entry for entry in owner.metadata_props if entry.key != _STACK_TRACE]
        del owner.metadata_props[:]
        owner.metadata_props.extend(kept)
    onnx.save(model, path)


def _check(model: nn.Module, input_name: str, inputs: Sequence[Tensor], path: Path) -> None:
    """Raise unless the file is valid, has the wanted names and agrees with torch on every one of `inputs`."""
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in (*session.get_inputs(), *session.get_outputs())]
    if names != [input_name, "logits"]:
        raise ValueError(f"{path.name}: unexpected inputs and outputs {names}")
    for batch in inputs:
        with torch.no_grad():
            expected = model(batch).numpy()
        (actual,) = session.run(["logits"], {input_name: batch.numpy()})
        error = float(np.abs(expected - actual).max())
        if actual.shape != expected.shape or not error <= TOLERANCE:
            raise ValueError(
                f"{path.name}: ONNX Runtime differs from torch by {error:.2e} on input {tuple(batch.shape)}"
            )
