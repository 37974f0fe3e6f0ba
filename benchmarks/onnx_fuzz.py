"""Fuzz the ONNX frontend: mutated models are imported, typed, verified, rewritten by the exact passes and exported.

    python -m benchmarks.onnx_fuzz [--cases 10000] [--seed 0] [--show]

Every case must succeed or raise one of fxopt.errors, within 20 seconds and 4 GB; what a pass raised by itself does not
count as one. Batches run in child processes with limits, so that a crash or a hang is one counted case.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from benchmarks.onnx_mutations import mutated

CASE_SECONDS = 20
MEMORY = 4 << 30  # bytes of address space beyond what a child has after its imports
BATCH = 500
_LARGEST = 60_000  # bytes of a model that is mutated


class TooSlow(BaseException):
    """A case took longer than its limit."""


def seeds(kinds: tuple[str, ...] = ("simple", "pytorch-converted", "pytorch-operator", "node")) -> list[bytes]:
    """Valid models: the ONNX suite (every fifth node model), a network, and one with sub-graphs and functions."""
    from onnx.backend.test.loader import load_model_tests

    from tests.test_large_graph import network

    found = [network(30), corner()]
    for kind in kinds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cases = load_model_tests(kind=kind)
        for case in cases[:: 5 if kind == "node" else 1]:
            model = case.model
            found.append(model if model is not None else onnx.load(Path(str(case.model_dir)) / "model.onnx"))
    contents = [model.SerializeToString() for model in found]
    return [content for content in contents if len(content) <= _LARGEST]


def corner() -> ModelProto:
    """If, Loop, a function, strings, four-bit integers, a sparse initializer's neighbours, doc strings, metadata."""
    return onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21, "local" : 1], doc_string: "corner", metadata_props: ["k" : "v"]>
        corner (float[n, 4] x, bool c) => (float[n, 4] y, float[n, 4] z, int64[1] s)
        <float[4, 4] w = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}, int64 three = {3}, int64[2] shape = {-1, 4},
         bool yes = {1}>
        {
            a = MatMul(x, w)
            d = local.twice(a)
            y = If (c) <
                then_branch = yes_graph () => (float[n, 4] t) { t = Add(a, d) },
                else_branch = no_graph () => (float[n, 4] e) { u = Mul(a, d) e = Relu(u) }
            >
            z = Loop (three, yes, a) <
                body = step (int64 i, bool on, float[n, 4] v) => (bool go, float[n, 4] r) {
                    go = Identity(on)
                    r = Add(v, d)
                }
            >
            f = Reshape(z, shape)
            g = Shape(f)
            h = Constant <value_ints = [0]> ()
            s = Gather(g, h)
        }
        <domain: "local", opset_import: ["" : 21]>
        twice (p) => (q) { two = Constant <value_float = 2.0> () q = Mul(p, two) }
    """)


def one(path: Path) -> str:
    """Run one file through everything; "succeeded", or the name of the error that a user may see.

    An error that a pass raised by itself is raised again.
    """
    from fxopt.cost_model.targets import get_target
    from fxopt.errors import FxoptError, PassError
    from fxopt.frontends.onnx import load
    from fxopt.ir.onnx.export import save
    from fxopt.ir.shapes import infer
    from fxopt.ir.verify import verify_structure
    from fxopt.passes.base import Context
    from fxopt.passes.manager import PassManager
    from fxopt.passes.pipelines import exact_pipeline, spelling_pipeline

    try:
        graph = load(path)
        infer(graph, {})
        verify_structure(graph)
        for steps in (exact_pipeline(), spelling_pipeline()):
            PassManager(steps).run(graph, Context(get_target("x86-avx2")))
        save(graph, path.with_name("out.onnx"))
        load(path.with_name("out.onnx"), check=False)
    except FxoptError as error:
        if isinstance(error, PassError) and not isinstance(error.__cause__, FxoptError):
            raise
        return type(error).__name__
    return "succeeded"


def case(contents: list[bytes], seed: int, index: int) -> tuple[bytes, str]:
    """The mutated model of a number, and the mutations' names."""
    chance = random.Random(f"{seed}/{index}")
    return mutated(chance.choice(contents), chance)


def child(seeds_file: Path, seed: int, first: int, count: int, log: Path) -> None:
    """Run cases and append a line for each: first that it begins, then how it ended."""
    import torch

    import fxopt.passes.pipelines  # noqa: F401

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    contents = pickle.loads(seeds_file.read_bytes())
    one_path = log.with_suffix(".onnx")
    one_path.write_bytes(contents[0])
    one(one_path)  # imports
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, _raise)
    with log.open("a", encoding="utf-8") as lines:
        for index in range(first, first + count):
            print(json.dumps({"begins": index}), file=lines, flush=True)
            content, names = case(contents, seed, index)
            one_path.write_bytes(content)
            signal.alarm(CASE_SECONDS)
            where = ""
            try:
                ended = one(one_path)
            except TooSlow:
                ended, where = "timeout", traceback.format_exc(limit=-6)
            except BaseException as error:
                ended, where = f"escaped: {type(error).__name__}", traceback.format_exc(limit=-8)
            finally:
                signal.alarm(0)
            print(json.dumps({"ends": index, "how": ended, "mutations": names, "where": where}), file=lines, flush=True)


def _raise(*_: Any) -> None:
    raise TooSlow


def run(cases: int, seed: int) -> list[dict[str, Any]]:
    """The outcome of every case; crashed children go on after the case that crashed them."""
    outcomes: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ONNX_MODELS"] = folder
        seeds_file, log = Path(folder) / "seeds", Path(folder) / "log"
        seeds_file.write_bytes(pickle.dumps(seeds()))
        first = 0
        while first < cases:
            log.write_text("", encoding="utf-8")
            count = min(BATCH, cases - first)
            arguments = [str(seeds_file), str(seed), str(first), str(count), str(log)]
            ran = subprocess.run(
                [sys.executable, "-m", "benchmarks.onnx_fuzz", "--child", *arguments],
                env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
                timeout=BATCH * CASE_SECONDS,
            )  # fmt: skip
            lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
            ended = [line for line in lines if "ends" in line]
            outcomes += ended
            if len(ended) < count:
                if not lines:
                    raise RuntimeError(f"a batch did not start: {ran.stderr[-2000:]}")
                crashed = lines[-1]["begins"] if "begins" in lines[-1] else first + len(ended) - 1
                outcomes.append({"ends": crashed, "how": f"crashed: {ran.returncode}", "where": ran.stderr[-3000:]})
                first = crashed + 1
            else:
                first += count
    return outcomes


def is_bad(outcome: dict[str, Any]) -> bool:
    """Anything but success and our errors."""
    return ":" in outcome["how"] or outcome["how"] == "timeout"


def main() -> None:
    """Run and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print where each bad case ended; write no result")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        seeds_file, seed, first, count, log = options.child
        child(Path(seeds_file), int(seed), int(first), int(count), Path(log))
        return
    outcomes = run(options.cases, options.seed)
    counts = collections.Counter(outcome["how"] for outcome in outcomes)
    for name, count in counts.most_common():
        print(f"{name:40s} {count:6d}")
    bad = [outcome for outcome in outcomes if is_bad(outcome)]
    print(f"{len(outcomes)} cases, {len(bad)} bad")
    if options.show:
        for outcome in bad:
            print(f"--- case {outcome['ends']}: {outcome['how']} ({outcome.get('mutations')})\n{outcome['where']}")
        return
    from benchmarks.common import write

    kept = [{**outcome, "where": outcome["where"][-600:]} for outcome in bad[:50]]
    write("onnx_fuzz", {"cases": len(outcomes), "seed": options.seed, "counts": dict(counts), "bad": kept})
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
