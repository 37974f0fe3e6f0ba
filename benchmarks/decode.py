"""One token at a time: linears of GPT-2 and Llama shapes and a whole decoding step, fewer bits against float32.

    python -m benchmarks.decode [--threads N] [--seconds S]

All competitors are what `fxopt.optimize` writes for this machine (the guard is off, so that every form is timed), in
sessions with default options, timed in alternating bursts in one process. Writes results/decode.json.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import fxopt
from benchmarks.common import write
from fxopt.backends.onnxruntime.session import make_session
from fxopt.guard import measure_many

SHAPES = {  # in x out
    "gpt2 attention output": (768, 768),
    "gpt2 qkv": (768, 2304),
    "gpt2 up": (768, 3072),
    "gpt2 down": (3072, 768),
    "llama attention output": (2048, 2048),
    "llama up": (2048, 5632),
    "llama down": (5632, 2048),
    "llama 7B attention output": (4096, 4096),
}
FORMS = {
    "int8, dynamic": "quantize-linear{activations=dynamic,smooth=off}",
    "int8, MatMulNBits": "quantize-linear{bits=8,activations=int8,method=rtn}",
    "int4": "quantize-linear{bits=4,method=rtn}",
    "int4, group 128": "quantize-linear{bits=4,group=128,method=rtn}",
}


def linear_model(inputs: int, outputs: int) -> onnx.ModelProto:
    """y [1, out] = x [1, in] @ w."""
    random = np.random.default_rng(0)
    weight = (random.standard_normal((inputs, outputs)) / np.sqrt(inputs)).astype(np.float32)
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="linear")],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, outputs])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


class Block(nn.Module):
    """A decoder block with a gated MLP and a cache of keys and values."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [1, 1, dim], caches [1, heads, past, dim / heads]."""
        h = self.norm1(x)
        q, k, v = (part(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        mixed = nn.functional.scaled_dot_product_attention(q, keys, values)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h)), keys, values


class Step(nn.Module):
    """One decoding step: a token's vector in, logits and the longer caches out."""

    def __init__(
        self, dim: int = 1024, heads: int = 16, hidden: int = 2816, layers: int = 6, words: int = 8192
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, hidden) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, words, bias=False)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Caches [layers, 1, heads, past, dim / heads]."""
        new_keys, new_values = [], []
        for index, block in enumerate(self.blocks):
            x, k, v = block(x, keys[index], values[index])
            new_keys.append(k)
            new_values.append(v)
        return self.head(self.norm(x)), torch.stack(new_keys), torch.stack(new_values)


def timed(files: dict[str, Path], feeds: dict[str, Any], threads: int, seconds: float) -> dict[str, float]:
    """Ratio of medians to float32 of each file."""
    sessions = {name: make_session(path, threads) for name, path in files.items()}
    times = measure_many({name: (lambda s=session: s.run(None, feeds)) for name, session in sessions.items()}, seconds)
    return {name: times["float32"].median / row.median for name, row in times.items()}


def linears(folder: Path, threads: int, seconds: float) -> dict[str, dict[str, float]]:
    """Every shape in every form."""
    found = {}
    for name, (inputs, outputs) in SHAPES.items():
        model = linear_model(inputs, outputs)
        samples = [{"x": torch.randn(1, inputs, generator=torch.Generator().manual_seed(seed))} for seed in range(8)]
        files = {"float32": folder / "float32.onnx"}
        onnx.save(model, files["float32"])
        for form, text in FORMS.items():
            result = fxopt.optimize(
                model, "host", calibration=samples, passes=[text], budget=None, objective="size", force=True,
                threads=threads,
            )  # fmt: skip
            files[form] = folder / f"{form}.onnx".replace(" ", "_").replace(",", "")
            result.save(files[form])
        found[name] = timed(files, {"x": samples[0]["x"].numpy()}, threads, seconds)
        print(f"{name} {inputs}x{outputs}:", {form: f"{ratio:.2f}x" for form, ratio in found[name].items()}, flush=True)
    return found


def step(folder: Path, threads: int, seconds: float, past: int = 127) -> dict[str, Any]:
    """The whole decoding step; "planned" is what the planner chooses within the default budget."""
    torch.manual_seed(0)
    model = Step().eval()
    layers, heads, size = len(model.blocks), 16, 64

    def sample(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = (layers, 1, heads, past, size)
        return torch.randn(1, 1, 1024, generator=generator), *(torch.randn(shape, generator=generator) for _ in "kv")

    path = folder / "step.onnx"
    program = torch.onnx.export(model, sample(0), dynamo=True, opset_version=20, verbose=False)
    assert program is not None
    program.save(path)
    names = [value.name for value in onnx.load(path, load_external_data=False).graph.input]
    samples = [dict(zip(names, sample(seed), strict=True)) for seed in range(8)]
    files, rows = {"float32": path}, {}
    forms: dict[str, Any] = {"planned": {"passes": None}}
    forms |= {name: {"passes": [text], "budget": None} for name, text in FORMS.items() if name != "int4, group 128"}
    for name, options in forms.items():
        result = fxopt.optimize(path, "host", calibration=samples, force=True, threads=threads, **options)
        files[name] = folder / f"step_{name}.onnx".replace(" ", "_").replace(",", "")
        result.save(files[name])
        error = result.report.error
        rows[name] = {"noise_to_signal": None if error is None else error.noise_to_signal}
        settings = sorted({row.setting for row in result.ledger.select(outcome="applied", pass_name="quantize-linear")})
        rows[name]["settings"] = settings
    feeds = {name: value.numpy() for name, value in samples[0].items()}
    for name, ratio in timed(files, feeds, threads, 4 * seconds).items():
        rows.setdefault(name, {})["ratio"] = ratio
    for name, row in rows.items():
        print(f"step, {name}: {row['ratio']:.2f}x, noise to signal {row.get('noise_to_signal')}", flush=True)
    return rows


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6.0, help="per comparison")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        found = {"linears": linears(folder, options.threads, options.seconds)}
        found["step"] = step(folder, options.threads, options.seconds)
    print(f"written: {write('decode', {'threads': options.threads, **found})}")


if __name__ == "__main__":
    main()
