"""Hardware as data: every file states its source and its error; the host is recognised."""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path

import pytest

from fxopt.cost_model import host
from fxopt.cost_model.host import available_cores, detect_host, host_class, instruction_sets
from fxopt.cost_model.roofline import peak
from fxopt.cost_model.targets import get_target, target_names
from fxopt.errors import UnknownName

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "host_rates.json"
FILES = [name for name in target_names() if name != "host"]
_BACKENDS = dict.fromkeys(("cortex-a53", "cortex-a76", "raspberry-pi-5", "wasm-simd", "wasm-relaxed"), "tvm")


@pytest.mark.parametrize("name", FILES)
def test_every_target_states_where_its_figures_come_from(name: str) -> None:
    target = get_target(name)
    assert target.name == name
    assert len(target.source) > 40
    assert "never measured" in target.error or "benchmarks/host_rates.py" in target.error
    assert 0 < target.interval <= 1
    assert target.peak["float32"] > 0 and target.bandwidth > 0 and target.launch_seconds > 0
    assert target.backend == _BACKENDS.get(name, "triton" if target.kind == "cuda" else "onnxruntime")
    assert all(0 < share <= 1 for share in target.efficiency.values())
    assert not target.is_host


def test_figures_are_those_that_the_benchmark_measured() -> None:
    for name, record in json.loads(RESULTS.read_text(encoding="utf-8")).items():
        target, fitted = get_target(name), record["fitted"]
        for figure in ("launch_seconds", "bandwidth", "cache_bandwidth", "cache_bytes", "efficiency"):
            assert getattr(target, figure) == fitted[figure], f"{name}: copy {figure} from {RESULTS.name}"
        assert f"{100 * record['held_out_error']:.0f} %" in target.error
        assert f"{100 * record['model_error']:.0f} %" in target.error
        assert target.interval >= record["held_out_90_percent"]


def test_classes_without_measurements_say_so() -> None:
    measured = set(json.loads(RESULTS.read_text(encoding="utf-8")))
    assert measured < set(FILES)
    assert all("never measured" in get_target(name).error for name in FILES if name not in measured)


@pytest.mark.parametrize("name", ["x86-avx512-vnni", "x86_avx512_vnni"])
def test_dashes_and_underscores_are_the_same(name: str) -> None:
    assert get_target(name).name == "x86-avx512-vnni"


def test_unknown_target_suggests_near_names() -> None:
    with pytest.raises(UnknownName, match=r"unknown target 'a10'; did you mean 'a100'.*Known: .*host"):
        get_target("a10")


# ---- the host


def test_host_is_this_machine() -> None:
    target = get_target("host")
    assert target == detect_host()
    assert target.is_host and target.name == "host" and target.kind == "cpu"
    assert target.cores == available_cores()
    known = get_target(host_class(platform.machine().lower(), instruction_sets()))
    assert target.efficiency == known.efficiency
    assert target.source.startswith(f"class {known.name}: ")


def test_threads_limit_the_cores() -> None:
    assert detect_host(1).cores == 1
    assert detect_host(10_000).cores == available_cores()


@pytest.mark.parametrize(
    ("arch", "features", "name"),
    [
        ("x86_64", {"avx2", "fma"}, "x86-avx2"),
        ("x86_64", {"avx2", "avx_vnni"}, "x86-avx-vnni"),
        ("x86_64", {"avx2", "avx512f", "avx512bw"}, "x86-avx512"),
        ("amd64", {"avx2", "avx512bw", "avx512_vnni"}, "x86-avx512-vnni"),
        ("x86_64", set(), "x86-avx2"),
        ("aarch64", {"neon"}, "aarch64"),
        ("arm64", {"neon", "dotprod"}, "aarch64"),
    ],
)
def test_class_by_instruction_sets(arch: str, features: set[str], name: str) -> None:
    assert host_class(arch, frozenset(features)) == name


@pytest.mark.parametrize(
    ("text", "features"),
    [
        ("processor\t: 0\nflags\t\t: fpu sse2 fma avx2\n", {"fma", "avx2"}),
        ("flags\t\t: avx2 avx512f avx512bw avx512_vnni\n", {"avx2", "avx512f", "avx512bw", "avx512_vnni"}),
        ("processor\t: 0\nFeatures\t: fp asimd crc32 asimddp i8mm\n", {"neon", "dotprod", "i8mm"}),
    ],
)
def test_instruction_sets_from_cpuinfo(tmp_path: Path, text: str, features: set[str]) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    assert instruction_sets(path) == features


def test_instruction_sets_without_cpuinfo(tmp_path: Path) -> None:
    assert isinstance(instruction_sets(tmp_path / "none"), frozenset)


def test_arm_without_dot_product_has_no_fast_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(host, "instruction_sets", lambda: frozenset({"neon"}))
    target = detect_host()
    assert peak(target, "int8") == peak(target, "float32")
    monkeypatch.setattr(host, "instruction_sets", lambda: frozenset({"neon", "dotprod"}))
    assert peak(detect_host(), "int8") > 2 * peak(target, "float32")


def test_targets_are_data() -> None:
    target = get_target("h200")
    assert dataclasses.replace(target, cores=2) != target
    assert target.peak["float8"] == get_target("h100").peak["float8"]
    assert "float8" not in get_target("a100").peak
