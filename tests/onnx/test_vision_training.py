"""Regions, deformable convolution, optimizer steps and random numbers, against ONNX Runtime or the formulas."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto

from fxopt.errors import InvalidInput, MissingReference
from fxopt.ir.onnx.op import OnnxOp
from tests.onnx.one_node import assert_same, by_runtime, by_torch, feeds_of, model_of

F32 = np.float32
TRAINING = "ai.onnx.preview.training"


def uniform(low: float, high: float, *shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).uniform(low, high, shape).astype(F32)


def compare(op_type: str, opset: int, inputs: list[Any], rtol: float = 0.0, **attributes: Any) -> None:
    model = model_of(op_type, opset, inputs, 1, attributes)
    assert_same(by_torch(model, feeds_of(inputs)), by_runtime(model, feeds_of(inputs)), rtol, rtol)


# ---- boxes and regions


@pytest.mark.parametrize("opset", [10, 11])
@pytest.mark.parametrize("centre", [0, 1])
@pytest.mark.parametrize("limit", [None, 0.4])
@pytest.mark.parametrize("most", [3, 100])
def test_non_max_suppression(opset: int, centre: int, limit: float | None, most: int) -> None:
    boxes = uniform(0, 1, 2, 30, 4, seed=1)
    scores = np.round(uniform(0, 1, 2, 3, 30, seed=2), 1)  # with ties
    inputs = [boxes, scores, np.array([most]), np.array([0.3], F32)]
    compare("NonMaxSuppression", opset, [*inputs, np.array([limit], F32)] if limit else inputs, center_point_box=centre)


def test_non_max_suppression_without_a_number_of_boxes() -> None:
    result = OnnxOp("", "NonMaxSuppression", 11)(torch.rand(1, 4, 4), torch.rand(1, 1, 4))
    assert (tuple(result.shape), result.dtype) == ((0, 3), torch.int64)


ROIS = np.array([[0, 0, 7, 7], [2.3, 1.7, 6.1, 8.9], [-3, -3, 2, 2], [5, 5, 30, 30], [4, 4, 4.2, 4.3]], F32)
BATCH = np.array([0, 1, 1, 0, 1])
IMAGE = uniform(-1, 1, 2, 3, 10, 12)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize(
    ("opset", "attributes"),
    [
        (10, {}),
        (16, {"coordinate_transformation_mode": "half_pixel"}),
        (16, {"coordinate_transformation_mode": "output_half_pixel"}),
    ],
)
def test_roi_align(mode: str, ratio: int, opset: int, attributes: Any) -> None:
    attributes = {**attributes, "output_height": 3, "output_width": 2, "sampling_ratio": ratio, "spatial_scale": 0.8}
    compare("RoiAlign", opset, [IMAGE, ROIS, BATCH], 2e-5, mode=mode, **attributes)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_max_roi_pool(scale: float) -> None:
    rois = np.concatenate([BATCH[:4, None].astype(F32), np.round(ROIS[:4])], 1)
    rois[2, 1:] = [1, 2, 3, 9]
    compare("MaxRoiPool", 1, [IMAGE, rois], pooled_shape=[3, 2], spatial_scale=scale)


# ---- convolution


@pytest.mark.parametrize("group", [1, 2])
def test_deform_conv_without_offsets_is_a_convolution(group: int) -> None:
    x, weight, bias = torch.rand(2, 4, 7, 6), torch.rand(6, 4 // group, 3, 2), torch.rand(6)
    strides, dilations = [2, 1], [1, 2]
    expected = F.conv2d(F.pad(x, [1, 0, 0, 1]), weight, bias, strides, 0, dilations, group)
    offset = torch.zeros(2, 2 * 6 * 2, *expected.shape[2:])
    op = OnnxOp("", "DeformConv", 19)
    options = {"strides": strides, "dilations": dilations, "pads": [0, 1, 1, 0], "group": group, "offset_group": 2}
    torch.testing.assert_close(op(x, weight, offset, bias, **options), expected)
    masked = op(x, weight, offset, None, torch.full((2, 2 * 6, *expected.shape[2:]), 0.5), **options)
    torch.testing.assert_close(masked, (expected - bias.reshape(-1, 1, 1)) / 2)


def test_deform_conv_moves_by_its_offset() -> None:
    """An offset of one row and half a column, in one and three dimensions too."""
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    offset = torch.stack([torch.ones(3, 3), torch.full((3, 3), 0.5)]).unsqueeze(0)
    weight = torch.ones(1, 1, 1, 1)
    y = OnnxOp("", "DeformConv", 19)(x[..., :3, :3].contiguous(), weight, offset)
    assert y[0, 0].tolist() == [[4.5, 5.5, 3.0], [8.5, 9.5, 5.0], [0.0, 0.0, 0.0]]
    line = OnnxOp("", "DeformConv", 19)(x[0, :, 0].unsqueeze(0), torch.ones(1, 1, 1), torch.full((1, 1, 4), 0.25))
    assert line[0, 0].tolist() == [0.25, 1.25, 2.25, 2.25]
    cube = torch.rand(1, 2, 3, 4, 5)
    kernel = torch.rand(3, 2, 2, 2, 2)
    expected = F.conv3d(cube, kernel)
    still = OnnxOp("", "DeformConv", 19)(cube, kernel, torch.zeros(1, 24, *expected.shape[2:]))
    torch.testing.assert_close(still, expected)


def test_deform_conv_equals_onnxruntime() -> None:
    x, weight = uniform(-1, 1, 1, 2, 6, 6), uniform(-1, 1, 2, 2, 3, 3, seed=1)
    offset, mask = uniform(-2, 2, 1, 18, 4, 4, seed=2), uniform(0, 1, 1, 9, 4, 4, seed=3)
    inputs = [x, weight, offset, np.zeros(2, F32), mask]
    model = model_of("DeformConv", 19, inputs, 1, {"kernel_shape": [3, 3]})
    try:
        expected = by_runtime(model, feeds_of(inputs))
    except Exception:
        pytest.skip("this ONNX Runtime has no DeformConv")
    assert_same(by_torch(model, feeds_of(inputs)), expected, 1e-5, 1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_col2im_is_the_transpose_of_cutting_blocks(rank: int) -> None:
    """<col2im(c), x> = <c, im2col(x)>, where a block is cut by hand."""
    size, block, steps, gaps, pads = (
        [5, 6, 4][:rank],
        [2, 3, 2][:rank],
        [2, 1, 1][:rank],
        [1, 2, 1][:rank],
        [1, 0, 1][:rank],
    )
    x = torch.rand(1, 2, *size, dtype=torch.float64)
    padded = F.pad(x, [pad for low in reversed(pads) for pad in (low, low)])
    spans = [gap * (length - 1) + 1 for gap, length in zip(gaps, block, strict=True)]
    parts = padded
    for axis, (span, step) in enumerate(zip(spans, steps, strict=True)):
        parts = parts.unfold(2 + axis, span, step)
    counts = parts.shape[2 : 2 + rank]
    for axis, gap in enumerate(gaps):
        parts = parts.index_select(2 + rank + axis, torch.arange(0, spans[axis], gap))
    order = [0, 1, *range(2 + rank, 2 + 2 * rank), *range(2, 2 + rank)]
    cut = parts.permute(order).reshape(1, 2 * int(np.prod(block)), int(np.prod(counts)))
    columns = torch.rand_like(cut)
    image = OnnxOp("", "Col2Im", 18)(
        columns, np.array(size), np.array(block), strides=steps, dilations=gaps, pads=[*pads, *pads]
    )
    assert image.shape == x.shape
    torch.testing.assert_close((image * x).sum(), (columns * cut).sum())


def test_mel_weight_matrix_equals_onnxruntime() -> None:
    inputs = [np.array(8), np.array(16), np.array(8192), np.array(0, F32), np.array(8192 / 2, F32)]
    compare("MelWeightMatrix", 17, inputs, 1e-6)


# ---- optimizer steps


def step(op_type: str, rate: float, count: int, *tensors: torch.Tensor, outputs: int, **attributes: Any) -> Any:
    op = OnnxOp(TRAINING, op_type, 1)
    return op(torch.tensor(rate), torch.tensor(count), *tensors, _outputs=outputs, **attributes)


def test_adam_equals_torch() -> None:
    """torch adds epsilon after the correction of the bias, so it is zero here."""
    x = torch.nn.Parameter(torch.rand(5))
    optimizer = torch.optim.Adam([x], 0.1, betas=(0.9, 0.999), eps=0.0)
    ours, mean, square = x.detach().clone(), torch.zeros(5), torch.zeros(5)
    for count in range(1, 5):
        x.grad = torch.rand(5)
        optimizer.step()
        ours, mean, square = step("Adam", 0.1, count, ours, x.grad, mean, square, outputs=3, epsilon=0.0)
        torch.testing.assert_close(ours, x.detach())


def test_adagrad_equals_torch() -> None:
    x = torch.nn.Parameter(torch.rand(5))
    optimizer = torch.optim.Adagrad([x], 0.1, lr_decay=0.01, weight_decay=0.1, eps=1e-6)
    ours, total = x.detach().clone(), torch.zeros(5)
    for count in range(4):
        x.grad = torch.rand(5)
        optimizer.step()
        ours, total = step(
            *("Adagrad", 0.1, count, ours, x.grad, total), outputs=2, decay_factor=0.01, norm_coefficient=0.1
        )
        torch.testing.assert_close(ours, x.detach())


@pytest.mark.parametrize("mode", ["standard", "nesterov"])
def test_momentum_equals_torch(mode: str) -> None:
    x = torch.nn.Parameter(torch.rand(5))
    optimizer = torch.optim.SGD([x], 0.1, momentum=0.9, weight_decay=0.1, nesterov=mode == "nesterov")
    ours, velocity = x.detach().clone(), torch.zeros(5)
    for count in range(4):
        x.grad = torch.rand(5)
        optimizer.step()
        ours, velocity = step(
            *("Momentum", 0.1, count, ours, x.grad, velocity), outputs=2, alpha=0.9, beta=1.0, mode=mode,
            norm_coefficient=0.1,
        )  # fmt: skip
        torch.testing.assert_close(ours, x.detach())


def test_the_first_step_of_momentum_ignores_beta() -> None:
    attributes: dict[str, Any] = {"alpha": 0.5, "beta": 0.25, "mode": "standard", "norm_coefficient": 0.0}
    one = torch.ones(1)
    assert step("Momentum", 1.0, 0, one, one, one, outputs=2, **attributes)[1].item() == 1.5
    assert step("Momentum", 1.0, 1, one, one, one, outputs=2, **attributes)[1].item() == 0.75


def test_several_variables_are_optimized_one_by_one() -> None:
    x, y, g, h = (torch.full((2,), value) for value in (1.0, 2.0, 3.0, 4.0))
    state = torch.zeros(2)
    joint = step("Adagrad", 0.1, 0, x, y, g, h, state, state, outputs=4)
    alone = [step("Adagrad", 0.1, 0, a, b, state, outputs=2) for a, b in ((x, g), (y, h))]
    for index, expected in enumerate([alone[0][0], alone[1][0], alone[0][1], alone[1][1]]):
        assert torch.equal(joint[index], expected)


# ---- random numbers


def test_a_seed_fixes_random_numbers() -> None:
    for op_type, inputs, attributes in [
        ("RandomNormal", [], {"shape": [50]}),
        ("RandomUniform", [], {"shape": [50]}),
        ("Bernoulli", [torch.full((50,), 0.5)], {}),
        ("Multinomial", [torch.zeros(1, 9)], {"sample_size": 50}),
        ("RandomNormalLike", [torch.zeros(50)], {}),
    ]:
        op = OnnxOp("", op_type, 22)
        assert torch.equal(op(*inputs, **attributes, seed=3.0), op(*inputs, **attributes, seed=3.0))
        assert not torch.equal(op(*inputs, **attributes), op(*inputs, **attributes))
        torch.manual_seed(0)
        once = op(*inputs, **attributes)
        torch.manual_seed(0)
        assert torch.equal(op(*inputs, **attributes), once)


def test_distributions() -> None:
    size = 40000
    normal = OnnxOp("", "RandomNormal", 22)(shape=[size], mean=2.0, scale=3.0, seed=0.0)
    assert abs(normal.mean() - 2) < 5 * 3 / size**0.5
    assert abs(normal.std() - 3) < 5 * 3 / (2 * size) ** 0.5
    flat = OnnxOp("", "RandomUniform", 22)(shape=[size], low=-1.0, high=3.0, seed=0.0, dtype=TensorProto.DOUBLE)
    assert (flat.dtype, bool((flat >= -1).all()), bool((flat < 3).all())) == (torch.float64, True, True)
    assert abs(flat.mean() - 1) < 5 * 4 / 12**0.5 / size**0.5
    coin = OnnxOp("", "Bernoulli", 22)(torch.full((size,), 0.2), dtype=TensorProto.BOOL, seed=0.0)
    assert abs(coin.double().mean() - 0.2) < 5 * 0.4 / size**0.5
    dice = OnnxOp("", "Multinomial", 22)(torch.tensor([[0.5, 0.3, 0.2]]).log() + 7, sample_size=size, seed=0.0)
    shares = torch.bincount(dice[0], minlength=3) / size
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.2]), atol=5 * 0.5 / size**0.5)
    assert dice.dtype == torch.int32


def test_dropout_in_training() -> None:
    x = torch.rand(200, 50) + 1
    for opset in (12, 22):
        y, mask = OnnxOp("", "Dropout", opset)(x, torch.tensor(0.25), torch.tensor(True), seed=1, _outputs=2)
        assert torch.equal(y, torch.where(mask, x / 0.75, 0.0))
        assert abs(mask.double().mean() - 0.75) < 5 * 0.433 / x.numel() ** 0.5


# ---- images


def test_image_decoder_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingReference, match="pip install pillow"):
        OnnxOp("", "ImageDecoder", 20)(torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(InvalidInput, match="pixel_format 'CMYK' given"):
        OnnxOp("", "ImageDecoder", 20)(torch.zeros(4, dtype=torch.uint8), pixel_format="CMYK")


def test_image_decoder_asks_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    class Image:
        def convert(self, mode: str) -> Any:
            pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
            return pixels if mode == "RGB" else pixels[:, :, 0]

    def open_image(file: Any) -> Image:
        if file.read() != b"\1\2":
            raise OSError("cannot identify image file")
        return Image()

    module = types.ModuleType("PIL.Image")
    module.open = open_image  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "PIL", types.ModuleType("PIL"))
    monkeypatch.setitem(sys.modules, "PIL.Image", module)
    op, content = OnnxOp("", "ImageDecoder", 20), torch.tensor([1, 2], dtype=torch.uint8)
    assert op(content)[0, 0].tolist() == [0, 1, 2]
    assert op(content, pixel_format="BGR")[0, 0].tolist() == [2, 1, 0]
    assert tuple(op(content, pixel_format="Grayscale").shape) == (2, 2, 1)
    assert tuple(op(content[:1]).shape) == (0, 0, 3)
