"""Which register tile is the fastest: WebAssembly by time in Node, 64-bit Arm by executed instructions.

    python -m benchmarks.tiles [--before 'taskset -c 0']

A tile of rows x columns accumulators (of a convolution outputs x pixels) has to fit the registers that an engine or a
compiler leaves. The sizes that `fxopt.backends.tvm.machine` names are chosen from this grid. Writes
benchmarks/results/tiles.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import write
from benchmarks.node_packages import folder, node
from fxopt.backends.tvm import qemu
from fxopt.backends.tvm.kernels.conv import Conv, conv
from fxopt.backends.tvm.kernels.dense import dense
from fxopt.backends.tvm.link import link
from fxopt.backends.tvm.lower import write_object
from fxopt.backends.tvm.machine import Machine, machine_for
from fxopt.cost_model.targets import get_target

SHAPE = (128, 384, 384)  # rows, inputs, outputs
CONV = Conv(1, 144, 28, 28, 192, (1, 1))
WASM = [(4, 8), (3, 8), (6, 8), (2, 16), (3, 12), (8, 4), (12, 4), (3, 16)]
WASM_CONV = [(4, 8), (2, 16), (3, 12), (8, 4), (4, 12), (6, 8)]
ARM = [(8, 8), (6, 8), (4, 16), (4, 8), (12, 4), (6, 12), (16, 4)]
_RUN = """
import { readFileSync } from "node:fs";
const plan = JSON.parse(readFileSync("plan.json", "utf8"));
const { instance } = await WebAssembly.instantiate(readFileSync("kernels.wasm"), {});
const { memory, __heap_base } = instance.exports;
memory.grow(Math.ceil(plan.bytes / 65536));
const best = {};
for (let round = 0; round < plan.rounds; round++)
  for (const [name, places] of Object.entries(plan.kernels)) {
    const given = places.map((place) => place + ((__heap_base.value + 63) & ~63));
    const call = instance.exports[name];
    if (round === 0) {
      const begin = performance.now();
      while (performance.now() - begin < 200) call(...given);
      await new Promise((done) => setTimeout(done, 30));
    }
    const begin = performance.now();
    for (let i = 0; i < 8; i++) call(...given);
    best[name] = Math.min(best[name] ?? Infinity, (performance.now() - begin) / 8);
  }
console.log(JSON.stringify(best));
"""


def tiled(machine: Machine, tile: tuple[int, int], kind: str) -> Machine:
    """The machine with another tile."""
    names = ("rows", "columns") if kind == "dense" else ("outputs", "pixels")
    return dataclasses.replace(machine, **dict(zip(names, tile, strict=True)))


def wasm(before: str) -> dict[str, dict[str, float]]:
    """Speed of every tile over the one in use: the fastest of many calls each."""
    machine = machine_for(get_target("wasm"))
    rows, inner, outputs = SHAPE
    functions, kernels, end = [], {}, 0
    for kind, tiles in (("dense", WASM), ("conv", WASM_CONV)):
        for tile in tiles:
            name = f"{kind}_{tile[0]}x{tile[1]}"
            made_for = tiled(machine, tile, kind)
            if kind == "dense":
                functions.append(dense(name, *SHAPE, made_for))
                sizes = [rows * inner, inner * (outputs + 16), outputs + 16, rows * outputs]
            else:
                functions.append(conv(name, CONV, made_for))
                pixels = CONV.height * CONV.width
                sizes = [CONV.channels * pixels, CONV.inner * (CONV.outputs + 16), CONV.outputs + 16]
                sizes.append(CONV.outputs * pixels)
            starts = np.cumsum([0, *(-(-4 * size // 64) * 64 + 64 for size in sizes)])
            kernels[name], end = [int(start) for start in starts[:-1]], max(end, int(starts[-1]))
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        built = write_object(functions, machine, place / "kernels.o")
        link([built], list(kernels), machine, place / "kernels.wasm")
        (place / "run.mjs").write_text(_RUN, encoding="utf-8")
        plan = {"kernels": kernels, "bytes": end + 65536, "rounds": 40}
        (place / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        command = [*shlex.split(before), str(node(folder())), "run.mjs"]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=True)
    times: dict[str, float] = json.loads(done.stdout)
    used = {"dense": f"dense_{machine.rows}x{machine.columns}", "conv": f"conv_{machine.outputs}x{machine.pixels}"}
    found: dict[str, dict[str, float]] = {"dense": {}, "conv": {}}
    for name, time in times.items():
        kind, tile_name = name.split("_")
        found[kind][tile_name] = round(times[used[kind]] / time, 3)
    return found


def arm() -> dict[str, float]:
    """Instructions of every tile over those of the one in use."""
    machine = machine_for(get_target("cortex-a76"))
    rows, inner, outputs = SHAPE
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for tile in ARM:
            made_for, name = tiled(machine, tile, "dense"), f"dense_{tile[0]}x{tile[1]}"
            whole = -(-outputs // tile[1]) * tile[1]
            sizes = (rows * inner, inner * whole, whole, rows * outputs)
            arrays = [np.zeros(size, np.float32) for size in sizes]
            call = qemu.Call(name, tuple((index, 0) for index in range(4)))
            place = Path(scratch) / name
            _, found = qemu.run([dense(name, *SHAPE, made_for)], [call], arrays, made_for, place, count=True)
            counts[f"{tile[0]}x{tile[1]}"] = found[name]
    used = counts[f"{machine.rows}x{machine.columns}"]
    return {tile: round(count / used, 3) for tile, count in counts.items()}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="", help="words before Node's command, such as 'taskset -c 0'")
    options = parser.parse_args()
    result: dict[str, Any] = {"shape": list(SHAPE), "wasm_speed_over_used": wasm(options.before)}
    if not qemu.missing():
        result["arm_instructions_over_used"] = arm()
    print(json.dumps(result, indent=1))
    print(write("tiles", result))


if __name__ == "__main__":
    main()
