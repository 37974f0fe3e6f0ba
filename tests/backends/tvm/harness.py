"""Build kernels for this machine, for WebAssembly and, under qemu, for Arm, and run them on arrays."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fxopt.backends.tvm import Tvm
from fxopt.cost_model.targets import get_target
from fxopt.errors import MissingDependency, Unsupported

try:
    Tvm.require()
except MissingDependency as error:
    pytest.skip(str(error), allow_module_level=True)

from fxopt.backends.tvm import qemu
from fxopt.backends.tvm.link import link
from fxopt.backends.tvm.load import load
from fxopt.backends.tvm.lower import write_object
from fxopt.backends.tvm.machine import Machine, machine_for

RUNNABLE = ("host", "wasm", "wasm-relaxed")
EMULATED = ("cortex-a53", "cortex-a76")  # slow: tests that take them are marked so
ALL = (*RUNNABLE, "x86-avx512-vnni", "x86-avx-vnni", "cortex-a53", "cortex-a76")


def machine(name: str) -> Machine:
    """The machine of a target; skips where this computer has none that code can be generated for."""
    try:
        return machine_for(get_target(name))
    except Unsupported as error:
        pytest.skip(f"{platform.machine()}: {error}")


class Builder:
    """Builds into one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def __call__(self, functions: Any, made_for: Machine) -> Callable[..., None]:
        """A caller `run(function_name, *arrays)` of freshly built functions."""
        self.count += 1
        stem = self.folder / f"k{self.count}"
        functions = functions if isinstance(functions, list) else [functions]
        if made_for.family == "arm" and platform.machine() not in ("aarch64", "arm64"):
            return self.emulated(functions, made_for, stem)
        built = write_object(functions, made_for, stem.with_suffix(".o"))
        names = [str(function.attrs["global_symbol"]) for function in functions]
        path = link([built], names, made_for, stem.with_suffix(".wasm" if made_for.family == "wasm" else ".so"))
        library = load(path)

        def run(name: str, *arrays: np.ndarray[Any, Any]) -> None:
            assert all(array.flags.c_contiguous for array in arrays)
            library.call(name, arrays)

        return run

    def emulated(self, functions: list[Any], made_for: Machine, folder: Path) -> Callable[..., None]:
        """A caller that starts the emulator each time."""
        if qemu.missing():
            pytest.skip(qemu.missing())

        def run(name: str, *arrays: np.ndarray[Any, Any]) -> None:
            call = qemu.Call(name, tuple((number, 0) for number in range(len(arrays))))
            found, _ = qemu.run(functions, [call], arrays, made_for, folder)
            for array, value in zip(arrays, found, strict=True):
                array[...] = value

        return run


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Builder]:
    """A builder in a temporary folder."""
    yield Builder(tmp_path)


def randn(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Normal float32 values, the same for the same shape and seed."""
    return np.random.default_rng((*shape, seed)).standard_normal(shape).astype(np.float32)


def guarded(*shape: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    """A result array that no kernel may leave as it is."""
    return np.full(shape, np.nan if np.issubdtype(dtype, np.floating) else 77, dtype)
