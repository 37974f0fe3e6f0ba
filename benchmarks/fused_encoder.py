"""BERT-like encoders whose linears are fused 8-bit products, as an ONNX file and a custom-operator library.

    python -m benchmarks.fused_encoder [--models minilm_b1,minilm_b8,bert4] [--threads 1] [--seconds 20]

The file is written from the PyTorch model: queries, keys and values, attention on their bytes, output projection with
residual and layer norm, feed-forward with GELU and with residual and layer norm. Scales are static, found on the
samples that calibrate all models of benchmarks.cpu_int8, after SmoothQuant (strength 0.8; Xiao et al., 2022), whose
factors lie in the roundings and in the weights; channels of queries and keys are evened out in the same way. Speed is
over ONNX Runtime fp32 on the exported model, the error on samples that calibrated nothing. Writes
benchmarks/results/fused_encoder.json.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper, save

from benchmarks.bursts import local, race
from benchmarks.common import write
from benchmarks.cpu_int8 import errors, names, samples
from benchmarks.models import MODELS, Feed
from fxopt.backends.onnxruntime.session import make_session
from fxopt.backends.tvm.custom_ops import ATTENTION, DOMAIN, OPERATOR, attributes, build_custom_ops
from fxopt.backends.tvm.kernels.attention_int8 import AttentionForm
from fxopt.backends.tvm.kernels.fused_int8 import Form

STRENGTH = 0.8  # of smoothing
ENCODERS = ("minilm_b1", "minilm_b8", "bert4")
Array = Any


class Writer:
    """Nodes and initializers of an ONNX graph."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.forms: list[Form] = []

    def constant(self, name: str, value: Array) -> str:
        """An initializer."""
        self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def node(self, op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **options: Any) -> str:
        """A node; its last output."""
        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain, name=outputs[-1], **options))
        return outputs[-1]

    def product(self, name: str, form: Form, source: Grid, x: str, weight: Array, bias: Array, **after: Any) -> None:
        """A fused product named `name`: `name` is its float result, `name_q` its bytes.

        `after`: `grid` of the bytes, `residual`, `norm`.
        """
        weight = weight * source.smooth
        scales = np.abs(weight).max(1) / 127
        codes = np.clip(np.rint(weight / scales[:, None]), -127, 127).astype(np.int8)
        inputs = [x, self.constant(f"{name}_w", codes)]
        inputs.append(self.constant(f"{name}_s", (scales * source.scale).astype(np.float32)))
        inputs.append(self.constant(f"{name}_b", bias))
        grid: Grid | Middle | None = after.get("grid")
        inputs.append(self.constant(f"{name}_i", grid.inverse) if grid else "")
        if "residual" in after:
            inputs.append(after["residual"])
            inputs += [self.constant(f"{name}_{key}", value) for key, value in zip("gh", after["norm"], strict=True)]
        outputs = [name if form.floats else "", f"{name}_q" if form.codes else ""]
        options = attributes(form, source.zero, grid.zero if grid else 0)
        self.node(OPERATOR, inputs, outputs if form.codes else outputs[:1], DOMAIN, **options)
        self.forms.append(form)


class Grid:
    """The bytes of a tensor: value = (code - zero) * scale * smooth, `smooth` per channel."""

    def __init__(self, seen: Sequence[Array], weight: Array) -> None:
        rows = np.concatenate([each.reshape(-1, each.shape[-1]) for each in seen])
        peak = np.maximum(np.abs(rows).max(0), 1e-5)
        smooth = peak**STRENGTH / np.maximum(np.abs(weight).max(0), 1e-5) ** (1 - STRENGTH)
        self.smooth = (smooth / np.exp(np.log(smooth).mean())).astype(np.float32)
        rows = rows / self.smooth
        low, high = min(float(rows.min()), 0.0), max(float(rows.max()), 0.0)
        self.scale = (high - low) / 255
        self.zero = round(-low / self.scale)

    @property
    def inverse(self) -> Array:
        """What a value is multiplied with."""
        return (1 / (self.scale * self.smooth)).astype(np.float32)


class Middle:
    """The bytes of a tensor around 128: value = (code - 128) * steps, `steps` per channel."""

    zero = 128

    def __init__(self, peaks: Array) -> None:
        self.steps = (np.maximum(peaks, 1e-5) / 127).astype(np.float32)

    @property
    def inverse(self) -> Array:
        """What a value is multiplied with."""
        return 1 / self.steps


def _array(tensor: torch.Tensor) -> Array:
    return tensor.detach().float().numpy()


def _linear(module: Any) -> tuple[Array, Array]:
    return _array(module.weight), _array(module.bias)


def _grids(encoder: Any, feeds: Sequence[Feed]) -> tuple[dict[str, Grid], dict[str, Array]]:
    """The grids of the inputs of every layer's products: qkv, out, up, down; peaks per channel of query, key, value."""
    seen: dict[str, list[Array]] = {}
    results: dict[str, list[Array]] = {}
    weights: dict[str, Array] = {}
    hooks = []
    for index, layer in enumerate(encoder.encoder.layer):
        heads = layer.attention.self
        places = {"qkv": heads.query, "out": layer.attention.output.dense, "up": layer.intermediate.dense,
                  "down": layer.output.dense}  # fmt: skip
        for name, module in places.items():
            key = f"{index}.{name}"
            weights[key] = _array(module.weight)
            kept = seen.setdefault(key, [])
            hooks.append(module.register_forward_pre_hook(lambda _, given, kept=kept: kept.append(_array(given[0]))))
        for name in ("query", "key", "value"):
            found = results.setdefault(f"{index}.{name}", [])
            module = getattr(heads, name)
            hooks.append(module.register_forward_hook(lambda _, __, y, found=found: found.append(_array(y.abs()))))
        weights[f"{index}.qkv"] = np.concatenate([_linear(m)[0] for m in (heads.query, heads.key, heads.value)])
    with torch.no_grad():
        for feed in feeds:
            if "x" in feed:
                encoder(input_ids=torch.from_numpy(feed["x"]))
            else:
                encoder(**{name: torch.from_numpy(value) for name, value in feed.items()})
    for hook in hooks:
        hook.remove()
    peaks = {
        key: np.max([each.reshape(-1, each.shape[-1]).max(0) for each in values], 0) for key, values in results.items()
    }
    return {key: Grid(values, weights[key]) for key, values in seen.items()}, peaks


def write_encoder(encoder: Any, feeds: Sequence[Feed], folder: Path, *, pooled: bool) -> Path:
    """`model.onnx` and `model.so`; with `pooled`, mean over the tokens of the mask and unit length."""
    config, writer = encoder.config, Writer()
    grids, peaks = _grids(encoder, feeds)
    size, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
    sequence = feeds[0]["input_ids" if pooled else "x"].shape[1]
    tokens = "input_ids" if pooled else "x"
    table = encoder.embeddings
    positions = _array(table.position_embeddings.weight)[:sequence] + _array(table.token_type_embeddings.weight)[0]
    node, constant = writer.node, writer.constant
    node("Gather", [constant("words", _array(table.word_embeddings.weight)), tokens], ["word"])
    node("Sum", ["word", constant("positions", positions)], ["embedded"])
    norm = [constant("eg", _array(table.LayerNorm.weight)), constant("eb", _array(table.LayerNorm.bias))]
    x = node("LayerNormalization", ["embedded", *norm], ["x0"], axis=-1, epsilon=eps)
    first = grids["0.qkv"]
    node("Mul", [x, constant("x0_i", 1 / first.smooth)], ["x0_m"])
    scale, zero = constant("x0_s", np.float32(first.scale)), constant("x0_z", np.uint8(first.zero))
    codes = node("QuantizeLinear", ["x0_m", scale, zero], ["x0_q"])
    mask = []
    if pooled:
        node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT)
        node("Sub", ["m", constant("one", np.float32(1))], ["hidden"])
        node("Mul", ["hidden", constant("large", np.float32(1e30))], ["scores"])
        mask = [node("Unsqueeze", ["scores", constant("inner", np.array([1, 2], np.int64))], ["mask"])]
    layers = encoder.encoder.layer
    for index, layer in enumerate(layers):
        p, attention = f"l{index}_", layer.attention
        grid = {name: grids[f"{index}.{name}"] for name in ("qkv", "out", "up", "down")}
        # factors that even out the channels: of queries and keys, of values and the product of the output
        even = np.sqrt(np.maximum(peaks[f"{index}.query"], 1e-5) / np.maximum(peaks[f"{index}.key"], 1e-5))
        factors = {"query": 1 / even, "key": even, "value": 1 / grid["out"].smooth}
        middles = {}
        for name, by in factors.items():
            weight, bias = _linear(getattr(attention.self, name))
            peak = peaks[f"{index}.{name}"] * by
            middles[name] = Middle(peak if name == "value" else np.full_like(peak, peak.max()))
            made = Form(size, size, "none", False, True)
            writer.product(p + name, made, grid["qkv"], codes, weight * by[:, None], bias * by, grid=middles[name])
        inverse = constant(p + "ai", middles["value"].steps / grid["out"].scale)
        width = size // config.num_attention_heads
        factor = float(middles["query"].steps[0] * middles["key"].steps[0] / np.sqrt(width))
        given = [p + "query_q", p + "key_q", p + "value_q", inverse, *mask]
        heads = config.num_attention_heads
        node(ATTENTION, given, [p + "a_q"], DOMAIN, num_heads=heads, factor=factor, zero=grid["out"].zero)
        writer.forms.append(AttentionForm(width, size))
        norm = Form(size, size, "layer_norm", True, True, eps)
        done = attention.output.LayerNorm
        writer.product(
            p + "x", norm, grid["out"], p + "a_q", *_linear(attention.output.dense), grid=grid["up"], residual=x,
            norm=_linear(done),
        )  # fmt: skip
        up = Form(size, inner, "gelu", False, True)
        writer.product(p + "h", up, grid["up"], p + "x_q", *_linear(layer.intermediate.dense), grid=grid["down"])
        following = None if index + 1 == len(layers) else grids[f"{index + 1}.qkv"]
        writer.product(
            p + "y", Form(inner, size, "layer_norm", True, following is not None, eps), grid["down"], p + "h_q",
            *_linear(layer.output.dense), residual=p + "x", norm=_linear(layer.output.LayerNorm),
            **({"grid": following} if following else {}),
        )  # fmt: skip
        x, codes = p + "y", p + "y_q"
    if pooled:
        axes, last = constant("axes", np.array([1], np.int64)), constant("last", np.array([-1], np.int64))
        node("Unsqueeze", ["m", last], ["m3"])
        node("Mul", [x, "m3"], ["kept"])
        node("ReduceSum", ["kept", axes], ["sum"], keepdims=0)
        node("ReduceSum", ["m", last], ["count"], keepdims=1)
        node("Div", ["sum", "count"], ["mean"])
        x = node("LpNormalization", ["mean"], ["sentence"], axis=-1, p=2)
    value = helper.make_tensor_value_info
    inputs = [value(name, TensorProto.INT64, ["batch", sequence]) for name in feeds[0]]
    shape = ["batch", size] if pooled else ["batch", sequence, size]
    graph = helper.make_graph(
        writer.nodes, "encoder", inputs, [value(x, TensorProto.FLOAT, shape)], list(writer.initializers.values())
    )
    opsets = [helper.make_opsetid(name, version) for name, version in (("", 21), ("com.microsoft", 1), (DOMAIN, 1))]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 10
    path = folder / "model.onnx"
    save(model, path)
    build_custom_ops(writer.forms, folder / "model.so")
    return path


def fused_session(path: Path, threads: int) -> ort.InferenceSession:
    """A session of the file with the library beside it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(path.with_suffix(".so")))
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def encoder_of(name: str) -> Any:
    """The PyTorch model."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if name.startswith("minilm"):
        from benchmarks.common import minilm

        return minilm()[0].encoder
    import transformers

    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(num_hidden_layers=4)).eval()


def measured(name: str, folder: Path, threads: Sequence[int], seconds: float) -> dict[str, Any]:
    """Speed over fp32 and errors of one model."""
    calibration, held_out = samples(name)
    MODELS[name].write(folder / "fp32.onnx")
    made = write_encoder(encoder_of(name), calibration, folder, pooled=name.startswith("minilm"))
    sessions = {"fp32": make_session(folder / "fp32.onnx", 1), "fused": fused_session(made, 1)}
    results = {key: [session.run(None, feed)[0] for feed in held_out] for key, session in sessions.items()}
    found: dict[str, Any] = {"errors": errors(results["fp32"], results["fused"]), "speed": {}}
    found["megabytes"] = {file.name: file.stat().st_size / 1e6 for file in sorted(folder.glob("*.*"))}
    for count in threads:
        sessions = {"fp32": make_session(folder / "fp32.onnx", count), "fused": fused_session(made, count)}
        bursts = {key: local(lambda s=session: s.run(None, held_out[0])) for key, session in sessions.items()}
        found["speed"][str(count)] = race(bursts, "fp32", seconds)
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: names(text, list(ENCODERS)), default=list(ENCODERS))
    parser.add_argument("--threads", type=lambda text: [int(part) for part in text.split(",")], default=[1])
    parser.add_argument("--seconds", type=float, default=20.0, help="timing time per model and number of threads")
    options = parser.parse_args()
    result: dict[str, Any] = {}
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            result[name] = measured(name, Path(folder), options.threads, options.seconds)
        for count, rows in result[name]["speed"].items():
            fp32, fused = rows["fp32"]["milliseconds"], rows["fused"]
            print(
                f"{name:10} {count} threads: fp32 {fp32:.2f} ms, fused {fused['milliseconds']:.2f} ms,"
                f" {fused['ratio_of_medians']:.2f}x ({fused['low']:.2f} to {fused['high']:.2f});"
                f" cosine {result[name]['errors']['mean_cosine']:.4f}",
                flush=True,
            )
    print(write("fused_encoder", {"models": result}))


if __name__ == "__main__":
    main()
