"""Compiled kernels in a folder: taken out of Triton's cache where they were made, put into it where they are used.

A bundle holds no paths of the machine that made it. Triton finds a kernel again by its key: the Triton build, the
kernel's source, types, constants and chip. So what does not fit is never run; it is compiled at its first use instead.
Machine code runs as it is: load only what you trust.

    manifest.json           architecture, Triton version and build, kernels
    <key>/<kernel>.cubin    machine code
    <key>/<kernel>.json     what the launcher must know
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxopt.backends.triton import library
from fxopt.backends.triton.formats import LAYOUTS
from fxopt.errors import InvalidModel

FORMAT = 1
_MANIFEST = "manifest.json"
_KEPT = (".cubin", ".json")


@dataclass(frozen=True)
class Bundle:
    """Kernels of one architecture and Triton build: key -> file name -> content."""

    arch: str  # "sm_80"
    triton: str
    build: str
    layouts: tuple[str, ...]
    kernels: dict[str, dict[str, bytes]]

    def save(self, folder: Path) -> None:
        """Write the files."""
        folder.mkdir(parents=True, exist_ok=True)
        for key, files in self.kernels.items():
            (folder / key).mkdir(exist_ok=True)
            for name, content in files.items():
                (folder / key / name).write_bytes(content)
        manifest = {
            "format": FORMAT, "arch": self.arch, "triton": self.triton, "build": self.build,
            "layouts": list(self.layouts), "kernels": {key: sorted(files) for key, files in self.kernels.items()},
        }  # fmt: skip
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """What `save` wrote.

        Raises:
            InvalidModel: a file is missing or cannot be read.
        """
        try:
            manifest: Any = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT:
                raise InvalidModel(f"{folder} has format {manifest['format']}; this version reads format {FORMAT}")
            kernels = {
                _plain(key): {_plain(name): (folder / key / name).read_bytes() for name in names}
                for key, names in manifest["kernels"].items()
            }
            layouts = tuple(map(str, manifest["layouts"]))
            return cls(str(manifest["arch"]), str(manifest["triton"]), str(manifest["build"]), layouts, kernels)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InvalidModel):
                raise
            reason = f"{type(error).__name__}: {error}"
            raise InvalidModel(f"{folder} holds no kernels that can be read: {reason}") from error

    def misfit(self, arch: str) -> str:
        """Why the kernels are not used on a chip of this architecture with the installed Triton; "" when they are."""
        made, here = f"{self.arch}, Triton {self.triton}", f"{arch}, Triton {library.version()}"
        if self.layouts != _layouts():
            theirs, ours = ", ".join(self.layouts), ", ".join(_layouts())
            return f"the saved kernels take packed weights of {theirs}, this version has {ours}"
        if (self.arch, self.triton) != (arch, library.version()):
            return f"the saved kernels were compiled for {made}; here is {here}"
        if self.build != library.build_key():
            return f"the saved kernels were compiled by another build of Triton {self.triton} (of another Python, say)"
        return ""

    def install(self) -> int:
        """Put the kernels into Triton's cache; returns how many were not there."""
        added = 0
        for key, files in self.kernels.items():
            manager = library.module("runtime.cache").get_cache_manager(key)
            described = next(name for name in files if name.endswith(".json"))
            if manager.get_group(described) is not None:
                continue
            group = {name: manager.put(content, name) for name, content in files.items()}
            manager.put_group(described, group)
            added += 1
        return added


def bundled(kernels: Iterable[Any], arch: str) -> Bundle:
    """A bundle of Triton's compiled kernels."""
    found: dict[str, dict[str, bytes]] = {}
    for kernel in kernels:
        manager = library.module("runtime.cache").get_cache_manager(kernel.hash)
        group: dict[str, str] = manager.get_group(f"{kernel.metadata.name[:150]}.json") or {}
        kept = {name: Path(path).read_bytes() for name, path in group.items() if name.endswith(_KEPT)}
        if len(kept) == len(_KEPT):
            found[kernel.hash] = kept
    return Bundle(arch, library.version(), library.build_key(), _layouts(), found)


def _layouts() -> tuple[str, ...]:
    return tuple(sorted(map(str, LAYOUTS.values())))


def _plain(name: str) -> str:
    """A file name that leads nowhere else."""
    if name != os.path.basename(name) or name in ("", ".", ".."):
        raise InvalidModel(f"{name!r} is no plain file name")
    return name
