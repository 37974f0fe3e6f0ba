"""Instructions that kernels and models for 64-bit Arm execute, counted under qemu-user: sparse and 8-bit over dense.

    python -m benchmarks.arm_instructions

There is no Arm processor here: these are no times. Counts are the same at every run, so tests hold them. Needs
qemu-user (Debian's package). Writes benchmarks/results/arm_instructions.json.
"""

from __future__ import annotations

import copy
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import wasm_models
from benchmarks.common import write
from benchmarks.tvm_kernels import arrays, block_sparse, shared_pattern
from fxopt.backends.tvm import Tvm, qemu
from fxopt.backends.tvm.executable import TvmExecutable
from fxopt.backends.tvm.kernels.bsr import bsr, pack_bsr
from fxopt.backends.tvm.kernels.bsr_int8 import bsr_int8, pack_blocks, panel_rows
from fxopt.backends.tvm.kernels.dense import dense, pack_bias, pack_dense
from fxopt.backends.tvm.kernels.dense_int8 import Product, dense_int8, work_space
from fxopt.backends.tvm.kernels.dot import column_sums, in_groups, pack_codes, preferred
from fxopt.backends.tvm.kernels.nm import nm, pack_nm
from fxopt.backends.tvm.machine import Machine, machine_for
from fxopt.backends.tvm.values import tvm_type
from fxopt.cost_model.targets import get_target
from fxopt.frontends.torch_export import load

SHAPES = [(196, 256, 256), (64, 768, 768)]  # rows, inputs, outputs
TARGET = "cortex-a76"
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {  # and the height of blocks
    "encoder": (wasm_models.encoder, (1, 64, 256), 8),
    "mobilenet": (wasm_models.mobilenet, (1, 3, 96, 96), 4),
}


def kernels(shape: tuple[int, int, int], machine: Machine) -> tuple[dict[str, Any], dict[str, list[Any]], Any, float]:
    """Functions, their arguments, and of 8 bits the exact result and the largest error of it that rounding explains."""
    rows, inner, outputs = shape
    x, w, b = arrays(shape)
    y, width = np.zeros((rows, outputs), np.float32), machine.columns
    bias = pack_bias(b, outputs, width)
    functions = {"dense": dense("dense", *shape, machine)}
    given: dict[str, list[Any]] = {"dense": [x, pack_dense(w, width), bias, y]}
    expected = {"dense": x.astype(np.float64) @ w.T + b}
    for kept in (30, 20, 10):
        name = f"bsr8x1_{kept}"
        sparse = block_sparse(w, 8, kept / 100)
        packed = pack_bsr(sparse, 8)
        functions[name] = bsr(name, *shape, len(packed.values), 8, machine)
        given[name] = [x, packed.values, packed.inputs, packed.starts, bias, y]
        expected[name] = x.astype(np.float64) @ sparse.T + b
    for shared in (4, 8):
        name = f"nm24_shared{shared}"
        sparse = shared_pattern(w, 2, 4, shared)
        pattern = pack_nm(sparse, 2, 4, shared)
        functions[name] = nm(name, *shape, 2, 4, shared, machine)
        given[name] = [x, pattern.values, pattern.inputs, pack_bias(b, outputs, shared), y]
        expected[name] = x.astype(np.float64) @ sparse.T + b
    random = np.random.default_rng(1)
    codes = random.integers(-127, 128, (outputs, inner)).astype(np.int8)
    for name, made_for in (("int8", machine), ("int8_without_dotprod", machine_for(get_target("cortex-a53")))):
        dot, size = preferred(made_for), Product(rows, inner, outputs)
        q = random.integers(-128, 128, (rows, in_groups(inner, dot))).astype(tvm_type(dot.x.dtype))
        ones, none = pack_bias(np.ones(outputs, np.float32), outputs, width), np.zeros_like(bias)
        kind, count = work_space(size, dot, made_for)
        functions[name] = dense_int8(name, size, dot, made_for)
        starts = 0 * column_sums(codes, width)
        space = [np.zeros(count, kind)] if count else []
        given[name] = [q, pack_codes(codes, width, dot), starts, ones, none, *space, y]
        expected[name] = q[:, :inner].astype(np.int64) @ codes.astype(np.int64).T
    dot, size = preferred(machine), Product(rows, inner, outputs)
    q, high = given["int8"][0], panel_rows(size, dot)
    for kept in (30, 20, 10):
        name, sparse = f"int8_bsr8x1_{kept}", codes * (block_sparse(w, 8, kept / 100) != 0)
        blocks = pack_blocks(sparse.astype(np.int8), 8, dot)
        functions[name] = bsr_int8(name, size, blocks.groups, 8, dot, machine)
        panel = np.zeros(high * q.shape[1], q.dtype)
        given[name] = [q, blocks.weights, blocks.inputs, blocks.firsts, 0 * column_sums(codes, 8), ones, none, panel, y]
        expected[name] = q[:, :inner].astype(np.int64) @ sparse.astype(np.int64).T
    return functions, given, expected, 1e-5


def counted(shape: tuple[int, int, int], machine: Machine, folder: Path) -> dict[str, Any]:
    """Instructions of every kernel, and over dense; results are checked."""
    functions, given, expected, limit = kernels(shape, machine)
    counts = {}
    for name, function in functions.items():
        calls = [qemu.Call(name, tuple((number, 0) for number in range(len(given[name]))))]
        found, executed = qemu.run([function], calls, given[name], machine, folder / name, count=True)
        error = np.abs(found[-1] - expected[name]).max() / np.abs(expected[name]).max()
        if error > limit:
            raise RuntimeError(f"{name} on {shape}: error {error}")
        counts[name] = executed[name]
    return {
        "shape": list(shape), "instructions": counts,
        "over_dense": {name: round(count / counts["dense"], 4) for name, count in counts.items()},
    }  # fmt: skip


def model_counts(name: str, folder: Path) -> dict[str, Any]:
    """Instructions of a whole model, dense and with 80 % of its blocks zero; results are checked against torch."""
    make, shape, width = MODELS[name]
    model, x = make(), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {}
    for form in ("dense", "sparse"):
        if form == "sparse":
            wasm_models.prune(model, width, 0.2)
        executable = Tvm().compile(load(model, (x,)), get_target(TARGET))
        assert isinstance(executable, TvmExecutable)
        (build,) = executable.package.builds
        (y,), counts = qemu.run_entry(build, build.entries[0], [x.numpy()], folder / form, count=True)
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double()).numpy()
        error = float(np.abs(y - exact).max() / np.abs(exact).max())
        if error > 1e-4:
            raise RuntimeError(f"{name}, {form}: error {error}")
        found[form] = sum(count for key, count in counts.items() if key.startswith(f"{build.entries[0].function}_k"))
        found[f"{form}_error"] = float(f"{error:.2g}")
    return {**found, "over_dense": round(found["sparse"] / found["dense"], 4)}


def main() -> None:
    """Count, print, write."""
    if qemu.missing():
        raise SystemExit(qemu.missing())
    machine, rows = machine_for(get_target(TARGET)), []
    with tempfile.TemporaryDirectory() as folder:
        for shape in SHAPES:
            rows.append(counted(shape, machine, Path(folder)))
            print(f"{' x '.join(map(str, shape))}: dense {rows[-1]['instructions']['dense']}")
            for name, ratio in rows[-1]["over_dense"].items():
                print(f"  {name:24} {ratio:.3f}")
        models = {name: model_counts(name, Path(folder) / name) for name in MODELS}
        for name, found in models.items():
            print(f"{name}: dense {found['dense']}, sparse over dense {found['over_dense']:.3f}")
    version = subprocess.run(["qemu-aarch64", "--version"], capture_output=True, text=True, check=True).stdout
    facts = {"target": TARGET, "emulator": version.splitlines()[0]}
    print(write("arm_instructions", {**facts, "kernels": rows, "models": models}))


if __name__ == "__main__":
    main()
