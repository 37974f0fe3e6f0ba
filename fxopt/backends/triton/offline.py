"""Compile launches for a GPU that is not here: Triton specialises, compiles and caches as it would on that machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from fxopt.backends.triton import library
from fxopt.backends.triton.chips import Chip
from fxopt.backends.triton.launch import Launch
from fxopt.errors import Unsupported


@cache
def _driver_class() -> Any:
    base: Any = library.module("backends.driver").DriverBase

    class OfflineDriver(base):  # type: ignore[misc]
        """A driver that knows its target and can do nothing else."""

        def __init__(self, chip: Chip) -> None:
            super().__init__()
            self.chip = chip

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return str(library.module("backends.nvidia.driver").ty_to_cpp(ty))

        def get_current_target(self) -> Any:
            return library.module("backends.compiler").GPUTarget(*self.chip.triton_target)

        def get_current_device(self) -> str:
            return f"absent {self.chip.sm}"  # Triton keeps compiled kernels per device

        def get_current_stream(self, device: Any) -> int:
            return 0

        def get_active_torch_device(self) -> Any:
            import torch

            return torch.device("meta")

        def get_benchmarker(self) -> Any:
            raise Unsupported(f"{self.chip.name} is not here: nothing can be timed")

    return OfflineDriver


@contextmanager
def _active(chip: Chip) -> Iterator[None]:
    """Triton compiles for this chip inside."""
    drivers = library.module("runtime.driver").driver
    before = drivers._active
    drivers.set_active(_driver_class()(chip))
    try:
        yield
    finally:
        drivers._active = before


def compiled(launch: Launch, chip: Chip) -> Any:
    """The launch's kernel, compiled for the chip: Triton's `CompiledKernel`.

    Raises:
        Unsupported: it does not compile, or this process is Triton's interpreter.
    """
    if library.interprets():
        raise Unsupported("TRITON_INTERPRET=1 is set: this process interprets kernels and cannot compile them")
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    try:
        with _active(chip):
            return launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.constants, **options)
    except Exception as error:  # the compiler raises its own classes, and ptxas RuntimeError
        raise Unsupported(f"{launch} does not compile for {chip.sm}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The last line of the error behind all others: before it is the source."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
