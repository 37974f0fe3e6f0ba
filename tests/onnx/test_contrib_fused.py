"""Fused convolutions, products, norms and pointwise operators of `com.microsoft` against ONNX Runtime's kernels."""

from __future__ import annotations

import numpy as np
import pytest

from tests.onnx.node import Case, assert_same, integers, normal, positive, scalar

CASES: dict[str, Case] = {
    "FusedConv": Case("FusedConv", [normal(2, 3, 7, 6), normal(4, 3, 3, 3), normal(4)], {"activation": "Relu"}),
    "FusedConv with sum": Case(
        "FusedConv",
        [normal(2, 4, 5, 5), normal(4, 2, 3, 3), None, normal(2, 4, 3, 3)],
        {"activation": "LeakyRelu", "activation_params": [0.3], "group": 2, "strides": [2, 2], "pads": [1, 1, 1, 1]},
    ),
    "FusedConv clipped": Case(
        "FusedConv",
        [normal(1, 3, 5), normal(2, 3, 2)],
        {"activation": "Clip", "activation_params": [-0.5, 0.7], "auto_pad": "SAME_LOWER"},
    ),
    "FusedConv hard sigmoid": Case(
        "FusedConv",
        [normal(1, 3, 5, 4), normal(2, 3, 2, 2)],
        {"activation": "HardSigmoid", "activation_params": [0.3, 0.4]},
    ),
    "FusedGemm": Case("FusedGemm", [normal(3, 4), normal(4, 5), normal(5)], {"activation": "Relu", "alpha": 0.5}),
    "FusedGemm, transposed": Case(
        "FusedGemm",
        [normal(4, 3), normal(5, 4)],
        {"activation": "LeakyRelu", "activation_alpha": 0.2, "transA": 1, "transB": 1},
    ),
    **{
        f"FusedGemm, {name}": Case(
            "FusedGemm", [normal(3, 4), normal(4, 5), normal(3, 1)], {"activation": name, **more}
        )
        for name, more in [
            ("Sigmoid", {}),
            ("Tanh", {}),
            ("Softplus", {}),
            ("Softsign", {}),
            ("Elu", {"activation_alpha": 0.7}),
            ("ThresholdedRelu", {"activation_alpha": 0.7}),
            ("HardSigmoid", {"activation_alpha": 0.3, "activation_beta": 0.4}),
            ("ScaledTanh", {"activation_alpha": 0.3, "activation_beta": 0.4}),
            ("ParametricSoftplus", {"activation_alpha": 0.3, "activation_beta": 0.4}),
            ("Selu", {"activation_alpha": 1.3, "activation_gamma": 0.9}),
        ]
    },
    "NhwcMaxPool": Case(
        "NhwcMaxPool",
        [integers(np.uint8, 2, 7, 6, 3)],
        {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]},
    ),
    "EmbedLayerNormalization": Case(
        "EmbedLayerNormalization",
        [
            *(integers(np.int32, 2, 5, high=9), integers(np.int32, 2, 5, high=2)),
            *(normal(9, 8), normal(6, 8), normal(2, 8), normal(8), normal(8)),
            np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32),
        ],
        outputs=[True, True, True],
        constant=frozenset(range(2, 7)),
    ),
    "EmbedLayerNormalization without segments, with positions": Case(
        "EmbedLayerNormalization",
        [
            *(integers(np.int32, 2, 5, high=9), None, normal(9, 8), normal(6, 8), None, normal(8), normal(8), None),
            integers(np.int32, 2, 5, high=6),
        ],
        {"epsilon": 1e-3},
        outputs=[True, True],
        constant=frozenset((2, 3, 5, 6)),
    ),
    "QEmbedLayerNormalization": Case(
        "QEmbedLayerNormalization",
        [
            *(integers(np.int32, 2, 5, high=9), integers(np.int32, 2, 5, high=2)),
            *(integers(np.uint8, 9, 8), integers(np.uint8, 6, 8), integers(np.uint8, 2, 8)),
            *(integers(np.uint8, 8), integers(np.uint8, 8), None),
            *(positive(), positive(), positive(), positive(), positive()),
            *(scalar(50, np.uint8), scalar(40, np.uint8), scalar(60, np.uint8), scalar(3, np.uint8)),
            scalar(9, np.uint8),
        ],
        outputs=[True, True],
        constant=frozenset((*range(2, 7), *range(8, 18))),
    ),
    "BranchwiseRMSNorm": Case("BranchwiseRMSNorm", [normal(2, 3, 4, 8), normal(8)]),
    "BranchwiseRMSNorm, flattened": Case("BranchwiseRMSNorm", [normal(2, 3, 12), normal(12)], {"num_branches": 3}),
    "BranchwiseRMSNorm, no scale": Case("BranchwiseRMSNorm", [normal(2, 3, 4)], {"epsilon": 0.1}),
    "GatedRMSNorm": Case("GatedRMSNorm", [normal(2, 3, 12), normal(4), normal(2, 3, 12)]),
    "GatedRMSNorm with sigmoid": Case(
        "GatedRMSNorm", [normal(2, 4), normal(4), normal(2, 4)], {"activation": "sigmoid", "epsilon": 0.1}
    ),
    "EngramGate": Case(
        "EngramGate",
        [normal(2, 3, 2, 8), normal(2, 3, 2, 8), normal(2, 3, 8), normal(2, 8), normal(2, 8), normal(2, 8)],
        outputs=[True, True],
    ),
    "HyperConnectionPreMix": Case(
        "HyperConnectionPreMix", [normal(2, 3, 4, 8), normal(2, 3, 4)], {"reduction_scale": 0.5}
    ),
    "HyperConnectionPreMix, flattened": Case(
        "HyperConnectionPreMix", [normal(2, 3, 12), normal(2, 3, 12)], {"num_branches": 3}
    ),
    "HyperConnectionPostMix": Case(
        "HyperConnectionPostMix", [normal(2, 3, 4, 8), normal(2, 3, 8), normal(2, 3, 4), normal(2, 3, 4, 4)]
    ),
    "HyperConnectionPostMix, flattened, no matrix": Case(
        "HyperConnectionPostMix", [normal(2, 3, 12), normal(2, 3, 4), normal(2, 3, 3, 4)], {"num_branches": 3}
    ),
    "ScaledSiLU": Case("ScaledSiLU", [normal(3, 5)], {"alpha": 0.7}),
    "ScaledSiLU by an input": Case("ScaledSiLU", [normal(3, 5), scalar(1.3)]),
    "GatedAdd": Case("GatedAdd", [normal(2, 3, 4), normal(2, 3, 4), normal(2, 3, 1)]),
    "LinearAttentionGate": Case(
        "LinearAttentionGate", [normal(2, 3, 4), normal(4), normal(4), normal(2, 3, 4)], outputs=[True, True]
    ),
    "SampleOp": Case("SampleOp", [normal(3)]),
}


@pytest.mark.parametrize("name", list(CASES))
def test_equals_onnxruntime(name: str) -> None:
    assert_same(CASES[name])
