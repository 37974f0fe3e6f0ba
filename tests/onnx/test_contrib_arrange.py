"""Weight-only products, images, look-ups and other operators of `com.microsoft` against ONNX Runtime's kernels."""

from __future__ import annotations

import numpy as np
import pytest

from tests.onnx.node import Case, assert_same, integers, normal, positive, scalar

BOXES = np.array(
    [[0, 0, 1, 1], [0.13, 0.22, 0.81, 0.73], [-0.3, 0.11, 0.64, 1.4], [0.91, 0.83, 0.22, 0.14]], np.float32
)
IMAGE_INDEX = np.array([0, 1, 0, 1], np.int32)

CASES: dict[str, Case] = {
    **{
        f"MatMulBnb4, type {kind}": Case(
            "MatMulBnb4",
            [normal(2, 3, 20), integers(np.uint8, 70, high=256), positive(9)],
            {"K": 20, "N": 7, "block_size": 16, "quant_type": kind},
            constant=frozenset((1, 2)),
        )
        for kind in (0, 1)
    },
    **{
        f"MatMulNBits, {bits} bits with zero points": Case(
            "MatMulNBits",
            [
                *(normal(2, 3, 40), integers(np.uint8, 6, 3, 2 * bits, high=256), positive(6, 3)),
                integers(np.uint8, 6, (3 * bits + 7) // 8, high=256),
            ],
            {"K": 40, "N": 6, "bits": bits, "block_size": 16},
        )
        for bits in (2, 4, 8)
    },
    "MatMulNBits with float zero points": Case(
        "MatMulNBits",
        [normal(2, 32), integers(np.uint8, 6, 2, 8, high=256), positive(6, 2), normal(6, 2)],
        {"K": 32, "N": 6, "bits": 4, "block_size": 16},
    ),
    "MatMulNBits with g_idx": Case(
        "MatMulNBits",
        [
            *(normal(2, 32), integers(np.uint8, 6, 2, 8, high=256), positive(6, 2), None),
            integers(np.int32, 32, high=2),
        ],
        {"K": 32, "N": 6, "bits": 4, "block_size": 16},
    ),
    "MatMulNBits omitted": Case(
        "MatMulNBits",
        [normal(2, 32), np.zeros((0, 2, 8), np.uint8), positive(6, 2), None, None, normal(6)],
        {"K": 32, "N": 6, "bits": 4, "block_size": 16},
    ),
    **{
        f"GatherBlockQuantized, {bits} bits": Case(
            "GatherBlockQuantized",
            [
                *(integers(np.uint8, 7, 32 * bits // 8, high=256), np.array([[0, 6], [-1, 3]], np.int64)),
                positive(7, 2),
                *([integers(np.uint8, 7, (2 * bits + 7) // 8, high=256)] if zero else []),
            ],
            {"bits": bits, "block_size": 16},
            constant=frozenset((0, 2, 3) if zero else (0, 2)),
        )
        for bits, zero in ((2, False), (4, False), (4, True), (8, False), (8, True))
    },
    "TransposeMatMul": Case("TransposeMatMul", [normal(2, 4, 3), normal(2, 4, 5)], {"alpha": 0.5, "transA": 1}),
    "CDist": Case("CDist", [normal(4, 3), normal(5, 3)], {"metric": "euclidean"}),
    "CDist, squared": Case("CDist", [normal(4, 3), normal(5, 3)]),
    "ConvTransposeWithDynamicPads": Case(
        "ConvTransposeWithDynamicPads",
        [normal(1, 3, 4, 5), normal(3, 2, 3, 3), np.array([1, 0, 1, 2], np.int64), normal(2)],
        {"strides": [2, 1]},
    ),
    **{
        f"CropAndResize, {mode}, {size}": Case(
            "CropAndResize",
            [normal(2, 3, 5, 6), BOXES, IMAGE_INDEX, np.array(size, np.int32)],
            {"mode": mode, "extrapolation_value": 0.5},
        )
        for mode in ("bilinear", "nearest")
        for size in ((3, 4), (1, 5))
    },
    "GridSample": Case(
        "GridSample", [normal(2, 3, 4, 5), normal(2, 3, 2, 2)], {"mode": "bilinear", "padding_mode": "border"}
    ),
    "GatherND": Case("GatherND", [normal(3, 4, 5), integers(np.int64, 2, 3, 2, high=3)]),
    "Pad": Case("Pad", [normal(2, 3), np.array([0, 1, 2, 0], np.int64), scalar(1.5)]),
    "Pad, reflected": Case("Pad", [normal(4, 3), np.array([[1, 1, 2, 0]], np.int64)], {"mode": "reflect"}),
    "Range": Case("Range", [scalar(1.0), scalar(4.2), scalar(0.5)]),
    "Range without a step": Case("Range", [scalar(3, np.int64), scalar(7, np.int64)]),
    "ExpandDims": Case("ExpandDims", [normal(2, 3), scalar(1, np.int32)]),
    "Trilu": Case("Trilu", [normal(2, 4, 5), scalar(-1, np.int64)], {"upper": 0}),
    "UnfoldTensor": Case("UnfoldTensor", [normal(3, 9, 2)], {"dim": 1, "size": 4, "step": 3}),
    "Inverse": Case("Inverse", [normal(2, 4, 4) + 4 * np.eye(4, dtype=np.float32)]),
    "Unique": Case("Unique", [np.array([2, 1, 1, 3, 4, 3, 2], np.float32)], outputs=[True, True, True]),
    "NGramRepeatBlock": Case(
        "NGramRepeatBlock",
        [np.array([[1, 2, 3, 1, 2], [4, 4, 4, 4, 4], [0, 1, 2, 3, 4]], np.int64), normal(3, 6)],
        {"ngram_size": 3},
    ),
    **{
        f"MurmurHash3, {np.dtype(dtype).name}": Case(
            "MurmurHash3", [integers(dtype, 3, 4, high=1 << 30)], {"seed": 42, "positive": positive_}
        )
        for dtype, positive_ in ((np.int32, 1), (np.uint32, 0), (np.int64, 1), (np.float32, 1), (np.float64, 0))
    },
}

LEGACY: dict[str, Case] = {
    "Affine": Case("Affine", [normal(2, 3)], {"alpha": 0.5, "beta": 2.0}, domain="", opset=1),
    "Scale": Case("Scale", [normal(2, 3)], {"scale": 0.5}, domain="", opset=1),
    "ScaledTanh": Case("ScaledTanh", [normal(2, 3)], {"alpha": 0.5, "beta": 2.0}, domain="", opset=1),
    "ParametricSoftplus": Case("ParametricSoftplus", [normal(2, 3)], {"alpha": 0.5, "beta": 2.0}, domain="", opset=1),
    "ImageScaler": Case(
        "ImageScaler", [normal(2, 3, 4, 5)], {"bias": [0.1, 0.2, 0.3], "scale": 0.5}, domain="", opset=1
    ),
    "Crop": Case("Crop", [normal(2, 3, 6, 7)], {"border": [1, 2, 1, 0]}, domain="", opset=1),
    "Crop to a size": Case("Crop", [normal(2, 3, 6, 7)], {"border": [1, 2, 0, 0], "scale": [3, 4]}, domain="", opset=1),
}


@pytest.mark.parametrize("name", [*CASES, *LEGACY])
def test_equals_onnxruntime(name: str) -> None:
    assert_same({**CASES, **LEGACY}[name])
