"""The fxopt operators that have kernels, over their own samples, against their definitions.

Sums of codes are exact; rounding to levels is done in float32, so a value within 1e-4 of the middle between two levels
may become either of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxopt.cost_model.targets import get_target
from fxopt.frontends.torch_export import load
from fxopt.ir.op import all_ops
from tests.backends.tvm import harness

from fxopt.backends.tvm import Tvm  # isort: skip
from fxopt.backends.tvm import qemu  # isort: skip
from fxopt.backends.tvm.runners import runner_of  # isort: skip

__all__ = ["harness"]
LEVELS = ("conv_w8a8", "add_a8", "mul_a8", "concat_a8", "global_average_pool_a8", "average_pool_a8")
OPERATORS = ("linear_w8a8", "linear_w8a8_dynamic", "linear_nbits", "embedding_w8", *LEVELS)
INPUTS = {"add_a8": (0, 1), "mul_a8": (0, 1), "embedding_w8": (2,)}  # which arguments are computed at run time; else 0


class Samples(nn.Module):
    """Calls an operator on all its samples; what is not computed at run time is a constant."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.operator = all_ops()[name]
        self.samples = [list(sample) for sample in self.operator.sample_arguments()]
        self.inputs: list[Tensor] = []
        for index, sample in enumerate(self.samples):
            for place, argument in enumerate(sample):
                if isinstance(argument, Tensor) and place not in INPUTS.get(name, (0,)):
                    self.register_buffer(f"constant_{index}_{place}", argument)
                elif isinstance(argument, Tensor):
                    self.inputs.append(argument)
                elif isinstance(argument, list) and isinstance(argument[0], Tensor):
                    self.inputs += argument

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Every result."""
        rest, results = list(given), []
        for index, sample in enumerate(self.samples):
            arguments = []
            for place, argument in enumerate(sample):
                if isinstance(argument, Tensor):
                    constant = getattr(self, f"constant_{index}_{place}", None)
                    arguments.append(rest.pop(0) if constant is None else constant)
                elif isinstance(argument, list) and isinstance(argument[0], Tensor):
                    arguments.append([rest.pop(0) for _ in argument])
                else:
                    arguments.append(argument)
            results.append(self.operator(*arguments))
        return tuple(results)


def compared(name: str, found: list[Tensor], model: Samples) -> None:
    """With the definition, in float32 and in float64."""
    with torch.no_grad():
        wanted = model(*model.inputs)
    assert len(found) == len(wanted)
    for index, (ours, best) in enumerate(zip(found, wanted, strict=True)):
        assert ours.shape == best.shape
        if not best.numel():
            continue
        error = (ours - best).abs()
        if name in LEVELS:
            scale = model.samples[index][-2 if name != "conv_w8a8" else 6]
            assert float(error.max()) <= 1.001 * scale
            assert int((error > 0.5 * scale).sum()) <= 1e-3 * best.numel()  # the others are the same code
        else:
            assert float(error.max()) <= 1e-6 * float(best.abs().max())


def arrays(model: Samples) -> list[np.ndarray[Any, Any]]:
    return [np.ascontiguousarray(x.numpy()) for x in model.inputs]


def run(name: str, target: str) -> None:
    """Every build: for WebAssembly there are two."""
    model = Samples(name).eval()
    executable: Any = Tvm().compile(load(model, tuple(model.inputs)), get_target(target))
    builds = executable.package.builds
    for build in builds if target.startswith("wasm") else ():
        found = runner_of(build, executable.package.name).run(build.entries[0].to_json(), arrays(model))
        compared(name, list(map(torch.from_numpy, found)), model)
    compared(name, executable.run(model.inputs), model)
    executable.close()


@pytest.mark.parametrize("name", ["linear_w8a8", "conv_w8a8", "linear_nbits"])
def test_on_this_machine(name: str) -> None:
    harness.machine("host")
    run(name, "host")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["host", "wasm", "x86-avx2"])
@pytest.mark.parametrize("name", OPERATORS)
def test_everywhere(name: str, target: str) -> None:
    harness.machine(target)
    run(name, target)


@pytest.mark.slow
@pytest.mark.skipif(bool(qemu.missing()), reason=qemu.missing() or "qemu is here")
@pytest.mark.parametrize("target", harness.EMULATED)
@pytest.mark.parametrize("name", OPERATORS)
def test_on_arm(name: str, target: str, tmp_path: Path) -> None:
    model = Samples(name).eval()
    executable: Any = Tvm().compile(load(model, tuple(model.inputs)), get_target(target))
    (build,) = executable.package.builds
    found, _ = qemu.run_entry(build, build.entries[0], arrays(model), tmp_path)
    compared(name, list(map(torch.from_numpy, found)), model)


class Chain(nn.Module):
    """Linears, convolutions and sums on one another's levels, and what floats take from between them.

    The scales have no ratios of small numbers: few sums lie in the middle between two levels.
    """

    def __init__(self, largest: int) -> None:
        super().__init__()
        all_ops()
        generator = torch.Generator().manual_seed(largest)

        def codes(*shape: int) -> Tensor:
            return torch.randint(-largest, largest + 1, shape, generator=generator, dtype=torch.int8)

        for name, shape in (
            ("first", (8, 3, 3, 3)),
            ("deep", (8, 1, 3, 3)),
            ("point", (12, 8, 1, 1)),
            ("up", (24, 12)),
        ):
            self.register_buffer(f"{name}_codes", codes(*shape))
            scales = torch.rand(shape[0], generator=generator) * 0.01 + 2e-3
            self.register_buffer(f"{name}_scales", scales)
            self.register_buffer(f"{name}_bias", torch.randn(shape[0], generator=generator))
        self.register_buffer("down_codes", codes(5, 24))
        self.register_buffer("down_scales", torch.rand(5, generator=generator) * 0.01 + 1e-3)
        self.register_buffer("factors", torch.rand(24, generator=generator) + 0.5)

    def layer(self, name: str) -> tuple[Any, Any, Any]:
        return tuple(getattr(self, f"{name}_{part}") for part in ("codes", "scales", "bias"))  # type: ignore[return-value]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Ends in floats, and in a value on levels."""
        ones, around = [1, 1], [1, 1, 1, 1]
        x = torch.ops.fxopt.conv_w8a8(x, *self.layer("first"), 0.0317, 120, 0.0613, 110, [2, 2], around, ones, 1)
        y = torch.ops.fxopt.conv_w8a8(x, *self.layer("deep"), 0.0613, 110, 0.0497, 0, ones, around, ones, 8)
        x = torch.ops.fxopt.add_a8(x, y, 0.0613, 110, 0.0497, 0, 0.0831, 100)
        x = torch.ops.fxopt.conv_w8a8(x, *self.layer("point"), 0.0831, 100, 0.0707, 128, ones, [0] * 4, ones, 1)
        mean = torch.ops.fxopt.global_average_pool_a8(x, False, 0.0707, 128, 0.0203, 128)
        z = torch.nn.functional.gelu(torch.ops.fxopt.linear_w8a8(mean, *self.layer("up"), 0.0203, 128)) * self.factors
        z = torch.ops.fxopt.linear_w8a8(z, self.down_codes, self.down_scales, None, 0.0203, 40)
        return z, torch.nn.functional.max_pool2d(x, 2)


@pytest.mark.slow
@pytest.mark.parametrize("largest", [127, 63])
@pytest.mark.parametrize("target", ["host", "wasm", "x86-avx2"])
def test_values_stay_codes_between_layers(target: str, largest: int) -> None:
    harness.machine(target)
    model = Chain(largest).eval()
    x = torch.randn(2, 3, 13, 11, generator=torch.Generator().manual_seed(0))
    graph = load(model, (x,))
    executable: Any = Tvm().compile(graph, get_target(target))
    kinds = [step.split("_", 2)[2].split(" ")[0] for step in executable.steps]
    assert kinds.count("conv_int8") == 2 and kinds.count("depthwise") == 1
    rounded = [step for step in executable.steps if "_pointwise (" in step]
    # the input alone: the others take codes as they are, unless their weights need another instruction than most
    expected = 3 if largest == 127 and target == "x86-avx2" else 1
    assert sum("conv_w8a8" in why for why in rounded) == expected
    with torch.no_grad():
        wanted = model(x)
    found = executable.run([x])
    assert float((found[0] - wanted[0]).abs().max()) <= 0.02 * float(wanted[0].abs().max())  # a level more or less
    assert float((found[1] - wanted[1]).abs().max()) <= 0.0708
    assert float(((found[1] - wanted[1]).abs() > 0.01).float().mean()) < 0.01


class Sparse(nn.Module):
    """A linear and a 1 x 1 convolution of codes of which most blocks are zero."""

    def __init__(self, kept: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("linear", (96, 64)), ("point", (64, 48, 1, 1))):
            codes = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
            keep = torch.rand(shape[0] // 32, *shape[1:], generator=generator) < kept
            self.register_buffer(f"{name}_codes", codes * keep.repeat_interleave(32, 0))
            self.register_buffer(f"{name}_scales", torch.rand(shape[0], generator=generator) * 0.01 + 1e-3)
            self.register_buffer(f"{name}_bias", torch.randn(shape[0], generator=generator))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Both results."""
        linear, conv = (all_ops()[name] for name in ("linear_w8a8", "conv_w8a8"))
        levels = (0.0317, 120, 0.0613, 110, [1, 1], [0] * 4, [1, 1], 1)
        return (
            linear(x, self.linear_codes, self.linear_scales, self.linear_bias, *levels[:2]),
            conv(y, self.point_codes, self.point_scales, self.point_bias, *levels),
        )


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0.1, 0.9])
@pytest.mark.parametrize("target", ["host", "wasm", "x86-avx2"])
def test_sparse_codes_are_skipped_where_that_is_faster(target: str, kept: float) -> None:
    harness.machine(target)
    model, generator = Sparse(kept).eval(), torch.Generator().manual_seed(1)
    x = torch.randn(9, 64, generator=generator), torch.randn(2, 48, 7, 9, generator=generator)
    executable: Any = Tvm().compile(load(model, x), get_target(target))
    kinds = [step.split("_", 2)[2].split(" ")[0] for step in executable.steps]
    conv = "conv_bsr_int8" if target == "wasm" else "conv"
    assert ("bsr_int8" in kinds, conv in kinds) == ((True, True) if kept < 0.5 else (False, False))
    with torch.no_grad():
        wanted = model(*x)
    found = executable.run(x)
    assert float((found[0] - wanted[0]).abs().max()) <= 1e-6 * float(wanted[0].abs().max())
    assert float((found[1] - wanted[1]).abs().max()) <= 0.0614  # a level
    assert int(((found[1] - wanted[1]).abs() > 0.03).sum()) <= 2
