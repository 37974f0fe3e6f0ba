"""Execution providers of ONNX Runtime that run a whole model on this CPU; they take the same file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fxopt.errors import MissingDependency, unknown


@dataclass(frozen=True)
class Provider:
    """One of them: its short name, that in ONNX Runtime, and the distribution of ONNX Runtime that has it."""

    name: str
    full_name: str
    title: str
    distribution: str

    @property
    def missing(self) -> str:
        """ "" when the installed ONNX Runtime has it, else what to do."""
        import onnxruntime

        if self.full_name in onnxruntime.get_available_providers():
            return ""
        return f"needs {self.distribution} in the place of onnxruntime, in an environment of its own"

    def arguments(self, threads: int | None) -> list[Any]:
        """What `onnxruntime.InferenceSession(providers=...)` takes."""
        if self.name == "cpu":
            return [self.full_name]
        # the number of threads is not that of the session's options
        settings = {} if threads is None else {"CPU": {"INFERENCE_NUM_THREADS": str(threads)}}
        return [(self.full_name, {"device_type": "CPU", "load_config": json.dumps(settings)}), CPU.full_name]


CPU = Provider("cpu", "CPUExecutionProvider", "CPU", "onnxruntime")
PROVIDERS = {
    provider.name: provider
    for provider in (CPU, Provider("openvino", "OpenVINOExecutionProvider", "OpenVINO", "onnxruntime-openvino"))
}


def find_provider(name: str) -> Provider:
    """The provider of a short name.

    Raises:
        UnknownName: there is no such one.
        MissingDependency: the installed ONNX Runtime lacks it.
    """
    if name not in PROVIDERS:
        raise unknown("provider of onnxruntime", name, PROVIDERS)
    missing = PROVIDERS[name].missing
    if missing:
        raise MissingDependency(f"provider {name} {missing}: pip install {PROVIDERS[name].distribution}")
    return PROVIDERS[name]


def others() -> list[Provider]:
    """What the installed ONNX Runtime has beside its own kernels."""
    return [provider for provider in PROVIDERS.values() if provider is not CPU and not provider.missing]
