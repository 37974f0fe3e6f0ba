"""The Triton backend on a GPU, against other libraries: one command, at most ten minutes.

    python -m benchmarks.gpu [--only linear,attention] [--minutes 9]

Every time stands beside the error of the result, and every row names the GPU. Competitors take turns; ratios are those
of the turns (median, least, largest). `cold`: the second-level cache is flushed before each call; `graph`: inside a
CUDA graph. Peers that are not installed are named as skipped. Results go to benchmarks/results/gpu.json.

Without a GPU it is a rehearsal: tiny inputs go through the references (with TRITON_INTERPRET=1 through the kernels, in
Triton's interpreter), the plan is printed, and nothing is written: no number of it was measured.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_peers as peers
from benchmarks.common import write
from benchmarks.gpu_blocks import blocks
from benchmarks.gpu_timing import Session
from fxopt.backends.triton import formats, library
from fxopt.backends.triton.ops.decode_attention import decode_attention
from fxopt.backends.triton.ops.linear_int8 import linear_int8
from fxopt.backends.triton.ops.linear_packed import linear_packed
from fxopt.backends.triton.ops.linear_sparse24 import linear_sparse24
from fxopt.backends.triton.ops.linear_sparse24 import packed as packed_24
from fxopt.backends.triton.ops.pattern_attention import pattern_attention
from fxopt.backends.triton.ops.registry import KernelOp
from fxopt.ir.ops.attention_pattern import Pattern, dense, diagonal, diagonals, seen_by, stripes
from fxopt.ir.pattern_work import Tile, work_of

F16 = torch.float16
GROUP = 128
LINEARS = {"Llama": ((4096, 4096), (14336, 4096), (4096, 14336)), "DiT": ((3072, 3072), (12288, 3072))}
ROWS = (1, 4, 16, 64, 256, 1024)


def device_of(session: Session) -> str:
    """Where tensors live."""
    return "cuda" if session.gpu else "cpu"


def ours(operator: KernelOp[...], *arguments: Any) -> Callable[[], Any]:
    """A call of one of our operators: its kernels, or (without a GPU or interpreter) its reference."""
    runs = arguments[0].is_cuda or library.interprets()
    return lambda: (operator.kernels if runs else operator.reference)(*arguments)


def ceilings(session: Session) -> None:
    """What the GPU does at best: copies, and large products."""
    device = device_of(session)
    size, width = (1 << 30, 8192) if session.gpu else (1 << 10, 64)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    into = torch.empty_like(source)
    copies = {"copy": lambda: (lambda: into.copy_(source), None)}
    session.compare("ceilings", f"copy of {size} bytes", copies, None, "copy")
    a, b = (torch.randn(width, width, device=device).to(F16) for _ in range(2))
    for name, dtype in (("float16", F16), ("bfloat16", torch.bfloat16)):
        x, y = a.to(dtype), b.to(dtype)
        makers = {f"cuBLAS {name}": lambda x=x, y=y: (lambda: x @ y, None)}
        session.compare("ceilings", f"{width} x {width} x {width}", makers, None, f"cuBLAS {name}")


def linear(session: Session) -> None:
    """Linears of Llama and of diffusion transformers, for one row up to many."""
    for model, shapes in LINEARS.items() if session.gpu else {"tiny": ((64, 256),)}.items():
        for outputs, columns in shapes:
            _linears_of(session, model, torch.randn(outputs, columns) * 0.02)


def _linears_of(session: Session, model: str, weight: Tensor) -> None:
    device = device_of(session)
    outputs, columns = weight.shape
    groups = weight.reshape(outputs, -1, GROUP)
    scales = (groups.abs().amax(-1) / 7).clamp(min=1e-8)
    codes = ((groups / scales[..., None]).round().clamp(-8, 7) + 8).to(torch.uint8).reshape(outputs, columns)
    packed = formats.pack_integers(codes, scales, None, 4, GROUP, F16)
    low = formats.pack_integers(codes >> 2, scales * 4, None, 2, GROUP, F16)
    steps = weight.abs().amax(1) / 127
    eight = (weight / steps[:, None]).round().to(torch.int8)
    half, rounded = weight.to(device, F16), _dense(packed, device)

    def compare(rows: int) -> None:
        x = torch.randn(rows, columns, device=device).to(F16)
        makers = {
            "cuBLAS float16": lambda: (lambda: x @ half.t(), x.double() @ half.double().t()),
            "fxopt 4 bits": lambda: (_packed_call(x, packed), None),
            "fxopt 2 bits": lambda: (_packed_call(x, low), x.double() @ _dense(low, device).t()),
            "fxopt int8 (rounds x)": lambda: (_int8_call(x, eight, steps), x.double() @ weight.to(device).double().t()),
            "tinygemm 4 bits": lambda: peers.tinygemm(x, codes, scales, GROUP),
            "torchao 4 bits": lambda: peers.torchao_int4(x, weight, GROUP),
            "gemlite 4 bits": lambda: peers.gemlite(x, codes, scales, GROUP),
            "bitsandbytes nf4": lambda: peers.bitsandbytes(x, weight),
            "torch._int_mm (product only)": lambda: peers.int8(x, eight),
            "torch._scaled_mm (product only)": lambda: peers.float8(x, weight),
        }
        shape, truth = f"{model} {rows} x {outputs} x {columns}", x.double() @ rounded.t()
        session.compare("linear", shape, makers, truth, "cuBLAS float16", captured=rows <= 64)

    for rows in ROWS if session.gpu else (3,):
        compare(rows)


def _dense(packed: formats.Packed, device: str) -> Tensor:
    return formats.dequantized(packed).to(device).double()


def _packed_call(x: Tensor, packed: formats.Packed) -> Callable[[], Any]:
    parts = (packed.words, packed.scales, packed.offsets, packed.factors)
    operands = (None if part is None else part.to(x.device) for part in parts)
    tail = (None, None, str(packed.layout), packed.outputs, packed.columns, packed.group, "", "")
    return ours(linear_packed, x, *operands, *tail)


def _int8_call(x: Tensor, codes: Tensor, steps: Tensor) -> Callable[[], Any]:
    codes = codes.to(x.device)
    sums = codes.sum(1, dtype=torch.int32)
    return ours(linear_int8, x, codes, steps.to(x.device), sums, None, None, None, None, "", "")


def sparse(session: Session) -> None:
    """2:4 weights."""
    shapes = ((16, 14336, 4096), (4096, 4096, 4096), (4096, 14336, 4096), (32768, 5120, 1280))
    for rows, outputs, columns in shapes if session.gpu else ((8, 32, 64),):
        _sparse_of(session, rows, outputs, columns)


def _sparse_of(session: Session, rows: int, outputs: int, columns: int) -> None:
    device = device_of(session)
    weight = torch.randn(outputs, columns // 4, 4)
    weight = weight.masked_fill(weight.abs().argsort(-1).argsort(-1) < 2, 0.0).reshape(outputs, columns).to(F16)
    x, there = torch.randn(rows, columns, device=device).to(F16), weight.to(device)
    values, places = (part.to(device) for part in packed_24(weight))
    makers = {
        "cuBLAS float16": lambda: (lambda: x @ there.t(), None),
        "fxopt 2:4": lambda: (ours(linear_sparse24, x, values, places, None), None),
        "torch 2:4 CUTLASS": lambda: peers.sparse_24(x, weight, True),
        "torch 2:4 cuSPARSELt": lambda: peers.sparse_24(x, weight, False),
    }
    truth = x.double() @ there.double().t()
    session.compare("sparse", f"{rows} x {outputs} x {columns}", makers, truth, "cuBLAS float16")


def attention(session: Session) -> None:
    """Pattern-sparse attention by density and by pattern, and decoding."""
    sizes = ((24, 8192, 64, 512), (24, 8192, 128, 512), (30, 16384, 64, 1024)) if session.gpu else ((2, 64, 16, 16),)
    for heads, length, width, frame in sizes:
        for name, pattern in _patterns(length, frame):
            _pattern_of(session, name, pattern, (1, heads, length, width))
    caches = ((1, 32, 8, 8192, 128), (8, 32, 8, 8192, 128), (1, 32, 32, 4096, 128))
    for batch, heads, kv_heads, keys, width in caches if session.gpu else ((1, 4, 2, 64, 16),):
        _decode_of(session, (batch, heads, 1, width), (batch, kv_heads, keys, width))


def _pattern_of(session: Session, name: str, pattern: Pattern, size: tuple[int, ...]) -> None:
    q, k, v = (torch.randn(size, device=device_of(session)).to(F16) for _ in range(3))
    _, heads, length, width = size
    call = ours(pattern_attention, q, k, v, list(pattern) * heads, width**-0.5)
    truth = _masked(q, k, v, pattern)
    makers = {
        "dense, flash": lambda: (peers.sdpa(q, k, v, "FLASH_ATTENTION")[0], _masked(q, k, v, dense())),
        "dense, cuDNN": lambda: (peers.sdpa(q, k, v, "CUDNN_ATTENTION")[0], _masked(q, k, v, dense())),
        "fxopt": lambda: (call, None),
        "FlexAttention": lambda: peers.flex(q, k, v, pattern),
    }
    shape = f"{name} ({work_of(pattern, length, tile=Tile(64, 64)).share:.2f} of blocks) {heads} x {length} x {width}"
    session.compare("attention", shape, makers, truth, "dense, flash")


def _decode_of(session: Session, queries: tuple[int, ...], cache: tuple[int, ...]) -> None:
    device = device_of(session)
    q = torch.randn(queries, device=device).to(F16)
    k, v = (torch.randn(cache, device=device).to(F16) for _ in range(2))
    scale = queries[3] ** -0.5
    makers = {
        "torch, flash": lambda: peers.sdpa(q, k, v, "FLASH_ATTENTION"),
        "torch, cuDNN": lambda: peers.sdpa(q, k, v, "CUDNN_ATTENTION"),
        "fxopt, keys split": lambda: (ours(decode_attention, q, k, v, None, scale), None),
    }
    truth = decode_attention.reference(q.float(), k.float(), v.float(), None, scale).double()
    shape = f"decode {queries[0]} x {queries[1]}/{cache[1]} x {cache[2]} x {cache[3]}"
    session.compare("attention", shape, makers, truth, "torch, flash", captured=True)


def _patterns(length: int, frame: int) -> Iterator[tuple[str, Pattern]]:
    for share in (0.05, 0.2, 0.4, 0.6, 0.8):
        window = int(length * (1 - math.sqrt(1 - share)))  # the band's share of the square
        yield f"diagonal {share}", diagonal(max(1, window))
    yield "diagonals", diagonals(frame // 16, frame)
    yield "stripes", stripes(0, frame // 4, 2 * frame)


def _masked(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    """The first head in float64, in pieces: row by row of blocks. Other heads are not compared."""
    length = q.shape[2]
    keys, values = k[:, :1].double(), v[:, :1].double()
    places = torch.arange(length, device=q.device)
    pieces = []
    for begin in range(0, length, 1024):
        rows = q[:, :1, begin : begin + 1024].double()
        scores = rows @ keys.transpose(-1, -2) * q.shape[3] ** -0.5
        seen = seen_by(pattern, places[begin : begin + 1024], places)
        pieces.append(torch.softmax(scores.masked_fill(~seen, float("-inf")), -1).nan_to_num(0.0) @ values)
    return torch.cat(pieces, 2)


SECTIONS: dict[str, Callable[[Session], None]] = {
    "ceilings": ceilings, "linear": linear, "sparse": sparse, "attention": attention, "blocks": blocks,
}  # fmt: skip


def main() -> None:
    """Measure, or rehearse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--minutes", type=float, default=9.0)
    options = parser.parse_args()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    session = Session(gpu, 60 * options.minutes)
    if not gpu:
        print("no GPU: tiny inputs, nothing is timed, nothing is written")
        print(f"plan: linears {LINEARS} at {ROWS} rows; 2:4; attention by density and pattern; decoding; blocks")
    for name in options.only.split(","):
        SECTIONS[name](session)
    wrong = [row for row in session.rows if row["error"] is not None and not row["error"] < 0.2]
    print(f"{len(session.rows)} rows, {len(session.skipped)} skipped, {len(wrong)} wrong")
    if gpu:
        versions = {"torch": torch.__version__, "triton": library.version(), "cuda": torch.version.cuda}
        path = write("gpu", {"gpu": gpu, "software": versions, "rows": session.rows, "skipped": session.skipped})
        print(f"written to {path}")


if __name__ == "__main__":
    main()
