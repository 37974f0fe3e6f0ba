"""fxopt::attention_pattern: slices against the definition, in torch and in ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from fxopt.backends.onnxruntime.forms import FORMS
from fxopt.errors import InvalidInput
from fxopt.frontends.onnx import load
from fxopt.ir.onnx.export import to_model
from fxopt.ir.ops.attention_pattern import (
    BLOCK,
    EVER,
    Pattern,
    attention_pattern,
    blocks_seen,
    dense,
    diagonal,
    diagonals,
    nothing,
    seen,
    stripes,
)
from fxopt.ir.pattern_work import Tile, tiles_seen, work_of
from fxopt.ir.shapes import infer
from fxopt.ir.sliced_attention import sliced_attention, slices

CASES: list[list[Pattern]] = [
    [diagonal(20), diagonal(20), dense()],
    [diagonals(3, 50), nothing(), stripes(30, 60)],
    [diagonal(9, sink=4), diagonals(1, 10, sink=3), stripes(0, 5, 90)],
]


def operands(length: int, heads: int = 3, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, heads, length, 8, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("every", CASES)
def test_slices_give_what_the_definition_gives(every: list[Pattern]) -> None:
    q, k, v = operands(350)
    numbers = [number for pattern in every for number in pattern]
    exact = attention_pattern.function(*(x.double() for x in (q, k, v)), numbers, 0.4)
    plain = (attention_pattern.function(q, k, v, numbers, 0.4) - exact).abs().max()
    error = (sliced_attention(q, k, v, numbers, 0.4) - exact).abs().max()
    assert error <= 2 * plain + 1e-7


def test_declared_samples_in_slices() -> None:
    for arguments in attention_pattern.sample_arguments():
        torch.testing.assert_close(sliced_attention(*arguments), attention_pattern.function(*arguments))


def test_lists_of_blocks_hide_blocks() -> None:
    blocks = torch.zeros(1, 3, 3, dtype=torch.bool)
    blocks[0, 0, 0] = blocks[0, 2, 1] = True
    visible = seen(dense(), 150, blocks)
    assert visible[0, :64, :64].all() and visible[0, 128:, 64:128].all()
    assert int(visible.sum()) == 64 * 64 + 22 * 64
    assert slices(dense(), 150, blocks)[0].pairs < 150 * 150
    with pytest.raises(InvalidInput, match=r"blocks have shape \[1, 3, 3\]; expected \[1, 2, 2\]"):
        seen(dense(), 100, blocks)


def test_many_diagonals_are_one_band_after_renumbering() -> None:
    """Tokens by place instead of by frame: what is multiplied is near what is seen, not everything."""
    frames, height, width = 16, 16, 16
    length, frame = frames * height * width, height * width
    pattern = diagonals(32, frame)
    elements = float(seen(pattern, length).double().mean())
    assert elements == pytest.approx(65 / 256)
    frame_by_frame = blocks_seen(pattern, *(torch.arange(0, length, BLOCK)[:, None] + torch.tensor([[0, BLOCK - 1]]),) * 2)
    assert float(frame_by_frame[0].double().mean()) >= 0.75, "blocks of the tokens as they are"
    for tile in (None, Tile(BLOCK, BLOCK)):
        assert elements <= work_of(pattern, length, tile=tile).share <= 1.2 * elements


def onnx_model(length: int, heads: int) -> onnx.ModelProto:
    nodes = [helper.make_node("Add", ["q", "k"], ["s"]), helper.make_node("Add", ["s", "v"], ["y"])]
    sizes = ["batch", heads, length, 8]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name in "qkvy"]
    graph = helper.make_graph(nodes, "g", info[:3], info[3:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("every", CASES)
@pytest.mark.parametrize("with_blocks", [False, True])
def test_onnx_form(every: list[Pattern], with_blocks: bool) -> None:
    ort = pytest.importorskip("onnxruntime", reason="runs the written file")
    length = 300
    graph = load(onnx_model(length, len(every)))
    infer(graph)
    end = next(node for node in graph.calls() if node.name == graph.result_nodes[0].name)
    numbers = [number for pattern in every for number in pattern]
    taken = [node for node in graph.nodes if node.op == "placeholder"]
    blocks = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(2)) < 0.5
    listed = (graph.add_constant(blocks, "blocks", ("blocks",)),) if with_blocks else ()
    arguments = (*taken, numbers, 0.4, *listed)
    graph.replace(end, graph.call(attention_pattern.target, arguments, before=end, made_by="test", like=end))
    graph.prune()
    infer(graph)
    model = to_model(graph, FORMS)
    onnx.checker.check_model(model)
    q, k, v = operands(length)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: x.numpy() for name, x in zip("qkv", (q, k, v), strict=True)})[0]
    wanted = attention_pattern.function(q, k, v, numbers, 0.4, *([blocks] if with_blocks else []))
    np.testing.assert_allclose(found, wanted.numpy(), atol=2e-6)


@pytest.mark.parametrize("run", [attention_pattern, sliced_attention])
def test_wrong_patterns(run: Any) -> None:
    x = torch.zeros(1, 2, 70, 8)
    with pytest.raises(InvalidInput, match="1 patterns for 2 heads"):
        run(x, x, x, list(dense()), 1.0)
    with pytest.raises(InvalidInput, match=r"blocks have shape \[2, 1, 1\]; expected \[2, 2, 2\]"):
        run(x, x, x, [*dense(), *dense()], 1.0, torch.ones(2, 1, 1, dtype=torch.bool))


SMALL = st.integers(0, 40)
PATTERNS = st.one_of(
    st.just(dense()),
    st.just(nothing()),
    st.builds(diagonal, SMALL, SMALL),
    st.builds(diagonals, st.integers(0, 9), st.integers(1, 70), SMALL),
    st.builds(stripes, SMALL, SMALL, st.one_of(st.just(EVER), st.integers(1, 90)), SMALL),
    st.tuples(st.sampled_from([0, 1]), st.integers(-200, 200), st.integers(1, 200), SMALL, SMALL),
)
LENGTHS = st.one_of(st.sampled_from([0, 1, 63, 64, 65, 127, 128, 129, 192, 257]), st.integers(2, 300))


@settings(max_examples=60, deadline=None)
@given(every=st.lists(PATTERNS, min_size=1, max_size=4), length=LENGTHS, seed=st.none() | st.integers(0, 99))
def test_slices_of_any_patterns_are_the_masked_dense_attention(
    every: list[Pattern], length: int, seed: int | None
) -> None:
    """In float64, with and without lists of blocks; rows that see nothing are zero."""
    numbers = [number for pattern in every for number in pattern]
    q, k, v = operands(length, len(every), torch.float64)
    count, blocks = -(-length // BLOCK), None
    if seed is not None:
        blocks = torch.rand(len(every), count, count, generator=torch.Generator().manual_seed(seed)) < 0.5
    found = sliced_attention(q, k, v, numbers, 0.4, blocks)
    visible = seen(numbers, length, blocks)
    scores = (q @ k.transpose(-1, -2) * 0.4).masked_fill(~visible, float("-inf"))
    wanted = torch.nan_to_num(torch.softmax(scores, -1), nan=0.0) @ v
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert not found[:, ~visible.any(-1)].any()
    multiplied = work_of(numbers, length, blocks).share * len(every) * length**2
    assert round(multiplied) >= int(visible.sum()), "nothing that is seen is left out"


@settings(max_examples=60, deadline=None)
@given(pattern=PATTERNS, length=LENGTHS.filter(bool))
def test_blocks_are_skipped_only_where_nothing_is_seen(pattern: Pattern, length: int) -> None:
    starts = torch.arange(0, length, BLOCK)
    ends = torch.stack([starts, (starts + BLOCK - 1).clamp(max=length - 1)], 1)
    some, whole = blocks_seen(pattern, ends, ends)
    visible = seen(pattern, length)[0]
    for row, queries in enumerate(visible.split(BLOCK)):
        for column, part in enumerate(queries.split(BLOCK, 1)):
            assert bool(some[row, column]) or not part.any()
            assert not whole[row, column] or bool(part.all())


def test_heads_that_see_nothing_cost_nothing() -> None:
    q, k, v = operands(200)
    numbers = [*nothing(), *nothing(), *nothing()]
    assert work_of(numbers, 200).share == 0.0
    assert torch.equal(sliced_attention(q, k, v, numbers, 0.4), torch.zeros_like(q))
    assert torch.equal(attention_pattern(q, k, v, numbers, 0.4), torch.zeros_like(q))


@settings(max_examples=40, deadline=None)
@given(
    every=st.lists(PATTERNS, min_size=1, max_size=3),
    length=LENGTHS,
    seed=st.none() | st.integers(0, 99),
    pairs=st.integers(1, 9000),
)
def test_the_definition_is_the_same_in_rows(every: list[Pattern], length: int, seed: int | None, pairs: int) -> None:
    """Sequences of which not all pairs fit are computed some rows at a time."""
    numbers = [number for pattern in every for number in pattern]
    q, k, v = operands(length, len(every), torch.float64)
    count = -(-length // BLOCK)
    generator = torch.Generator().manual_seed(seed or 0)
    blocks = None if seed is None else torch.rand(len(every), count, count, generator=generator) < 0.5
    whole = attention_pattern.function(q, k, v, numbers, 0.4, blocks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxopt.ir.ops.attention_pattern._PAIRS", pairs)
        found = attention_pattern.function(q, k, v, numbers, 0.4, blocks)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    every=st.lists(PATTERNS, min_size=1, max_size=4),
    length=LENGTHS.filter(bool),
    tile=st.builds(Tile, st.sampled_from([16, 32, 64]), st.sampled_from([16, 32, 64])),
)
def test_tiles_cover_what_is_seen(every: list[Pattern], length: int, tile: Tile) -> None:
    """The work in tiles is at least that of the pairs that are seen, and no more than everything."""
    numbers = [number for pattern in every for number in pattern]
    found = work_of(numbers, length, tile=tile)
    pairs = (-(-length // tile.queries) * tile.queries) * (-(-length // tile.keys) * tile.keys)
    visible = seen(numbers, length)
    assert found.share * pairs * len(every) >= int(visible.sum()) - 1e-6
    assert found.share <= 1.0 and found.calls == 1
    for head, pattern in enumerate(every):
        tiles = tiles_seen(pattern, length, tile)
        u = torch.arange(length)
        order = u % tiles.frames * tiles.frame + u // tiles.frames
        own = visible[head][order][:, order]
        rows = [part.any(0) for part in own.split(tile.queries)]
        wanted = torch.stack([torch.stack([part.any() for part in row.split(tile.keys)]) for row in rows])
        assert not (wanted & ~tiles.some).any()


def test_tiles_take_no_lists_of_blocks() -> None:
    with pytest.raises(InvalidInput, match="kernels that take tiles have no lists of blocks"):
        work_of(dense(), 128, torch.ones(1, 2, 2, dtype=torch.bool), Tile(64, 64))


def test_the_cost_counts_copies_and_what_lists_leave_out() -> None:
    q = torch.zeros(2, 1, 256, 8)
    plain = attention_pattern.cost_of(q, q, q, list(diagonal(8)), 0.4)
    assert plain.bytes == 4 * q.nbytes
    renumbered = attention_pattern.cost_of(q, q, q, list(diagonals(0, 64)), 0.4)
    assert renumbered.bytes == 4 * q.nbytes + 2 * 4 * q.nbytes, "q, k, v and the result are read and written"
    joined = attention_pattern.cost_of(q, q, q, list(diagonal(8, sink=4)), 0.4)
    (group,) = slices(diagonal(8, sink=4), 256)
    copied = sum(high - low for piece in group.pieces if len(piece.ranges) > 1 for low, high in piece.ranges)
    assert copied and joined.bytes == 4 * q.nbytes + 2 * 2 * copied * q.nbytes / 256
    blocks = torch.eye(4, dtype=torch.bool)[None]
    listed = attention_pattern.cost_of(q, q, q, list(dense()), 0.4, blocks)
    whole = attention_pattern.cost_of(q, q, q, list(dense()), 0.4)
    assert listed.bytes == whole.bytes + blocks.numel()
    assert listed.flops == whole.flops / 2, "of 128 queries the keys of two blocks"
    unknown = attention_pattern.cost_of(q, q, q, list(dense()), 0.4, blocks.to("meta"))
    assert unknown.flops == whole.flops
