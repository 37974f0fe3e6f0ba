"""Other libraries' products and attention, each as a call and what it should give; those that lack raise."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Made = tuple[Callable[[], Any], Tensor | None]
_ATEN = torch.ops.aten


def tinygemm(x: Tensor, codes: Tensor, scales: Tensor, group: int) -> Made:
    """PyTorch's own product with 4-bit weights (bfloat16)."""
    rows = x.to(torch.bfloat16)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous().to(x.device)
    packed = _ATEN._convert_weight_to_int4pack(pairs, 8)
    steps = scales.t().to(x.device, torch.bfloat16)
    both = torch.stack([steps, torch.zeros_like(steps)], -1).contiguous()
    return lambda: _ATEN._weight_int4pack_mm(rows, packed, group, both), None


def torchao_int4(x: Tensor, weight: Tensor, group: int) -> Made:
    """torchao's weight-only 4 bits of a linear; compared with the float weight, so its error is that of rounding."""
    quantization = importlib.import_module("torchao.quantization")
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=x.device, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.copy_(weight)
    quantization.quantize_(linear, quantization.Int4WeightOnlyConfig(group_size=group))
    rows = x.to(torch.bfloat16)

    def call() -> Any:
        with torch.no_grad():
            return linear(rows)

    return call, x.double() @ weight.to(x.device).double().t()


def gemlite(x: Tensor, codes: Tensor, scales: Tensor, group: int) -> Made:
    """gemlite's A16W4."""
    helper = importlib.import_module("gemlite.helper")
    steps = scales.reshape(-1, 1).to(x.device, torch.float16)
    made = helper.A16Wn(device=x.device, dtype=torch.float16).from_weights(
        codes.to(x.device), steps, torch.full_like(steps, 8), 4, group
    )
    return lambda: made(x), None


def bitsandbytes(x: Tensor, weight: Tensor) -> Made:
    """NF4 in blocks of 64, compared with the float weight."""
    functional = importlib.import_module("bitsandbytes.functional")
    package = importlib.import_module("bitsandbytes")
    packed, state = functional.quantize_4bit(weight.to(x.device, x.dtype), blocksize=64, quant_type="nf4")
    truth = x.double() @ weight.to(x.device).double().t()
    return lambda: package.matmul_4bit(x, packed.t(), quant_state=state), truth


def int8(x: Tensor, codes: Tensor) -> Made:
    """`torch._int_mm` alone, without rounding activations."""
    levels = torch.randint(-127, 128, (max(32, len(x)), x.shape[1]), dtype=torch.int8, device=x.device)
    weight = codes.to(x.device).t()
    truth = levels.double() @ weight.double()
    return lambda: _ATEN._int_mm(levels, weight), truth


def float8(x: Tensor, weight: Tensor) -> Made:
    """`torch._scaled_mm`, scales per row, without rounding activations."""
    one, many = torch.ones(len(x), 1, device=x.device), torch.ones(1, len(weight), device=x.device)
    a, b = x.to(torch.float8_e4m3fn), weight.to(x.device).to(torch.float8_e4m3fn).t()
    truth = a.double() @ b.double()
    return lambda: _ATEN._scaled_mm(a, b, one, many, out_dtype=torch.bfloat16), truth


def sparse_24(x: Tensor, weight: Tensor, cutlass: bool) -> Made:
    """PyTorch's semi-structured weights, in CUTLASS or cuSPARSELt."""
    kind = torch.sparse.SparseSemiStructuredTensor
    kind._FORCE_CUTLASS = cutlass
    made = torch.sparse.to_sparse_semi_structured(weight.to(x.device, x.dtype))
    return lambda: torch.nn.functional.linear(x, made), None


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Made:
    """Dense attention in one of torch's kernels: "FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"."""
    attention: Any = importlib.import_module("torch.nn.attention")
    chosen = getattr(attention.SDPBackend, backend)
    grouped = q.shape[1] != k.shape[1]

    def call() -> Any:
        with attention.sdpa_kernel(chosen):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)

    return call, None


def flex(q: Tensor, k: Tensor, v: Tensor, pattern: tuple[int, ...]) -> Made:
    """FlexAttention with a block mask of one pattern for all heads."""
    module: Any = importlib.import_module("torch.nn.attention.flex_attention")
    slope, offset, period, width, sink = pattern

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (torch.remainder(j - slope * i - offset, period) < width) | (j < sink)

    length = q.shape[2]
    mask = module.create_block_mask(seen, None, None, length, length, device=q.device)
    compiled = torch.compile(module.flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask), None
