"""Block-sparse 8-bit linears (4x1 blocks) on this x86 CPU, one thread, against dense 8 bits and float32.

    python -m benchmarks.sparse_int8 [--parts break_even,region,encoder] [--rounds 30] [--zero-blocks 0.5,0.7]

- region: x [tokens, 768] -> linear to 3072 -> GELU -> linear to 768 -> y, floats at both ends. Sparse: what
  `fxopt.optimize(..., custom_ops=True)` writes, with 50 to 90 % of the blocks zero, at random places. Against the same
  with dense weights, ONNX Runtime fp32, and five forms of ONNX Runtime's own 8 bits, of which the fastest counts.
- encoder: MiniLM's shape (6 layers of 384, 12 heads) with random weights, all linears of the layers 80 % zero blocks,
  sequence 128. Against the same with dense weights in fxopt's own dense kernels, and against ONNX Runtime fp32.
- break_even: the kernels alone, 64 rows, in every x86 form that this CPU runs: the share of zero blocks at which the
  sparse and the dense kernel take equally long (fxopt/cost_model/sparse_int8.py, sparse_int8_kernels.py here).

Alternating bursts; processor time, so that other processes count for little. Everything that fxopt writes is made with
the guard off, so that every form is timed. Writes results/sparse_int8.json; parts that are not asked for keep their
rows.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

import fxopt
from benchmarks.common import RESULTS, write
from benchmarks.peers import quantize_dynamic
from benchmarks.sparse_int8_kernels import break_even, with_zeros
from fxopt.backends.onnxruntime.library import SUFFIX

NAME = "sparse_int8"
WIDTH, INNER = 768, 3072
TOKENS, SHARES = (64, 128, 384), (0.5, 0.7, 0.8, 0.9)
ENCODER = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
ENCODER_SHARE, SEQUENCE = 0.8, 128
FP32, SPARSE, DENSE = "onnxruntime_fp32", "fxopt_sparse", "fxopt_dense"
PASSES = ("quantize-linear{activations=static}",)
_LEAST_CALLS, _BURST_SECONDS = 4, 0.02
Arrays = dict[str, Any]


# ---- two linears


def weights(share: float) -> Arrays:
    """Float weights [out, in] and biases of the two linears."""
    random = np.random.default_rng(0)

    def linear(outputs: int, inner: int) -> Any:
        whole = random.standard_normal((outputs, inner)) / np.sqrt(inner * (1 - share))
        return with_zeros(whole, share, random).astype(np.float32)

    def bias(size: int) -> Any:
        return (random.standard_normal(size) / 10).astype(np.float32)

    return {"w1": linear(INNER, WIDTH), "b1": bias(INNER), "w2": linear(WIDTH, INNER), "b2": bias(WIDTH)}


def model(nodes: Sequence[Any], held: Mapping[str, Any]) -> onnx.ModelProto:
    """x [n, WIDTH] -> y."""
    value = helper.make_tensor_value_info
    shape = ["n", WIDTH]
    inputs, outputs = ([value(name, TensorProto.FLOAT, shape)] for name in "xy")
    used = {name for node in nodes for name in node.input}
    kept = {name: np.ascontiguousarray(array) for name, array in held.items() if name in used}
    tensors = [numpy_helper.from_array(array, name) for name, array in kept.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    body = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(body, opset_imports=opsets, ir_version=10)


def in_floats(given: Arrays) -> onnx.ModelProto:
    """What everything else is made from."""
    nodes = [
        helper.make_node("MatMul", ["x", "t1"], ["m1"]),
        helper.make_node("Add", ["m1", "b1"], ["a1"], name="up"),
        helper.make_node("Gelu", ["a1"], ["g"]),
        helper.make_node("MatMul", ["g", "t2"], ["m2"]),
        helper.make_node("Add", ["m2", "b2"], ["y"], name="down"),
    ]
    return model(nodes, {**given, "t1": given["w1"].T, "t2": given["w2"].T})


def peers(given: Arrays) -> dict[str, onnx.ModelProto]:
    """ONNX Runtime's 8-bit forms of the two linears, weights per channel; the scales of x and of the middle matter for
    no time."""
    held = {**given, "xs": np.float32(8 / 255), "xz": np.uint8(128), "gs": np.float32(6 / 255), "gz": np.uint8(8)}
    for digit in "12":
        weight = given["w" + digit]
        scale = np.abs(weight).max(1) / 127
        codes = np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8)
        held |= {"c" + digit: codes.T, "s" + digit: scale.astype(np.float32)}
        held["z" + digit] = np.zeros(len(codes), np.int8)
    own = {"domain": "com.microsoft"}
    gelu = helper.make_node("Gelu", ["m"], ["g"])

    def product(digit: str, x: str, scale: str, zero: str, y: str) -> Any:
        names = [x, "c" + digit, scale, "s" + digit, zero, "z" + digit, "b" + digit]
        return helper.make_node("MatMulIntegerToFloat", names, [y], **own)

    def dynamic(digit: str, x: str, y: str) -> Any:
        names = [x, "c" + digit, "s" + digit, "z" + digit, "b" + digit]
        return helper.make_node("DynamicQuantizeMatMul", names, [y], **own)

    forms = {
        "onnxruntime_static": [
            helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]), product("1", "q", "xs", "xz", "m"), gelu,
            helper.make_node("QuantizeLinear", ["g", "gs", "gz"], ["r"]), product("2", "r", "gs", "gz", "y"),
        ],
        "onnxruntime_dynamic": [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "ds", "dz"]), product("1", "q", "ds", "dz", "m"),
            gelu,
            helper.make_node("DynamicQuantizeLinear", ["g"], ["r", "es", "ez"]), product("2", "r", "es", "ez", "y"),
        ],
        "onnxruntime_dynamic_fused": [dynamic("1", "x", "m"), gelu, dynamic("2", "g", "y")],
    }  # fmt: skip
    return {name: model(nodes, held) for name, nodes in forms.items()}


def quantize_static(source: Path, path: Path, feeds: Sequence[Arrays]) -> None:
    """ONNX Runtime's static quantiser."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter(feeds)

        def get_next(self) -> Arrays | None:
            return next(self.feeds, None)

    quantize(
        source, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"], extra_options={"DefaultTensorType": 1},
    )  # fmt: skip


def inputs(tokens: int, count: int, seed: int = 0) -> list[Arrays]:
    """Normal rows."""
    random = np.random.default_rng(seed)
    return [{"x": random.standard_normal((tokens, WIDTH)).astype(np.float32)} for _ in range(count)]


def own(source: Path, path: Path, feeds: Sequence[Arrays]) -> dict[str, Any]:
    """What fxopt writes with own kernels; the error, and why linears run on sparse kernels or not."""
    result = fxopt.optimize(
        source, "host", passes=PASSES, calibration=list(feeds), threads=1, custom_ops=True, budget=1.0, force=True
    )
    result.save(path)
    error = result.report.error
    return {
        "noise_to_signal": None if error is None else error.noise_to_signal,
        "verdicts": {row.node: f"{row.outcome}: {row.reason}" for row in result.ledger.select(pass_name="sparse-int8")},
    }


def session(path: Path) -> ort.InferenceSession:
    """One thread, and the library beside the file where there is one."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    library = path.with_suffix(SUFFIX)
    if library.exists():
        settings.register_custom_ops_library(str(library))
    return ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def timed(sessions: Mapping[str, Any], feed: Arrays, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of processor time: of every round the fastest call of a burst of each."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for index in range(rounds):
        for name in list(sessions) if index % 2 == 0 else reversed(list(sessions)):
            one, taken, begin = sessions[name], [], time.perf_counter()
            one.run(None, feed)
            while len(taken) < _LEAST_CALLS or time.perf_counter() - begin < _BURST_SECONDS:
                start = time.thread_time()
                one.run(None, feed)
                taken.append(time.thread_time() - start)
            times[name].append(1e3 * min(taken))
    return times


def compared(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Medians, and how many times as fast as the others the sparse one is: median, least and most of the rounds."""
    stock = [name for name in times if name.startswith("onnxruntime") and name != FP32]
    against = {"fxopt_dense": DENSE, "onnxruntime_fp32": FP32}
    found: dict[str, Any] = {"milliseconds": {name: statistics.median(taken) for name, taken in times.items()}}
    if stock:
        best = min(stock, key=lambda name: statistics.median(times[name]))
        found["best_onnxruntime_int8"] = against["onnxruntime_int8"] = best
    for kind, name in against.items():
        ratios = [other / sparse for other, sparse in zip(times[name], times[SPARSE], strict=True)]
        found[f"over_{kind}"] = {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return found


def region(rounds: int, shares: Sequence[float]) -> list[dict[str, Any]]:
    """One row per share of zero blocks and number of tokens."""
    found = []
    for share in shares:
        with tempfile.TemporaryDirectory() as name:
            folder, calibration = Path(name), inputs(64, 4)
            source = folder / f"{FP32}.onnx"
            onnx.save(in_floats(weights(share)), source)
            onnx.save(in_floats(weights(0.0)), folder / "dense.onnx")
            for peer, made in peers(weights(share)).items():
                onnx.save(made, folder / f"{peer}.onnx")
            quantize_dynamic(source, folder / "onnxruntime_quantize_dynamic.onnx")
            quantize_static(source, folder / "onnxruntime_quantize_static.onnx", calibration)
            about = own(source, folder / f"{SPARSE}.onnx", calibration)
            own(folder / "dense.onnx", folder / f"{DENSE}.onnx", calibration)
            (folder / "dense.onnx").unlink()
            sessions = {path.stem: session(path) for path in sorted(folder.glob("*.onnx"))}
            for tokens in TOKENS:
                times = timed(sessions, inputs(tokens, 1, seed=9)[0], rounds)
                row = {"zero_blocks": share, "tokens": tokens, **about, **compared(times)}
                found.append(row)
                show(f"region {100 * share:.0f} % zero, {tokens} tokens", row)
    return found


def show(title: str, row: Mapping[str, Any]) -> None:
    """One line."""
    text = ", ".join(f"{value['ratio']:.2f}x {kind}" for kind, value in row.items() if kind.startswith("over_"))
    print(f"{title}: {1e3 * row['milliseconds'][SPARSE]:.0f} us, {text}", flush=True)


# ---- an encoder


def write_encoder(path: Path, share: float) -> None:
    """(x, mask) [1, SEQUENCE] int64 -> hidden states; the linears of the layers have zero blocks."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    encoder = BertModel(BertConfig(vocab_size=1000, **ENCODER), add_pooling_layer=False).eval()
    random = np.random.default_rng(1)
    with torch.no_grad():
        for layer in encoder.modules():
            if isinstance(layer, torch.nn.Linear):
                zeroed = with_zeros(layer.weight.numpy(), share, random) / np.sqrt(1 - share)
                layer.weight.copy_(torch.from_numpy(zeroed.astype(np.float32)))

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.encoder(input_ids=x, attention_mask=mask).last_hidden_state
            return hidden

    example = torch.ones(1, SEQUENCE, dtype=torch.int64)
    program = torch.onnx.export(
        Encoder(), (example, example), dynamo=True, opset_version=20, verbose=False, input_names=["x", "mask"],
        output_names=["y"],
    )  # fmt: skip
    assert program is not None
    program.save(path)


def encoder(rounds: int) -> dict[str, Any]:
    """The whole model: sparse, dense in own kernels, fp32."""
    random = np.random.default_rng(0)
    ones = np.ones((1, SEQUENCE), np.int64)
    feeds = [{"x": random.integers(0, 1000, (1, SEQUENCE)), "mask": ones} for _ in range(9)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_encoder(folder / f"{FP32}.onnx", ENCODER_SHARE)
        write_encoder(folder / "dense.onnx", 0.0)
        about = own(folder / f"{FP32}.onnx", folder / f"{SPARSE}.onnx", feeds[:8])
        own(folder / "dense.onnx", folder / f"{DENSE}.onnx", feeds[:8])
        sessions = {one: session(folder / f"{one}.onnx") for one in (FP32, DENSE, SPARSE)}
        times = timed(sessions, feeds[8], rounds)
    row = {"zero_blocks": ENCODER_SHARE, "sequence": SEQUENCE, "config": ENCODER, **about, **compared(times)}
    show(f"encoder {100 * ENCODER_SHARE:.0f} % zero, sequence {SEQUENCE}", row)
    return row


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="break_even,region,encoder")
    parser.add_argument("--rounds", type=int, default=30, help="bursts of each competitor")
    parser.add_argument("--zero-blocks", default=",".join(map(str, SHARES)), help="shares of the region")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    path = RESULTS / f"{NAME}.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept.pop("machine", None)
    if "break_even" in options.parts:
        kept["break_even"] = break_even(options.rounds)
    if "region" in options.parts:
        shares = [float(share) for share in options.zero_blocks.split(",")]
        rows = [row for row in kept.get("region", []) if row["zero_blocks"] not in shares]
        rows += region(options.rounds, shares)
        kept["region"] = sorted(rows, key=lambda row: (row["zero_blocks"], row["tokens"]))
    if "encoder" in options.parts:
        kept["encoder"] = encoder(options.rounds)
    print(write(NAME, {"threads": 1, **kept}))


if __name__ == "__main__":
    main()
