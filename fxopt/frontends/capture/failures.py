"""Why a PyTorch model could not be captured: what failed, the user's line, what to do."""

from __future__ import annotations

import linecache
import re
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from fxopt.errors import CaptureError

_TORCH = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parents[2])
_STANDARD = sysconfig.get_paths()["stdlib"]

# (pattern in the error, what to do); the first that matches is printed
_ADVICE = (
    (
        r"data-dependent|DataDependent|\.item\(\)|_local_scalar_dense",
        "Python code depends on the value of a tensor; use torch.where or torch.cond there, or move it out of forward",
    ),
    (
        r"specialized it to be a constant|= \d+\s*$",
        "the model fixes this dimension; leave it out of dynamic_shapes, or compute sizes from x.shape in forward",
    ),
    (
        r"Constraints violated",
        "the dimension may not take every value; give a range, Dim(name, min=..., max=...), or leave it out",
    ),
    (
        r"not a known type|register a pytree|unsupported (input|output) type|Unsupported input type",
        "wrap the model in a module whose forward takes and returns tensors, tuples and dicts of tensors "
        "(Hugging Face models: pass use_cache=False)",
    ),
    (
        r"missing a required argument|missing \d+ required|unexpected keyword|too many positional",
        "example_inputs must fit forward: a tuple of positional arguments, or a dict of named ones",
    ),
    (
        r"fake impl|no fake|NotImplementedError.*Meta|register_fake|not supported for tensor subclasses|\.numpy\(\)",
        "only torch operators with a shape rule can be captured; stay in torch, or use torch.library.register_fake",
    ),
    (
        r"[Ss]hape|[Ss]ize|dimension|reduction dim",
        "run the model on the example inputs first, and give inputs of the shapes that it takes",
    ),
)

_HINTS = re.compile(
    r"For more|For C\+\+|For extended|If you suspect|consider using|Caused by|The error above|The following"
)


def explain(error: BaseException, name: str, inputs: Sequence[str] = ()) -> CaptureError:
    """The error to raise `from` whatever `torch.export` raised for the model called `name`."""
    text = str(getattr(error, "msg", None) or error)
    for index, given in enumerate(inputs):
        text = text.replace(f"L['tensors'][{index}]", given)
    where = user_line(error)
    place = f"\n  at {where}" if where else ""
    advice = _advice(error, text)
    return CaptureError(f"{name} could not be captured: {_reason(error, text)}{place}\n  To fix it: {advice}.")


def _reason(error: BaseException, text: str) -> str:
    """The lines that say something, without torch's debugging hints."""
    lines = [line.strip() for line in text.splitlines()]
    told = []
    for line in lines:
        if _HINTS.match(line):
            break
        line = re.sub(r"For more information.*|If you're using.*|Alternatively.*|See https?://.*", "", line)
        line = re.sub(r"\s*\(unhinted: .*", "", line).strip()
        if line:
            told.append(line)
    shown = "\n    ".join(told[:8]) + ("\n    ..." if len(told) > 8 else "")
    return f"{type(error).__name__}: {shown or 'no message'}"


def _advice(error: BaseException, text: str) -> str:
    whole = f"{type(error).__name__}: {text}"
    for pattern, advice in _ADVICE:
        if re.search(pattern, whole, re.MULTILINE):
            return advice
    return "try torch.export.export(model, args, strict=False) alone, or wrap the part that torch can trace in a module"


def user_line(error: BaseException) -> str:
    """`file:line: code` of the innermost frame that is neither torch's nor ours nor Python's; "" when there is none."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.endswith(".py") and not _foreign(frame.filename) and frame.name != "<module>"
    ]
    if not frames:
        return ""
    last = frames[-1]
    code = (last.line or linecache.getline(last.filename, last.lineno or 0)).strip()
    return f"{last.filename}:{last.lineno} in {last.name}: {code}"


def source_line(stack_trace: object) -> str:
    """`file:line` of the innermost frame in a node's stack trace that is the user's; "" when there is none."""
    frames = re.findall(r'File "(.*?)", line (\d+)', stack_trace if isinstance(stack_trace, str) else "")
    own = [f"{file}:{line}" for file, line in frames if Path(file).is_absolute() and not _foreign(file)]
    return own[-1] if own else ""


def _foreign(path: str) -> bool:
    if path.startswith((_TORCH, _OWN)):
        return True
    return path.startswith(_STANDARD) and "site-packages" not in path
