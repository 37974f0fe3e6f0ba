"""Where results go: tables to the terminal, JSON to a file or stdout, files whole or not at all."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from fxopt.errors import OutputError
from fxopt.report.printable import printable

_PLAIN_WIDTH = 140  # where there is no terminal whose width counts


class Output:
    """Prints for people, and writes JSON for programs when it was asked for."""

    def __init__(self, json_to: str | None = None) -> None:
        self.json_to = json_to
        stream = sys.stderr if json_to == "-" else sys.stdout
        self.console = Console(
            file=stream, width=None if stream.isatty() else _PLAIN_WIDTH, highlight=False, soft_wrap=False
        )
        if json_to not in (None, "-"):
            check_destination(Path(str(json_to)), "--json")

    def print(self, renderable: RenderableType) -> None:
        """Show something to the user."""
        shown = printable(renderable, keep="\n") if isinstance(renderable, str) else renderable
        self.console.print(shown, markup=False)

    def json(self, data: Any) -> None:
        """Write the data when --json was given."""
        if self.json_to is None:
            return
        text = json.dumps(data, indent=2, default=str) + "\n"
        if self.json_to == "-":
            sys.stdout.write(text)
        else:
            write_text(Path(self.json_to), text)


def check_destination(path: Path, option: str, source: Path | None = None) -> None:
    """Raise now, before any work, when `path` cannot be written later.

    Raises:
        OutputError: it is a folder, its folder does not exist or cannot be written, or it is the input.
    """
    if path.is_dir():
        raise OutputError(f"{option} {path} is a folder; give the name of a file, such as {path / 'out'}{path.suffix}")
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"{option} {path}: the folder {folder} does not exist; create it first")
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise OutputError(f"{option} {path} is the input, which is never changed; give another name")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise OutputError(f"{option} {path} cannot be written: permission denied")


def write_text(path: Path, text: str) -> None:
    """Write the file whole: to a temporary name first, which leaves nothing behind when it fails.

    Raises:
        OutputError: it cannot be written.
    """
    scratch: str | None = None
    try:
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(scratch, 0o666 & ~_umask())
        os.replace(scratch, path)
    except OSError as error:
        if scratch is not None:
            Path(scratch).unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
