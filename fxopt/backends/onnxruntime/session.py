"""ONNX Runtime sessions: the lowest-overhead call on the CPU is numpy views of the tensors (no copies)."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxopt.backends.base import Executable
from fxopt.backends.onnxruntime.library import library_of
from fxopt.backends.onnxruntime.providers import CPU, Provider
from fxopt.errors import InvalidInput, InvalidModel, OutputError
from fxopt.ir.onnx.dtypes import from_numpy, to_numpy

if TYPE_CHECKING:
    import onnxruntime as ort


def make_session(
    path: str | os.PathLike[str],
    threads: int | None = None,
    optimized_path: str | os.PathLike[str] | None = None,
    provider: Provider = CPU,
) -> ort.InferenceSession:
    """A CPU session with default options; `optimized_path` receives the model after ONNX Runtime's own optimiser.

    The library of own kernels that a file needs is registered (`fxopt.backends.onnxruntime.library`).

    Raises:
        InvalidModel: ONNX Runtime cannot load the model, or not in this provider, or its library is not there.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
    where = "" if provider is CPU else f" in {provider.title}"
    library = library_of(path)
    try:
        if library is not None:
            options.register_custom_ops_library(str(library.resolve()))
        session = onnxruntime.InferenceSession(str(path), options, providers=provider.arguments(threads))
    except Exception as error:  # onnxruntime's exceptions share no public base class
        reason = " ".join(str(error).split())
        name = f"{Path(path).name}{where}"
        if "NOT_IMPLEMENTED" in reason:
            reason += " (the backend eager, --backend eager, runs operators in torch)"
        raise InvalidModel(f"ONNX Runtime {onnxruntime.__version__} cannot load {name}: {reason}") from error
    if session.get_providers()[0] != provider.full_name:
        raise InvalidModel(f"ONNX Runtime {onnxruntime.__version__} fell back from {provider.title} to its own kernels")
    return session


class OnnxExecutable(Executable):
    """A model file in an ONNX Runtime session; the artifact is the file."""

    opening: Sequence[str] = ()  # what the report says of the memory that opening it takes

    def __init__(
        self,
        path: Path,
        threads: int | None,
        scratch: tempfile.TemporaryDirectory[str] | None = None,
        provider: Provider = CPU,
    ) -> None:
        self.path = path
        self.threads = threads
        self._scratch = scratch  # deleted with this object
        self._borrowed: Any = None
        self.runtime = provider.name
        self.library = library_of(path)
        self.session = make_session(path, threads, provider=provider)
        self.input_names = [value.name for value in self.session.get_inputs()]
        shown = threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else threads
        self.executed_on = f"onnxruntime {provider.title}, {shown} thread{'' if shown == 1 else 's'}"

    def moved(self, provider: Provider) -> OnnxExecutable:
        """The same file in another provider; either may be closed first."""
        other = OnnxExecutable(self.path, self.threads, provider=provider)
        other._borrowed = self._scratch or self._borrowed  # kept alive
        return other

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """The outputs as tensors."""
        feeds = self.feeds(inputs)
        return [_tensor(value) for value in self.session.run(None, feeds)]

    def feeds(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """Flat inputs as numpy views by name."""
        if len(inputs) != len(self.input_names):
            raise InvalidInput(
                f"{len(inputs)} inputs given, the model takes {len(self.input_names)}: {self.input_names}"
            )
        return {name: _array(value) for name, value in zip(self.input_names, inputs, strict=True)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Copy the file (and the weights beside it) through a temporary name."""
        target = Path(path)
        data = self.path.with_name(f"{self.path.name}.data")
        if data.exists():
            raise OutputError("a model with external weights is written from its graph, not copied")
        temporary = target.with_name(f".{target.name}.part")
        try:
            shutil.copyfile(self.path, temporary)
            os.replace(temporary, target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OutputError(f"{target} cannot be written: {error.strerror or error}") from error

    def notes(self) -> Sequence[str]:
        """What opening the file takes."""
        return self.opening

    def close(self) -> None:
        """Drop the session and the temporary file."""
        del self.session
        if self._scratch is not None:
            self._scratch.cleanup()


def _array(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return to_numpy(value)
    if isinstance(value, (list, tuple)):
        return [_array(item) for item in value]
    return value


def _tensor(value: Any) -> Any:
    if value is None or isinstance(value, (str, bytes)):
        return value
    if isinstance(value, list):
        return [_tensor(item) for item in value]
    return value if value.dtype.kind in "OUS" else from_numpy(value)
