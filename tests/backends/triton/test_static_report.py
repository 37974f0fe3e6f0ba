"""What is read out of a disassembly, and how many blocks fit a multiprocessor."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from fxopt.backends.triton import static_report
from fxopt.backends.triton.chips import chip_of, chip_of_arch
from fxopt.backends.triton.cost import Work, estimate, trip_cycles
from fxopt.backends.triton.static_report import StaticReport, report_on
from fxopt.cost_model.targets import get_target
from fxopt.errors import Unsupported

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                   /* 0x1 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R2], [R4.64] ;
        /*0020*/                   LDS.64 R4, [R2] ;
        /*0030*/                   ULOP3.LUT UR4, UR4, 0x1, URZ, 0xc0, !UPT ;
        /*0040*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0050*/                   STL.128 [R1], R8 ;
        /*0060*/               @P0 BRA 0x20 ;
        /*0070*/                   FFMA R1, R1, R1, R1 ;
        /*0080*/               @P0 BRA 0x10 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0;
        /*00b0*/                   NOP;
"""
REPORT = StaticReport("k", 80, 4, 96, 0, 36000, {"tensor": 32, "half": 68, "logic": 96, "integer": 40}, {"HMMA": 32})


def read(monkeypatch: pytest.MonkeyPatch, usage: str = "REG:96 STACK:0") -> StaticReport:
    monkeypatch.setattr(static_report, "_tool", lambda option, cubin: usage if option == "-res-usage" else LISTING)
    metadata = SimpleNamespace(name="k", num_warps=4, shared=128, target=SimpleNamespace(arch=80))
    kernel: Any = SimpleNamespace(asm={"cubin": b"."}, metadata=metadata)
    return report_on(kernel)


def test_the_hottest_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inner one: as many tensor instructions as the outer one, in fewer others."""
    found = read(monkeypatch)
    assert found.loop == {"tensor": 1, "shared_load": 1, "local": 1, "logic": 1, "branch": 1}
    assert (found.registers, found.spilled, found.shared) == (96, 16, 128)
    assert found.tensor_names == {"HMMA": 1}
    assert found.per_weight(5 * 128) == 1.0


def test_what_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unsupported, match="says nothing of the registers of k"):
        read(monkeypatch, "nothing")
    other: Any = SimpleNamespace(asm={"hsaco": b""}, metadata=SimpleNamespace(name="k"))
    with pytest.raises(Unsupported, match="holds no cubin"):
        report_on(other)


def test_blocks_that_fit() -> None:
    a100 = chip_of(get_target("a100"))
    assert REPORT.resident(a100) == 4  # shared memory
    assert dataclasses.replace(REPORT, shared=0).resident(a100) == 65536 // (96 * 32) // 4
    assert dataclasses.replace(REPORT, shared=0, registers=16).resident(a100) == 2048 // 128
    assert REPORT.occupancy(a100) == 0.25
    assert REPORT.resident(chip_of_arch(86, 82, 1.7e9)) == 2
    assert "4 warps, 96 registers, 0 bytes spilled" in str(REPORT)


def test_refusals() -> None:
    a100 = chip_of(get_target("a100"))
    assert REPORT.refusal(a100) == ""
    assert "12 bytes a thread are spilled" in dataclasses.replace(REPORT, spilled=12).refusal(a100)
    assert "sm_80 has 166912" in dataclasses.replace(REPORT, shared=200_000).refusal(a100)


def test_estimates() -> None:
    """Bound by what is the slowest: a pipe, the bandwidth, or waiting for memory."""
    target = get_target("a100")
    chip = chip_of(target)
    work = Work(128, 32, 128 * 128 * 16.0, 8.65e6, 3)
    cycles = trip_cycles(REPORT, chip, work)
    assert cycles["tensor"] == 256 and cycles["issue"] == 236
    whole = estimate(REPORT, chip, target, work)
    assert whole.seconds == pytest.approx(cycles["tensor"] * 32 * 2 / chip.clock / target.efficiency["linear"]) and whole.bound == "tensor"
    light = estimate(REPORT, chip, target, dataclasses.replace(work, multiply_adds=1.0, moved=8.65e9))
    assert light.bound == "bandwidth" and light.seconds == pytest.approx(8.65e9 / 2.039e12 / 0.9)
    few = estimate(REPORT, chip, target, Work(2, 64, 1.0, 8e6, 2))
    assert few.bound == "latency"


def test_chips() -> None:
    assert chip_of(get_target("h200")).multiprocessors == 132
    assert chip_of(get_target("rtx3090")).block_shared == 99 * 1024
    with pytest.raises(Unsupported, match=r"compute capability 7\.5: the kernels need 8\.0 or later"):
        chip_of_arch(75, 40, 1e9)
    with pytest.raises(Unsupported, match="the triton backend compiles for NVIDIA GPUs; cortex-a76 is aarch64"):
        chip_of(get_target("cortex-a76"))
    old = dataclasses.replace(get_target("a100"), name="v100", arch="sm_70")
    with pytest.raises(Unsupported, match=r"compute capability 7\.0"):
        chip_of(old)
