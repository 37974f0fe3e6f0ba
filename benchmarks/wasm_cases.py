"""The cases of benchmarks/wasm.py: how the files of each competitor are made. wasm_race.mjs reads a case as JSON."""

from __future__ import annotations

import copy
import resource
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import fxopt
from benchmarks import wasm_models
from benchmarks.common import docstrings, encode, export_minilm, minilm
from benchmarks.models import MODELS
from benchmarks.peers import quantize_dynamic, quantize_static
from fxopt.backends.tvm import Tvm
from fxopt.backends.tvm.executable import TvmExecutable
from fxopt.cost_model.targets import get_target
from fxopt.frontends.torch_export import load

Case = dict[str, Any]
_FLOATS = ["fold-batch-norm"]  # one of the exact passes, which run anyway: no others
_CALIBRATION = 64  # sentences
LINEARS = [(128, 384, 384), (128, 384, 1536), (128, 1536, 384), (64, 256, 1024), (196, 192, 768)]  # rows, in, out
CONVS = [(16, 96, 112), (144, 24, 56), (32, 192, 28), (384, 64, 14), (160, 960, 7)]  # channels, outputs, height = width


_INSIDE = "fxopt, data inside"
_OURS = {
    "fxopt": {"kind": "fxopt", "folder": "ours"},
    _INSIDE: {"kind": "fxopt", "folder": "ours", "inside": True},
}


def compiled(model: nn.Module, inputs: tuple[torch.Tensor, ...], path: Path, target: str = "wasm") -> None:
    """The model as it is, compiled and saved."""
    with torch.no_grad():
        executable = Tvm().compile(load(model, inputs), get_target(target))
    executable.save(path)
    executable.close()


def optimized(model: nn.Module, inputs: tuple[torch.Tensor, ...], path: Path, target: str = "wasm", **how: Any) -> Any:
    """What `fxopt.optimize` makes of the model, saved; returns the report."""
    with torch.no_grad():
        result = fxopt.optimize(model, target, example_inputs=inputs, **how)
    begin = _processor_seconds()
    executable = Tvm().compile(result.graph, get_target(target))
    # of both builds, without and with relaxed SIMD
    facts: dict[str, Any] = {"code_generation_cpu_seconds": round(_processor_seconds() - begin, 2)}
    assert isinstance(executable, TvmExecutable)
    executable.save(path)
    executable.close()
    facts["wasm_kilobytes"] = {item.name: round(item.stat().st_size / 1000) for item in sorted(path.glob("*.wasm"))}
    return result.report, facts


def _processor_seconds() -> float:
    """Of this process and the compilers that it has started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(item.ru_utime + item.ru_stime for item in used)


def exported(model: nn.Module, inputs: tuple[torch.Tensor, ...], path: Path) -> str:
    """The model as an ONNX file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, inputs, dynamo=True, opset_version=20, verbose=False)
    assert program is not None
    program.save(path)
    return path.name


def given(place: Path, inputs: Sequence[tuple[str, torch.Tensor]]) -> list[dict[str, Any]]:
    """Write the inputs."""
    rows = []
    for name, value in inputs:
        (place / f"{name}.bin").write_bytes(value.contiguous().numpy().tobytes())
        dtype = str(value.dtype).removeprefix("torch.")
        rows.append({"name": name, "dtype": dtype, "shape": list(value.shape), "file": f"{name}.bin"})
    return rows


def save(place: Path, name: str, value: torch.Tensor) -> str:
    """Write a tensor as float32."""
    (place / name).write_bytes(value.detach().to(torch.float32).contiguous().numpy().tobytes())
    return name


def one_node(place: Path, node: Any, x: torch.Tensor, y: torch.Tensor, constants: dict[str, torch.Tensor]) -> str:
    """An ONNX file of one node from x to y."""
    graph = helper.make_graph(
        [node], "one", [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(y.shape))],
        [numpy_helper.from_array(value.detach().numpy(), name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (place / "one.onnx").write_bytes(model.SerializeToString())
    return "one.onnx"


def linear(shape: tuple[int, int, int], place: Path) -> Case:
    """A dense linear layer: Gemm, fused.matMul."""
    rows, inner, outputs = shape
    torch.manual_seed(0)
    model, x = nn.Linear(inner, outputs).eval(), torch.randn(rows, inner)
    weight, bias = model.weight, model.bias
    exact = (x.double() @ weight.double().t() + bias.double()).detach()
    compiled(model, (x,), place / "ours")
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
    return {
        "title": f"linear {rows} x {inner} x {outputs}",
        "inputs": given(place, [("input", x)]),
        "expected": save(place, "y.bin", exact),
        "competitors": {
            **_OURS,
            "onnxruntime-web": {
                "kind": "onnxruntime", "file": one_node(place, node, x, exact, {"w": weight, "b": bias}),
            },
            "tfjs-backend-wasm": {
                "kind": "tfjs_linear", "weight": save(place, "w.bin", weight.t()), "bias": save(place, "b.bin", bias),
            },
        },
    }  # fmt: skip


def conv(shape: tuple[int, int, int], place: Path) -> Case:
    """A dense 1 x 1 convolution: Conv on [N, C, H, W], fused.conv2d on [N, H, W, C]."""
    channels, outputs, size = shape
    torch.manual_seed(0)
    model, x = nn.Conv2d(channels, outputs, 1).eval(), torch.randn(1, channels, size, size)
    weight, bias = model.weight, model.bias
    with torch.no_grad():
        exact = nn.functional.conv2d(x.double(), weight.double(), bias.double())
    compiled(model, (x,), place / "ours")
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], kernel_shape=[1, 1])
    return {
        "title": f"conv 1x1 {channels} -> {outputs}, {size} x {size}",
        "inputs": given(place, [("input", x)]),
        "expected": save(place, "y.bin", exact),
        "tfjs_image": save(place, "x_last.bin", x.permute(0, 2, 3, 1)),
        "competitors": {
            **_OURS,
            "onnxruntime-web": {
                "kind": "onnxruntime", "file": one_node(place, node, x, exact, {"w": weight, "b": bias}),
            },
            "tfjs-backend-wasm": {
                "kind": "tfjs_conv", "image": [size, size, channels],
                "weight": save(place, "w.bin", weight[:, :, 0, 0].t()), "bias": save(place, "b.bin", bias),
                "expected": save(place, "y_last.bin", exact.permute(0, 2, 3, 1)),
            },
        },
    }  # fmt: skip


def float_model(
    name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], width: int, density: float, place: Path
) -> Case:
    """A whole model, dense and pruned; the peer runs the dense one, which takes it the same time."""
    torch.manual_seed(1)
    model, x = make(), torch.randn(shape)
    competitors: Case = {"onnxruntime-web": {"kind": "onnxruntime", "file": exported(model, (x,), place / "m.onnx")}}
    facts: dict[str, Any] = {}
    with torch.no_grad():
        dense = save(place, "dense.bin", copy.deepcopy(model).double()(x.double()))
        competitors["onnxruntime-web"]["expected"] = dense
        _, facts["dense"] = optimized(model, (x,), place / "dense", passes=_FLOATS)
        competitors["fxopt"] = {"kind": "fxopt", "folder": "dense", "expected": dense}
        wasm_models.prune(model, width, density)
        _, facts["sparse"] = optimized(model, (x,), place / "sparse", passes=_FLOATS)
        exact = save(place, "sparse.bin", copy.deepcopy(model).double()(x.double()))
    competitors["fxopt sparse"] = {"kind": "fxopt", "folder": "sparse", "expected": exact}
    kept = f"{1 - density:.0%} zeros in blocks of {width} outputs x 1 input"
    return {"title": f"{name}; sparse: {kept}", "inputs": given(place, [("x", x)]), "competitors": competitors,
            "expected": dense, "facts": facts}  # fmt: skip


def sparse_model(
    name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], width: int, density: float, place: Path
) -> Case:
    """A pruned model in float32 and in 8 bits, which both skip the zeros."""
    torch.manual_seed(1)
    model, x = make(), (torch.randn(shape),)
    wasm_models.prune(model, width, density)
    competitors: Case = {"onnxruntime-web": {"kind": "onnxruntime", "file": exported(model, x, place / "m.onnx")}}
    with torch.no_grad():
        exact = save(place, "y.bin", copy.deepcopy(model).double()(x[0].double()))
    facts = eight_bits(model, x, [(torch.randn(shape),) for _ in range(16)], place, competitors)
    title = f"{name}; {1 - density:.0%} zeros in blocks of {width} outputs x 1 input"
    return {"title": title, "inputs": given(place, [("x", x[0])]), "competitors": competitors, "expected": exact,
            "facts": facts}  # fmt: skip


def minilm_model(place: Path) -> Case:
    """all-MiniLM-L6-v2 on 128 tokens: float32 and 8 bits, with and without relaxed SIMD."""
    model, tokenizer = minilm()
    samples = encode(tokenizer, docstrings(_CALIBRATION + 1))
    names = ("input_ids", "attention_mask")
    tensors = [tuple(torch.from_numpy(sample[name]) for name in names) for sample in samples]
    x = tensors.pop()
    source = place / "m.onnx"
    export_minilm(model, source)
    quantize_dynamic(source, place / "dynamic.onnx")
    quantize_static(source, place / "static.onnx", MODELS["minilm_b1"], samples[:_CALIBRATION])
    peers = {"onnxruntime-web": "m", "onnxruntime-web int8 dynamic": "dynamic", "onnxruntime-web int8 static": "static"}
    competitors: Case = {name: {"kind": "onnxruntime", "file": f"{file}.onnx"} for name, file in peers.items()}
    with torch.no_grad():
        exact = save(place, "y.bin", copy.deepcopy(model).double()(*x))
    facts = eight_bits(model, x, tensors, place, competitors)
    return {"title": "MiniLM-L6, 128 tokens", "inputs": given(place, list(zip(names, x, strict=True))),
            "competitors": competitors, "expected": exact, "facts": facts}  # fmt: skip


def digits_model(place: Path) -> Case:
    """The digits ViT of the examples, its weights trained."""
    from examples.data import digits

    model = wasm_models.digits_vit()
    images, _, tests, _ = digits()
    x = (torch.from_numpy(tests[:1]),)
    competitors: Case = {"onnxruntime-web": {"kind": "onnxruntime", "file": exported(model, x, place / "m.onnx")}}
    with torch.no_grad():
        exact = save(place, "y.bin", copy.deepcopy(model).double()(x[0].double()))
    samples = [(torch.from_numpy(image[None]),) for image in images[:256]]
    facts = eight_bits(model, x, samples, place, competitors)
    return {"title": "digits ViT, 136 k parameters", "inputs": given(place, [("image", x[0])]),
            "competitors": competitors, "expected": exact, "facts": facts}  # fmt: skip


def eight_bits(model: nn.Module, x: Any, samples: Any, place: Path, competitors: Case) -> dict[str, Any]:
    """Add the float32 and the 8-bit builds of fxopt to the competitors; returns their facts."""
    facts: dict[str, Any] = {}
    _, facts["fxopt"] = optimized(model, x, place / "float32", passes=_FLOATS)
    competitors["fxopt"] = {"kind": "fxopt", "folder": "float32"}
    for target, name in (("wasm", "fxopt int8"), ("wasm-relaxed", "fxopt int8 relaxed")):
        report, facts[name] = optimized(model, x, place / target, target, calibration=samples)
        facts[name]["noise_to_signal"] = float(f"{report.error.noise_to_signal:.3g}")
        competitors[name] = {"kind": "fxopt", "folder": target}
    return facts


_MODELS: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], int, float]] = [
    ("MobileNetV2 224", wasm_models.mobilenet, (1, 3, 224, 224), 4, 0.2),
    ("encoder d256 ff1024, 64 tokens", wasm_models.encoder, (1, 64, 256), 8, 0.2),
]
GROUPS: dict[str, list[Callable[[Path], Case]]] = {
    "products": [*(partial(linear, shape) for shape in LINEARS), *(partial(conv, shape) for shape in CONVS)],
    "models": [partial(float_model, *each) for each in _MODELS],
    "int8": [minilm_model, digits_model],
    "sparse": [partial(sparse_model, *each) for each in _MODELS],
}
