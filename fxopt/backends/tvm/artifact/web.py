"""Loaders for JavaScript: an ES module, its TypeScript declarations, and what bundlers read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_TYPES = {
    "float32": "Float32Array", "int64": "BigInt64Array", "int32": "Int32Array", "bool": "Uint8Array",
    "uint8": "Uint8Array", "int8": "Int8Array",
}  # fmt: skip
_HEAD = """// {name}, compiled by fxopt. Loads in browsers, bundlers and Node:
//
//   import {{ load }} from "./index.js";
//   const model = await load();
//   const results = model.run({arguments}); // typed arrays by name, in and out
"""


def write_web(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write `index.js`, `index.d.ts` and `package.json` for the builds that the manifest lists."""
    files = {str(build["label"]): str(build["file"]) for build in manifest["builds"]}
    for build in manifest["builds"]:
        if build["weights"] is not None:
            files[f"{build['label']}.weights"] = str(build["weights"])
    (folder / "index.js").write_text(_module(manifest, files), encoding="utf-8")
    (folder / "index.d.ts").write_text(_declarations(manifest), encoding="utf-8")
    (folder / "package.json").write_text(_package(manifest, files.values()), encoding="utf-8")


def _module(manifest: Mapping[str, Any], files: Mapping[str, str]) -> str:
    functions = {
        name: {**described, "entries": [_entry(entry) for entry in described["entries"]]}
        for name, described in manifest["functions"].items()
    }
    signature = {
        "name": manifest["name"],
        "builds": {build["label"]: build["file"] for build in manifest["builds"]},
        "weightsBytes": {build["label"]: build["weights_bytes"] for build in manifest["builds"]},
        "functions": functions,
    }
    # Each URL is written out: bundlers copy the files of those that they can read.
    places = [f'  {_key(key)}: () => new URL("./{file}", import.meta.url),' for key, file in files.items()]
    head = [
        _usage(manifest),
        f"const signature = {json.dumps(signature)};",
        f"const names = {json.dumps(dict(files))};",
        "\n".join(["const files = {", *places, "};"]),
    ]
    body = Path(__file__).with_name("loader.js").read_text(encoding="utf-8")
    return "\n".join([*head, body])


def _usage(manifest: Mapping[str, Any]) -> str:
    name, described = next(iter(manifest["functions"].items()))
    inputs = ", ".join(f"{_key(port['name'])}: array" for port in described["inputs"])
    text = _HEAD.format(name=manifest["name"], arguments=f"{{ {inputs} }}")
    return text if len(manifest["functions"]) == 1 else text.replace("model.run", f"model.functions.{name}.run")


def _entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: entry[key] for key in ("symbol", "sizes", "inputs", "outputs")}
    return {**kept, "arenaBytes": entry["arena_bytes"]}


def _declarations(manifest: Mapping[str, Any]) -> str:
    builds = " | ".join(json.dumps(build["label"]) for build in manifest["builds"])
    lines = [
        f"// {manifest['name']}, compiled by fxopt.",
        f"export type Build = {builds};",
        "export interface Shaped<T> { readonly data: T; readonly shape: readonly number[]; }",
        "export interface Port {",
        "  readonly name: string;",
        '  readonly dtype: "float32" | "int64" | "int32" | "bool" | "uint8" | "int8";',
        "  /** Sizes; in the ports of a function, a name stands for a size in which its entries differ. */",
        "  readonly shape: readonly (number | string)[];",
        "  readonly nbytes?: number;",
        "}",
        "/** A compiled set of sizes. */",
        "export interface Entry {",
        "  readonly symbol: string;",
        "  readonly sizes: Readonly<Record<string, number>>;",
        "  readonly inputs: readonly Port[];",
        "  readonly outputs: readonly Port[];",
        "}",
        "export interface Views {",
        "  readonly inputs: Readonly<Record<string, TypedArray>>;",
        "  readonly outputs: Readonly<Record<string, TypedArray>>;",
        "  run(): void;",
        "}",
        f"export type TypedArray = {' | '.join(sorted(set(_TYPES.values())))};",
        "export interface ModelFunction<Inputs, Outputs> {",
        "  readonly name: string;",
        "  readonly inputs: readonly Port[];",
        "  readonly outputs: readonly Port[];",
        "  readonly entries: readonly Entry[];",
        "  /** Throws a TypeError or a RangeError that names the input which does not fit. */",
        "  run(inputs: Inputs): Outputs;",
        "  /** Inputs and outputs where they lie, to avoid copies: write, run, read. All entries share this memory. */",
        "  views(entry?: Entry): Views;",
        "}",
    ]
    kinds = []
    for index, (name, described) in enumerate(manifest["functions"].items()):
        one = "" if len(manifest["functions"]) == 1 else str(index + 1)
        lines += _interface(f"Inputs{one}", described["inputs"], shaped=True)
        lines += _interface(f"Outputs{one}", described["outputs"], shaped=False)
        given = f"Inputs{one}"
        if len(described["inputs"]) == 1:
            given += f" | {_TYPES[described['inputs'][0]['dtype']]}"
        kinds.append((name, given, f"Outputs{one}"))
    lines += [
        "export interface Model {",
        "  /** The build that was loaded. */",
        "  readonly build: Build;",
        "  readonly functions: {",
        *(f"    readonly {_key(name)}: ModelFunction<{given}, {made}>;" for name, given, made in kinds),
        "  };",
    ]
    if len(kinds) == 1:
        lines.append(f"  run(inputs: {kinds[0][1]}): {kinds[0][2]};")
    lines += [
        "}",
        "/** The builds that this engine runs correctly, best first. */",
        "export function builds(): Build[];",
        "/** Load the model; `url` is the folder of the files, by default that of this module. */",
        "export function load(url?: string | URL, options?: { build?: Build }): Promise<Model>;",
    ]
    return "\n".join([*lines, ""])


def _interface(name: str, ports: Sequence[Mapping[str, Any]], *, shaped: bool) -> list[str]:
    lines = [f"export interface {name} {{"]
    for port in ports:
        kind = _TYPES[port["dtype"]]
        shape = " x ".join(map(str, port["shape"])) or "one value"
        lines.append(f"  /** {port['dtype']}, {shape} */")
        lines.append(f"  {_key(port['name'])}: {f'{kind} | Shaped<{kind}>' if shaped else kind};")
    return [*lines, "}"]


def _key(name: str) -> str:
    """A property's name in JavaScript, in quotes where it needs them."""
    return name if name.isidentifier() and name.isascii() else json.dumps(name)


def _package(manifest: Mapping[str, Any], files: Iterable[str]) -> str:
    package = {
        "name": str(manifest["name"]).replace("_", "-"),
        "version": "0.0.0",
        "description": f"{manifest['name']}, compiled to WebAssembly by fxopt {manifest['versions']['fxopt']}",
        "type": "module",
        "main": "./index.js",
        "module": "./index.js",
        "types": "./index.d.ts",
        "exports": {".": {"types": "./index.d.ts", "default": "./index.js"}, "./*": "./*"},
        "files": ["index.js", "index.d.ts", "manifest.json", *sorted(set(files))],
        "sideEffects": False,
    }
    return json.dumps(package, indent=2) + "\n"
