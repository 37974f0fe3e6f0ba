"""Saved folders, used as their users would: in Node, in a browser, from C, from Python without torch, under qemu."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import InvalidInput, InvalidModel, InvalidOption, OutputError, UnknownName, Unsupported
from fxopt.ir.folders import digest
from tests.backends.tvm import harness
from tests.browser import Browser, Server, browser

__all__ = ["harness"]
pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
CNN = ROOT / "examples" / "models" / "digits-cnn.onnx"
ARM_LIBRARIES = Path("/usr/aarch64-linux-gnu")
BUCKETS = {"batch": [1, 3]}


def image(batch: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).random((batch, 1, 8, 8)).astype(np.float32)


def reference(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    (found,) = fxopt.capture(CNN).run([torch.from_numpy(x)])
    return found.numpy()


def close(found: Any, batch: int) -> None:
    expected = reference(image(batch))
    assert np.abs(np.reshape(found, expected.shape) - expected).max() < 1e-5 * np.abs(expected).max()


def saved(folder: Path, target: str, **options: Any) -> Path:
    result = fxopt.optimize(CNN, target, buckets=BUCKETS, **options)
    result.save(folder)
    return folder


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two folders of one model: with the weights in the modules, and beside them."""
    folder = tmp_path_factory.mktemp("web")
    saved(folder / "embedded", "wasm-simd")
    saved(folder / "external", "wasm-relaxed", weights="external")
    (folder / "assets").mkdir()
    for path in (folder / "embedded").glob("*.wasm"):
        shutil.copy(path, folder / "assets")
    (folder / "index.html").write_text("<!doctype html><title>empty</title>")
    yield folder


# ---- the folder


def test_the_manifest_says_what_is_there(web: Path) -> None:
    manifest = json.loads((web / "embedded" / "manifest.json").read_text())
    files = {path.name for path in (web / "embedded").iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == files == {
        "digits_cnn.simd128.wasm", "digits_cnn.relaxed.wasm", "index.js", "index.d.ts", "package.json", "report.json",
    }  # fmt: skip
    assert all(digest(web / "embedded" / name) == entry["sha256"] for name, entry in manifest["files"].items())
    assert manifest["target"]["name"] == "wasm-simd"
    assert manifest["versions"]["apache-tvm"] and manifest["versions"]["fxopt"] == fxopt.__version__
    function = manifest["functions"]["digits_cnn"]
    assert function["inputs"] == [{"name": "image", "dtype": "float32", "shape": ["batch", 1, 8, 8]}]
    assert [entry["symbol"] for entry in function["entries"]] == ["digits_cnn_batch1", "digits_cnn_batch3"]
    assert function["entries"][1]["outputs"] == [
        {"name": "logits", "dtype": "float32", "shape": [3, 10], "nbytes": 120}
    ]


def test_modules_import_nothing(web: Path) -> None:
    wasmtime = pytest.importorskip("wasmtime", reason="needs wasmtime")
    engine = wasmtime.Engine()
    for path in sorted(web.rglob("e*/*.wasm")):
        module = wasmtime.Module.from_file(engine, str(path))
        assert not module.imports
        shown = {item.name for item in module.exports} - {"memory", "__heap_base", "digits_cnn_weights"}
        assert shown == {"digits_cnn_batch1", "digits_cnn_batch3"}


def test_external_weights_are_one_file_for_both_builds(web: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in (web / "external").iterdir()}
    assert sizes["digits_cnn.weights.bin"] > 590_000
    assert max(sizes["digits_cnn.simd128.wasm"], sizes["digits_cnn.relaxed.wasm"]) < 60_000


def test_what_is_there_is_kept_when_it_is_not_ours(web: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("x")
    with pytest.raises(OutputError, match="other content"):
        fxopt.load(web / "embedded").save(tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# ---- Node and browsers


def in_node(script: str, folder: Path) -> Any:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs Node")
    path = folder / "run.mjs"
    path.write_text(script)
    done = subprocess.run([node, str(path)], capture_output=True, text=True, timeout=60)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


SCRIPT = """
const image = (batch) => Float32Array.from(IMAGES[batch]);
const model = await load(URL_OF_FOLDER, OPTIONS);
const errors = [];
for (const wrong of [{}, { imgae: image(1) }, { image: [0] }, image(1).subarray(1), { image: { data: image(3), shape: [3, 64] } }])
  try { model.run(wrong); errors.push(""); } catch (error) { errors.push(`${error.name}: ${error.message}`); }
const views = model.functions.digits_cnn.views(model.functions.digits_cnn.entries[1]);
views.inputs.image.set(image(3));
views.run();
const inside = Array.from(views.outputs.logits);
const three = model.run({ image: { data: image(3), shape: [3, 1, 8, 8] } });
return { build: model.build, inside, one: Array.from(model.run(image(1)).logits), three: Array.from(three.logits), errors,
         named: Array.from(model.functions.digits_cnn.run({ image: image(1) }).logits) };
"""


def script(url: str = "undefined", options: str = "{}") -> str:
    images = {batch: image(batch).ravel().tolist() for batch in (1, 3)}
    text = SCRIPT.replace("IMAGES", json.dumps(images)).replace("URL_OF_FOLDER", url).replace("OPTIONS", options)
    return f"(async ({{ load }}) => {{ {text} }})"


def check(found: dict[str, Any]) -> None:
    close(found["one"], 1)
    close(found["three"], 3)
    assert found["named"] == found["one"] and found["inside"] == found["three"]
    assert found["errors"] == [
        'TypeError: input "image" is missing; digits_cnn takes "image"',
        'TypeError: unknown input "imgae"; digits_cnn takes "image"',
        'TypeError: input "image" is Array, expected Float32Array',
        'RangeError: "image" of 63 values does not fit; digits_cnn was compiled for "image" float32 [1, 1, 8, 8], or "image" float32 [3, 1, 8, 8]',
        'RangeError: "image" [3,64] of 192 values does not fit; digits_cnn was compiled for "image" float32 [1, 1, 8, 8], or "image" float32 [3, 1, 8, 8]',
    ]


@pytest.mark.parametrize("kind", ["embedded", "external"])
def test_node(web: Path, tmp_path: Path, kind: str) -> None:
    module = f'import * as module from "{(web / kind / "index.js").as_uri()}";\n'
    check(in_node(f"{module}console.log(JSON.stringify(await {script()}(module)));", tmp_path))


def test_node_says_what_is_missing(web: Path, tmp_path: Path) -> None:
    module = f'import * as module from "{(web / "embedded" / "index.js").as_uri()}";\n'
    text = (
        "const said = [];\n"
        "for (const [url, options] of [['file:///nowhere', {}], [undefined, { build: 'fast' }]])\n"
        "  try { await module.load(url, options); } catch (error) { said.push(error.message); }\n"
        "console.log(JSON.stringify(said));"
    )
    missing, unknown = in_node(module + text, tmp_path)
    assert "/nowhere/digits_cnn." in missing
    assert unknown == 'unknown build "fast"; expected simd128 or relaxed'


@pytest.fixture(scope="module")
def page(web: Path) -> Iterator[tuple[Server, Browser]]:
    with Server(web) as server, browser() as shown:
        shown.open(f"{server.url}index.html")
        yield server, shown


@pytest.mark.parametrize("kind", ["embedded", "external"])
@pytest.mark.parametrize("build", ["simd128", "relaxed"])
def test_browser(page: tuple[Server, Browser], build: str, kind: str) -> None:
    server, shown = page
    usable = shown.evaluate(f'import("{server.url}{kind}/index.js").then((module) => module.builds())')
    if build not in usable:
        pytest.skip(f"this browser runs {', '.join(usable)} only")
    text = script(options=json.dumps({"build": build}))
    found = shown.evaluate(f'import("{server.url}{kind}/index.js").then({text})')
    assert found["build"] == build
    check(found)


def test_the_folder_may_lie_elsewhere(page: tuple[Server, Browser]) -> None:
    server, shown = page
    text = script(url='"assets"')  # relative to the page
    check(shown.evaluate(f'import("{server.url}embedded/index.js").then({text})'))
    with pytest.raises(RuntimeError, match="has no function digits_cnn_weights: it is of another build"):
        shown.evaluate(f'import("{server.url}embedded/index.js").then(({{ load }}) => load("external/"))')
    with pytest.raises(RuntimeError, match=r"none/digits_cnn\.\w+\.wasm cannot be loaded: HTTP 404"):
        shown.evaluate(f'import("{server.url}embedded/index.js").then(({{ load }}) => load("none/"))')


# ---- C and Python


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    harness.machine("host")
    return saved(tmp_path_factory.mktemp("host") / "model", "host", backend="tvm", force=True)


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("arm") / "model", "cortex-a76", weights="external")


def test_names_of_libraries(host: Path, arm: Path) -> None:
    common = {"digits_cnn.h", "digits_cnn.py", "example.c", "libdigits_cnn.so", "manifest.json", "report.json"}
    assert {path.name for path in host.iterdir()} - {"__pycache__"} == common
    assert {path.name for path in arm.iterdir()} == common | {"digits_cnn.weights.bin"}
    assert (arm / "libdigits_cnn.so").read_bytes()[18:20] == b"\xb7\x00"  # e_machine of the ELF header: AArch64


def test_python_with_numpy_alone(host: Path) -> None:
    code = (
        "import sys, json, numpy as np, digits_cnn\n"
        "model = digits_cnn.load()\n"
        "x = np.array(json.load(sys.stdin), np.float32)\n"
        "errors = []\n"
        "for wrong in ({}, {'imgae': x}, {'image': x.astype(np.float64)}, {'image': x[:, 0]}):\n"
        "    try: model.run(**wrong)\n"
        "    except (TypeError, ValueError) as error: errors.append(str(error))\n"
        "assert not {'torch', 'fxopt', 'tvm'} & set(sys.modules)\n"
        "print(json.dumps([model.run(image=x)['logits'].tolist(), errors]))"
    )
    given = json.dumps(image(3).tolist())
    done = subprocess.run(
        [sys.executable, "-c", code], input=given, cwd=host, env={"PYTHONPATH": str(host)}, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    found, errors = json.loads(done.stdout)
    close(found, 3)
    assert errors == [
        "input 'image' is missing; digits_cnn takes image",
        "unknown input 'imgae'; digits_cnn takes image",
        "input 'image' is float64, expected float32",
        "digits_cnn was compiled for image [1, 1, 8, 8] or image [3, 1, 8, 8]; given image [3, 8, 8]",
    ]


def values(command: list[str], folder: Path) -> list[float]:
    image(1).tofile(folder / "image.bin")
    done = subprocess.run([*command, "image.bin"], cwd=folder, capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr
    return [float(line) for line in done.stdout.split()]


def test_c_example(host: Path, tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    shutil.copytree(host, tmp_path / "model")
    folder = tmp_path / "model"
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-L.", "-ldigits_cnn", "-Wl,-rpath,$ORIGIN"]
    subprocess.run([compiler, "example.c", "-o", "example", *flags], cwd=folder, check=True, timeout=60)
    close(values(["./example"], folder), 1)
    done = subprocess.run(["./example", "none.bin"], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "none.bin: expected 256 bytes, got 0" in done.stderr


def test_c_example_on_arm(arm: Path, tmp_path: Path) -> None:
    emulator = shutil.which("qemu-aarch64")
    if emulator is None or not ARM_LIBRARIES.is_dir():
        pytest.skip("needs qemu-aarch64 and a C library for Arm (Debian: qemu-user libc6-arm64-cross)")
    shutil.copytree(arm, tmp_path / "model")
    folder = tmp_path / "model"
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu"]
    flags = ["-O2", "-L.", "-ldigits_cnn", "-Wl,-rpath,$ORIGIN"]
    subprocess.run([*compiler, "example.c", "-o", "example", *flags], cwd=folder, check=True, timeout=300)
    close(values([emulator, "-L", str(ARM_LIBRARIES), "./example"], folder), 1)


def test_a_library_of_another_machine_is_refused(arm: Path) -> None:
    with pytest.raises(InvalidModel, match="is compiled for aarch64; this machine is x86-64"):
        fxopt.load(arm)


# ---- loading


def test_loading(web: Path, host: Path) -> None:
    for folder in (web / "embedded", web / "external", host):
        model = fxopt.load(folder)
        close(model(torch.from_numpy(image(3))).numpy(), 3)
        assert model.report.backend == "tvm"
    with pytest.raises(InvalidInput, match="compiled for batch=1, batch=3; the inputs have batch=2"):
        model(torch.from_numpy(image(2)))
    with pytest.raises(UnknownName, match="unknown function 'digits'"):
        fxopt.load(web / "embedded", function="digits")


def test_a_changed_file_is_refused(web: Path, tmp_path: Path) -> None:
    shutil.copytree(web / "external", tmp_path / "model")
    with (tmp_path / "model" / "digits_cnn.weights.bin").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(InvalidModel, match=r"weights\.bin is not the file that was saved"):
        fxopt.load(tmp_path / "model")
    (tmp_path / "model" / "digits_cnn.weights.bin").unlink()
    with pytest.raises(InvalidModel, match=r"lacks digits_cnn\.weights\.bin"):
        fxopt.load(tmp_path / "model")


def test_saving_again_after_loading(web: Path, tmp_path: Path) -> None:
    fxopt.load(web / "external").save(tmp_path / "copy")
    before, after = (json.loads((path / "manifest.json").read_text()) for path in (web / "external", tmp_path / "copy"))
    assert before == after


# ---- several functions


class Half(nn.Module):
    def __init__(self, shared: nn.Module, back: bool) -> None:
        super().__init__()
        self.shared, self.back = shared, back

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.shared(x)
        return torch.relu(y) if self.back else torch.tanh(y)


def test_bundle(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shared = nn.Linear(300, 200).eval()
    halves = {"encode": Half(shared, False).eval(), "decode": Half(shared, True).eval()}
    x = torch.randn(2, 300)
    compiled = {key: fxopt.optimize(half, "wasm-simd", example_inputs=(x,), passes=[]) for key, half in halves.items()}
    said = fxopt.bundle(compiled, tmp_path / "both", name="coder")
    assert "coder.wasm relaxed in wasmtime gave torch's results on 2 samples" in said
    assert (tmp_path / "both" / "coder.simd128.wasm").stat().st_size < 1.2 * 200 * 300 * 4  # the weight is there once
    for key, half in halves.items():
        with torch.no_grad():
            expected = half(x)
        assert (fxopt.load(tmp_path / "both", function=key)(x) - expected).abs().max() < 1e-5
    with pytest.raises(InvalidModel, match="functions encode, decode; choose one"):
        fxopt.load(tmp_path / "both")
    text = (
        f'import {{ load }} from "{(tmp_path / "both" / "index.js").as_uri()}";\n'
        "const model = await load();\n"
        "const x = new Float32Array(600).fill(0.25);\n"
        "let said = ''; try { model.run(x); } catch (error) { said = error.message; }\n"
        "const found = Object.values(model.functions).map((one) => Object.values(one.run(x))[0].length);\n"
        "console.log(JSON.stringify([said, found]));"
    )
    assert in_node(text, tmp_path) == ["choose one: model.functions.{encode, decode}.run", [400, 400]]


def test_bundles_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    x = torch.randn(2, 8)
    wasm = fxopt.optimize(nn.Linear(8, 4), "wasm-simd", example_inputs=(x,))
    arm = fxopt.optimize(nn.Linear(8, 4), "cortex-a53", example_inputs=(x,))
    eager = fxopt.optimize(nn.Linear(8, 4), "host", example_inputs=(x,))
    for functions, error, reason in (
        ({"a": wasm, "b": arm}, InvalidOption, "for one target; given a: wasm-simd, b: cortex-a53"),
        ({}, InvalidOption, "given none"),
        ({"a-b": wasm, "a_b": wasm}, InvalidOption, "make one C identifier"),
        ({"a": eager}, Unsupported, "function 'a' runs in onnxruntime"),
    ):
        with pytest.raises(error, match=reason):
            fxopt.bundle(functions, tmp_path / "none")
    assert not list(tmp_path.iterdir())


# ---- how long it takes


def test_compiling_takes_seconds(tmp_path: Path) -> None:
    """Code under 5 s and a link under 1 s on a quiet machine; twice that here."""
    from fxopt.backends.tvm.compile import build
    from fxopt.backends.tvm.link import link
    from fxopt.backends.tvm.source import sources

    graph = fxopt.capture(ROOT / "examples" / "models" / "digits-vit.onnx")
    made_for = harness.machine("wasm-simd")
    found = sources(graph, {"batch": (1,)}, "vit")
    begin = time.process_time()
    built = build(found, made_for, tmp_path, "vit")
    assert time.process_time() - begin < 10
    begin = time.perf_counter()
    link(built.objects, ["vit_batch1"], made_for, tmp_path / "again.wasm")
    assert time.perf_counter() - begin < 2


def test_large_windows_compile_in_seconds(tmp_path: Path) -> None:
    """The patches of a vision transformer: code must not grow with the window (it took 29 s of processor time)."""

    from fxopt.backends.tvm.compile import build
    from fxopt.backends.tvm.source import sources
    from fxopt.frontends.torch_export import load

    graph = load(nn.Conv2d(3, 192, 8, 8).eval(), (torch.randn(1, 3, 64, 64),))
    begin = time.process_time()
    build(sources(graph, {}, "patches"), harness.machine("wasm-simd"), tmp_path, "patches")
    assert time.process_time() - begin < 8
