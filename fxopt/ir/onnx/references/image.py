"""ImageDecoder, through Pillow where it is installed."""

from __future__ import annotations

import importlib
import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxopt.errors import InvalidInput, MissingReference
from fxopt.ir.onnx.foreign import host_data
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()

_MODES = {"RGB": "RGB", "BGR": "RGB", "Grayscale": "L"}


@operators.reference("ImageDecoder")
def image_decoder(call: Call, encoded: Tensor, pixel_format: str = "RGB") -> Tensor:
    """The pixels [height, width, channels] of an encoded image, uint8; nothing, [0, 0, channels], if it is no image.

    Raises:
        InvalidInput: an unknown pixel format.
        MissingReference: Pillow is not installed.
    """
    if str(pixel_format) not in _MODES:
        raise InvalidInput(f"pixel_format {pixel_format!r} given; expected 'RGB', 'BGR' or 'Grayscale'")
    content = host_data(encoded).tobytes()
    try:
        pillow: Any = importlib.import_module("PIL.Image")
    except ImportError as error:
        raise MissingReference("ImageDecoder needs Pillow: pip install pillow") from error
    mode = _MODES[str(pixel_format)]
    try:
        pixels = np.array(pillow.open(io.BytesIO(content)).convert(mode))
    except (OSError, ValueError, SyntaxError):  # what Pillow raises for broken files
        return torch.zeros([0, 0, len(mode)], dtype=torch.uint8)
    pixels = pixels.reshape([*pixels.shape[:2], len(mode)])
    return torch.from_numpy(np.ascontiguousarray(pixels[:, :, ::-1] if str(pixel_format) == "BGR" else pixels))
