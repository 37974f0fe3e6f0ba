"""A model written tensor by tensor is the message that protobuf writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from fxopt.errors import Unsupported
from fxopt.ir.onnx import message_writer
from fxopt.ir.onnx.dtypes import FROM_TORCH
from fxopt.ir.onnx.message_writer import write_message

VALUES = {
    "matrix": torch.arange(300, dtype=torch.float32).reshape(20, 15),
    "turned": torch.arange(12, dtype=torch.int64).reshape(3, 4).T,
    "half": torch.ones(129, dtype=torch.bfloat16),
    "scalar": torch.tensor(3, dtype=torch.int32),
    "none": torch.empty(0, 7),
}


def model() -> ModelProto:
    """Initializers with and without their bytes, by turns."""
    body = helper.make_graph([helper.make_node("Identity", ["matrix"], ["y"])], "g", [], [])
    body.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [20, 15]))
    for name, value in VALUES.items():
        body.initializer.append(TensorProto(name=name, data_type=FROM_TORCH[value.dtype], dims=list(value.shape)))
        body.initializer[-1].doc_string = f"the {name}"
        body.initializer.append(numpy_helper.from_array(np.arange(5), f"small_{name}"))
    made = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10, doc_string="about")
    made.metadata_props.add(key="who", value="me")
    return made


def test_equals_the_message(tmp_path: Path) -> None:
    expected = model()
    for tensor in expected.graph.initializer:
        if tensor.name in VALUES:
            tensor.raw_data = VALUES[tensor.name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    write_message(model(), VALUES, tmp_path / "model.onnx")
    assert onnx.load(tmp_path / "model.onnx") == expected
    assert (tmp_path / "model.onnx").stat().st_size == expected.ByteSize()


def test_refuses_what_no_message_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_writer, "_MOST_BYTES", 1000)
    with pytest.raises(Unsupported, match="bytes do not fit into one protobuf message; save the model with external data"):
        write_message(model(), VALUES, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
