"""Whole blocks: a step of decoding, shaped like Llama, with 4-bit weights in the Triton backend."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fxopt
from benchmarks.gpu_timing import Session
from fxopt.cost_model.targets import get_target
from fxopt.ir.ops.linear_nbits import dequantized, linear_nbits
from fxopt.ir.packing import pack
from fxopt.ir.target import Target

F16 = torch.float16
Made = tuple[Callable[[], Any], Tensor | None]
_GROUP = 128


class Coded(nn.Module):
    """A linear of random 4-bit codes, or of the same numbers in 16-bit floats."""

    def __init__(self, columns: int, outputs: int, in_floats: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(columns + outputs)
        codes = torch.randint(0, 16, (outputs, columns), generator=generator, dtype=torch.uint8)
        scales = torch.rand(outputs, columns // _GROUP, generator=generator) * 0.2 / columns**0.5
        packed = pack(codes, 4)
        self.columns = columns
        weight = dequantized(packed, scales, None, 4, _GROUP, columns).to(F16) if in_floats else None
        self.register_buffer("weight", weight)
        self.register_buffer("packed", None if in_floats else packed)
        self.register_buffer("scales", None if in_floats else scales)

    def forward(self, x: Tensor) -> Tensor:
        """x @ weight.T."""
        if self.weight is not None:
            return nn.functional.linear(x, self.weight)
        return linear_nbits(x, self.packed, self.scales, None, None, self.columns, 4, _GROUP, 16)


class Step(nn.Module):
    """One token through blocks: x [batch, 1, hidden], keys and values [layers, batch, kv heads, length, width]."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, inner: int, layers: int, in_floats: bool) -> None:
        super().__init__()
        self.width, self.kv_heads = hidden // heads, kv_heads
        sizes = {
            "q": (hidden, hidden), "k": (hidden, kv_heads * self.width), "v": (hidden, kv_heads * self.width),
            "o": (hidden, hidden), "gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden),
        }  # fmt: skip
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: Coded(*size, in_floats) for name, size in sizes.items()}) for _ in range(layers)
        )

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The token behind the last layer."""
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, nn.ModuleDict)
            h = _normed(x)
            q, k, v = (layer[name](h).view(*x.shape[:2], -1, self.width).transpose(1, 2) for name in "qkv")
            k, v = torch.cat([keys[index], _turned(k, cos, sin)], 2), torch.cat([values[index], v], 2)
            y = nn.functional.scaled_dot_product_attention(_turned(q, cos, sin), k, v, enable_gqa=True)
            x = x + layer["o"](y.transpose(1, 2).reshape(x.shape))
            h = _normed(x)
            x = x + layer["down"](nn.functional.silu(layer["gate"](h)) * layer["up"](h))
        return x


def _normed(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def _turned(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = t.shape[-1] // 2
    return t * cos + torch.cat((-t[..., half:], t[..., :half]), -1) * sin


def target_here() -> Target:
    """The target that is most like this machine's GPU."""
    if not torch.cuda.is_available():
        return get_target("a100")
    name = torch.cuda.get_device_name().lower().replace(" ", "")
    for known in ("h200", "h100", "a100", "b200", "l40s", "rtx4090", "rtx3090"):
        if known in name:
            return get_target(known)
    major, minor = torch.cuda.get_device_capability()
    return get_target({80: "a100", 86: "rtx3090", 89: "l40s", 90: "h100"}.get(10 * major + minor, "b200"))


def blocks(session: Session) -> None:
    """Decoding in 4 bits against the same weights in 16-bit floats, compiled by torch."""
    device = "cuda" if session.gpu else "cpu"
    sizes = ((4096, 32, 8, 14336, 4), 4096, (1, 8)) if session.gpu else ((256, 4, 2, 256, 1), 32, (1,))
    shape, length, batches = sizes
    for batch in batches:
        _step_of(session, device, shape, length, batch)


def _step_of(session: Session, device: str, shape: tuple[int, ...], length: int, batch: int) -> None:
    hidden, heads, kv_heads, inner, layers = shape
    cache = (layers, batch, kv_heads, length, hidden // heads)
    angles = torch.randn(1, 1, 1, hidden // heads)
    inputs = [torch.randn(batch, 1, hidden), torch.randn(cache), torch.randn(cache), angles.cos(), angles.sin()]
    half = [value.to(F16) for value in inputs]
    there = [value.to(device) for value in half]
    plain = Step(hidden, heads, kv_heads, inner, layers, True).eval().to(device)
    with torch.no_grad():
        truth = plain.double()(*(value.double() for value in there))
    plain = plain.half()

    def compiled(mode: str | None) -> Made:
        call = torch.compile(plain, mode=mode) if session.gpu else plain

        def run() -> Any:
            with torch.no_grad():
                return call(*there)

        for _ in range(3):
            run()
        return run, None

    def in_triton() -> Made:
        coded = Step(hidden, heads, kv_heads, inner, layers, False).eval()
        graph = fxopt.capture(coded, tuple(half))
        executable: Any = importlib.import_module("fxopt.backends.triton.executable")
        made = executable.TritonExecutable(graph, target_here())
        return lambda: made.run(there), None

    makers: dict[str, Callable[[], Made]] = {
        "torch.compile float16": lambda: compiled(None),
        "torch.compile float16, CUDA graphs": lambda: compiled("reduce-overhead"),
        "fxopt 4 bits, CUDA graphs": in_triton,
    }
    name = f"Llama block x {layers}, batch {batch}, {length} keys"
    session.compare("blocks", name, makers, truth, "torch.compile float16, CUDA graphs")
