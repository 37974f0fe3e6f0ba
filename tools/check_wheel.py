"""Build the wheel, install it into a clean environment, and use it from another folder.

Catches what an editable install hides: files missing from the wheel, and undeclared dependencies.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Raise, with the command's output shown, at the first step that fails."""
    with tempfile.TemporaryDirectory(prefix="fxopt-wheel-") as folder:
        scratch = Path(folder)
        build = (sys.executable, "-m", "build", "--wheel", "--outdir", str(scratch), str(ROOT))
        _run(build, scratch)
        (wheel,) = scratch.glob("*.whl")
        _check_contents(wheel)
        python = _environment(scratch / "venv", wheel)
        elsewhere = scratch / "elsewhere"
        elsewhere.mkdir()
        _use(python, elsewhere)
    print(f"{wheel.name}: built, installed into a clean environment and used from another folder")


def _check_contents(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fxopt").rglob("*.py")} | {"fxopt/py.typed"}
    missing = sorted(ours - held)
    foreign = sorted(name for name in held if not name.startswith(("fxopt/", "fxopt-")))
    if missing or foreign:
        raise SystemExit(f"{wheel.name}: missing {missing}, not ours {foreign}")


def _environment(folder: Path, wheel: Path) -> Path:
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    torch = next(line for line in requirements if line.startswith("torch"))
    _run((*pip, torch), folder)  # first and alone, as in the Makefile
    _run((*pip, str(wheel)), folder)
    return python


def _use(python: Path, folder: Path) -> None:
    command = str(python.parent / "fxopt")
    _run((command, "--version"), folder)
    for listed in ("passes", "targets", "backends", "ops"):
        _run((command, listed, "--json", f"{listed}.json"), folder)
    model = ROOT / "examples" / "models" / "digits-cnn.onnx"
    shown = _run(
        (
            command,
            str(model),
            "-o",
            "out.onnx",
            "--calibration",
            "random",
            "--json",
            "out.json",
            "--guard-seconds",
            "1",
        ),
        folder,
    )
    if "operators" not in shown or not (folder / "out.onnx").is_file():
        raise SystemExit(f"fxopt MODEL -o OUT did not do its work:\n{shown}")


def _run(command: tuple[str, ...], folder: Path) -> str:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nfailed with exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
