"""WebAssembly, one thread, in Node and Chromium: fxopt against onnxruntime-web and tfjs-backend-wasm.

    python -m benchmarks.wasm [--cases products,int8] [--engines node,chromium] [--rounds 15] [--node PATH]
        [--before 'taskset -c 0']

The competitors of a case are called in alternating bursts of one process; a ratio is the median over the rounds, with
its 10th and 90th percentiles. Every competitor's first output is compared with torch in float64 before. The peers and
Node are installed from npm, in the versions of `benchmarks.node_packages`, into a cache folder.
Writes benchmarks/results/wasm.json; cases that are not asked for keep their rows.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import wasm_cases
from benchmarks.browser import Browser, Server
from benchmarks.common import RESULTS, write
from benchmarks.node_packages import PINNED, folder, node

_SECONDS = 900.0  # for one case
_RACE = Path(__file__).with_suffix("").with_name("wasm_race.mjs")


def in_node(title: str, place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Race the competitors of the case in this folder."""
    command = [*shlex.split(options.before), str(options.node or node(folder())), str(_RACE), str(place / "case.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"{title}: Node failed: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def in_chromium(title: str, place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The same in a page of a headless browser."""
    server = Server(_RACE.parent, case=place, modules=folder() / "node_modules")
    with server, Browser(_SECONDS, shlex.split(options.before)) as browser:
        browser.open(f"{server.url}wasm_race.html")
        try:
            results = browser.evaluate("start()")
        except RuntimeError as error:
            raise RuntimeError(f"{title}: Chromium failed: {error}") from error
        version = browser.send("Browser.getVersion")
    return {"engine": f"{version['product']}, V8 {version['jsVersion']}", "results": results}


ENGINES = {"node": in_node, "chromium": in_chromium}


def measured(case: Any, place: Path, engine: str, options: argparse.Namespace) -> dict[str, Any]:
    """Race the competitors of a case."""
    plan = {
        **case, "modules": str(folder() / "node_modules"), "rounds": options.rounds, "burst_ms": 25, "warm_up_ms": 700,
    }  # fmt: skip
    (place / "case.json").write_text(json.dumps(plan), encoding="utf-8")
    found = ENGINES[engine](case["title"], place, options)
    rows = {}
    for name, result in found["results"].items():
        rows[name] = {
            "milliseconds": float(f"{statistics.median(result['bursts']):.4g}"),
            "relative_error": float(f"{result['relative_error']:.2g}"),
        }
        if case["competitors"][name]["kind"] == "fxopt":
            rows[name]["speed_over"] = {
                peer: speed(found["results"][peer]["bursts"], result["bursts"]) for peer in peers(case, name)
            }
    return {"title": case["title"], "engine": found["engine"], **case.get("facts", {}), "rows": rows}


def peers(case: dict[str, Any], name: str) -> list[str]:
    """Whom a row of fxopt is compared with: who keeps data inside, with who does too."""
    inside = case["competitors"][name].get("inside", False)
    return [
        peer for peer, found in case["competitors"].items()
        if found["kind"] != "fxopt" and found["kind"].startswith("tfjs") == inside
    ]  # fmt: skip


def speed(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """Ratios of the rounds."""
    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    return {"median": round(statistics.median(ratios), 3), "low": round(low, 3), "high": round(high, 3)}


def show(row: dict[str, Any]) -> None:
    """One case."""
    print(row["title"], {key: value for key, value in row.items() if key not in ("title", "rows")})
    for name, found in row["rows"].items():
        over = "".join(
            f"   {ratio['median']:6.2f} ({ratio['low']:.2f} ... {ratio['high']:.2f}) times as fast as {peer}"
            for peer, ratio in found.get("speed_over", {}).items()
        )
        print(f"  {name:28} {found['milliseconds']:9.4f} ms   error {found['relative_error']:.1e}{over}", flush=True)


def geometric_means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of the ratios of a kind, over the cases that have it."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        for name, found in row["rows"].items():
            for peer, ratio in found.get("speed_over", {}).items():
                ratios.setdefault(f"{name} over {peer}", []).append(ratio["median"])
    return {name: round(math.exp(statistics.mean(map(math.log, values))), 3) for name, values in ratios.items()}


def main() -> None:
    """Run, print and write after each group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(wasm_cases.GROUPS)
    parser.add_argument("--cases", type=lambda text: text.split(","), default=known, help=f"of {','.join(known)}")
    parser.add_argument("--engines", type=lambda text: text.split(","), default=list(ENGINES), help="where")
    parser.add_argument("--rounds", type=int, default=15, help="bursts of each competitor")
    parser.add_argument("--node", type=Path, help="another Node than the pinned one")
    parser.add_argument("--before", default="", help="words before Node's command, such as 'taskset -c 0'")
    options = parser.parse_args()
    unknown = sorted(set(options.cases) - set(known))
    if unknown:
        parser.error(f"unknown cases {', '.join(unknown)}; known: {', '.join(known)}")
    unknown = sorted(set(options.engines) - set(ENGINES))
    if unknown:
        parser.error(f"unknown engines {', '.join(unknown)}; known: {', '.join(ENGINES)}")
    path = RESULTS / "wasm.json"
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    result.pop("machine", None)
    for group in options.cases:
        rows: dict[str, list[dict[str, Any]]] = {engine: [] for engine in options.engines}
        for make in wasm_cases.GROUPS[group]:
            with tempfile.TemporaryDirectory() as scratch:
                case = make(Path(scratch))
                for engine in options.engines:
                    rows[engine].append(measured(case, Path(scratch), engine, options))
                    show(rows[engine][-1])
        for engine, found in rows.items():
            means = geometric_means(found)
            print(f"{group} in {engine}: geometric means {means}\n", flush=True)
            engines = result.setdefault("engines", {}).setdefault(engine, {})
            engines[group] = {"geometric_means": means, "cases": found}
        write("wasm", {**result, "rounds": options.rounds, "threads": 1, "peer_versions": dict(PINNED)})
    print(f"written: {path}")


if __name__ == "__main__":
    main()
