"""Every row of the tables compiles for its GPU without spills, in tensor cores, within its budget of instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install 'fxopt[triton]'")

from fxopt.backends.triton import configs, library
from fxopt.backends.triton.chips import Chip, chip_of_arch
from fxopt.backends.triton.configs import Choice, choice_of
from fxopt.backends.triton.launch import Launch, recorded
from fxopt.backends.triton.offline import compiled
from fxopt.backends.triton.static_report import StaticReport, report_on, usage_of
from fxopt.backends.triton.testing import arguments_for
from fxopt.errors import Unsupported

pytestmark = pytest.mark.slow
ARCHITECTURES = (80, 86, 89, 90, 100)
_SYNC = r"mma\.sync\.aligned\.m16n8"
TENSOR = {80: _SYNC, 86: _SYNC, 89: _SYNC, 90: rf"wgmma\.mma_async|{_SYNC}", 100: rf"tcgen05\.mma|{_SYNC}"}
# Thread instructions per weight of a tile of 16 rows, scales per 128 inputs.
BUDGETS = {80: 2.7, 86: 2.7, 89: 2.7, 90: 2.4, 100: 2.5}
BUDGETS_2BIT = {80: 2.2, 86: 2.2, 89: 2.2, 90: 2.45}


def chip(arch: int) -> Chip:
    return chip_of_arch(arch, 108, 1.5e9)


def main_launch(key: str, arch: int) -> Launch:
    operator, arguments = arguments_for(key)
    with recorded(chip(arch)) as launches:
        operator.kernels(*arguments)
    names = {"planar4": "w4a16", "shift4": "w4a16", "planar2": "w2a16"}
    name = key.split("/")[0]
    return next(launch for launch in launches if launch.name == names.get(name, name))


def report(key: str, arch: int) -> StaticReport:
    return report_on(compiled(main_launch(key, arch), chip(arch)))


def keys(arch: int) -> Iterator[str]:
    """Keys with a choice: all of them for the two architectures that most tables are for, else every third one."""
    step = 1 if arch in (80, 90) else 3
    for key in sorted(configs.table(configs.table_arch(arch)))[::step]:
        if choice_of(chip(arch), key) is not None:
            yield key


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_compile_without_spills_in_tensor_cores(arch: int) -> None:
    wrong = []
    for key in keys(arch):
        kernel = compiled(main_launch(key, arch), chip(arch))
        registers, stack = usage_of(kernel)
        if stack and report_on(kernel).spilled:
            wrong.append(f"{key}: {registers} registers, {report_on(kernel).spilled} bytes spilled")
        if kernel.metadata.shared > chip(arch).block_shared:
            wrong.append(f"{key}: {kernel.metadata.shared} bytes of shared memory")
        if not re.search(TENSOR[arch], kernel.asm["ptx"]):
            wrong.append(f"{key}: no tensor instruction")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("arch", BUDGETS)
def test_instructions_of_a_4_bit_weight(arch: int) -> None:
    key = "planar4/fp16/16/summed"
    choice = choice_of(chip(arch), key)
    assert choice is not None
    found = report(key, arch)
    assert found.per_weight(choice["BN"] * 128) <= BUDGETS[arch]
    assert found.loop["async_copy"] > 0 and found.loop.get("shared_store", 0) <= 1


@pytest.mark.parametrize("arch", BUDGETS_2BIT)
def test_instructions_of_a_2_bit_weight(arch: int) -> None:
    key = "planar2/fp16/16/summed"
    choice = choice_of(chip(arch), key)
    assert choice is not None
    assert report(key, arch).per_weight(choice["BN"] * 256) <= BUDGETS_2BIT[arch]


@pytest.mark.parametrize(("arch", "instruction"), [(80, r"mma\.sync"), (90, r"wgmma\.mma_async"), (100, r"tcgen05\.mma")])
def test_weights_go_into_the_newest_tensor_instruction(arch: int, instruction: str) -> None:
    assert re.search(instruction, compiled(main_launch("planar4/fp16/16/summed", arch), chip(arch)).asm["ptx"])


def test_hopper_copies_tiles_of_8_bit_operands() -> None:
    kernel = compiled(main_launch("w8a8_tma/128", 90), chip(90))
    assert "cp.async.bulk.tensor" in kernel.asm["ptx"] and "wgmma.mma_async" in kernel.asm["ptx"]


def test_reports_of_the_tables_are_those_of_the_kernels() -> None:
    """Of the Triton version that is installed: what the cost model works from is what is compiled."""
    version = ".".join(map(str, library.minor()))
    key = "planar4/fp16/16/summed"
    if version not in configs.table(80)[key]:
        pytest.skip(f"the tables have no rows of Triton {version}")
    choice = choice_of(chip(80), key)
    assert choice is not None and choice.report is not None
    found = report(key, 80)
    assert (found.registers, found.spilled, found.shared) == (
        choice.report.registers, choice.report.spilled, choice.report.shared,
    )  # fmt: skip
    assert dict(found.loop) == dict(choice.report.loop)


def test_a_kernel_that_does_not_compile_says_why() -> None:
    key = "planar4/fp16/16/summed"
    with configs.forced({key: Choice({"BM": 16, "BN": 96, "JOINED": 1}, 4, 3)}):
        launch = main_launch(key, 80)
    with pytest.raises(Unsupported, match=r"w4a16\[.*BN=96.*\] does not compile for sm_80: .*power of 2"):
        compiled(launch, chip(80))


def test_a_kernel_that_spills_is_refused() -> None:
    key = "planar4/fp16/64/summed"
    with configs.forced({key: Choice({"BM": 64, "BN": 256, "JOINED": 1}, 4, 3)}):
        found = report(key, 80)
    assert found.spilled > 0
    assert re.search("registers do not suffice: .* bytes a thread are spilled", found.refusal(chip(80)))


def test_a_kernel_that_wants_too_much_shared_memory_is_refused() -> None:
    key = "w8a8/64"
    with configs.forced({key: Choice({"BM": 64, "BN": 128, "BK": 128, "SWAP": 0}, 8, 6)}):
        found = report(key, 80)
    assert not found.refusal(chip(80))
    assert "bytes of shared memory a block; sm_86 has" in found.refusal(chip(86))
