"""Peak memory of SparseGPT at 2:4 on a Llama of 1.1 billion parameters: below the size of the model plus 3 GB.

    python -m benchmarks.sparse_memory [--layers 22] [--samples 16] [--length 128]

Random weights in the shape of TinyLlama; nothing is downloaded. All linears but the head, each calibrated on what the
sparse ones before it give; one layer's second moments are alive at a time. The peak is that of the whole process, with
its libraries, from its start: VmHWM of /proc/self/status. Needs Linux and 9 GB of free memory.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import torch

import fxopt
from benchmarks.common import write
from benchmarks.sparse_lm import pruned_linears
from fxopt.ir.graph import Graph, set_attribute
from fxopt.ir.sparsity import Pattern
from fxopt.passes.sequential import SequentialRun
from fxopt.passes.sparsify.methods import sparsegpt

VOCABULARY = 32000
ALLOWED = 3_000_000_000  # bytes beside the model
PATTERN = Pattern.parse("2:4")


def llama(layers: int, dtype: torch.dtype, length: int) -> Graph:
    """The captured model: tokens [1, length] -> logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    class Logits(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(input_ids=tokens, use_cache=False).logits
            return logits

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=VOCABULARY, max_position_embeddings=2048, dtype=dtype,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Logits(LlamaForCausalLM._from_config(config)).eval()
    return fxopt.capture(model, (torch.zeros(1, length, dtype=torch.int64),))


def peak() -> int:
    """The most bytes of memory that this process has had so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def sparsify(graph: Graph, samples: list[list[torch.Tensor]]) -> dict[str, float]:
    """Every linear but the head, in place; seconds of CPU by part."""
    walk = SequentialRun(graph, samples)
    seconds = {"statistics": 0.0, "sparsegpt": 0.0}
    views = list(pruned_linears(graph))
    for index, view in enumerate(views):
        begin = time.process_time()
        moments = walk.moments(view.x)
        between = time.process_time()
        made = sparsegpt(view.weight(graph), moments, PATTERN, 0).weight
        set_attribute(graph.root, str(view.weight_node.target), made.t().contiguous() if view.transposed else made)
        seconds["statistics"] += between - begin
        seconds["sparsegpt"] += time.process_time() - between
        if (index + 1) % 7 == 0:
            print(f"{index + 1} of {len(views)}: {peak() / 1e9:.2f} GB, {sum(seconds.values()):.0f} s", flush=True)
    return seconds


def main() -> None:
    """Build, sparsify, check, and write benchmarks/results/sparse_memory.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--no-result", action="store_true", help="print only")
    options = parser.parse_args()
    graph = llama(options.layers, getattr(torch, options.dtype), options.length)
    gc.collect()  # the exporter leaves cycles that hold the module, and with it every weight that is replaced
    size, built = graph.size_bytes(), peak()
    print(f"{size / 1e9:.2f} GB of constants; peak {built / 1e9:.2f} GB once the model is captured", flush=True)
    generator = torch.Generator().manual_seed(1)
    samples = [[torch.randint(VOCABULARY, (1, options.length), generator=generator)] for _ in range(options.samples)]
    seconds, most = sparsify(graph, samples), peak()
    broken = [text for view in pruned_linears(graph) if (text := PATTERN.violation(view.weight(graph)))]
    count = sum(1 for _ in pruned_linears(graph))
    bound = size + ALLOWED
    print(f"{count} linears, {len(broken)} of them without the pattern; {sum(seconds.values()):.0f} s: {seconds}")
    print(f"peak {most / 1e9:.2f} GB, {(most - size) / 1e9:+.2f} GB beside the model (bound {bound / 1e9:.2f} GB)")
    if not options.no_result:
        result: dict[str, Any] = {
            "bytes": size, "peak": most, "peak_when_captured": built, "bound": bound, "seconds": seconds,
            "linears": count, "broken": len(broken), "threads": torch.get_num_threads(), **vars(options),
        }  # fmt: skip
        print(f"written: {write('sparse_memory', result)}")
    raise SystemExit(0 if most < bound and not broken else 1)


if __name__ == "__main__":
    main()
