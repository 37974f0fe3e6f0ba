"""Kernels of block-sparse 8-bit linears alone, 64 rows, against the dense ones (see `benchmarks.sparse_int8`)."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fxopt.backends.tvm.kernels.fused_int8 import PARAMETERS, Form, fused_int8, pack, starts_of, tile_for
from fxopt.backends.tvm.kernels.sparse_int8 import (
    BLOCK,
    SPARSE_PARAMETERS,
    SparseForm,
    group_of,
    pack_sparse,
    sparse_int8,
    sparse_starts,
)
from fxopt.backends.tvm.link import link
from fxopt.backends.tvm.load import HostLibrary
from fxopt.backends.tvm.lower import write_object
from fxopt.backends.tvm.machine import machine_for
from fxopt.cost_model.targets import get_target

LEVELS = {"x86-avx512-vnni": {"avx512_vnni"}, "x86-avx-vnni": {"avx_vnni"}, "x86-avx2": {"avx2"}}
KERNELS = (
    SparseForm(768, 3072, "gelu", False, True),
    SparseForm(3072, 768, "layer_norm", True, True),
    SparseForm(768, 768, "none", False, True),
    SparseForm(768, 768, "layer_norm", True, True),
    SparseForm(384, 384, "none", False, True),
    SparseForm(384, 384, "layer_norm", True, True),
    SparseForm(384, 1536, "gelu", False, True),
    SparseForm(1536, 384, "layer_norm", True, True),
    SparseForm(128, 512, "gelu", False, True),
    SparseForm(64, 64, "none", False, True),
)
GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # shares of zero blocks


def with_zeros(weight: Any, share: float, random: np.random.Generator) -> Any:
    """[out, in] with a share of its 4x1 blocks set to zero."""
    kept = random.random((-(-weight.shape[0] // BLOCK), weight.shape[1])) >= share
    return weight * np.repeat(kept, BLOCK, 0)[: weight.shape[0]]


def arrays_of(form: SparseForm, machine: Any, share: float | None) -> list[Any]:
    """Operands of the sparse kernel with a share of zero blocks; of the dense one for None."""
    random = np.random.default_rng(0)
    rows, outputs, inner = 64, form.outputs, form.inner
    codes = with_zeros(random.integers(-127, 128, (outputs, inner)), share or 0.0, random).astype(np.int8)
    in_rows = form.in_rows or share is None
    held = {
        "rows": np.array([rows], np.int32),
        "scales": (random.uniform(0.5, 1, outputs) / 600 / np.sqrt(inner)).astype(np.float32),
        "bias": random.standard_normal(outputs).astype(np.float32),
        "residual": random.standard_normal((rows, outputs)).astype(np.float32),
        "gamma": random.uniform(0.5, 1.5, outputs).astype(np.float32),
        "beta": random.standard_normal(outputs).astype(np.float32),
        "y": np.zeros((rows, outputs), np.float32),
        "codes": np.zeros((rows, outputs) if in_rows else (outputs, rows), np.uint8),
        "inverse": random.uniform(20, 40, outputs).astype(np.float32),
        "zero": np.array([60], np.float32),
    }
    if share is None:
        tile = tile_for(outputs, machine)
        q = random.integers(0, 256, (rows, inner)).astype(np.uint8)
        held |= {"q": q, "w": pack(codes, tile), "starts": starts_of(codes, 7, tile)}
        return [aligned(held[name]) for name in PARAMETERS]
    packed = pack_sparse(codes, group_of(machine))
    panel = random.integers(0, 256, (inner, rows)).astype(np.uint8)
    held |= {"panel": panel, "stream": packed.stream, "firsts": packed.firsts, "starts": sparse_starts(codes, 7)}
    return [aligned(held[name]) for name in SPARSE_PARAMETERS]


def aligned(array: Any) -> Any:
    """The same in memory that begins with a cache line."""
    memory = np.zeros(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    made = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    made[...] = array
    return made


def crossing(dense: float, sparse: Sequence[float]) -> float:
    """The share of zero blocks from which on the sparse kernel is faster; between two of the grid on a line."""
    at = next((i for i in range(len(GRID)) if all(one <= dense for one in sparse[i:])), len(GRID))
    if at in (0, len(GRID)):
        return 0.0 if at == 0 else 1.0
    before, after = sparse[at - 1], sparse[at]
    return GRID[at - 1] + (GRID[at] - GRID[at - 1]) * (before - dense) / (before - after)


def break_even(rounds: int) -> list[dict[str, Any]]:
    """One row per x86 form and product."""
    found = []
    for target, needed in LEVELS.items():
        if not needed <= get_target("host").features:
            continue
        machine = machine_for(get_target(target))
        with tempfile.TemporaryDirectory() as name:
            functions = []
            for index, form in enumerate(KERNELS):
                plain = Form(form.inner, form.outputs, form.epilogue, form.floats, form.codes, form.eps)
                functions += [sparse_int8(f"s{index}", form, machine), fused_int8(f"d{index}", plain, machine)]
            names = [str(function.attrs["global_symbol"]) for function in functions]
            built = write_object(functions, machine, Path(name) / "k.o")
            library = HostLibrary(link([built], names, machine, Path(name) / "k.so"))
        for index, form in enumerate(KERNELS):
            times = kernel_times(library, index, form, machine, rounds)
            row = {
                "target": target, "inner": form.inner, "outputs": form.outputs, "epilogue": form.epilogue,
                "dense_us": times[0], "sparse_us": dict(zip(map(str, GRID), times[1:], strict=True)),
                "break_even_zero_blocks": crossing(times[0], times[1:]),
            }  # fmt: skip
            found.append(row)
            text = f"{target} {form.inner} -> {form.outputs} {form.epilogue}"
            print(f"{text}: break-even at {100 * row['break_even_zero_blocks']:.0f} % zero blocks", flush=True)
    return found


def kernel_times(library: HostLibrary, index: int, form: SparseForm, machine: Any, rounds: int) -> list[float]:
    """Microseconds of the dense kernel and of the sparse one at every share: lower quartiles over the rounds."""
    calls = []
    for share in (None, *GRID):
        arrays = arrays_of(form, machine, share)
        function = library.function(f"{'d' if share is None else 's'}{index}", len(arrays))
        addresses = [array.ctypes.data for array in arrays]
        calls.append((function, addresses, arrays))
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for (function, addresses, _), taken in zip(calls, times, strict=True):
            function(*addresses)
            begin = time.thread_time()
            for _ in range(3):
                function(*addresses)
            taken.append((time.thread_time() - begin) / 3)
    return [1e6 * statistics.quantiles(taken, n=4)[0] for taken in times]
