"""Call kernels in this process: shared libraries through ctypes, WebAssembly modules in wasmtime."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fxopt.errors import InvalidModel, MissingDependency, UnknownName

Array = npt.NDArray[Any]
ALIGNMENT = 64


class Library(Protocol):
    """Functions whose parameters are all pointers to arrays."""

    def call(self, function: str, arrays: Sequence[Array]) -> None:
        """Run; the function may write into the arrays, which are C-contiguous."""


class HostLibrary:
    """A shared library of this machine; arrays are passed as they are."""

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path.resolve()))
        except OSError as error:
            raise InvalidModel(f"{path.name} cannot be loaded on this machine: {error}") from error

    def call(self, function: str, arrays: Sequence[Array]) -> None:
        """Run a function on the arrays' own memory."""
        self.function(function, len(arrays))(*(array.ctypes.data for array in arrays))

    def function(self, name: str, parameters: int) -> Any:
        """The ctypes function, taking addresses."""
        try:
            found = getattr(self._library, name)
        except AttributeError as error:
            raise UnknownName(f"the library has no function {name!r}") from error
        found.argtypes = [ctypes.c_void_p] * parameters
        found.restype = None
        return found


class WasmLibrary:
    """A WebAssembly module without imports; arrays are copied into its memory and back."""

    def __init__(self, path: Path) -> None:
        try:
            wasmtime: Any = importlib.import_module("wasmtime")
        except ImportError as error:
            raise MissingDependency("running WebAssembly needs wasmtime; pip install 'fxopt[tvm]'") from error
        engine = wasmtime.Engine()
        self.store = wasmtime.Store(engine)
        try:
            module = wasmtime.Module.from_file(engine, str(path))
        except (OSError, wasmtime.WasmtimeError) as error:
            raise InvalidModel(f"{path.name} is no WebAssembly module that wasmtime takes: {error}") from error
        if module.imports:
            raise InvalidModel(f"{path.name} imports {[item.name for item in module.imports]}; expected no imports")
        self.exports: Any = wasmtime.Instance(self.store, module, []).exports(self.store)
        self.memory: Any = self.exports["memory"]
        self._base = _aligned(int(self.exports["__heap_base"].value(self.store)))

    def call(self, function: str, arrays: Sequence[Array]) -> None:
        """Copy the arrays in, run, copy them back."""
        addresses = self.place(arrays)
        for address, array in zip(addresses, arrays, strict=True):
            self.memory.write(self.store, array.tobytes(), address)
        self.function(function)(self.store, *addresses)
        for address, array in zip(addresses, arrays, strict=True):
            found = np.frombuffer(self.memory.read(self.store, address, address + array.nbytes), array.dtype)
            array[...] = found.reshape(array.shape)

    def function(self, name: str) -> Any:
        """The exported function; its first argument is the store."""
        try:
            return self.exports[name]
        except KeyError as error:
            raise UnknownName(f"the module has no function {name!r}") from error

    def place(self, arrays: Sequence[Array], *, keep: bool = False) -> list[int]:
        """Addresses for the arrays behind the module's own data, which later ones reuse unless `keep`; memory grows."""
        addresses, end = [], self._base
        for array in arrays:
            addresses.append(end)
            end = _aligned(end + array.nbytes)
        if keep:
            self._base = end
        missing = end - self.memory.data_len(self.store)
        if missing > 0:
            self.memory.grow(self.store, -(-missing // 65536))
        return addresses


def load(path: Path) -> HostLibrary | WasmLibrary:
    """The library of a file, by its suffix."""
    return WasmLibrary(path) if path.suffix == ".wasm" else HostLibrary(path)


def _aligned(address: int) -> int:
    return -(-address // ALIGNMENT) * ALIGNMENT
