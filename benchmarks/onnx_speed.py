"""Import plus export against onnx.load plus onnx.save of the same file, interleaved; CPU seconds, medians.

    python -m benchmarks.onnx_speed [--repeats 5] [--no-minilm]

The bound that tests/onnx/test_speed.py holds: five times as long as onnx alone, plus a millisecond per node.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from fxopt.frontends.onnx import load
from fxopt.ir.onnx.export import save


@dataclass(frozen=True)
class Row:
    """One model: nodes, bytes of the file, CPU seconds of both (medians), and the bound of ours."""

    nodes: int
    bytes: int
    onnx_seconds: float
    fxopt_seconds: float

    @property
    def bound(self) -> float:
        """Seconds that import and export may take."""
        return 5 * self.onnx_seconds + 1e-3 * self.nodes


def measure(path: Path, repeats: int) -> Row:
    """Time both on one file, in turns, after one round that does not count."""
    target = path.with_name("again.onnx")

    def plain() -> None:
        onnx.save(onnx.load(path), target)

    def ours() -> None:
        save(load(path), target)

    times = [(_seconds(plain), _seconds(ours)) for _ in range(repeats + 1)][1:]
    theirs, own = (statistics.median(values) for values in zip(*times, strict=True))
    return Row(len(onnx.load(path).graph.node), path.stat().st_size, theirs, own)


def _seconds(call: Callable[[], None]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def models(folder: Path, minilm: bool) -> dict[str, Path]:
    """The files to be timed."""
    from benchmarks.common import export_minilm
    from benchmarks.common import minilm as real
    from tests.test_large_graph import network

    found: dict[str, Path] = {}
    for nodes in (1_000, 10_000, 20_000):
        found[f"network of {nodes} nodes"] = folder / f"{nodes}.onnx"
        onnx.save(network(nodes), found[f"network of {nodes} nodes"])
    for path in sorted((Path(__file__).parent.parent / "examples" / "models").glob("*.onnx")):
        found[path.stem] = folder / path.name
        found[path.stem].write_bytes(path.read_bytes())
    if minilm:
        found["MiniLM"] = folder / "minilm.onnx"
        export_minilm(real()[0], found["MiniLM"])
    return found


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-minilm", action="store_true")
    options = parser.parse_args()
    from benchmarks.common import write

    rows: dict[str, dict[str, Any]] = {}
    print(f"{'model':28s} {'nodes':>6s} {'MB':>7s} {'onnx s':>8s} {'fxopt s':>8s} {'ratio':>6s} {'bound s':>8s}")
    with tempfile.TemporaryDirectory() as folder:
        for name, path in models(Path(folder), not options.no_minilm).items():
            row = measure(path, options.repeats)
            ratio = row.fxopt_seconds / row.onnx_seconds
            print(
                f"{name:28s} {row.nodes:6d} {row.bytes / 1e6:7.1f} {row.onnx_seconds:8.3f} {row.fxopt_seconds:8.3f} "
                f"{ratio:6.1f} {row.bound:8.3f}"
            )
            rows[name] = {**asdict(row), "ratio": ratio, "bound": row.bound}
    write("onnx_speed", {"repeats": options.repeats, "models": rows})


if __name__ == "__main__":
    main()
