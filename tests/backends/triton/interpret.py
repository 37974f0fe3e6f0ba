"""Run all cases in Triton's interpreter, which a process is from its start or never; print their errors as JSON.

    TRITON_INTERPRET=1 python -m tests.backends.triton.interpret
"""

from __future__ import annotations

import json
import time

import torch

from fxopt.backends.triton import library
from tests.backends.triton.cases import all_cases


def main() -> None:
    """name -> [error, room, seconds], or the text of an exception."""
    assert library.interprets()
    torch.set_num_threads(1)
    found: dict[str, object] = {}
    for case in all_cases():
        begin = time.perf_counter()
        try:
            found[case.name] = [case.error(), case.room, round(time.perf_counter() - begin, 3)]
        except Exception as error:
            found[case.name] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
