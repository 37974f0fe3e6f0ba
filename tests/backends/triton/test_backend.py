"""A model optimised for a GPU that is not here: kernels are made and saved, the reference runs, and says so."""

from __future__ import annotations

import importlib.util
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.backends import eager
from fxopt.backends.base import Backend
from fxopt.backends.triton import Triton, library
from fxopt.backends.triton import executable as module
from fxopt.backends.triton.bundle import Bundle
from fxopt.backends.triton.executable import TritonExecutable, usable_gpu
from fxopt.backends.triton.lower.job import Job
from fxopt.catalog import find_backend
from fxopt.cost_model.targets import get_target
from fxopt.errors import MissingDependency, Unsupported
from fxopt.options import resolve_backend

HERE = "eager (reference)"
lacks_triton = importlib.util.find_spec("triton") is None
needs_triton = pytest.mark.skipif(lacks_triton, reason="Triton is not installed: pip install 'fxopt[triton]'")
slow = pytest.mark.slow


def test_it_is_found_by_name() -> None:
    assert find_backend("triton") is Triton and Triton().name == "triton"


def test_without_triton_the_reference_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target's own backend is replaced with a note; asked for by name, it is an error with what to install."""

    def lacking(cls: type[Backend]) -> None:
        raise MissingDependency("backend Triton needs triton; install it: pip install 'fxopt[triton]'")

    monkeypatch.setattr(Triton, "require", classmethod(lacking))
    notes: list[str] = []
    found = resolve_backend(None, get_target("a100"), notes)
    assert isinstance(found, eager.Eager)
    assert notes == [
        "backend Triton needs triton; install it: pip install 'fxopt[triton]': decided for a100, run in eager"
    ]
    with pytest.raises(MissingDependency, match=r"pip install 'fxopt\[triton\]'"):
        resolve_backend("triton", get_target("a100"), [])


def test_it_knows_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Triton, "needs", ())
    backend: Backend = resolve_backend(None, get_target("h200"), [])
    assert backend.name == "triton" and backend.target == get_target("h200")


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


class Block(nn.Module):
    """Llama's block, written out, with the widths of a small one."""

    def __init__(self, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.width = hidden // heads
        self.norm1, self.norm2 = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.rand(hidden) + 0.5)
        sizes = {"q": hidden, "k": kv_heads * self.width, "v": kv_heads * self.width, "o": hidden}
        self.attention = nn.ModuleDict({name: nn.Linear(hidden, out, bias=False) for name, out in sizes.items()})
        self.gate, self.up = (nn.Linear(hidden, 2 * hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * hidden, hidden, bias=False)

    @staticmethod
    def normed(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    @staticmethod
    def turned(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = t.shape[-1] // 2
        return t * cos + torch.cat((-t[..., half:], t[..., :half]), -1) * sin

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.normed(x, self.norm1)
        q, k, v = (self.attention[name](h).view(*x.shape[:2], -1, self.width).transpose(1, 2) for name in "qkv")
        q, k = self.turned(q, cos, sin), self.turned(k, cos, sin)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.attention["o"](y.transpose(1, 2).reshape(x.shape))
        h = self.normed(x, self.norm2)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """A few blocks."""

    def __init__(self, hidden: int = 256, heads: int = 4, kv_heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(hidden, heads, kv_heads) for _ in range(layers))
        angle = torch.outer(torch.arange(64.0), 0.9 ** torch.arange(hidden // heads // 2))
        angle = torch.cat([angle, angle], -1)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = (table[None, None, : x.shape[1]] for table in (self.cos, self.sin))
        for block in self.blocks:
            x = block(x, cos, sin)
        return x


def job_of(fast: fxopt.Optimized) -> Job:
    executable = fast._ready.executable
    assert isinstance(executable, TritonExecutable)
    job = executable.job()
    assert job is not None
    return job


@pytest.fixture(scope="module")
def llama() -> tuple[fxopt.Optimized, Tensor]:
    """Optimised for an A100, in 4 bits, and an input."""
    torch.manual_seed(0)
    model = Llama().half().eval()
    data = [torch.randn(1, 8, 256).half() for _ in range(4)]
    begin = time.process_time()
    fast = fxopt.optimize(
        model, "a100", example_inputs=(data[0],), calibration=data, budget=None, objective="size",
        passes=["quantize-linear{bits=4,group=64,method=rtn}"],
    )  # fmt: skip
    assert time.process_time() - begin < 60
    return fast, data[0]


@slow
@needs_triton
@no_gpu
def test_a_small_llama(llama: tuple[fxopt.Optimized, Tensor]) -> None:
    fast = llama[0]
    assert fast.report.backend == "triton" and fast.report.executed_on == HERE
    assert fast.report.outcome == "optimized" and "never measured" in fast.report.why
    made = list(fast.ledger.select(pass_name="triton"))
    assert len(made) == 14 and {row.outcome for row in made} == {"applied"}
    texts = [row.reason for row in made]
    assert sum(text.startswith("queries, keys and values at once") and "rotary" in text for text in texts) == 2
    assert sum(text.endswith(", with silu and mul") for text in texts) == 2
    assert sum(text.endswith(", with add") for text in texts) == 4
    assert any("kernels compiled for sm_80, 0 not used" in text for text in fast.report.warnings)


@slow
@needs_triton
@no_gpu
def test_the_reference_runs_and_says_so_once(llama: tuple[fxopt.Optimized, Tensor]) -> None:
    fast, x = llama
    fast._warned = False
    with pytest.warns(UserWarning, match="compiled for a100, running the reference"):
        first = fast(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fast(x), first)
    lowered = job_of(fast).graph.run([x])[0]
    assert float((lowered - first).float().norm() / first.float().norm()) < 4e-3


@slow
@needs_triton
@no_gpu
def test_saved_and_loaded(llama: tuple[fxopt.Optimized, Tensor], tmp_path: Path) -> None:
    fast, x = llama
    fast.save(tmp_path / "out")
    assert (tmp_path / "out" / "kernels" / "manifest.json").is_file()
    fast.save(tmp_path / "out")  # over itself
    back = fxopt.load(tmp_path / "out")
    assert isinstance(back._ready.executable, TritonExecutable)
    assert back._ready.executable.saved == tmp_path / "out" / "kernels"
    assert back.report.executed_on == HERE
    with pytest.warns(UserWarning, match="running the reference"):
        assert torch.equal(back(x), fast(x))
    assert len(list(back._ready.executable.verdicts())) == 14


@slow
@needs_triton
def test_without_triton_a_saved_result_still_runs(
    llama: tuple[fxopt.Optimized, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama[0].save(tmp_path / "out")

    def lacking(cls: type[Backend]) -> None:
        raise MissingDependency("backend Triton needs triton; install it: pip install 'fxopt[triton]'")

    monkeypatch.setattr(Triton, "require", classmethod(lacking))
    with pytest.warns(UserWarning, match=r"pip install 'fxopt\[triton\]'; the result runs in the reference"):
        back = fxopt.load(tmp_path / "out")
    assert type(back._ready.executable) is eager.EagerExecutable


@slow
@needs_triton
@pytest.mark.parametrize("target", ["h200", "rtx4090", "b200", "rtx3090"])
def test_other_chips(target: str) -> None:
    x = torch.randn(2, 128).half()
    model = nn.Sequential(nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 128)).half().eval()
    fast = fxopt.optimize(
        model, target, example_inputs=(x,), calibration=[(x,), (x,)], budget=None, objective="size",
        passes=["quantize-linear{bits=4,method=rtn}"],
    )  # fmt: skip
    rows = [row.reason for row in fast.ledger.select(pass_name="triton")]
    assert rows == ["planar4/1 of 64 x 128, 2 rows, with gelu", "planar4/1 of 128 x 64, 2 rows"]


@slow
@needs_triton
def test_an_empty_batch() -> None:
    rows = {0: torch.export.Dim("rows", min=1, max=64)}
    model = nn.Linear(64, 32).half().eval()
    data = torch.randn(4, 64).half()
    fast = fxopt.optimize(
        model, "a100", example_inputs=(data,), calibration=[(data,), (data,)], dynamic_shapes=(rows,), budget=None,
        objective="size", passes=["quantize-linear{bits=4,method=rtn}"],
    )  # fmt: skip
    assert fast(data[:0]).shape == (0, 32)
    assert job_of(fast).graph.run([data[:0]])[0].shape == (0, 32)


@slow
@needs_triton
def test_models_from_onnx_files(tmp_path: Path) -> None:
    import onnx

    from tests.conftest import mlp

    onnx.save(mlp(features=512, hidden=1024), tmp_path / "m.onnx")
    fast = fxopt.optimize(tmp_path / "m.onnx", "a100", calibration="random", passes=["quantize-linear"], budget=None)
    assert fast.report.backend == "triton" and fast.report.executed_on == HERE
    x = torch.randn(3, 512)
    before = fxopt.optimize(tmp_path / "m.onnx", "a100", passes=[])(x)
    after = fast(x)
    assert float((after - before).norm() / before.norm()) < 0.1


@needs_triton
def test_wrong_targets() -> None:
    class Small(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    graph = fxopt.capture(Small(), (torch.ones(1),))
    with pytest.raises(Unsupported, match="compiles for NVIDIA GPUs; cortex-a76 is aarch64"):
        Triton().compile(graph, get_target("cortex-a76"))


class Gpu:
    """A GPU that is not here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Something")


def test_a_graph_that_cannot_be_lowered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuses(graph: Any, target: Any) -> Any:
        raise Unsupported("it branches on data")

    monkeypatch.setattr(module, "lowered", refuses)
    executable = TritonExecutable(fxopt.capture(nn.ReLU(), (torch.ones(2),)), get_target("a100"))
    assert executable.verdicts() == ()
    assert executable.notes() == ["there are no kernels, and the reference runs: it branches on data"]
    executable.save_beside(tmp_path)
    assert not list(tmp_path.iterdir())
    Gpu(monkeypatch, (8, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert executable.run([torch.tensor([-1.0, 2.0])])[0].tolist() == [0.0, 2.0]


def test_which_gpu_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch, (9, 0))
    assert usable_gpu() == "NVIDIA Something"
    Gpu(monkeypatch, (7, 5))
    assert usable_gpu() == ""
    Gpu(monkeypatch, (9, 0))
    monkeypatch.setenv("FXOPT_TRITON", "0")
    assert usable_gpu() == ""


@needs_triton
def test_saved_kernels_of_another_chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clear reason, and they are compiled again."""
    made = Bundle("sm_80", library.version(), library.build_key(), ("planar2/1", "planar4/1", "shift4/1"), {})
    made.save(tmp_path)
    graph = fxopt.capture(nn.ReLU(), (torch.ones(1),))
    found = TritonExecutable(graph, get_target("a100"), saved=tmp_path)
    installed: list[Any] = []
    monkeypatch.setattr(Bundle, "install", lambda self: installed.append(self))
    Gpu(monkeypatch, (9, 0))
    with pytest.warns(UserWarning, match="compiled for sm_80, Triton .*; here is sm_90, .*compiled again at their first"):
        found._install(torch.device("cuda", 0))
    assert not installed
    Gpu(monkeypatch, (8, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found._install(torch.device("cuda", 0))
    assert len(installed) == 1
    (tmp_path / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="holds no kernels that can be read.*compiled again"):
        found._install(torch.device("cuda", 0))


@needs_triton
def test_nothing_is_compiled_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "lowered", lambda graph, target: pytest.fail("lowered too early"))
    executable = Triton().compile(fxopt.capture(nn.ReLU(), (torch.ones(2),)), get_target("a100"))
    assert executable.run([torch.tensor([-1.0, 2.0])])[0].tolist() == [0.0, 2.0]
    executable.close()
