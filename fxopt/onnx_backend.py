"""The ONNX backend interface: run ONNX models in torch, through fxopt's imported graph.

    import onnx.backend.test, fxopt.onnx_backend
    tests = onnx.backend.test.BackendTest(fxopt.onnx_backend, __name__)

Source: `onnx.backend.base` (the interface), `onnx.backend.test` (its conformance suite). A node without a torch
reference runs in ONNX's reference evaluator or in ONNX Runtime, and `BackendRep.fallback_nodes` names it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnx.backend.base import Backend, namedtupledict
from onnx.backend.base import BackendRep as OnnxBackendRep
from torch import fx

from fxopt.errors import FxoptError, InvalidInput, InvalidModel, MissingReference
from fxopt.frontends.onnx import load
from fxopt.inputs import misfit
from fxopt.ir.graph import Graph, label
from fxopt.ir.onnx.values import from_array, to_array


class BackendRep(OnnxBackendRep):
    """An imported model that is ready to run; `fallback_nodes` says which nodes of the last run left torch."""

    def __init__(self, graph: Graph, device: str = "CPU") -> None:
        self.graph = graph
        self.fallback_nodes: list[str] = []
        self._outputs = namedtupledict("Outputs", [spec.name for spec in graph.outputs])
        self._device = torch.device("cuda" if device.upper().startswith("CUDA") else "cpu")

    def run(self, inputs: Any, **options: Any) -> tuple[Any, ...]:
        """The outputs, in order or by name: numpy arrays, lists for sequences, None for an empty optional.

        Args:
            inputs: one value per input of the model, in order, or a mapping of input names to values; arrays of types
                that numpy lacks are those of `ml_dtypes`. Inputs that have an initializer are not given.

        Raises:
            InvalidInput: the number or the names of the inputs are wrong, or the model does not run on their shapes and
                types.
            MissingReference: neither torch nor ONNX's evaluators can run an operator.
        """
        _no_options(options, "run takes only the inputs")
        evaluator = Fallback()
        given = [self._placed(from_array(value)) for value in self._ordered(inputs)]
        try:
            results = self.graph.run(given, evaluator=evaluator)
        except FxoptError:
            raise
        except Exception as error:
            fault = misfit(self.graph, given) if len(given) == len(self.graph.inputs) else ""
            if not fault:
                raise
            raise InvalidInput(f"{fault} ({type(error).__name__}: {error})") from error
        self.fallback_nodes = list(evaluator.nodes)
        return self._outputs(*map(to_array, results))

    def _ordered(self, inputs: Any) -> list[Any]:
        expected = [spec.name for spec in self.graph.inputs]
        if isinstance(inputs, dict):
            if sorted(inputs) != sorted(expected):
                raise InvalidInput(f"inputs {sorted(inputs)} given, the model takes {expected}")
            return [inputs[name] for name in expected]
        if isinstance(inputs, np.ndarray) and len(expected) == 1:
            return [inputs]
        return list(inputs)

    def _placed(self, value: Any) -> Any:
        return value.to(self._device) if isinstance(value, torch.Tensor) else value


class Fallback:
    """Runs what has no torch reference in ONNX's reference evaluator, else in ONNX Runtime; keeps the nodes' names."""

    def __init__(self) -> None:
        self.nodes: dict[str, None] = {}
        self._runtime: Any = None

    def __call__(self, graph: Graph, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from fxopt.backends.onnxruntime.evaluator import OnnxEvaluator
        from fxopt.backends.onnxruntime.reference import evaluate

        self.nodes[label(node)] = None
        try:
            return evaluate(graph, node, args, kwargs)
        except MissingReference:
            if self._runtime is None:
                self._runtime = OnnxEvaluator()
            return self._runtime(graph, node, args, kwargs)


class FxoptBackend(Backend):
    """`onnx.backend.base.Backend` over fxopt's importer and interpreter."""

    @classmethod
    def is_compatible(cls, model: ModelProto, device: str = "CPU", **options: Any) -> bool:
        """True when the model can be imported; what runs outside torch is seen when it runs."""
        _no_options(options, "is_compatible takes the model and the device")
        if not cls.supports_device(device):
            return False
        try:
            load(model)
        except InvalidModel:
            return False
        return True

    @classmethod
    def prepare(cls, model: Any, device: str = "CPU", **options: Any) -> BackendRep:
        """Import a model (message or path).

        Raises:
            InvalidModel: it is not a valid ONNX model.
            InvalidInput: an option is unknown, or the device is not there.
        """
        _no_options(options, "prepare takes the model and the device")
        _supported(cls, device)
        if not isinstance(model, (ModelProto, str, os.PathLike)):
            raise InvalidInput(f"{type(model).__name__} given; expected an onnx.ModelProto or the path of a model")
        return BackendRep(load(model), device)

    @classmethod
    def run_model(cls, model: Any, inputs: Any, device: str = "CPU", **options: Any) -> tuple[Any, ...]:
        """Import a model and run it once; see `prepare` and `BackendRep.run`."""
        return cls.prepare(model, device, **options).run(inputs)

    @classmethod
    def run_node(
        cls,
        node: NodeProto,
        inputs: Sequence[Any],
        device: str = "CPU",
        outputs_info: Sequence[tuple[Any, tuple[int, ...]]] | None = None,
        **options: Any,
    ) -> tuple[Any, ...]:
        """Run one node; `inputs` are those it names, in order. `opset_version`, of its domain, the newest unless given.

        Raises:
            InvalidInput: the number of inputs is wrong, the node does not run on them, an option is unknown or the
                device is not there.
        """
        _supported(cls, device)
        given = options.pop("opset_version", None)
        _no_options(options, "run_node knows 'opset_version'")
        names = list(dict.fromkeys(name for name in node.input if name))
        if len(inputs) != len(names):
            raise InvalidInput(f"{len(inputs)} inputs given, node {node.op_type} takes {len(names)}: {names}")
        values = [helper.make_value_info(name, _type(value)) for name, value in zip(names, inputs, strict=True)]
        outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
        domain = "" if node.domain == "ai.onnx" else node.domain
        imports = {"": onnx.defs.onnx_opset_version(), domain: given or _newest(domain)}
        body = helper.make_graph([node], "node", values, outputs)
        model = helper.make_model(body, opset_imports=[helper.make_opsetid(*item) for item in imports.items()])
        prepared = BackendRep(load(model, check=False), device)
        try:
            return prepared.run(list(inputs))
        except FxoptError:
            raise
        except Exception as error:
            what = f"node {node.op_type} does not run on these inputs: {type(error).__name__}: {error}"
            raise InvalidInput(what) from error

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """True for "CPU", and for "CUDA" (with or without a number) where torch sees one."""
        kind = device.split(":")[0].upper()
        return kind == "CPU" or (kind == "CUDA" and torch.cuda.is_available())


def _no_options(options: dict[str, Any], known: str) -> None:
    if options:
        raise InvalidInput(f"unknown options {sorted(options)}; {known}")


def _supported(backend: type[FxoptBackend], device: str) -> None:
    if not backend.supports_device(device):
        raise InvalidInput(f"device {device!r} is not there; expected 'CPU', or 'CUDA' where torch sees a GPU")


def _newest(domain: str) -> int:
    versions = (schema.since_version for schema in onnx.defs.get_all_schemas() if schema.domain == domain)
    return max(versions, default=1) if domain else onnx.defs.onnx_opset_version()


def _type(value: Any) -> onnx.TypeProto:
    if isinstance(value, list):
        element = _type(value[0]) if value else helper.make_tensor_type_proto(TensorProto.FLOAT, None)
        return helper.make_sequence_type_proto(element)
    array = np.asarray(value)
    kind = TensorProto.STRING if array.dtype.kind in "OUS" else helper.np_dtype_to_tensor_dtype(array.dtype)
    return helper.make_tensor_type_proto(kind, array.shape)


is_compatible = FxoptBackend.is_compatible
prepare = FxoptBackend.prepare
run_model = FxoptBackend.run_model
run_node = FxoptBackend.run_node
supports_device = FxoptBackend.supports_device
