"""Linears and 1x1 convolutions whose zeros are not stored: storage, definition, and what ONNX Runtime makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.backends.onnxruntime.forms import FORMS
from fxopt.frontends.onnx import load
from fxopt.frontends.to_onnx import to_onnx
from fxopt.ir.masks import marks, stale
from fxopt.ir.onnx.export import to_model
from fxopt.ir.ops.linear_sparse import conv_sparse, dense, linear_sparse, stored, stored_bytes
from fxopt.ir.packing import packed_width
from fxopt.ir.sparsity import Mark, Pattern
from fxopt.ir.views.weights import weight_of

OPS = {"linear_sparse": linear_sparse, "conv_sparse": conv_sparse}


@settings(max_examples=60, deadline=None)
@given(
    text=st.sampled_from(["2:4", "4:8", "8x2:4", "4x1", "1x1", "16x1"]), groups=st.integers(1, 3), runs=st.integers(1, 5),
    share=st.sampled_from([0.0, 0.3, 0.9, 1.0]), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)  # fmt: skip
def test_what_is_stored_comes_back(text: str, groups: int, runs: int, share: float, dtype: torch.dtype) -> None:
    pattern = Pattern.parse(text)
    weight = torch.randn(groups * pattern.outputs, runs * pattern.of, generator=torch.Generator().manual_seed(groups)).to(dtype)
    weight = weight * pattern.mask(weight.float().square(), share)
    values, mask = stored(weight, pattern)
    assert values.dtype == dtype and mask.dtype == torch.uint8
    assert mask.shape == (groups, packed_width(weight.shape[1], 1))
    again = dense(values, mask, weight.shape[1])
    assert again.dtype == dtype and torch.equal(again, weight)
    assert values.nbytes + mask.nbytes == stored_bytes(pattern, *weight.shape, pattern.zeros(weight), weight.itemsize)


def test_two_of_four_floats_take_53_percent() -> None:
    assert stored_bytes(Pattern.parse("2:4"), 128, 256, 0.5, 4) / (4 * 128 * 256) == 0.53125


def arguments() -> list[Any]:
    return [pytest.param(name, case, id=f"{name}-{case[5]}-{list(case[0].shape)}-{case[3] is not None}")
            for name, declared in OPS.items() for case in declared.sample_arguments()]  # fmt: skip


@pytest.mark.parametrize(("name", "case"), arguments())
def test_the_definition_is_a_dense_product_in_float64(name: str, case: tuple[Any, ...]) -> None:
    x, values, mask, bias, columns, pattern, *rest = case
    declared = OPS[name]
    rows = []
    for group, bits in enumerate(mask.tolist()):
        for output in range(values.shape[1]):
            row = torch.zeros(columns, dtype=torch.float64)
            place = sum(bin(byte).count("1") for earlier in mask.tolist()[:group] for byte in earlier)
            for column in range(columns):
                if bits[column // 8] >> column % 8 & 1:
                    row[column] = values[place, output]
                    place += 1
            rows.append(row)
    weight = torch.stack(rows)
    shift = None if bias is None else bias.double()
    if name == "linear_sparse":
        expected = torch.nn.functional.linear(x.double(), weight, shift)
    else:
        stride, pads = rest
        rank = len(stride)
        ordered = [pad for axis in reversed(range(rank)) for pad in (pads[axis], pads[axis + rank])]
        padded = torch.nn.functional.pad(x.double(), ordered)
        convolve = getattr(torch.nn.functional, f"conv{rank}d")
        expected = convolve(padded, weight.reshape(*weight.shape, *[1] * rank), shift, stride)
    found = declared(*case)
    assert found.dtype == x.dtype and torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4)
    with FakeTensorMode() as mode:
        fake = declared(*(mode.from_tensor(item) if isinstance(item, Tensor) else item for item in case))
    assert (fake.shape, fake.dtype) == (found.shape, found.dtype)
    cost = declared.cost_of(*case)
    positions = found.numel() // len(weight)
    assert cost.multiply_adds == positions * weight.numel() and cost.zeros is not None
    ((text, share),) = cost.zeros.shares
    assert (text, cost.zeros.rows) == (pattern, positions)
    assert share == pytest.approx(Pattern.parse(pattern).zeros(weight))


class Calls(torch.nn.Module):
    def __init__(self, name: str, case: tuple[Any, ...]) -> None:
        super().__init__()
        self.name, self.rest = name, case[4:]
        for name, value in zip(("values", "mask", "bias"), case[1:4], strict=True):
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return OPS[self.name](x, self.values, self.mask, self.bias, *self.rest)  # type: ignore[arg-type]


@pytest.mark.slow
def test_exported_one_to_one_with_marks_and_weights() -> None:
    """From PyTorch's exporter to a file of standard operators, whose decoded weight is recognised value by value."""
    case = next(iter(linear_sparse.sample_arguments()))
    graph, _ = to_onnx(Calls("linear_sparse", case).eval(), case[0])
    (node,) = graph.calls()
    assert node.target is linear_sparse.target and node.args[-1] == "2:4"
    weight = weight_of(graph, node)
    assert weight is not None and torch.equal(weight, dense(*case[1:3], case[4]))
    node.meta["sparsity"] = Mark.of(Pattern.parse("2:4"), weight)
    again = load(to_model(graph, FORMS))
    assert list(marks(again).values()) == [node.meta["sparsity"]] and not stale(again)
    (product,) = [node for node in again.calls() if "sparsity" in node.meta]
    decoded = weight_of(again, product)
    assert decoded is not None and torch.equal(decoded, weight)
