"""Hardware as data: one file per target, its name the file's stem with `-` for `_`.

Figures of a file are of the vendor's data sheet or measured, and `source` says which; `error` says how far off
predictions were on operators that were not used for the fit, or "never measured".
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from fxopt.errors import unknown
from fxopt.ir.target import Target

ALIASES = {"wasm": "wasm-simd", "wasm-relaxed-simd": "wasm-relaxed"}  # other names of targets


def target_names() -> list[str]:
    """The names of all targets of this package, sorted."""
    return sorted(info.name.replace("_", "-") for info in pkgutil.iter_modules(__path__))


def get_target(name: str) -> Target:
    """The target of this name in this package (`fxopt.catalog.find_target` knows those of plug-ins, too).

    Dashes and underscores are the same; `host` is detected.

    Raises:
        UnknownName: there is none; near names are suggested.
    """
    kebab = canonical(name)
    if kebab not in target_names():
        raise unknown("target", name, target_names())
    found: Target | Callable[[], Target]
    found = importlib.import_module(f"{__name__}.{kebab.replace('-', '_')}").TARGET
    return found if isinstance(found, Target) else found()


def canonical(name: str) -> str:
    """The name with dashes, and that of the target for another name of it.

    >>> canonical("wasm")
    'wasm-simd'
    """
    kebab = name.replace("_", "-")
    return ALIASES.get(kebab, kebab)
