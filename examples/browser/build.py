"""Build the page that recognises a drawn digit: the model is compiled to WebAssembly, the page copied beside it.

    python examples/browser/build.py [--out out/browser] [--model digits-cnn] [--onnxruntime-web] [--serve]

With --onnxruntime-web the page compares times: npm fetches the package, and the page gets a copy with the ONNX file.
"""

from __future__ import annotations

import argparse
import http.server
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fxopt

HERE = Path(__file__).resolve().parent
MODELS = HERE.parent / "models"
PAGE = ("index.html", "page.js", "digit.js")
PACKAGE = "onnxruntime-web@1.30.0"
PEER = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def build(model: Path, out: Path) -> None:
    """Compile the model for one image at a time and copy the page."""
    out.mkdir(parents=True, exist_ok=True)
    result = fxopt.optimize(model, "wasm-simd", buckets={"batch": [1]})
    result.save(out / "model")
    for note in result.ledger.notes:
        print(note)
    for name in PAGE:
        shutil.copyfile(HERE / name, out / name)


def add_peer(model: Path, out: Path) -> None:
    """Fetch onnxruntime-web from npm and put what the page needs of it, and the model, into the folder."""
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit("--onnxruntime-web needs npm on the path")
    place = out / "onnxruntime-web"
    with tempfile.TemporaryDirectory() as scratch:
        command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", scratch, PACKAGE]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        place.mkdir(exist_ok=True)
        for name in PEER:
            shutil.copyfile(Path(scratch) / "node_modules" / "onnxruntime-web" / "dist" / name, place / name)
    shutil.copyfile(model, place / "model.onnx")


def serve(out: Path) -> None:
    """Serve the folder on this machine until interrupted."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(out))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 8000), handler) as server:
        print("http://127.0.0.1:8000/ (end with Ctrl-C)")
        server.serve_forever()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out") / "browser")
    parser.add_argument("--model", choices=("digits-cnn", "digits-vit"), default="digits-cnn")
    parser.add_argument("--onnxruntime-web", action="store_true", help="compare with it; npm fetches it")
    parser.add_argument("--serve", action="store_true", help="serve the folder afterwards, on port 8000")
    options = parser.parse_args(arguments)
    model = MODELS / f"{options.model}.onnx"
    build(model, options.out)
    if options.onnxruntime_web:
        add_peer(model, options.out)
    print(f"built: {options.out / 'index.html'}; a browser loads it from a server (--serve), not from a file")
    if options.serve:
        serve(options.out)


if __name__ == "__main__":
    main()
