"""GPTQ: the published properties, on made-up layers with correlated inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxopt.passes.quantize_linear.gptq import gptq, nearest
from fxopt.passes.quantize_linear.grids import Grid, group_grid


def layer(out: int = 24, columns: int = 96, rows: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and inputs of few directions and very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator)
    mix = torch.randn(columns // 3, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, columns // 3, generator=generator, dtype=torch.float64) @ mix
    x = x * torch.logspace(-1, 1, columns, dtype=torch.float64)[torch.randperm(columns, generator=generator)]
    return weight, x + 0.1 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def error(weight: Tensor, x: Tensor, codes: Tensor, grid: Grid) -> float:
    rounded = grid.values(codes.float(), grid.groups(weight.shape[1]))
    return float(((rounded - weight).double() @ x.t()).square().sum())


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 32, 96])
def test_act_order_beats_plain_beats_nearest(bits: int, symmetric: bool, group: int) -> None:
    wins = 0
    for seed in range(10):
        weight, x = layer(seed=seed)
        grid = group_grid(weight, bits, group, symmetric)
        rounded = error(weight, x, nearest(weight, grid), grid)
        plain = error(weight, x, gptq(weight, x.t() @ x, grid, act_order=False).codes, grid)
        ordered = error(weight, x, gptq(weight, x.t() @ x, grid, act_order=True).codes, grid)
        assert plain < rounded and ordered < rounded
        wins += ordered < plain
    assert wins >= 9


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, 40), (4, 200), (8, 32)])
def test_independent_inputs_are_rounded_to_nearest(bits: int, group: int, act_order: bool) -> None:
    """With a diagonal H there is nothing to compensate: every code is equal."""
    weight = torch.randn(17, 200, generator=torch.Generator().manual_seed(1))
    grid = group_grid(weight, bits, group, symmetric=True)
    moments = torch.diag(torch.rand(200, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1)
    assert torch.equal(gptq(weight, moments, grid, act_order=act_order).codes, nearest(weight, grid))


def test_the_loss_is_that_of_the_exact_greedy_solution() -> None:
    """Equation 2, solved anew for each column in float64 by least squares, gives the same codes."""
    weight, x = layer(out=3, columns=12, rows=60, seed=5)
    grid = group_grid(weight, 3, 12, symmetric=False)
    moments = x.t() @ x
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    left, codes = weight.double().clone(), torch.zeros(3, 12)
    wide = Grid(3, 12, grid.scales.double(), grid.zeros.double())
    for column in range(12):
        here = slice(column, column + 1)
        code = wide.codes(left[:, here], torch.zeros(1, dtype=torch.long))
        codes[:, here] = code.float()
        delta = wide.values(code, torch.zeros(1, dtype=torch.long)) - left[:, here]
        rest = slice(column + 1, 12)
        if column < 11:  # the change of the others that minimises the damped quadratic form, given this one
            left[:, rest] -= delta @ torch.linalg.solve(damped[rest, rest], damped[rest, here]).t()
    assert torch.equal(gptq(weight, moments, grid, act_order=False).codes.float(), codes)


def test_damping_is_raised_and_said() -> None:
    weight, x = layer(columns=48)
    moments = x.t() @ x
    shifted = moments - 0.2 * moments.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    grid = group_grid(weight, 4, 16, symmetric=True)
    found = gptq(weight, shifted, grid)
    assert found.damping > 0.01
    assert gptq(weight, moments, grid).damping == 0.01
    with pytest.raises(ValueError, match="second moments"):
        gptq(weight, moments * float("nan"), grid)


def test_inputs_that_are_always_zero() -> None:
    weight, x = layer()
    x[:, 7] = 0
    grid = group_grid(weight, 4, 32, symmetric=True)
    found = gptq(weight, x.t() @ x, grid)
    assert torch.equal(found.codes[:, 7], nearest(weight, grid)[:, 7])


@pytest.mark.parametrize("symmetric", [True, False])
def test_grids(symmetric: bool) -> None:
    weight, _ = layer(columns=40)
    weight[0, :16] = 0
    weight[1, :16] = 3.0
    for bits in (2, 3, 4, 8):
        grid = group_grid(weight, bits, 16, symmetric, search=False)
        assert grid.scales.shape == (24, 3)  # the last group has eight inputs
        assert bool((grid.zeros == grid.zeros.round()).all()) and grid.zeros.max() < 1 << bits
        rounded = grid.values(nearest(weight, grid).float(), grid.groups(40))
        assert bool((rounded[0, :16] == 0).all())
        assert rounded[1, :16].allclose(weight[1, :16], rtol=1e-6)
        half = grid.scales.abs()[:, grid.groups(40)] * (1.001 if symmetric else 0.501)  # symmetric: one side is short
        assert bool(((rounded - weight).abs() <= half).all())
        searched = group_grid(weight, bits, 16, symmetric)
        better = searched.values(nearest(weight, searched).float(), searched.groups(40))
        assert (better - weight).abs().pow(2.4).sum() <= (rounded - weight).abs().pow(2.4).sum()
