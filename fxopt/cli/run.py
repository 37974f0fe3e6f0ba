"""Entry point: arguments in, exit code out. 0: done; 1: a check failed; 2: wrong use, or an error."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from fxopt.cli.app import COMMANDS, app
from fxopt.config import Config
from fxopt.errors import FxoptError
from fxopt.report.printable import printable

_LIBRARIES = r"(torch|onnx|onnxscript|onnx_ir|onnxruntime|copyreg)(\.|$)"
_NO_MEMORY = ("can't allocate memory", "Failed to allocate memory", "std::bad_alloc")  # of torch and ONNX Runtime
_VALUE_FREE = ("--debug", "--version", "--help", "-h")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors are one message on stderr, with a traceback under --debug."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    with warnings.catch_warnings():
        return _run(given, debug)


def _run(given: list[str], debug: bool) -> int:
    try:
        debug = debug or Config.from_environment().debug
        _quiet(debug)
        code = get_command(app).main(with_command(given), prog_name="fxopt", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except typer.TyperException as error:
        return _fail(_usage(error), error.exit_code, debug)
    except FxoptError as error:
        return _fail(f"error: {error}", 2, debug)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130, debug=False)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit complains
        return 1
    except OSError as error:
        return _fail(f"error: {error.filename or 'a file'}: {error.strerror or error}", 2, debug)
    except MemoryError:
        return _fail("error: out of memory", 2, debug)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        if any(sign in text for sign in _NO_MEMORY):
            return _fail(f"error: out of memory: {text}", 2, debug)
        return _fail(
            f"internal error: {type(error).__name__}: {text}\nThis is a fault of fxopt; run again with --debug.",
            2,
            debug,
        )


def with_command(arguments: list[str]) -> list[str]:
    """The arguments with `optimize` in front when they start with a model or its options instead of a command.

    >>> with_command(["model.onnx", "-o", "out.onnx"])
    ['optimize', 'model.onnx', '-o', 'out.onnx']
    """
    first = next((argument for argument in arguments if argument not in _VALUE_FREE), None)
    if first is None or first.replace("_", "-") in COMMANDS:
        return arguments
    looks_like_option = first.startswith("-") and any(_is_model(argument) for argument in arguments)
    return ["optimize", *arguments] if looks_like_option or _is_model(first) else arguments


def _is_model(text: str) -> bool:
    if text.startswith("-"):
        return False
    return bool(Path(text).suffix) or "/" in text or os.sep in text or text in (".", "..") or Path(text).is_file()


def _usage(error: typer.TyperException) -> str:
    context: Any = getattr(error, "ctx", None)
    command = "fxopt" if context is None else context.command_path
    message = error.format_message().replace("Value error, ", "")
    if "unexpected extra argument" in message and ".onnx" in message:
        message += ": one model at a time, so run it for each"
    if type(error).__name__ == "NoArgsIsHelpError":
        return message
    return f"error: {message}\nTry '{command} --help'."


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(printable(message, keep="\n\t"), file=sys.stderr)
    return code


def _quiet(debug: bool) -> None:
    """Our own warnings in one line; those of libraries only under --debug."""
    if debug:
        return
    warnings.filterwarnings("ignore", module=_LIBRARIES)
    warnings.showwarning = _show_warning


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    if issubclass(category, UserWarning):
        text = printable(str(message), keep="\n")
        print(f"warning: {text}", file=sys.stderr)
