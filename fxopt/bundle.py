"""Several compiled functions in one folder: `encode` and `decode` of a model, with the weights that they share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fxopt.errors import Unsupported, unknown
from fxopt.ir.folders import check_folder, write_folder

if TYPE_CHECKING:
    from fxopt.api import Optimized


def bundle(
    functions: Mapping[str, Optimized], path: str | os.PathLike[str], *, name: str = "model", weights: str = "embedded"
) -> str:
    """Write results of `optimize` for one compiled target (WebAssembly, ARM) as one library; returns what was verified.

    Weights that are equal are stored once. In JavaScript the functions are `model.functions.NAME.run`, in Python
    `load()` gives a dict of them, in C their names begin with that of the bundle.

    Args:
        functions: by name; each name becomes part of a C identifier.
        path: of the folder.
        name: of the library.
        weights: "embedded" in the library, or "external" in a file beside it.

    Raises:
        InvalidOption: there are no functions, or they are for different targets.
        UnknownName: there is no such place for weights.
        Unsupported: a function was not compiled, or has open dimensions.
        OutputError: the folder cannot be written.
    """
    from fxopt.artifact import with_reports
    from fxopt.backends.tvm.backend import PLACES
    from fxopt.backends.tvm.executable import TvmExecutable
    from fxopt.backends.tvm.package import joined
    from fxopt.backends.tvm.verify import verify

    if weights not in PLACES:
        raise unknown("place of weights", weights, PLACES)
    outcomes = {key: result._ready for key, result in functions.items()}
    packages = {}
    for key, outcome in outcomes.items():
        if not isinstance(outcome.executable, TvmExecutable):
            raise Unsupported(
                f"function {key!r} runs in {outcome.executable.executed_on}; a bundle takes results that were compiled"
            )
        packages[key] = outcome.executable.closed()
    check_folder(Path(path))
    whole = joined(packages, name, embedded=weights == "embedded")
    try:
        verified = verify(whole, {})
        write_folder(Path(path), lambda folder: with_reports(outcomes, folder, whole.write(folder)))
    finally:
        whole.close()
    return verified
