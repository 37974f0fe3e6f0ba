"""What is predicted not to pay is refused, as a prediction; nothing of it claims to be measured."""

from __future__ import annotations

import pytest
import torch

from fxopt.backends.triton import Triton, asked, library, worth
from fxopt.backends.triton.block_plan import block_plan
from fxopt.backends.triton.formats import PLANAR4
from fxopt.cost_model.roofline import predict
from fxopt.cost_model.targets import get_target
from fxopt.ir.ops.attention_pattern import attention_pattern, diagonal, diagonals
from fxopt.ir.ops.linear_nbits import linear_nbits
from fxopt.ir.target import Cost
from fxopt.passes.attention_patterns.pricing import Pricing, pricing_of
from fxopt.passes.attention_patterns.site import Site
from fxopt.passes.base import Context

F16 = torch.float16
TARGETS = ("a100", "h200", "rtx4090", "b200")
LLAMA = [(4096, 4096), (14336, 4096), (4096, 14336)]


@pytest.fixture(autouse=True)
def some_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables are read without Triton."""
    monkeypatch.setattr(library, "minor", lambda: (3, 7))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("outputs", "columns"), LLAMA)
def test_four_bits_pay_for_few_rows_only(name: str, outputs: int, columns: int) -> None:
    target = get_target(name)
    for rows in (1, 8, 16):
        assert worth.nbits_refusal(target, rows, outputs, columns, 4, 128, F16) == ""
    for rows in (1024, 4096) if name == "rtx4090" else (256, 1024, 4096):  # it has little bandwidth
        reason = worth.nbits_refusal(target, rows, outputs, columns, 4, 128, F16)
        assert f"predicted not to pay on {name} (not measured): a 4-bit weight of {outputs} x {columns}" in reason


def test_predictions_are_sane() -> None:
    """At most what the bytes allow; more for fewer bits; less for more rows."""
    target = get_target("a100")
    one = worth.packed_linear(target, 1, 4096, 4096, PLANAR4, 128, F16)
    assert one is not None and 1.5 < one.plain / one.kernel < 4
    ratios = []
    for rows in (1, 16, 32, 64, 128, 256, 512, 1024):
        found = worth.packed_linear(target, rows, 4096, 4096, PLANAR4, 128, F16)
        assert found is not None
        ratios.append(found.plain / found.kernel)
    assert ratios[0] > 1.5 and ratios[-1] < 1.0


def test_powers_of_two_are_never_faster_than_integers() -> None:
    for name in TARGETS:
        for rows in (1, 64, 1024):
            reason = worth.shift_refusal(get_target(name), rows, 4096, 4096, 128, F16)
            assert "4-bit integers, with a smaller error" in reason and "not measured" in reason


def test_two_of_four_needs_rows() -> None:
    target = get_target("a100")
    assert "fewer than 64 rows (16; not measured on a100)" in worth.sparse_24_refusal(target, 16, 4096, 4096, F16)
    assert worth.sparse_24_refusal(target, 4096, 4096, 4096, F16) == ""
    assert "lists no 2:4 rate of float64" in worth.sparse_24_refusal(target, 4096, 64, 64, torch.float64)


@pytest.mark.parametrize("name", TARGETS)
def test_sparse_attention_has_a_break_even_density(name: str) -> None:
    target = get_target(name)
    limit = worth.break_even_density(target, 24, 8192, 128, F16, False)
    assert 0 < limit < 0.7
    assert worth.density_refusal(target, limit * 0.9, 24, 8192, 128, F16) == ""
    reason = worth.density_refusal(target, limit * 1.1, 24, 8192, 128, F16)
    assert f"predicted not to pay on {name} (not measured)" in reason and f"from {limit:.2f} on" in reason


def test_what_passes_ask() -> None:
    backend = Triton()
    backend.target = get_target("h200")
    assert backend.supports("linear_w8a8", "int8") == backend.supports("linear_fp8", "float8_e4m3fn") == ""
    assert backend.supports("scaled_dot_product_attention", "float16") == backend.supports("attention", "float16") == ""
    assert backend.supports("linear_sparse", "float16", "2:4") == ""
    assert "the weight is 4x1 in float16" in backend.supports("linear_sparse", "float16", "4x1")
    assert backend.supports("linear_nbits", "int4", "group=32,activations=float") == ""
    assert "take activations as they are" in backend.supports("linear_nbits", "int4", "group=32,activations=int8")
    assert "8-bit weights have no packed layout" in backend.supports("linear_nbits", "int8", "group=32,activations=float")
    assert "group 48 has no packed layout" in backend.supports("linear_nbits", "int4", "group=48,activations=float")
    assert "conv_w8a8 has no kernel" in backend.supports("conv_w8a8", "int8")
    assert "do not pay for fewer than 64 rows" in backend.supports("linear_24", "float16", "rows=1,out=4096,in=4096")
    sizes = "heads=24,length=8192,width=128"
    assert "dense attention is as fast from" in backend.supports("attention_pattern", "float16", f"{sizes},density=0.99")
    assert backend.supports("attention_pattern", "float16", f"{sizes},density=0.05") == ""
    assert "shift-add" in backend.supports("linear_shift", "float16", "rows=1,out=4096,in=4096,group=128")
    assert backend.supports("linear_24", "float16") == ""


@pytest.mark.parametrize(("name", "width"), [("h200", 128), ("a100", 128), ("a100", 64), ("rtx4090", 256)])
@pytest.mark.parametrize("frames", [False, True])
def test_the_pass_counts_the_tiles_that_the_kernel_takes(name: str, width: int, frames: bool) -> None:
    """What it decides by is the density of the plan that is launched, renumbered or not."""
    backend = Triton()
    backend.target = get_target(name)
    ctx = Context(backend.target, capabilities=backend)
    site = Site(None, 2, 1024, width, None, None, None)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Site, "dtype", F16)
        pricing = pricing_of(ctx, site, frames=True)
    assert isinstance(pricing, Pricing) and not pricing.lists
    numbers = [*diagonal(40), *(diagonals(3, 64) if frames else diagonal(90))]
    known = worth.pattern_choice(backend.target, width, F16, frames)
    if known is None:
        assert pricing.over_dense(numbers, pricing.work(numbers)) > 1e6, "there is no kernel to offer"
        return
    plan = block_plan(tuple(numbers), 1024, known["BQ"], known["BK"])
    assert pricing.work(numbers).share == plan.density
    assert str(pricing.kernel_for(numbers).tile) == f"{known['BQ']}x{known['BK']}"


def test_patterns_are_predicted_by_their_tiles() -> None:
    backend, target = Triton(), get_target("h200")
    q = torch.empty(1, 24, 8192, 128, dtype=F16, device="meta")
    half, tenth = (attention_pattern.cost_of(q, q, q, list(diagonal(window)) * 24, 0.1) for window in (1200, 200))
    times = [found.seconds for found in (backend.predicted(cost, target) for cost in (half, tenth)) if found]
    assert len(times) == 2 and times[1] < 0.3 * times[0]
    blocks = torch.ones(24, 128, 128, dtype=torch.bool)
    assert backend.predicted(attention_pattern.cost_of(q, q, q, list(diagonal(9)) * 24, 0.1, blocks), target) is None


def nbits_cost(rows: int, bits: int = 4, dtype: torch.dtype = F16, group: int = 128) -> Cost:
    x = torch.empty(rows, 4096, dtype=dtype, device="meta")
    packed = torch.empty(4096, 4096 * bits // 8, dtype=torch.uint8, device="meta")
    scales = torch.empty(4096, 4096 // group, device="meta")
    return linear_nbits.cost_of(x, packed, scales, None, None, 4096, bits, group, 16)


def test_prices_come_from_the_static_reports() -> None:
    target = get_target("a100")
    found = Triton().predicted(nbits_cost(1), target)
    comparison = worth.packed_linear(target, 1, 4096, 4096, PLANAR4, 128, F16)
    assert found is not None and comparison is not None
    assert found.seconds == comparison.kernel + target.launch_seconds
    assert found.low < found.seconds < found.high
    assert found.seconds < predict(Cost(2.0 * 4096**2, 2.0 * 4096**2, "float16", "linear"), target).seconds


def test_everything_else_is_left_to_the_roofline() -> None:
    target = get_target("a100")
    assert asked.predicted(Cost(1.0, 1.0), target) is None
    assert asked.predicted(nbits_cost(1, bits=8), target) is None
    assert asked.predicted(nbits_cost(1, group=48), target) is None
    assert asked.predicted(nbits_cost(1, dtype=torch.float64), target) is None
    assert asked.predicted(nbits_cost(1), get_target("cortex-a76")) is None
    wide, half = asked.predicted(nbits_cost(16, dtype=torch.float32), target), asked.predicted(nbits_cost(16), target)
    assert wide is not None and half is not None and wide.seconds > half.seconds
