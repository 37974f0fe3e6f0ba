"""Folders that are written whole or not at all, and what is in them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxopt.errors import OutputError

MANIFEST = "manifest.json"  # its "files" are those beside it: {name: {"bytes", "sha256"}}


def write_folder(path: Path, fill: Callable[[Path], dict[str, Any]]) -> None:
    """Let `fill` write files into an empty folder, add the manifest (its result, and the files' hashes), move it there.

    A folder that was written so before is replaced, an empty one is used.

    Raises:
        OutputError: the path is a file, a folder with other content, or cannot be written; nothing is left behind.
    """
    check_folder(path)
    try:
        scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            manifest = fill(scratch)
            text = json.dumps({**manifest, "files": _listed(scratch)}, indent=1)
            (scratch / MANIFEST).write_text(text + "\n", encoding="utf-8")
            scratch.chmod(0o777 & ~_umask())  # temporary folders are private
            _move(scratch, path)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": digest(file)} for file in files
    }


def _move(scratch: Path, path: Path) -> None:
    """Put a folder in the place of another one, which is there until the new one is."""
    if not path.exists():
        scratch.rename(path)
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    os.replace(path, old)
    scratch.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def check_folder(path: Path, option: str = "") -> None:
    """Raise now, before any work, when `write_folder` will not take the path.

    Args:
        option: what to call it in messages, such as "--output".

    Raises:
        OutputError: it is a file, a folder with other content, or its parent does not exist or cannot be written.
    """
    shown = f"{option} {path}".strip()
    if path.exists() and not path.is_dir():
        raise OutputError(f"{shown} is a file; give the name of a folder, or of an .onnx file")
    if path.is_dir() and not _is_ours(path):
        raise OutputError(f"{shown} is a folder with other content; give an empty or a new one")
    if not path.parent.is_dir():
        raise OutputError(f"{shown}: the folder {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{shown} cannot be written: permission denied")


def _is_ours(folder: Path) -> bool:
    """Whether everything in the folder was written by `write_folder`."""
    names = {entry.name for entry in folder.iterdir()}
    try:
        written = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"] if names else []
        return names <= {MANIFEST, "__pycache__", *(str(name).partition("/")[0] for name in written)}
    except (OSError, ValueError, KeyError, TypeError):
        return False


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)  # there is no other way to read it
    os.umask(mask)
    return mask
