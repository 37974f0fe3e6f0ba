"""The memory plan never gives two values that live together the same bytes; views know their strides."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.backends.tvm.memory import ALIGNMENT, Life, plan
from fxopt.backends.tvm.values import is_dense, row_major

LIVES = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 20), st.integers(0, 20)).map(
        lambda t: Life(t[0], min(t[1:]), max(t[1:]))
    ),
    max_size=30,
)


@given(LIVES)
@settings(deadline=None, max_examples=200)
def test_values_that_live_together_do_not_overlap(lives: list[Life]) -> None:
    offsets, size = plan(lives)
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    assert all(offset + life.size <= size for offset, life in zip(offsets, lives, strict=True))
    for i, (a, at) in enumerate(zip(lives, offsets, strict=True)):
        for b, bt in zip(lives[:i], offsets[:i], strict=True):
            assert not a.meets(b) or at + a.size <= bt or bt + b.size <= at


@given(LIVES)
@settings(deadline=None, max_examples=100)
def test_the_plan_is_no_larger_than_separate_memory(lives: list[Life]) -> None:
    _, size = plan(lives)
    assert size <= sum(-(-life.size // ALIGNMENT) * ALIGNMENT for life in lives)


@given(st.lists(st.integers(1, 5), max_size=5).map(tuple))
def test_row_major_strides_are_dense(shape: tuple[int, ...]) -> None:
    assert is_dense(shape, row_major(shape))
    if len([size for size in shape if size > 1]) > 1:
        assert not is_dense(shape, row_major(shape[::-1])[::-1])
