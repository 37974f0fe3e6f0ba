"""What the code generator must know about a processor: LLVM's names for it, vector width, register tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fxopt.errors import Unsupported
from fxopt.ir.target import Target

Family = Literal["x86", "arm", "wasm"]
# How four 8-bit products are summed into an int32 lane; "" where a machine has no instruction for it.
Dot = Literal["vpdpbusd", "vpmaddubsw", "sdot", "relaxed_dot", "dot_i16x8", "smull"]

# The instruction sets that code is generated for, as targets name them.
KNOWN = (
    "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "neon", "dotprod", "simd128", "relaxed_simd",
)  # fmt: skip
_WASM = ("+simd128", "+bulk-memory", "+nontrapping-fptoint", "+sign-ext")


@dataclass(frozen=True)
class Machine:
    """A code generation target.

    Attributes:
        lanes: floats in a vector register.
        rows, columns: accumulators of the row-major tile (rows of x, outputs); they fit the register file.
        outputs, pixels: accumulators of the feature-major tile (outputs, consecutive pixels).
    """

    family: Family
    triple: str
    features: tuple[str, ...]
    cpu: str
    lanes: int
    rows: int
    columns: int
    outputs: int
    pixels: int
    dot: Dot

    @property
    def llvm(self) -> dict[str, Any]:
        """The dictionary that `tvm.target.Target` takes; products and sums may be fused (no other liberty)."""
        found: dict[str, Any] = {"kind": "llvm", "mtriple": self.triple, "fast-math-contract": True}
        if self.family == "wasm":
            found["vector-width"] = 128  # without it TVM prints a warning
        if self.cpu:
            found["mcpu"] = self.cpu
        if self.features:
            found["mattr"] = list(self.features)
        return found

    def tile_rows(self, width: int) -> int:
        """Rows of a tile of `width` outputs that use as many registers as `rows` x `columns`."""
        return max(1, self.rows * self.columns // max(width, self.lanes))

    @property
    def dot_rows(self) -> int:
        """Rows of an 8-bit tile of `columns` outputs."""
        return 4 if self.family == "wasm" else 8 if self.lanes != 8 else 4

    @property
    def arch(self) -> str:
        """The architecture as targets name it."""
        return {"x86": "x86-64", "arm": "aarch64", "wasm": "wasm32"}[self.family]

    @property
    def label(self) -> str:
        """What distinguishes builds for one target: "simd128", "relaxed"; "" where there is one."""
        if self.family != "wasm":
            return ""
        return "relaxed" if "+relaxed-simd" in self.features else "simd128"

    @property
    def pointer_bits(self) -> int:
        """Of an address."""
        return 32 if self.family == "wasm" else 64

    @property
    def clang(self) -> str:
        """The target's name for `zig cc`."""
        names = {"x86": "x86_64-linux-gnu", "arm": "aarch64-linux-gnu", "wasm": "wasm32-freestanding"}
        return names[self.family]


def machine_for(target: Target) -> Machine:
    """The machine of a target, by its architecture and instruction sets.

    Raises:
        Unsupported: no code can be generated for this architecture.
    """
    features = target.features
    if target.arch == "x86-64":
        return _x86(features)
    if target.arch == "aarch64":
        return _arm(features, target.cpu)
    if target.arch == "wasm32":
        return _wasm(features)
    raise Unsupported(
        f"the tvm backend has no code generator for {target.arch} (target {target.name}); "
        "expected x86-64, aarch64 or wasm32"
    )


def machines_for(target: Target) -> list[Machine]:
    """The machines that a result for the target holds code for: for WebAssembly, engines without and with relaxed SIMD.

    Raises:
        Unsupported: no code can be generated for this architecture.
    """
    if target.arch != "wasm32":
        return [machine_for(target)]
    return [_wasm(frozenset({"simd128"})), _wasm(frozenset({"simd128", "relaxed_simd"}))]


def _x86(features: frozenset[str]) -> Machine:
    triple = "x86_64-linux-gnu"
    if "avx2" not in features or "fma" not in features:
        raise Unsupported(f"the tvm backend needs AVX2 and FMA on x86-64; this target has {sorted(features) or 'none'}")
    if "avx512bw" in features:
        vnni = "avx512_vnni" in features
        flags = ("+avx512f", "+avx512bw", "+avx512vl", "+avx512dq", *(("+avx512vnni",) if vnni else ()))
        dot: Dot = "vpdpbusd" if vnni else "vpmaddubsw"
        return Machine("x86", triple, flags, "skylake-avx512", 16, 8, 32, 8, 32, dot)
    vnni = "avx_vnni" in features
    flags = ("+avx2", "+fma", *(("+avxvnni",) if vnni else ()))
    return Machine("x86", triple, flags, "haswell", 8, 6, 16, 4, 24, "vpdpbusd" if vnni else "vpmaddubsw")


def _arm(features: frozenset[str], cpu: str) -> Machine:
    dotted = "dotprod" in features
    flags = ("+neon", "+dotprod") if dotted else ("+neon",)
    return Machine("arm", "aarch64-linux-gnu", flags, cpu, 4, 8, 8, 4, 16, "sdot" if dotted else "smull")


def _wasm(features: frozenset[str]) -> Machine:
    relaxed = "relaxed_simd" in features
    flags = (*_WASM, "+relaxed-simd") if relaxed else _WASM
    dot: Dot = "relaxed_dot" if relaxed else "dot_i16x8"
    return Machine("wasm", "wasm32-unknown-unknown", flags, "", 4, 4, 8, 4, 8, dot)
