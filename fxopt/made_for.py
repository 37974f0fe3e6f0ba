"""For which instruction sets a file was made, and what that means on another machine.

8-bit products of x86 CPUs without VNNI go through vpmaddubsw, which adds two of them in saturating 16-bit integers:
only weights of 7 bits are exact there.
"""

from __future__ import annotations

from collections.abc import Mapping

KEY = "fxopt.instruction_sets"
WIDE = ("avx512_vnni", "avx_vnni", "amx_int8")  # sum 8-bit products in 32 bits


def recorded(features: frozenset[str]) -> str:
    """The text for the file's metadata: what decides about 8-bit codes, and "x86" or the like when nothing does."""
    return ",".join(sorted(features & {*WIDE, "avx2", "avx512bw", "neon", "dotprod", "i8mm"}))


def concern(metadata: Mapping[str, str], features: frozenset[str], name: str) -> str:
    """What a user of the file should know on a CPU with these instruction sets; "" when it was made for such a one."""
    if KEY not in metadata or "quantize-linear" not in metadata.get("fxopt.passes", ""):
        return ""
    made = set(metadata[KEY].split(","))
    here = features & {*WIDE}
    if made & {*WIDE} and not here and "avx2" in features:
        return (
            f"{name} was made for a CPU with {', '.join(sorted(made & {*WIDE}))}; this one lacks it, its sums of 8-bit "
            "products saturate, so results may be wrong: optimise the original model on this machine"
        )
    if here and not made & {*WIDE} and "avx2" in made:
        return (
            f"{name} was made for a CPU without VNNI, with weights of 7 bits; optimise the original model on this "
            "machine for a smaller error"
        )
    return ""
