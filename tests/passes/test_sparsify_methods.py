"""Magnitude, Wanda and SparseGPT: their definitions, on made-up layers with correlated inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxopt.ir.sparsity import Pattern
from fxopt.passes.quantize_linear.gptq import gptq
from fxopt.passes.quantize_linear.grids import group_grid
from fxopt.passes.sparsify import methods
from fxopt.passes.sparsify.methods import Pruned, magnitude, sparsegpt, sparsegpt_rounded, wanda

COUNTED = ("2:4", "4:8", "8x2:4", "3:5", "1:2")
BLOCKS = ("4x1", "unstructured")


def layer(out: int = 24, columns: int = 160, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the second moments of inputs of few directions and different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator)
    mix = torch.randn(columns // 2, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(4 * columns, columns // 2, generator=generator, dtype=torch.float64) @ mix
    x += torch.randn(x.shape, generator=generator, dtype=torch.float64)
    x *= torch.logspace(-1, 1, columns, dtype=torch.float64)[torch.randperm(columns, generator=generator)]
    return weight, 2 / len(x) * (x.t() @ x)


def error(weight: Tensor, moments: Tensor, found: Pruned) -> float:
    """The error of the outputs relative to them."""
    change = (found.weight - weight).to(moments.dtype)
    return float((change @ moments).mul(change).sum() / (weight.to(moments.dtype) @ moments).mul(weight).sum())


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
@pytest.mark.parametrize("text", COUNTED + BLOCKS)
def test_statistics_help(text: str, sparsity: float) -> None:
    """On inputs of different sizes Wanda is better than magnitude, on correlated ones SparseGPT better than Wanda."""
    pattern = Pattern.parse(text)
    for seed in range(3):
        weight, moments = layer(seed=seed)
        all_found = [
            magnitude(weight, pattern, sparsity),
            wanda(weight, moments, pattern, sparsity),
            sparsegpt(weight, moments, pattern, sparsity),
        ]
        errors = [error(weight, moments, found) for found in all_found]
        assert errors[2] < errors[1] < errors[0]
        for found in all_found:
            assert not pattern.violation(found.weight) and not found.notes
            expected = pattern.sparsity if pattern.is_counted else sparsity
            assert pattern.zeros(found.weight) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("text", COUNTED)
def test_independent_inputs_of_one_size(text: str) -> None:
    """Nothing to weigh and nothing to make up for: all three are magnitude, bit for bit."""
    pattern = Pattern.parse(text)
    weight, _ = layer()
    moments = 0.37 * torch.eye(160, dtype=torch.float64)
    expected = magnitude(weight, pattern, 0).weight
    assert torch.equal(wanda(weight, moments, pattern, 0).weight, expected)
    assert torch.equal(sparsegpt(weight, moments, pattern, 0).weight, expected)


@pytest.mark.parametrize("text", BLOCKS)
def test_blocks_compete_where_they_should(text: str) -> None:
    """Magnitude in the whole weight, Wanda in each output, SparseGPT in 128 columns; the survivors are as they were."""
    pattern = Pattern.parse(text)
    weight, _ = layer()
    squares, moments = weight.double().square(), torch.eye(160, dtype=torch.float64)
    for found, kept in (
        (magnitude(weight, pattern, 0.6), pattern.mask(squares, 0.6)),
        (wanda(weight, moments, pattern, 0.6), pattern.mask(squares, 0.6, per_row=True)),
        (
            sparsegpt(weight, moments, pattern, 0.6),
            torch.cat([pattern.mask(squares[:, :128], 0.6), pattern.mask(squares[:, 128:], 0.6)], 1),
        ),
    ):
        assert torch.equal(found.weight, weight * kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", BLOCKS)
def test_nothing_to_remove(text: str, dtype: torch.dtype) -> None:
    weight, moments = layer()
    weight, pattern = weight.to(dtype), Pattern.parse(text)
    for found in (
        magnitude(weight, pattern, 0),
        wanda(weight, moments, pattern, 0),
        sparsegpt(weight, moments, pattern, 0),
    ):
        assert found.weight.dtype == dtype and torch.equal(found.weight, weight)


def test_sparsegpt_is_the_exact_greedy_solution() -> None:
    """At every fourth column: the two of the smallest loss; after each, the best change of all columns behind it."""
    weight, moments = layer(out=3, columns=12, seed=5)
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    left = weight.double().clone()
    kept = torch.zeros(3, 12, dtype=torch.bool)
    for column in range(12):
        later = slice(column + 1, 12)
        if column % 4 == 0:
            group = range(column, column + 4)
            losses = torch.stack(
                [left[:, at].square() / torch.linalg.inv(damped[at:, at:])[0, 0] for at in group], dim=1
            )
            kept[:, column : column + 4].scatter_(1, losses.topk(2, 1).indices, True)
        delta = torch.where(kept[:, column], 0.0, -left[:, column])
        left[:, column] += delta
        if column < 11:
            left[:, later] -= torch.outer(delta, torch.linalg.solve(damped[later, later], damped[later, column]))
    found = sparsegpt(weight, moments, Pattern.parse("2:4"), 0)
    assert torch.equal(found.weight != 0, kept)
    torch.testing.assert_close(found.weight.double(), left, rtol=1e-6, atol=1e-7)


def test_joint_rounding() -> None:
    """Codes are those of zero where the pattern has zeros; one sweep is better than two; with no zeros it is GPTQ."""
    pattern = Pattern.parse("2:4")
    weight, moments = layer()
    grid = group_grid(weight, 4, 32, symmetric=False)
    found = sparsegpt(weight, moments, pattern, 0, grid=grid)
    assert found.codes is not None and not pattern.violation(found.weight)
    assert torch.equal(found.weight, grid.values(found.codes.float(), grid.groups(160)))
    fitted, own = sparsegpt_rounded(weight, moments, pattern, 0, lambda kept: group_grid(kept, 4, 32, symmetric=False))
    kept = sparsegpt(weight, moments, pattern, 0).weight
    apart = own.values(own.codes(kept, own.groups(160)), own.groups(160))
    errors = [error(weight, moments, each) for each in (fitted, found, Pruned(apart))]
    assert errors[0] < errors[1] and errors[0] < errors[2]
    nothing = sparsegpt(weight, moments, Pattern.parse("unstructured"), 0, grid=grid)
    assert nothing.codes is not None
    assert torch.equal(nothing.codes, gptq(weight, moments, grid, act_order=False).codes)


@pytest.mark.parametrize("method", [wanda, sparsegpt])
@pytest.mark.parametrize("text", ("2:4", "4x1"))
def test_inputs_that_were_always_zero_go_first(method: Callable[..., Pruned], text: str) -> None:
    pattern = Pattern.parse(text)
    weight, moments = layer()
    dead = [0, 5, 7, 130]
    moments[dead] = 0
    moments[:, dead] = 0
    weight[:, dead] *= 100
    found = method(weight, moments, pattern, 0.5)
    assert bool((found.weight[:, dead] == 0).all())
    assert found.notes == (
        "4 inputs were 0 in every calibration row (0, 5, 7, 130); what they are multiplied with is removed first",
    )
    kept_dead = method(weight, moments, Pattern.parse("unstructured"), 0.0)
    assert torch.equal(kept_dead.weight, weight)


def test_damping_is_raised_and_said() -> None:
    weight, moments = layer()
    shifted = moments - 0.02 * moments.diagonal().mean() * torch.eye(160, dtype=torch.float64)
    shifted.diagonal().clamp_(min=0.01 * float(moments.diagonal().mean()))
    found = sparsegpt(weight, shifted, Pattern.parse("2:4"), 0)
    assert any("damping raised to 0.1" in note for note in found.notes), found.notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moments": float("nan")}, "second moments of its input are infinite or NaN"),
        ({"moments": -1.0}, "negative diagonal"),
        ({"weight": float("inf")}, "the weight has infinite or NaN values"),
    ],
)
def test_refusals(change: dict[str, float], message: str) -> None:
    weight, moments = layer()
    for name, value in change.items():
        (weight if name == "weight" else moments)[3, 3] = value
    with pytest.raises(ValueError, match=message):
        sparsegpt(weight, moments, Pattern.parse("2:4"), 0)


def test_shapes_are_checked() -> None:
    weight, moments = layer()
    with pytest.raises(ValueError, match=r"second moments \[100, 160\] do not fit a weight of 160 inputs"):
        wanda(weight, moments[:100], Pattern.parse("2:4"), 0)
    with pytest.raises(ValueError, match="24 outputs do not divide by the 16 of the pattern 16x1"):
        magnitude(weight, Pattern.parse("16x1"), 0.5)
    with pytest.raises(ValueError, match="160 inputs do not divide by the 7 of the pattern 2:7"):
        sparsegpt(weight, moments, Pattern.parse("2:7"), 0)
    with pytest.raises(ValueError, match="sparsity 1.5: expected a share from 0 to 1"):
        magnitude(weight, Pattern.parse("4x1"), 1.5)


def test_wide_weights_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above a width sums are in float32: nearly the same choice, and an error as small."""
    weight, moments = layer()
    pattern = Pattern.parse("2:4")
    expected = sparsegpt(weight, moments, pattern, 0)
    monkeypatch.setattr(methods, "WIDE_COLUMNS", 100)
    found = sparsegpt(weight, moments.float(), pattern, 0)
    assert not pattern.violation(found.weight)
    assert float(((found.weight != 0) == (expected.weight != 0)).double().mean()) > 0.99
    assert error(weight, moments, found) == pytest.approx(error(weight, moments, expected), rel=0.02)
    assert torch.equal(magnitude(weight, pattern, 0).weight != 0, pattern.mask(weight.abs(), 0))


def test_the_diagonal_is_enough_for_wanda() -> None:
    weight, moments = layer()
    pattern = Pattern.parse("4x1")
    expected = wanda(weight, moments, pattern, 0.5).weight
    assert torch.equal(wanda(weight, moments.diagonal(), pattern, 0.5).weight, expected)
