"""What goes beside or around a sparse weight: the low-rank correction, and ARMOR's block-diagonal factors."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from fxopt.ir.sparsity import Pattern
from fxopt.passes.sparsify.armor import armor, normalised, solve_groups
from fxopt.passes.sparsify.low_rank import low_rank
from fxopt.passes.sparsify.methods import magnitude

TWO_OF_FOUR = Pattern.parse("2:4")


def layer(out: int = 48, columns: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight with columns of different sizes, and the second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator) * torch.rand(columns, generator=generator)
    x = torch.randn(200, columns // 2, generator=generator) @ torch.randn(columns // 2, columns, generator=generator)
    x = (x + torch.randn(200, columns, generator=generator)).double()
    return weight, x.t() @ x / 100


def error(change: Tensor, moments: Tensor) -> float:
    return float((change.double() @ moments).mul(change).sum())


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_low_rank_is_the_best_of_its_rank(shape: tuple[int, int]) -> None:
    """Equal to the truncated singular value decomposition of D H**(1/2), from an independent square root."""
    weight, moments = layer(*shape)
    sparse = magnitude(weight, TWO_OF_FOUR, 0).weight
    values, vectors = torch.linalg.eigh(moments)
    singular = torch.linalg.svdvals((weight - sparse).double() @ (vectors * values.clamp(min=0).sqrt()))
    for rank in (1, 7, 47):
        left, right = low_rank(weight, sparse, moments, rank)
        assert left.shape == (shape[0], rank) and right.shape == (rank, shape[1])
        left_over = error(weight - sparse - left @ right, moments)
        least = float(singular[rank:].square().sum())
        damped = (
            0 if shape[0] <= shape[1] else 0.01 * float(moments.diagonal().mean() * (weight - sparse).square().sum())
        )
        assert least * (1 - 1e-4) <= left_over <= least * (1 + 1e-4) + damped


def test_rank_nothing_is_nothing() -> None:
    weight, moments = layer()
    left, right = low_rank(weight, torch.zeros_like(weight), moments, 0)
    assert torch.equal(left @ right, torch.zeros_like(weight))
    with pytest.raises(ValueError, match="rank 49 of a weight 48x64: expected 0 to 48"):
        low_rank(weight, weight, moments, 49)
    with pytest.raises(ValueError, match="infinite or NaN"):
        low_rank(weight, weight, moments * float("nan"), 1)


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4"])
def test_armor_starts_at_the_normalised_mask(text: str) -> None:
    weight, moments = layer()
    pattern, h = Pattern.parse(text), moments.diagonal()
    start = armor(weight, moments, pattern, block=16, steps=0)
    normal = weight.double() / (torch.linalg.norm(weight.double(), dim=0) + 1e-5)
    normal /= torch.linalg.norm(normal, dim=1, keepdim=True) + 1e-5
    scores = normal.square() * h
    kept = pattern.mask(scores, 0)
    torch.testing.assert_close(start.dense(), weight * kept)
    assert start.losses == (pytest.approx(float(scores[~kept].sum() / scores.sum())),)


@pytest.mark.parametrize("text", ["2:4", "4:8"])
def test_armor_keeps_the_best(text: str) -> None:
    """Also where the rate is so high that the loss rises."""
    pattern = Pattern.parse(text)
    weight, moments = layer()
    for rate, falls in ((3e-3, True), (3.0, False)):
        found = armor(weight, moments, pattern, block=16, steps=60, learning_rate=rate)
        assert not pattern.violation(found.core)
        assert (found.losses[-1] < 0.8 * found.losses[0]) == falls
        normal, rows, columns = normalised(weight.double())
        change = found.dense().double() / columns / rows[:, None] - normal
        weights = moments.diagonal() / (normal.square() * moments.diagonal()).sum()
        assert float((change.square() * weights).sum()) == pytest.approx(min(found.losses), rel=1e-4)
        again = armor(weight, moments.diagonal(), pattern, block=16, steps=60, learning_rate=rate)
        assert torch.equal(again.core, found.core) and again.losses == found.losses


def test_the_exact_step_is_that_of_all_supports() -> None:
    """Against least squares for each of the six supports of one group of each block."""
    d, p, q = 8, 2, 3
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    left, right, target = random(p, d, d), random(q, d, d), random(p * d, q * d)
    h = random(q * d).square()
    kept = TWO_OF_FOUR.mask(random(p * d, q * d), 0)
    core = random(p * d, q * d) * kept
    before = core.clone()
    choice = torch.randint(d * d // 4, (p, q), generator=generator)
    solve_groups(left, core, right, kept, target, h, TWO_OF_FOUR, choice)
    assert torch.equal(core != 0, kept)
    full_left, full_right = torch.block_diag(*left), torch.block_diag(*right)
    for i in range(p):
        for j in range(q):
            row, start = i * d + int(choice[i, j]) // 2, j * d + int(choice[i, j]) % 2 * 4
            rows, columns = slice(i * d, i * d + d), slice(j * d, j * d + d)
            empty = before.clone()
            empty[row, start : start + 4] = 0
            wanted = ((target - full_left @ empty @ full_right) * h.sqrt())[rows, columns].flatten()
            found = []
            for support in combinations(range(4), 2):
                units = [
                    torch.outer(full_left[:, row], full_right[start + at] * h.sqrt())[rows, columns].flatten()
                    for at in support
                ]
                basis = torch.stack(units, 1)
                values = torch.linalg.lstsq(basis, wanted).solution
                found.append((float((wanted - basis @ values).square().sum()), support, values))
            _, support, values = min(found, key=lambda entry: entry[0])
            expected = torch.zeros(4, dtype=torch.float64)
            expected[list(support)] = values
            torch.testing.assert_close(core[row, start : start + 4], expected, rtol=1e-6, atol=1e-8)
            before[row, start : start + 4] = core[row, start : start + 4]
    assert torch.equal(core, before)  # nothing else has changed


def test_inputs_that_were_always_zero() -> None:
    weight, moments = layer()
    moments[:, :20] = moments[:20] = 0
    found = armor(weight, moments, TWO_OF_FOUR, block=16, steps=20)
    assert bool(torch.isfinite(found.dense()).all()) and min(found.losses) < found.losses[0]
    nothing = armor(weight, torch.zeros(64), TWO_OF_FOUR, block=16, steps=3)
    assert bool(torch.isfinite(nothing.dense()).all())
    assert armor(torch.zeros(16, 16), torch.ones(16), TWO_OF_FOUR, block=16, steps=3).losses[-1] == 0


@pytest.mark.parametrize(
    ("text", "block", "message"),
    [
        ("4x1", 16, "the sparse core of ARMOR is N:M with at most 100 choices, not 4x1"),
        ("8x2:4", 16, "not 8x2:4"),
        ("8:16", 16, "not 8:16"),
        ("2:4", 32, "blocks of 32: expected a divisor of 48 outputs and 64 inputs that is a multiple of 4"),
        ("2:4", 2, "multiple of 4"),
        ("3:5", 16, "64 inputs do not divide by the 5"),
    ],
)
def test_armor_refuses(text: str, block: int, message: str) -> None:
    weight, moments = layer()
    with pytest.raises(ValueError, match=message):
        armor(weight, moments, Pattern.parse(text), block=block, steps=1)
