"""Sections of the page of benchmarks about ONNX in and out."""

from __future__ import annotations

from typing import Any


def onnx_suite(result: dict[str, Any], where: str) -> list[str]:
    """The conformance suite of ONNX."""
    lines = [
        "## The conformance suite of ONNX",
        "",
        f"`python -m benchmarks.onnx_suite` on {where}. Native: passed while neither ONNX's",
        "reference evaluator nor ONNX Runtime could be imported, in torch and fxopt's host lane alone.",
        "",
        "| kind | cases | passed | native |",
        "|---|---|---|---|",
    ]
    for kind, row in sorted(result["kinds"].items()):
        lines.append(f"| {kind} | {row['cases']} | {row['passed']} | {row['native']} |")
    return lines


def onnx_large(result: dict[str, Any], where: str) -> list[str]:
    """A model with external data that is never loaded whole."""
    return [
        "## A model of several gigabytes",
        "",
        f"`python -m benchmarks.onnx_large` on {where}.",
        "",
        f"{result['bytes'] / 1e9:.2f} GB of external weights, {result['pass']}, {result['memory']}B of memory allowed:",
        f"peak {result['peak'] / 1e9:.2f} GB without file-backed pages (2 GiB and the largest tensor:"
        f" {result['bound'] / 1e9:.2f} GB); {result['written'] / 1e9:.2f} GB written.",
        f"The ledger says \"{result['ledger']}\".",
    ]


def onnx_convert(result: dict[str, Any], where: str) -> list[str]:
    """The same model at a newer opset."""
    old, new = result["opsets"]
    return [
        "## A model of several gigabytes at a newer opset",
        "",
        f"`python -m benchmarks.onnx_large --convert` on {where}.",
        "",
        f"{result['bytes'] / 1e9:.2f} GB of external weights from opset {old} to {new}:",
        f"peak {result['peak'] / 1e9:.2f} GB without file-backed pages,",
        f"{result['seconds']:.0f} s; {result['ledger']}; {result['written'] / 1e9:.2f} GB written.",
    ]


def onnx_speed(result: dict[str, Any], where: str) -> list[str]:
    """Import and export over what onnx takes to load and save."""
    lines = [
        "## Import and export of ONNX models",
        "",
        f"`python -m benchmarks.onnx_speed` on {where}. CPU seconds, medians of {result['repeats']}, in turns.",
        "Bound: five times what `onnx.load` and `onnx.save` take, and a millisecond per node.",
        "",
        "| model | nodes | onnx | fxopt | bound |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["models"].items():
        seconds = " | ".join(f"{row[key]:.3f} s" for key in ("onnx_seconds", "fxopt_seconds", "bound"))
        lines.append(f"| {name} | {row['nodes']} | {seconds} |")
    return lines


def onnx_fuzz(result: dict[str, Any], where: str) -> list[str]:
    """Mutated models."""
    counts = ", ".join(f"{count} {name}" for name, count in sorted(result["counts"].items()))
    return [
        "## Mutated ONNX models",
        "",
        f"`python -m benchmarks.onnx_fuzz` on {where}. {result['cases']} mutations of valid models are imported,",
        "typed, rewritten by the exact passes and exported. Each succeeds or is refused with one of fxopt's errors:",
        f"{counts}; anything else (crash, hang, other exception): {len(result['bad'])}.",
    ]
