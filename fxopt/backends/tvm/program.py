"""A model as calls of kernels: built by the rules, then laid out in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fxopt.backends.tvm.machine import Machine
from fxopt.backends.tvm.memory import ALIGNMENT, Life, plan
from fxopt.backends.tvm.values import Place, Slot, Value, row_major

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Step:
    """A call of a kernel on slots; `why` names the node it computes."""

    function: str
    slots: tuple[Slot, ...]
    why: str


@dataclass
class Program:
    """Kernels, constants and calls of a model for one machine.

    Kernels of equal sizes are one function, equal constants are stored once.
    """

    machine: Machine
    functions: dict[Hashable, Any] = field(default_factory=dict)
    constants: list[Array] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    inputs: list[Slot] = field(default_factory=list)
    outputs: list[Slot] = field(default_factory=list)
    arena_bytes: int = 0
    why: str = ""  # the node that is being lowered
    prefix: str = "k"
    _known: dict[Hashable, Slot] = field(default_factory=dict)

    def another(self) -> Program:
        """An empty program that shares kernels and constants with this one."""
        return replace(self, steps=[], inputs=[], outputs=[], arena_bytes=0, why="")

    def slot(self, count: int, dtype: str = "float32", place: Place = "arena", index: int = 0) -> Slot:
        """Memory for `count` values."""
        return Slot(place, count, dtype, index)

    def value(self, shape: tuple[int, ...], dtype: str = "float32") -> Value:
        """A new contiguous tensor."""
        strides = row_major(shape)
        return Value(self.slot(int(np.prod(shape, dtype=np.int64)), dtype), shape, strides)

    def constant(self, array: Array) -> Slot:
        """Memory that holds the array's values."""
        array = np.ascontiguousarray(array)
        key = (array.dtype.str, array.shape, hashlib.sha256(array.data).digest())
        if key not in self._known:
            dtype = {"bool": "uint8"}.get(str(array.dtype), str(array.dtype))
            self._known[key] = self.slot(array.size, dtype, "constant", len(self.constants))
            self.constants.append(array)
        return self._known[key]

    def call(self, template: Callable[..., Any], sizes: tuple[Hashable, ...], *slots: Slot, **options: Any) -> None:
        """Call the kernel `template(name, *sizes, machine, **options)`."""
        key = (template.__module__, template.__name__, sizes, tuple(sorted(options.items())))
        if key not in self.functions:
            name = f"{self.prefix}{len(self.functions)}_{template.__name__}"
            self.functions[key] = name, template(name, *sizes, self.machine, **options)
        self.steps.append(Step(self.functions[key][0], slots, self.why))

    def kernels(self) -> list[Any]:
        """The functions to generate code for."""
        return [function for _, function in self.functions.values()]

    def lay_out(self) -> bytes:
        """Give every slot its offset; returns the constants in one piece, those of all programs that share them."""
        self._lay_out_arena()
        blob = bytearray()
        offsets = []
        for array in self.constants:
            blob.extend(bytes(-len(blob) % ALIGNMENT))
            offsets.append(len(blob))
            blob.extend(array.tobytes())
        for slot in self._known.values():
            slot.offset = offsets[slot.index]
        return bytes(blob)

    def _lay_out_arena(self) -> None:
        first: dict[Slot, int] = {}
        last: dict[Slot, int] = {}
        for index, step in enumerate(self.steps):
            for slot in step.slots:
                if slot.place == "arena":
                    first.setdefault(slot, index)
                    last[slot] = index
        slots = list(first)
        offsets, self.arena_bytes = plan([Life(slot.nbytes, first[slot], last[slot]) for slot in slots])
        for slot, offset in zip(slots, offsets, strict=True):
            slot.offset = offset
