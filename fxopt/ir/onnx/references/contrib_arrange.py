"""Operators of the domain `com.microsoft` that look up, arrange, search or hash, and older forms of ONNX's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.onnx.lane import to_scalar, to_tensor
from fxopt.ir.onnx.references.arrange import trilu
from fxopt.ir.onnx.references.common import first, ordered, require
from fxopt.ir.onnx.references.create import arange
from fxopt.ir.onnx.references.gather import gather_nd
from fxopt.ir.onnx.references.pad import pad
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators("com.microsoft")

operators.reference("Trilu", raw=True)(trilu)


@operators.reference("GatherND")
def gather_nd_1(call: Call, data: Tensor, indices: Tensor) -> Tensor:
    """The slices of data at the index vectors in the last axis of `indices`."""
    result: Tensor = gather_nd(Call(13), data, indices)
    return result


@operators.reference("Pad", raw=True)
def dynamic_pad(call: Call, x: Any, pads: Any, value: Any = None, mode: str = "constant") -> Tensor:
    """Pad of ONNX with its pads as an input, which may be [1, 2 * rank]."""
    result: Tensor = pad(Call(13), x, to_tensor(pads).reshape(-1), value, mode=mode)
    return result


@operators.reference("Range", raw=True)
def range_with_default(call: Call, start: Any, limit: Any, delta: Any = None) -> Tensor:
    """start, start + delta, ... up to but without limit; delta is 1 when omitted."""
    step = torch.ones((), dtype=to_tensor(start).dtype) if delta is None else delta
    result: Tensor = arange(call, start, limit, step)
    return result


@operators.reference("ExpandDims", raw=True)
def expand_dims(call: Call, x: Any, axis: Any) -> Tensor:
    """x with an axis of size 1 inserted."""
    tensor: Tensor = to_tensor(x)
    return tensor.unsqueeze(int(to_scalar(axis)))


@operators.reference("SampleOp")
def sample_op(call: Call, x: Tensor) -> Tensor:
    """x itself."""
    return x.clone()


@operators.reference("TorchEmbedding")
def torch_embedding(
    call: Call, weight: Tensor, indices: Tensor, padding_idx: Any = None, scale_grad_by_freq: Any = None
) -> Tensor:
    """The rows of the weight at the indices."""
    return F.embedding(indices, weight)


@operators.reference("UnfoldTensor")
def unfold_tensor(call: Call, x: Tensor, size: int, dim: int = -1, step: int = 1) -> Tensor:
    """All slices of `size` elements along an axis, `step` apart, in a new last axis."""
    return x.unfold(dim, size, step)


@operators.reference("Inverse")
def inverse(call: Call, x: Tensor) -> Tensor:
    """The inverse of the matrices in the last two axes."""
    wide = x.float() if x.dtype == torch.float16 else x
    result: Tensor = torch.linalg.inv(wide)
    return result.to(x.dtype)


def _spectrum(normalized: int, onesided: int) -> None:
    require(not normalized and bool(onesided), "a Fourier transform that is normalized or two-sided")


@operators.reference("Rfft")
def rfft(call: Call, x: Tensor, signal_ndim: int = 1, normalized: int = 0, onesided: int = 1) -> Tensor:
    """The Fourier transform of real signals in the last axes; real and imaginary parts in a new last axis."""
    _spectrum(normalized, onesided)
    return torch.view_as_real(torch.fft.rfftn(x, dim=list(range(-signal_ndim, 0))))


@operators.reference("Irfft")
def irfft(call: Call, x: Tensor, signal_ndim: int = 1, normalized: int = 0, onesided: int = 1) -> Tensor:
    """The real signals of even length that Rfft makes x of."""
    _spectrum(normalized, onesided)
    signal = torch.view_as_complex(x.contiguous())
    y: Tensor = torch.fft.irfftn(signal, dim=list(range(-signal_ndim, 0)))
    return y


@operators.reference("Unique")
def unique(call: Call, x: Tensor) -> Any:
    """The distinct values in the order in which they first appear, where every element went, and their counts."""
    values, index, counts = torch.unique(x, return_inverse=True, return_counts=True)
    positions = torch.arange(x.shape[0], device=x.device)
    start = torch.full_like(counts, x.shape[0]).scatter_reduce(0, index, positions, "amin")
    order = torch.argsort(start)
    rank = torch.argsort(order)
    return first(call, values[order], rank[index], counts[order])


@operators.reference("NGramRepeatBlock")
def n_gram_repeat_block(call: Call, input_ids: Tensor, scores: Tensor, ngram_size: int) -> Tensor:
    """The scores with minus infinity for every token that would repeat an n-gram of the ids."""
    length = input_ids.shape[1]
    if length < ngram_size:
        return scores.clone()
    ids = input_ids.to(torch.int64)
    windows = ids.unfold(1, ngram_size, 1)
    tail = ids[:, length - ngram_size + 1 :].unsqueeze(1)
    repeated = (windows[..., :-1] == tail).all(-1)
    hits = torch.zeros_like(scores).scatter_add(1, windows[..., -1], repeated.to(scores.dtype))
    return scores.masked_fill(hits > 0, float("-inf"))


_MASK = 0xFFFFFFFF


def _rotated(x: Tensor, bits: int) -> Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _MASK


@operators.reference("MurmurHash3")
def murmur_hash(call: Call, x: Tensor, positive: int = 1, seed: int = 0) -> Tensor:
    """The 32-bit MurmurHash3 of the bytes of every element.

    Source: Appleby's MurmurHash3_x86_32. Computed in int64 modulo 2**32.
    """
    require(isinstance(x, Tensor), "MurmurHash3 of strings has no torch reference")
    size = x.element_size()
    require(size in (4, 8), f"MurmurHash3 of {x.dtype} has no torch reference")
    words = ordered(x.contiguous().view(torch.int32).to(torch.int64)).reshape(*x.shape, size // 4) & _MASK
    hashed = torch.full(x.shape, seed & _MASK, dtype=torch.int64, device=x.device)
    for word in words.unbind(-1):
        block = (word * 0xCC9E2D51) & _MASK
        block = (_rotated(block, 15) * 0x1B873593) & _MASK
        hashed = (_rotated(hashed ^ block, 13) * 5 + 0xE6546B64) & _MASK
    hashed = hashed ^ size
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashed = ((hashed ^ (hashed >> shift)) * factor) & _MASK
    hashed = hashed ^ (hashed >> 16)
    return hashed.to(torch.uint32) if positive else hashed.to(torch.int32)


@operators.reference("MatMulInteger16")
def matmul_integer_16(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """a @ b of 16-bit numbers in 32 bits, exact modulo 2**32."""
    product = torch.matmul(a.to(torch.int64), b.to(torch.int64))
    unsigned = a.dtype == torch.uint16 and b.dtype == torch.uint16
    return product.to(torch.uint32 if unsigned else torch.int32)
