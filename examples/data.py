"""Data the example models train on: scikit-learn's digits and Python's own texts. Nothing is downloaded."""

from __future__ import annotations

import importlib
import sysconfig
from pathlib import Path

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

# Installed packages, tests, the evaluation text itself (pydoc_data) and code-page tables (encodings).
_EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings"}
)
# Generated when Python was built: they differ from machine to machine.
_EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")


def digits() -> tuple[FloatArray, IntArray, FloatArray, IntArray]:
    """Return scikit-learn's digits as (train_x, train_y, test_x, test_y), a stratified 75/25 split.

    Images are float32 [count, 1, 8, 8] scaled to [0, 1]; labels are int64 [count] in 0..9.
    There are 1347 training and 450 test images.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels.astype(np.int64), test_size=0.25, random_state=0, stratify=labels
    )
    return train_x, train_y, test_x, test_y


def python_sources(limit_bytes: int | None = None) -> bytes:
    """Return the running Python's standard library sources, joined in sorted file order.

    Tests, installed packages, code-page tables and the evaluation text of `python_documentation` are left out.
    The result is cut at `limit_bytes` where given. It depends on the Python version.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return b"\n".join((root / name).read_bytes() for name in names if _is_training_source(name))[:limit_bytes]


def _is_training_source(name: str) -> bool:
    """Tell whether the standard library file `name` (relative, with slashes) belongs to the training text."""
    parts = name.split("/")
    return not any(part in _EXCLUDED_FOLDERS or part.startswith(_EXCLUDED_PREFIXES) for part in parts)


def python_documentation() -> bytes:
    """Return the texts of Python's `help()` topics (`pydoc_data.topics`), joined in sorted topic order, as UTF-8."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n".join(topics[name] for name in sorted(topics)).encode()


def byte_windows(data: bytes, length: int, count: int, seed: int) -> IntArray:
    """Return `count` windows of `length` consecutive bytes at random positions of `data`: int64 [count, length]."""
    if len(data) < length:
        raise ValueError(f"data has {len(data)} bytes, fewer than one window of {length}")
    values = np.frombuffer(data, dtype=np.uint8)
    starts = np.random.default_rng(seed).integers(0, len(data) - length + 1, size=count)
    windows: IntArray = values[starts[:, None] + np.arange(length)].astype(np.int64)
    return windows
