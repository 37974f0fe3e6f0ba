"""What the launcher and the cost model must know about an NVIDIA chip: its limits, from the CUDA programming guide."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch

from fxopt.errors import Unsupported
from fxopt.ir.target import Target

LEAST = 80  # compute capability 8.0: products of 16-bit floats and int8 that the kernels use


@dataclass(frozen=True)
class Chip:
    """A GPU.

    Units: bytes of shared memory, clock cycles a second. Rates are per multiprocessor and clock: instructions of
    a thread, and multiply-adds of 16-bit floats in tensor cores (8-bit operands: twice as many).
    """

    name: str
    arch: int  # compute capability times ten
    multiprocessors: int
    clock: float
    shared: int  # of a multiprocessor
    block_shared: int  # a block may use
    threads: int = 2048
    blocks: int = 32
    registers: int = 65536
    tensor_rate: int = 1024
    convert_rate: int = 64
    float_rate: int = 128

    @property
    def triton_target(self) -> tuple[str, int, int]:
        """The arguments of Triton's `GPUTarget`."""
        return "cuda", self.arch, 32

    @property
    def sm(self) -> str:
        """ "sm_80"."""
        return f"sm_{self.arch}"


_KIB = 1024
# multiprocessors, boost clock (data sheets) and the architecture that a target is of
_OF_TARGET = {
    "a100": (108, 1.41e9),
    "rtx3090": (82, 1.70e9),
    "l40s": (142, 2.52e9),
    "rtx4090": (128, 2.52e9),
    "h100": (132, 1.83e9),
    "h200": (132, 1.83e9),
    "b200": (148, 1.85e9),
}
_USUAL = {80: "a100", 86: "rtx3090", 89: "l40s", 90: "h100", 100: "b200"}


def chip_of_arch(arch: int, multiprocessors: int, clock: float, name: str = "") -> Chip:
    """A chip of a compute capability.

    Raises:
        Unsupported: it is before 8.0.
    """
    if arch < LEAST:
        given, least = divmod(arch, 10), divmod(LEAST, 10)
        raise Unsupported(f"compute capability {given[0]}.{given[1]}: the kernels need {least[0]}.{least[1]} or later")
    label = name or f"sm_{arch}"
    if arch in (80, 87):
        return Chip(label, arch, multiprocessors, clock, 164 * _KIB, 163 * _KIB, convert_rate=16, float_rate=64)
    if arch in (86, 89):
        blocks = 16 if arch == 86 else 24
        return Chip(label, arch, multiprocessors, clock, 100 * _KIB, 99 * _KIB, 1536, blocks, tensor_rate=512)
    if arch >= 120:  # consumer Blackwell
        return Chip(label, arch, multiprocessors, clock, 100 * _KIB, 99 * _KIB, 1536, 24, tensor_rate=512)
    rate = 2048 if arch == 90 else 4096
    return Chip(label, arch, multiprocessors, clock, 228 * _KIB, 227 * _KIB, tensor_rate=rate)


def chip_of(target: Target) -> Chip:
    """The chip of a target.

    Raises:
        Unsupported: it is no NVIDIA GPU, or too old.
    """
    if target.kind != "cuda" or not target.arch.startswith("sm_"):
        raise Unsupported(f"the triton backend compiles for NVIDIA GPUs; {target.name} is {target.arch}")
    arch = int(target.arch.removeprefix("sm_").rstrip("af"))
    usual = _USUAL.get(arch, "h100" if arch >= 90 else "a100")
    return chip_of_arch(arch, *_OF_TARGET.get(target.name, _OF_TARGET[usual]), target.name)


@cache
def chip_of_device(index: int) -> Chip:
    """The chip of a CUDA device of this machine."""
    properties = torch.cuda.get_device_properties(index)
    arch = 10 * properties.major + properties.minor
    clock = float(getattr(properties, "clock_rate", 0)) * 1e3 or _OF_TARGET[_USUAL.get(arch, "a100")][1]
    return chip_of_arch(arch, properties.multi_processor_count, clock, properties.name)


PRETENDED: ContextVar[Chip | None] = ContextVar("fxopt_triton_chip", default=None)  # while compiling for an absent one


def chip_for(tensor: torch.Tensor) -> Chip:
    """The chip that a kernel on this tensor is for: the one that is compiled for, else the tensor's device."""
    pretended = PRETENDED.get()
    if pretended is not None:
        return pretended
    if tensor.is_cuda:
        return chip_of_device(tensor.device.index)
    return chip_of_arch(80, *_OF_TARGET["a100"])  # the interpreter
