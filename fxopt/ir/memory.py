"""How much memory there is, which models are large for it, and where large new constants go."""

from __future__ import annotations

import ctypes
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path

import torch

from fxopt.errors import InvalidOption
from fxopt.ir.graph import Graph

VARIABLE = "FXOPT_MEMORY"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SPILLED = 1 << 20  # bytes from which a new constant goes to a file


def limit() -> int:
    """Bytes of memory to use: `FXOPT_MEMORY` (`4G`, `500M`, a number), else what the machine has.

    Raises:
        InvalidOption: the variable is no size.
    """
    text = os.environ.get(VARIABLE, "")
    if not text:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", text.strip().upper())
    if match is None or not int(match[1]):
        raise InvalidOption(f"{VARIABLE}={text}: expected a size such as 4G or 500M")
    return int(match[1]) * _UNITS[match[2]]


def is_large(graph: Graph) -> bool:
    """Whether the constants exceed half of the memory: such a model is never loaded whole."""
    return graph.size_bytes() > limit() // 2


def give_back_freed() -> None:
    """Give freed memory back to the system: GNU's C library keeps blocks of up to 32 MiB; others need no such call.

    A small object behind such a block pins it, so passes over many large weights would leave a gigabyte that nothing
    uses.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def spilled(value: torch.Tensor) -> torch.Tensor:
    """The tensor, memory-mapped from a temporary file when it is large; the file goes with the last use of the tensor.

    What the computation of the tensor left is given back too.

    Raises:
        OSError: the disk is full.
    """
    if value.nbytes < _SPILLED:
        return value
    handle, name = tempfile.mkstemp(prefix="fxopt-")
    try:
        content = value.detach().contiguous()
        with os.fdopen(handle, "wb") as file:
            file.write(content.reshape(-1).view(torch.uint8).numpy().data)
        storage = torch.UntypedStorage.from_file(name, False, value.nbytes)
    finally:
        Path(name).unlink()
    give_back_freed()
    return torch.empty(0, dtype=value.dtype).set_(storage, 0, tuple(value.shape))  # type: ignore[call-overload, no-any-return]
