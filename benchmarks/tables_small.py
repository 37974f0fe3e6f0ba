"""Sections of docs/benchmarks.md on WebAssembly and 64-bit Arm; see `benchmarks.tables`."""

from __future__ import annotations

from typing import Any

_TITLES = {
    "products": "Single layers in float32",
    "models": "Models in float32, dense and block-sparse",
    "int8": "Models in 8 bits",
    "sparse": "Pruned models in float32 and in 8 bits",
}


def wasm(result: dict[str, Any], where: str) -> list[str]:
    """Speed over each peer, in each engine."""
    peers = ", ".join(f"{name} {version}" for name, version in sorted(result["peer_versions"].items()))
    lines = [
        "## WebAssembly",
        "",
        f"`python -m benchmarks.wasm` on {where}, one thread; {peers}.",
        "",
        "How many times as fast, median of alternating bursts (10th to 90th percentile). `simd128` unless the name",
        "says relaxed. Error: largest difference to torch in float64, of the largest value.",
    ]
    for groups in result["engines"].values():
        for name, group in groups.items():
            engines = ", ".join(sorted({row["engine"] for row in group["cases"]}))
            lines += ["", f"### {_TITLES.get(name, name)}, {engines}", "", "| case | fxopt | error | over | times |"]
            lines += ["|---|---|---|---|---|", *_rows(group)]
            means = "; ".join(f"{pair} {mean:.2f}x" for pair, mean in group["geometric_means"].items())
            lines += ["", f"Geometric means: {means}."]
    return lines


def _rows(group: dict[str, Any]) -> list[str]:
    lines = []
    for row in group["cases"]:
        for ours, found in row["rows"].items():
            for peer, ratio in found.get("speed_over", {}).items():
                times = f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
                lines.append(f"| {row['title']} | {ours} | {found['relative_error']:.1e} | {peer} | {times} |")
    return lines


def sparse_rates(result: dict[str, Any], where: str) -> list[str]:
    """What zeros give, of every form on every target."""
    shares = [float(share) for share in result["shares"]]
    lines = [
        "## Blocks of zeros in compiled code",
        "",
        f"`python -m benchmarks.sparse_rates` on {where}. One layer over the same without zeros, by the share of zero",
        "blocks (outputs x inputs): WebAssembly timed in Node, Arm counted in instructions. The cost model's figures.",
        "",
        f"| target | layer | {' | '.join(f'{share:.0%}' for share in shares)} |",
        f"|---|---|{'---|' * len(shares)}",
    ]
    for target, found in result["targets"].items():
        for form, ratios in found["speedups"].items():
            shown = " | ".join(f"{ratios[str(share)]:.2f}x" for share in shares)
            lines.append(f"| {target} | {form} | {shown} |")
    return lines


def arm_instructions(result: dict[str, Any], where: str) -> list[str]:
    """Counts, for there is no Arm processor here."""
    lines = [
        "## Instructions on 64-bit Arm",
        "",
        f"`python -m benchmarks.arm_instructions` on {where}; {result['emulator']}, code for {result['target']}.",
        "",
        "Executed instructions over those of fxopt's dense float kernel. These are no times: there is no Arm processor",
        "here. Results are compared with numpy and torch.",
        "",
    ]
    names = list(result["kernels"][0]["over_dense"])
    lines += [f"| rows x inputs x outputs | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for row in result["kernels"]:
        shown = " | ".join(f"{row['over_dense'][name]:.3f}" for name in names)
        lines.append(f"| {' x '.join(map(str, row['shape']))} | {shown} |")
    models = "; ".join(f"{name} {found['over_dense']:.3f}" for name, found in result["models"].items())
    return [*lines, "", f"Whole models with 80 % of their blocks zero, over dense: {models}."]
