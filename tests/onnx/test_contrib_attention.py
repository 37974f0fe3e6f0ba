"""Attention, positions and mixtures of experts of `com.microsoft` against ONNX Runtime's kernels."""

from __future__ import annotations

import numpy as np
import pytest

from tests.onnx.node import Case, assert_same, integers, normal, positive, reference, runtime

H, T = 8, 5  # hidden size, tokens
ENDS = np.array([5, 3], np.int32)
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)


def attention(mask: np.ndarray | None = None, past: int = 0, **attributes: int | float | list[int]) -> Case:
    """Attention of 2 sequences of 5 tokens with 2 heads of 4, by default."""
    return Case(
        "Attention",
        [normal(2, T, 6), normal(6, 3 * H), normal(3 * H), mask, normal(2, 2, 2, past, 4) if past else None],
        {"num_heads": 2, **attributes},
        outputs=[True, True],
    )


def gqa(count: int, past: int, lengths: list[int], bias: bool = False, sink: bool = False, **attributes: float) -> Case:
    """GroupQueryAttention with 4 heads of 16 for queries and 2 for keys."""
    total = max(lengths)
    return Case(
        "GroupQueryAttention",
        [
            *(normal(2, count, 64), normal(2, count, 32), normal(2, count, 32)),
            *((normal(2, 2, past, 16), normal(2, 2, past, 16)) if past else (None, None)),
            *(np.array(lengths, np.int32) - 1, np.array(total, np.int32), None, None, None),
            *(normal(1, 4, count, total) if bias else None, normal(4) if sink else None),
        ],
        {"num_heads": 4, "kv_num_heads": 2, **attributes},
        outputs=[True, True, True],
    )


def moe(activation: str, fusion: int = 1, bias: bool = True, **attributes: float) -> Case:
    """3 experts of width 6 inside 4."""
    return Case(
        "MoE",
        [
            *(normal(7, 4), normal(7, 3), normal(3, fusion * 6, 4), normal(3, fusion * 6) if bias else None),
            *(normal(3, 4, 6), normal(3, 4) if bias else None),
        ],
        {"activation_type": activation, **attributes},
    )


def qmoe(bits: int, block: int, zero_points: bool = False) -> Case:
    """3 experts with fused swiglu and weights of few bits."""
    inner, hidden = 64, 32
    blocks1, blocks2 = (hidden // block, inner // block) if block else (0, 0)
    scale1 = positive(3, 2 * inner, blocks1) if block else positive(3, 2 * inner)
    scale2 = positive(3, hidden, blocks2) if block else positive(3, hidden)
    zeros = (
        [
            integers(np.uint8, 3, 2 * inner, (blocks1 * bits + 7) // 8, high=256),
            integers(np.uint8, 3, hidden, (blocks2 * bits + 7) // 8, high=256),
        ]
        if zero_points
        else []
    )
    return Case(
        "QMoE",
        [
            *(normal(5, hidden), normal(5, 3), integers(np.uint8, 3, 2 * inner, hidden * bits // 8, high=256), scale1),
            *(normal(3, 2 * inner), integers(np.uint8, 3, hidden, inner * bits // 8, high=256), scale2),
            *(normal(3, hidden), *([None, None, None, *zeros] if zeros else [])),
        ],
        {
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "k": 2,
            "expert_weight_bits": bits,
            "weights_prepacked": 0,
            "normalize_routing_weights": 1,
            **({"block_size": block} if block else {}),
        },
        constant=frozenset((2, 3, 4, 5, 6, 7)) | (frozenset((11, 12)) if zeros else frozenset()),
    )


CASES: dict[str, Case] = {
    "Attention": attention(),
    "Attention with ends": attention(ENDS),
    "Attention with ends and starts": attention(np.array([5, 4, 1, 0], np.int32)),
    "Attention with a mask": attention(MASK, scale=0.3, mask_filter_value=-5000.0),
    "Attention with a mask per query": attention(integers(np.int32, 2, T, T, high=2)),
    "Attention, causal with a mask": attention(
        np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], np.int32), unidirectional=1
    ),
    "Attention, causal with past": attention(past=3, unidirectional=1),
    "Attention, past with a mask": attention(integers(np.int32, 2, T + 3, high=2), past=3),
    "Attention with other value size": Case(
        "Attention",
        [normal(2, T, 6), normal(6, 28), normal(28), None, None, normal(2, 2, T, T)],
        {"num_heads": 2, "qkv_hidden_sizes": [8, 8, 12]},
    ),
    "MultiHeadAttention with ends": Case(
        "MultiHeadAttention", [normal(2, T, H), normal(2, T, H), normal(2, T, H), None, ENDS], {"num_heads": 2}
    ),
    "MultiHeadAttention with a mask per query": Case(
        "MultiHeadAttention",
        [normal(2, T, H), normal(2, 6, H), normal(2, 6, H), None, integers(np.int32, 2, T, 6, high=2)],
        {"num_heads": 2},
    ),
    "MultiHeadAttention with other value size, and scores": Case(
        "MultiHeadAttention",
        [normal(2, T, H), normal(2, 6, H), normal(2, 6, 12), normal(28), None, normal(1, 2, T, 6)],
        {"num_heads": 2},
        outputs=[True, False, False, True],
        typed=True,
    ),
    "DecoderMaskedMultiHeadAttention, cross": Case(
        "DecoderMaskedMultiHeadAttention",
        [normal(2, 1, H), normal(2, 2, 6, 4), normal(2, 2, 6, 4)],
        {"num_heads": 2},
    ),
    "GroupQueryAttention with a bias": gqa(5, 0, [5, 5], bias=True),
    "GroupQueryAttention with a bias, next token": gqa(1, 4, [5, 5], bias=True, softcap=2.0),
    "GroupQueryAttention with sinks": gqa(5, 0, [5, 5], sink=True),
    "GroupQueryAttention with sinks and a window": gqa(1, 4, [5, 3], sink=True, local_window_size=2),
    "GroupQueryAttention with smooth softmax": gqa(5, 0, [5, 5], smooth_softmax=1),
    "GroupQueryAttention, not causal": gqa(5, 0, [5, 5], causal=0),
    "GroupQueryAttention, packed with rotary embedding": Case(
        "GroupQueryAttention",
        [
            *(normal(2, 4, 128), None, None, None, None, np.array([3, 3], np.int32), np.array(4, np.int32)),
            *(normal(9, 8), normal(9, 8)),
        ],
        {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1},
        outputs=[True, True, True],
    ),
    **{
        f"MRotaryEmbedding, layout {layout}, interleaved {interleaved}": Case(
            "MRotaryEmbedding",
            [normal(2, T, 2 * 12), integers(np.int64, 3, 2, T, high=9), normal(9, 6), normal(9, 6)],
            {"mrope_section": [2, 2, 2], "num_heads": 2, "mrope_layout": layout, "interleaved": interleaved},
        )
        for layout in (0, 1)
        for interleaved in (0, 1)
    },
    "MoE relu": moe("relu", k=1),
    "MoE gelu, two experts": moe("gelu", bias=False, k=2),
    "MoE silu, normalized": moe("silu", k=2, normalize_routing_weights=1),
    "MoE identity": moe("identity", k=3),
    "MoE swiglu, interleaved": moe(
        "swiglu", 2, k=2, swiglu_fusion=1, activation_alpha=1.7, activation_beta=1.0, swiglu_limit=0.8
    ),
    "QMoE 4 bits per row": qmoe(4, 0),
    "QMoE 8 bits per row": qmoe(8, 0),
    "QMoE 4 bits per block": qmoe(4, 32),
    "QMoE 4 bits per block with zero points": qmoe(4, 32, True),
    "LinearAttention": Case(
        "LinearAttention",
        [normal(2, 4, 16), normal(2, 4, 8), normal(2, 4, 8), normal(2, 2, 4, 4), -positive(2, 4, 2), positive(2, 4, 2)],
        {"q_num_heads": 4, "kv_num_heads": 2},
        outputs=[True, True],
    ),
    "CausalConvWithState": Case(
        "CausalConvWithState",
        [normal(2, 3, 6), normal(3, 1, 4), normal(3), normal(2, 3, 3)],
        {"activation": "silu"},
        outputs=[True, True],
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_equals_onnxruntime(name: str) -> None:
    assert_same(CASES[name])


def test_decoder_masked_equals_attention_after_its_past() -> None:
    """The kernel wants a shared buffer; one token after its past is what MultiHeadAttention computes too."""
    token, past, bias = [normal(2, 1, H) for _ in range(3)], [normal(2, 2, 3, 4) for _ in range(2)], normal(3 * H)
    plain = Case("MultiHeadAttention", [*token, bias, None, None, *past], {"num_heads": 2}, outputs=[True, True, True])
    masked = Case(
        "DecoderMaskedMultiHeadAttention",
        [*token, None, None, *past, None, None, None, bias],
        {"num_heads": 2},
        outputs=[True, True, True],
    )
    for mine, right in zip(reference(masked), runtime(plain), strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-5, atol=1e-6)
