"""ONNX Runtime's operators that forms use, in numpy, for the reference evaluator of ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun


class MatMulIntegerToFloat(OpRun):
    """(a - a_zero) @ (b - b_zero) * a_scale * b_scale + bias, as its documentation defines it."""

    op_domain = "com.microsoft"

    def _run(
        self, a: Any, b: Any, a_scale: Any, b_scale: Any, a_zero: Any = None, b_zero: Any = None, bias: Any = None
    ) -> tuple[Any]:
        left = a.astype(np.int64) - (0 if a_zero is None else a_zero.astype(np.int64))
        right = b.astype(np.int64) - (0 if b_zero is None else b_zero.astype(np.int64))
        y = (left @ right).astype(np.float32) * (a_scale * b_scale)
        return ((y if bias is None else y + bias).astype(np.float32),)


def evaluator(model: ModelProto) -> ReferenceEvaluator:
    """The specification's evaluator, which knows these operators."""
    return ReferenceEvaluator(model, new_ops=[MatMulIntegerToFloat])
