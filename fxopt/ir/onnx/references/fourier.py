"""Fourier transforms of real numbers and of complex ones held as pairs: DFT, STFT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.ir.onnx.lane import to_scalar, to_tensor
from fxopt.ir.onnx.references.common import at_least_float32, keep_symbols, require
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()


def _complex(x: Tensor) -> Tensor:
    """The last axis, of size 1 or 2, as real or complex numbers."""
    wide = at_least_float32(x)
    return wide.squeeze(-1) if x.shape[-1] == 1 else torch.complex(wide[..., 0], wide[..., 1])


def _transform(x: Tensor, length: int | None, axis: int, inverse: bool, onesided: bool) -> Tensor:
    """The discrete Fourier transform along an axis, real and imaginary part in the last one."""
    signal = _complex(x)
    result: Tensor
    with keep_symbols(*x.shape):
        if inverse and onesided:
            result = torch.fft.irfft(signal, length, axis)
            return result.unsqueeze(-1).to(x.dtype)
        if onesided:
            require(not signal.is_complex(), "the one-sided DFT of a complex signal has no torch reference")
            result = torch.fft.rfft(signal, length, axis)
        else:
            result = (torch.fft.ifft if inverse else torch.fft.fft)(signal, length, axis)
    return torch.view_as_real(result.resolve_conj()).to(x.dtype)


@operators.reference("DFT", raw=True)
def dft(
    call: Call,
    x: Any,
    dft_length: Any = None,
    axis_input: Any = None,
    axis: int = 1,
    inverse: int = 0,
    onesided: int = 0,
) -> Tensor:
    """The discrete Fourier transform along an axis: an attribute (default 1) below opset 20, an input (-2) since."""
    tensor: Tensor = to_tensor(x)
    if call.version >= 20:
        axis = -2 if axis_input is None else int(to_scalar(axis_input))
    length = None if dft_length is None else int(to_scalar(dft_length))
    return _transform(tensor, length, axis % tensor.dim(), bool(inverse), bool(onesided))


@operators.reference("STFT", raw=True)
def stft(
    call: Call, signal: Any, frame_step: Any, window: Any = None, frame_length: Any = None, onesided: int = 1
) -> Tensor:
    """The discrete Fourier transform of overlapping frames, each multiplied with the window."""
    x: Tensor = to_tensor(signal)
    weights: Tensor | None = to_tensor(window)
    length: int = weights.shape[0] if weights is not None else 0
    if frame_length is not None:
        length = int(to_scalar(frame_length))
    require(weights is None or weights.shape[0] == length, "STFT with a window shorter than its frames")
    frames = x.unfold(1, length, int(to_scalar(frame_step))).transpose(2, 3)
    if weights is not None:
        frames = frames * weights.unsqueeze(-1)
    return _transform(frames, None, 2, False, bool(onesided))
