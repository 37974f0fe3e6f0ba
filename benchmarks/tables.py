"""Write docs/benchmarks.md from benchmarks/results/*.json: no number in the docs is typed by hand.

python -m benchmarks.tables

Longer than most files here: one function per table; those of few lines are in `tables_small`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import tables_onnx, tables_small
from benchmarks.common import RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
NOT_MEASURED = "not measured"


def load(name: str) -> dict[str, Any] | None:
    """A result file, or None when the benchmark has not been run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def where(result: dict[str, Any]) -> str:
    """The machine and the versions in one line."""
    machine = result["machine"]
    sets = ", ".join(machine["instruction_sets"]) or "no vector extensions listed"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(machine["versions"].items()))
    return (
        f"{machine['cpu']} (family {machine['family']}, model {machine['model']}), {machine['cores']} cores, {sets}; "
        f"Python {machine['python']}, {versions}"
    )


def cpu_int8(result: dict[str, Any]) -> list[str]:
    """8 bits on the CPU: one table per model."""
    lines = [
        "## 8 bits on this CPU",
        "",
        f"`python -m benchmarks.cpu_int8` on {where(result)}.",
        "",
        "Speed-up over ONNX Runtime fp32: median of the runs (lowest to highest), each a ratio of medians of",
        "alternating bursts. Noise to signal and mean cosine to fp32 on samples that calibrated nothing. Every row is",
        "one file.",
    ]
    for found in result["models"].values():
        lines += ["", *_int8_model(found)]
    cost = result.get("optimize")
    if cost is not None:
        lines += [
            "",
            f"`optimize` on MiniLM, without the guard's measuring time: {cost['seconds_without_guard']:.1f} s; it adds "
            f"{cost['added_peak_megabytes']:.0f} MB to the peak memory of a process that has run the model.",
        ]
    if not {"avx512_vnni", "avx_vnni"} & set(result["machine"]["instruction_sets"]):
        lines += ["", f"On a CPU with VNNI: {NOT_MEASURED}."]
    return lines


def _int8_model(found: dict[str, Any]) -> list[str]:
    counts = sorted({threads for row in found["competitors"].values() for threads in row["speed"]}, key=int)
    heads = [f"{count} thread{'s' if count != '1' else ''}" for count in counts]
    retrieves = any("top1_agreement" in row for row in found["competitors"].values())
    lines = [
        f"### {found['title']}",
        "",
        f"| file | {' | '.join(heads)} | noise | cosine |{' top-1 |' if retrieves else ''} MB |",
        f"|---|{'---|' * len(counts)}---|---|---|{'---|' if retrieves else ''}",
    ]
    for name, row in found["competitors"].items():
        speeds = " | ".join(_speed(row["speed"].get(count)) for count in counts)
        noise = f"{row['noise_to_signal']:.2g}" if "noise_to_signal" in row else NOT_MEASURED
        size = f"{row['megabytes']:.1f}" if "megabytes" in row else ""
        top = f" {row['top1_agreement']:.2f} |" if retrieves else ""
        lines.append(f"| {name} | {speeds} | {noise} | {row['mean_cosine']:.4f} |{top} {size} |")
    for name, reason in found.get("not_measured", {}).items():
        lines.append(f"| {name} | {' | '.join([NOT_MEASURED] * len(counts))} | | |{' |' if retrieves else ''} |")
        lines += ["", f"{name}: {reason}."]
    versions = ", ".join(f"{name} {version}" for name, version in found.get("peer_versions", {}).items())
    asked = [f"fxopt: {found['asked']}."] if "asked" in found else []
    said = [*asked, *([f"Peers: {versions}."] if versions else [])]
    return [*lines, "", " ".join(said)] if said else lines


def _speed(row: dict[str, Any] | None) -> str:
    if row is None:
        return NOT_MEASURED
    spread = f" ({row['low']:.2f} to {row['high']:.2f})" if "low" in row else ""
    return f"{row['ratio_of_medians']:.2f}{spread}"


def ort_fusions(result: dict[str, Any]) -> list[str]:
    """SkipLayerNormalization against its parts."""
    lines = [
        "## Fusions of ONNX Runtime that are avoided",
        "",
        f"`python -m benchmarks.ort_fusions` on {where(result)}, one thread.",
        "",
        "| shape | time of SkipLayerNormalization / time of Sum + LayerNormalization |",
        "|---|---|",
    ]
    for row in result["skip_layer_normalization"]:
        lines.append(f"| {row['shape']} | {row['fused_over_parts']:.2f} |")
    return lines


def attention_forms(result: dict[str, Any]) -> list[str]:
    """Attention operators of ONNX Runtime against their parts."""
    lines = [
        "## Attention operators of ONNX Runtime",
        "",
        f"`python -m benchmarks.attention_forms` on {where(result)}, one thread.",
        "Speed over that of the parts, projections included (median of the runs, with the extremes).",
        "",
    ]
    forms = [name for name in result["self_attention"][0]["speed"] if not name.startswith("parts")]
    lines += [f"| batch, length, heads, width | mask | {' | '.join(forms)} |", f"|---|---|{'---|' * len(forms)}"]
    for row in result["self_attention"]:
        shown = " | ".join(_speed(row["speed"].get(form)) for form in forms)
        lines.append(f"| {row['shape']} | {row['mask']} | {shown} |")
    forms = [name for name in result["grouped"][0]["speed"] if not name.startswith("parts")]
    lines += ["", f"| batch, heads, shared heads, queries, keys, width | {' | '.join(forms)} |"]
    lines.append(f"|---|{'---|' * len(forms)}")
    for row in result["grouped"]:
        lines.append(f"| {row['shape']} | {' | '.join(_speed(row['speed'].get(form)) for form in forms)} |")
    lines += ["", "| batch, length, heads, width | Attention with a soft cap |", "|---|---|"]
    lines += [f"| {row['shape']} | {_speed(row['speed']['Attention'])} |" for row in result["capped"]]
    return lines


def attention_fusion(result: dict[str, Any]) -> list[str]:
    """Exact passes on encoders against ONNX Runtime's optimiser of transformers."""
    lines = [
        "## Encoders of text: exact passes against ONNX Runtime's optimiser of transformers",
        "",
        f"`python -m benchmarks.attention_fusion` on {where(result)}, one thread, float32.",
        "Speed over that of the file that `onnxruntime.transformers.optimizer` (model_type bert) makes; kernels are",
        "the nodes that ONNX Runtime runs.",
        "",
        "| model | exporter | batch, length | as exported | fxopt | kernels: as exported | optimiser | fxopt |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["encoders"]:
        counts = row["kernels"]
        for each in row["shapes"]:
            speeds = " | ".join(_speed(each["speed"].get(way)) for way in ("as exported", "fxopt"))
            shown = " | ".join(str(counts[way]) for way in ("as exported", "onnxruntime.transformers", "fxopt"))
            lines.append(f"| {row['model']} | {row['exporter']} | {each['shape']} | {speeds} | {shown} |")
    return lines


def attention_patterns(result: dict[str, Any]) -> list[str]:
    """Attention with patterns: ways to run it, break-even, a whole block."""
    lines = [
        "## Attention with a pattern per head",
        "",
        f"`python -m benchmarks.attention_patterns` on {where(result)}, one thread (but for the",
        f"rows of two), float32, {result['heads']} heads of {result['width']}. Speed over torch's dense attention at a",
        "block density of 0.25:",
        "",
    ]
    names = list(dict.fromkeys(name for row in result["ways"] for name in row["speed"]))
    names.remove("torch, dense")
    lines += [f"| tokens | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for row in result["ways"]:
        lines.append(f"| {row['length']} | {' | '.join(_speed(row['speed'].get(name)) for name in names)} |")
    lines += ["", "Time over dense attention of the same runtime, by the part of the work that is left and the number"]
    lines += ["of calls it takes (six: every head has a pattern of its own):", ""]
    lines += ["| threads | tokens | pattern | block density | work | calls | torch | ONNX Runtime |", f"|{'---|' * 8}"]
    for row in result["densities"]:
        shown = " | ".join(f"{row[name]:.2f}" for name in ("block_density", "work"))
        times = " | ".join(f"{row[name]:.2f}" for name in ("eager", "onnxruntime"))
        lines.append(
            f"| {row['threads']} | {row['length']} | {row['pattern']} | {shown} | {row['calls']} | {times} |"
        )
    lines += ["", "Prices that fit these rows: the time of a pair of a query and a key over that in dense attention,"]
    lines += ["in slices and in heads of one call, and what dense attention multiplies in the time of a call.", ""]
    lines += ["| threads | runtime | in slices | one call | a call |", f"|{'---|' * 5}"]
    for threads, found in sorted(result["fits"].items()):
        for name, fit in sorted(found.items()):
            lines.append(
                f"| {threads} | {name} | {fit['sliced']:.2f} | {fit['whole']:.2f} | {fit['call'] / 1e6:.1f} million |"
            )
    lines.append("")
    lines += ["| tokens | attention's share of the block | its speed-up | block: Amdahl | measured | of Amdahl |"]
    lines.append("|---|---|---|---|---|---|")
    for row in result["blocks"]:
        names = ["attention_share", "attention_gain", "amdahl", "measured", "of_amdahl"]
        lines.append(f"| {row['length']} | {' | '.join(f'{row[name]:.2f}' for name in names)} |")
    return lines


def embeddings(result: dict[str, Any]) -> list[str]:
    """Forms of an 8-bit table against the float table."""
    rows = result["embeddings"]
    names = list(dict.fromkeys(row["form"] for row in rows))
    lines = [
        "## 8-bit embeddings",
        "",
        f"`python -m benchmarks.embeddings` on {where(result)}, one thread. Time of",
        "looking up random rows over that in the float table.",
        "",
        f"| table | rows looked up | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    found = {(tuple(row["table"]), row["lookups"], row["form"]): row["over_float"] for row in rows}
    for table, lookups in dict.fromkeys(key[:2] for key in found):
        shown = " | ".join(f"{found[table, lookups, name]:.2f}" for name in names)
        lines.append(f"| {list(table)} | {lookups} | {shown} |")
    return lines


def byte_lm_bits(result: dict[str, Any]) -> list[str]:
    """What fewer bits cost a language model."""
    before, group = result["float32"], result["group"]
    lines = [
        "## Fewer bits: the byte-level language model",
        "",
        f"`python -m benchmarks.byte_lm_bits` on {where(result)}. Groups of {group} inputs, symmetric; float",
        "activations where only weights are named. Bits per byte on Python's documentation; float32 in the same run:",
        f"{before:.4f}.",
        "",
        "| form | bits per byte | more than float32 |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {bits:.4f} | {bits - before:+.4f} |" for name, bits in sorted(result["bits_per_byte"].items())
    ]
    lines += ["", "| bits | layers | mean error RTN | GPTQ | act-order | GPTQ below RTN | act-order below GPTQ |"]
    lines.append("|---|---|---|---|---|---|---|")
    for bits, layers in result["layers"].items():
        rows = list(layers.values())
        means = [sum(row[name] for row in rows) / len(rows) for name in ("rtn", "gptq", "gptq, act-order")]
        below = sum(row["gptq"] < row["rtn"] for row in rows)
        ordered = sum(row["gptq, act-order"] < row["gptq"] for row in rows)
        shown = " | ".join(f"{mean:.2e}" for mean in means)
        lines.append(f"| {bits} | {len(rows)} | {shown} | {below} | {ordered} |")
    return lines


def sparse_lm(result: dict[str, Any]) -> list[str]:
    """What zeros cost a language model."""
    methods = ("magnitude", "wanda", "sparsegpt")
    lines = [
        "## Zeros: the byte-level language model",
        "",
        f"`python -m benchmarks.sparse_lm` on {where(result)}. All linears but the head. More bits per byte than dense",
        f"({result['dense']:.4f}) on Python's documentation; in brackets the mean relative error of a layer's output.",
        "",
        "| pattern | magnitude | Wanda | SparseGPT | layers with SparseGPT < Wanda < magnitude |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["patterns"].items():
        cells = " | ".join(f"{row['increase'][key]:+.4f} ({row['mean_error'][key]:.4f})" for key in methods)
        lines.append(f"| {name} | {cells} | {row['ordered_layers']} of {len(row['layers'])} |")
    lines += ["", "| at 2:4 | increase | error | more parameters | seconds of CPU |", "|---|---|---|---|---|"]
    for name, row in result["2:4"].items():
        more, seconds = row["more_parameters"], row["seconds"]
        lines.append(f"| {name} | {row['increase']:+.4f} | {row['mean_error']:.4f} | {more:.1%} | {seconds:.1f} |")
    return lines


def finetune(result: dict[str, Any]) -> list[str]:
    """What training brings back, and what an order of channels saves."""
    dense, share = result["dense_bits"], f"{result['sparsity']:.0%}"
    lines = [
        "## Fine-tuning and the order of channels",
        "",
        f"`python -m benchmarks.finetune` on {where(result)}. The byte-level language model, all linears but the head",
        f"at {share} of {result['pattern']} blocks by SparseGPT, then {result['steps']} steps, each of",
        f"{result['batch']} windows of {result['length']} bytes. More bits per byte than dense ({dense:.4f}) on",
        "Python's documentation; in brackets the share of the increase that is recovered.",
        "",
    ]
    names = list(dict.fromkeys(name for row in result["starts"].values() for name in row["objectives"]))
    order = sorted(names, key=len)
    lines += [f"| channels | one shot | {' | '.join(order)} | zeros lost |", f"|---|---|{'---|' * len(order)}---|"]
    for name, row in sorted(result["starts"].items()):
        found = row["objectives"]
        cells = [
            f"{found[each]['bits'] - dense:+.4f} ({found[each]['recovered']:.0%})" if each in found else NOT_MEASURED
            for each in order
        ]
        lost = sum(each["zeros_lost"] for each in found.values())
        lines.append(f"| {name} | {row['bits'] - dense:+.4f} | {' | '.join(cells)} | {lost if found else ''} |")
    lines += [
        "",
        "Share of the magnitudes of all linears and convolutions but the last that a pattern keeps, in the order of",
        "the channels as trained and in that of rearrange-channels:",
        "",
        "| model | pattern | as trained | rearranged | groups of channels | CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    for model, rows in result["orders"].items():
        for pattern, row in rows.items():
            lines.append(
                f"| {model} | {pattern} | {row['before']:.1%} | {row['after']:.1%} | {row['rearranged']} of "
                f"{row['groups']} | {row['cpu_seconds']:.1f} |"
            )
    return lines


def sparse_int8(result: dict[str, Any]) -> list[str]:
    """Block-sparse 8-bit linears against dense ones."""
    lines = [
        "## Zero blocks of 8-bit linears on this CPU",
        "",
        f"`python -m benchmarks.sparse_int8` on {where(result)}.",
        "",
        "768 -> 3072, GELU, 3072 -> 768 from floats to floats, one thread, some 4x1 blocks of the weights zero: how",
        "many times as fast as the fastest of ONNX Runtime's own 8-bit forms, as fxopt's dense kernels and as ONNX",
        "Runtime fp32 (median of the bursts, lowest to highest).",
        "",
        "| zero blocks | tokens | us | ONNX Runtime 8 bits | fxopt dense | ONNX Runtime fp32 |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["region"]:
        time = f"{1e3 * row['milliseconds']['fxopt_sparse']:.0f}"
        kinds = ("onnxruntime_int8", "fxopt_dense", "onnxruntime_fp32")
        cells = " | ".join(_times(row[f"over_{kind}"]) for kind in kinds)
        lines.append(f"| {row['zero_blocks']:.0%} | {row['tokens']} | {time} | {cells} |")
    whole = result["encoder"]
    lines += [
        "",
        f"A whole encoder (6 layers of 384, 12 heads, sequence {whole['sequence']}), {whole['zero_blocks']:.0%} zero "
        f"blocks: {_times(whole['over_fxopt_dense'])} over fxopt's dense kernels, "
        f"{_times(whole['over_onnxruntime_fp32'])} over ONNX Runtime fp32.",
        "",
        "Share of zero blocks from which on the sparse kernel is faster than the dense one, 64 rows:",
        "",
        "| kernels | product | break-even |",
        "|---|---|---|",
    ]
    for row in result["break_even"]:
        product = f"{row['inner']} -> {row['outputs']}, {row['epilogue']}"
        lines.append(f"| {row['target']} | {product} | {row['break_even_zero_blocks']:.0%} |")
    return lines


def _times(found: dict[str, float]) -> str:
    return f"{found['ratio']:.2f}x ({found['low']:.2f} to {found['high']:.2f})"


def sparse_memory(result: dict[str, Any]) -> list[str]:
    """What sparsifying a large model holds in memory."""
    names = ("bytes", "peak", "bound", "resident", "written")
    size, peak, allowed, resident, written = (result[name] / 1e9 for name in names)
    return [
        "## Memory of SparseGPT",
        "",
        f"`python -m benchmarks.sparse_memory` on {where(result)}. `fxopt optimize` on a Llama of",
        f"{result['layers']} layers with random float32 weights: 2:4 by SparseGPT in {result['linears']} linears,",
        f"calibrated on {result['samples']} samples of {result['length']} tokens, then stored without their zeros. The",
        "peak is that of memory that no file backs; resident pages count those of mapped files too, which the kernel",
        "takes back when it needs them.",
        "",
        "| model | peak | bound: model + 3 GB | resident | written |",
        "|---|---|---|---|---|",
        f"| {size:.2f} GB | {peak:.2f} GB | {allowed:.2f} GB | {resident:.2f} GB | {written:.2f} GB |",
    ]


SECTIONS = (
    ("cpu_int8", cpu_int8),
    ("byte_lm_bits", byte_lm_bits),
    ("sparse_lm", sparse_lm),
    ("finetune", finetune),
    ("sparse_int8", sparse_int8),
    ("sparse_memory", sparse_memory),
    ("ort_fusions", ort_fusions),
    ("attention_forms", attention_forms),
    ("attention_fusion", attention_fusion),
    ("attention_patterns", attention_patterns),
    ("embeddings", embeddings),
    ("wasm", lambda result: tables_small.wasm(result, where(result))),
    ("sparse_rates", lambda result: tables_small.sparse_rates(result, where(result))),
    ("arm_instructions", lambda result: tables_small.arm_instructions(result, where(result))),
    ("onnx_suite", lambda result: tables_onnx.onnx_suite(result, where(result))),
    ("onnx_large", lambda result: tables_onnx.onnx_large(result, where(result))),
    ("onnx_convert", lambda result: tables_onnx.onnx_convert(result, where(result))),
    ("onnx_speed", lambda result: tables_onnx.onnx_speed(result, where(result))),
    ("onnx_fuzz", lambda result: tables_onnx.onnx_fuzz(result, where(result))),
)


def page() -> str:
    """The whole page."""
    parts = ["# Benchmarks", "", "Generated by `python -m benchmarks.tables` from `benchmarks/results/`; do not edit."]
    for name, render in SECTIONS:
        result = load(name)
        parts += ["", *(render(result) if result is not None else [f"## {name}", "", f"{NOT_MEASURED}."])]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Write the page."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
