"""The same calls on a GPU, where there is one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'fxopt[triton]'")

from fxopt.backends.triton.cuda_graphs import Replays
from tests.backends.triton.cases import Case, all_cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("case", list(all_cases()), ids=lambda case: case.name)
def test_kernel(case: Case) -> None:
    assert case.error("cuda") <= case.room


def test_replays_give_what_the_function_gives() -> None:
    replays = Replays(lambda inputs: [inputs[0] @ inputs[0], inputs[0] + 1])
    for size in (8, 16, 8):
        x = torch.randn(size, size, device="cuda")
        first, second = replays([x])
        torch.testing.assert_close(first, x @ x)
        assert torch.equal(second, x + 1)
