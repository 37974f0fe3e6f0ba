"""`fxopt explain MODEL --pass fuse-attention-heads`: the first condition that failed, by softmax and product."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest

from fxopt.backends.onnxruntime.backend import version

Cli = Callable[..., Any]
BODY = """
    kt = Transpose <perm = [0, 1, 3, 2]> (x)
    s1 = MatMul (x, kt)
    p1 = Softmax <axis = -1> (s1)
    y1 = MatMul (p1, x)
    s2 = MatMul (y1, kt)
    r2 = Relu (s2)
    p2 = Softmax <axis = -1> (r2)
    y2 = MatMul (p2, x)
    s3 = MatMul (y2, kt)
    p3 = Softmax <axis = -1> (s3)
    y3 = MatMul (p3, x)
    m3 = ReduceMax <keepdims = 0> (p3)
    n3 = Relu (y3)
    y = Softmax <axis = -1> (n3)
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 17]> '
        f"attend (float[2, 4, 6, 8] x) => (float[2, 4, 6, 8] y, float m3) {{ {BODY} }}"
    )
    for node in proto.graph.node:
        node.name = f"/layer/{node.output[0]}"
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    return path


def test_every_softmax_has_a_verdict(cli: Cli, model: Path) -> None:
    if version() < (1, 32):
        pytest.skip("Attention is fused for ONNX Runtime 1.32 and later")
    ran = cli("explain", model, "--pass", "fuse-attention-heads", "--json", "-")
    rows = {row["node"]: (row["outcome"], row["reason"]) for row in json.loads(ran.out)["verdicts"]}
    relu = "between q @ k.T and the softmax there is /layer/r2 (Relu), which is not understood"
    twice = "its probabilities /layer/p3 are taken by /layer/y3 (MatMul) and by /layer/m3 (ReduceMax)"
    assert rows["/layer/y1"] == ("applied", "exact rewrite")
    assert rows["/layer/p2"] == ("refused", relu)
    assert rows["/layer/y2"] == ("refused", f"a product around /layer/p2: {relu}")
    assert rows["/layer/p3"] == ("refused", twice)
    assert rows["/layer/s3"] == ("refused", f"a product around /layer/p3: {twice}")
    outcome, reason = rows["/layer/y"]
    assert (outcome, reason) == (
        "no-match", "a softmax that is no attention: its probabilities /layer/y are an output of the model"
    )  # fmt: skip


def test_the_name_before_is_an_error_that_names_the_new_one(cli: Cli, model: Path) -> None:
    ran = cli("explain", model, "--pass", "fuse-attention")
    assert ran.code == 2
    assert "unknown pass 'fuse-attention'" in ran.err
    assert "fuse-attention-heads" in ran.err
