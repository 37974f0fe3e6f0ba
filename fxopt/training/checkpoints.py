"""The state of a training run in one safetensors file: tensors as they are, everything else as JSON in its header.

Nothing is pickled. The file is written under a temporary name and renamed, so that a run that is cut off while writing
leaves the checkpoint before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fxopt.errors import InvalidModel, InvalidOption, OutputError, Unsupported
from fxopt.ir.text_files import read_metadata, replacing, tensors_in, write_tensors

FORMAT = 1
FILE = "checkpoint.safetensors"
_STATE = "training"  # the key in the header
_PLAIN = (bool, int, float, str, type(None))


class Checkpoints:
    """The checkpoint of one run in a folder.

    Args:
        fingerprint: what a run must have in common with the one that wrote the checkpoint.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.path = folder / FILE
        self.fingerprint = dict(fingerprint)

    def require_room(self) -> None:
        """Raise rather than overwrite what another run has written.

        Raises:
            InvalidOption: there is a checkpoint.
        """
        if self.path.exists():
            raise InvalidOption(
                f"{self.path.parent} holds a checkpoint; give resume=True to go on from it, or another folder"
            )

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a state: nested dictionaries, lists and tuples of tensors, numbers and texts.

        Raises:
            Unsupported: it holds something else.
            OutputError: it cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        text = json.dumps({"format": FORMAT, "run": self.fingerprint, "state": _parted(state, "", tensors)})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as scratch:
                write_tensors(scratch, tensors, {_STATE: text})
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def load(self) -> Any:
        """The state that was written last; None when there is none.

        Raises:
            InvalidModel: the file is damaged.
            InvalidOption: it is that of another run.
        """
        if not self.path.exists():
            return None
        try:
            header: Any = json.loads(read_metadata(self.path)[_STATE])
        except (ValueError, KeyError) as error:
            raise InvalidModel(f"{self.path} is no checkpoint of a training run") from error
        if header["format"] != FORMAT:
            raise InvalidModel(f"{self.path} has format {header['format']}; this version reads format {FORMAT}")
        for name, wanted in self.fingerprint.items():
            found = header["run"].get(name)
            if found != wanted:
                raise InvalidOption(
                    f"{self.path} is of another run: {name} was {found!r} there and is {wanted!r} here; give the same "
                    "settings to resume, or another folder to begin anew"
                )
        return _joined(header["state"], tensors_in(self.path))


def _parted(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON, its tensors put aside under their paths."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, _parted(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_parted(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]}
    if type(value) not in _PLAIN:
        raise Unsupported(
            f"a checkpoint holds tensors, numbers and texts; {name.lstrip('/')} is a {type(value).__name__}"
        )
    return value


def _joined(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind == "tensor":
        return tensors[content].clone()  # the file is memory-mapped, and will be replaced
    if kind == "dict":
        return {key: _joined(item, tensors) for key, item in content}
    items = [_joined(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)
