"""Features of ai.onnx.ml: ArrayFeatureExtractor, Binarizer, FeatureVectorizer, Imputer, Normalizer, Scaler."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxopt.errors import InvalidInput
from fxopt.ir.onnx.foreign import host_data, is_foreign
from fxopt.ir.onnx.lane import to_tensor
from fxopt.ir.onnx.references.common import pad_with
from fxopt.ir.onnx.references.ml_scores import as_float, as_rows, vector
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators("ai.onnx.ml")


@operators.reference("ArrayFeatureExtractor", raw=True)
def array_feature_extractor(call: Call, x: Any, indices: Any) -> Any:
    """The entries of x along its last axis, [.., number of indices]; a vector becomes one row."""
    if is_foreign(x):
        taken = np.take(x, host_data(indices).reshape(-1), axis=-1)
        return taken[None] if x.ndim == 1 else taken
    tensor, index = to_tensor(x), to_tensor(indices).reshape(-1)
    return as_rows(tensor.index_select(-1, index))


@operators.reference("Binarizer")
def binarizer(call: Call, x: Tensor, threshold: float = 0.0) -> Tensor:
    """1 where x exceeds the threshold, else 0, in the type of x."""
    return (x > threshold).to(x.dtype)


@operators.reference("FeatureVectorizer")
def feature_vectorizer(call: Call, *parts: Tensor, inputdimensions: list[int] | None = None) -> Tensor:
    """The parts ([N, C] or [C]) side by side as float32, each cut or padded with 0 to its input dimension."""
    rows = [as_rows(part).to(torch.float32) for part in parts]
    sizes = inputdimensions or [row.shape[1] for row in rows]
    return torch.cat([pad_with(row, [0, size - row.shape[1]]) for row, size in zip(rows, sizes, strict=True)], 1)


@operators.reference("Imputer")
def imputer(
    call: Call,
    x: Tensor,
    imputed_value_floats: list[float] | None = None,
    imputed_value_int64s: list[int] | None = None,
    replaced_value_float: float = 0.0,
    replaced_value_int64: int = 0,
) -> Tensor:
    """x [.., F] with what equals the replaced value (NaN included) replaced by one value, or one per feature.

    Raises:
        InvalidInput: there is no value to impute.
    """
    values: Any = imputed_value_floats if x.is_floating_point() else imputed_value_int64s
    if not values:
        kind = "imputed_value_floats" if x.is_floating_point() else "imputed_value_int64s"
        raise InvalidInput(f"Imputer of {x.dtype} needs the attribute {kind}")
    replaced: Any = replaced_value_float if x.is_floating_point() else replaced_value_int64
    missing = torch.isnan(x) if replaced != replaced else x == replaced
    return torch.where(missing, torch.tensor(values, dtype=x.dtype, device=x.device), x)


@operators.reference("Normalizer")
def normalizer(call: Call, x: Tensor, norm: str = "MAX") -> Tensor:
    """Every row of x divided by its maximum, its sum of magnitudes (L1) or its length (L2), as float32; not by 0.

    Raises:
        InvalidInput: there is no such norm.
    """
    wide = as_float(x)
    if str(norm) not in ("MAX", "L1", "L2"):
        raise InvalidInput(f"norm {norm!r} given; expected 'MAX', 'L1' or 'L2'")
    if str(norm) == "MAX":
        divisor = wide.amax(-1, keepdim=True)
    else:
        divisor = torch.linalg.vector_norm(wide, 1 if str(norm) == "L1" else 2, -1, keepdim=True)
    return torch.where(divisor == 0, wide, wide / divisor).to(torch.float32)


@operators.reference("Scaler")
def scaler(call: Call, x: Tensor, offset: list[float] | None = None, scale: list[float] | None = None) -> Tensor:
    """(x - offset) * scale as float32, with one number or one per feature."""
    wide = as_float(x)
    shifted = wide - vector(offset, wide) if offset else wide
    return (shifted * vector(scale, wide) if scale else shifted).to(torch.float32)
