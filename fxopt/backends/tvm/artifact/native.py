"""What comes with a shared library: a C header, an example in C, a loader for Python."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fxopt.backends.tvm.artifact import native_loader
from fxopt.backends.tvm.source import identifier

_TYPES = {
    "float32": "float", "int64": "int64_t", "int32": "int32_t", "bool": "uint8_t", "uint8": "uint8_t", "int8": "int8_t",
}  # fmt: skip
_FORMATS = {"float32": '"%.9g\\n", (double)', "int64": '"%lld\\n", (long long)'}
_KEYWORDS = """
arena weights auto break case char const continue default do double else enum extern float for goto if inline int long
register restrict return short signed sizeof static struct switch typedef union unsigned void volatile while bool true
false class delete new private public protected template this throw try catch namespace operator using virtual main
"""  # of C and C++, and the parameters' own names
_WORDS = frozenset(_KEYWORDS.split())


def write_native(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write `NAME.h`, `example.c` and `NAME.py`."""
    name = str(manifest["name"])
    (folder / f"{name}.h").write_text(header(manifest), encoding="utf-8")
    (folder / "example.c").write_text(_example(manifest), encoding="utf-8")
    shutil.copyfile(str(native_loader.__file__), folder / f"{name}.py")


def header(manifest: Mapping[str, Any]) -> str:
    """The C header."""
    name, upper, build = manifest["name"], manifest["name"].upper(), manifest["builds"][0]
    entries = [entry for function in manifest["functions"].values() for entry in function["entries"]]
    flags = ", ".join(build["cpu_flags"]) or "nothing special"
    lines = [
        f"/* {name}, compiled by fxopt for {manifest['target']['name']} ({build['triple']}; needs {flags}).",
        " *",
        " * Inputs and outputs are contiguous arrays. `arena` is scratch memory, aligned to 64 bytes, for one call at",
        " * a time; it holds nothing between calls. No two pointers may overlap.",
        " */",
        f"#ifndef {upper}_H",
        f"#define {upper}_H",
        "#include <stdint.h>",
        "#ifdef __cplusplus",
        'extern "C" {',
        "#endif",
        "",
        f"#define {upper}_ARENA_BYTES {max(entry['arena_bytes'] for entry in entries)}",
        f"#define {upper}_WEIGHTS_BYTES {build['weights_bytes']}",
        "",
    ]
    if build["weights"] is None:
        lines += [f"/* The weights, which are in the library. */\nconst void *{name}_weights(void);"]
    else:
        lines += [f"/* `weights` is the content of {build['weights']}, aligned to 64 bytes. */"]
    for entry in entries:
        lines += ["", *(f"/* {port}" for port in [_ports(entry)]), f"void {entry['symbol']}({_parameters(entry)});"]
    lines += ["", "#ifdef __cplusplus", "}", "#endif", "#endif", ""]
    return "\n".join(lines)


def _ports(entry: Mapping[str, Any]) -> str:
    texts = [f"{port['name']}: {port['dtype']} {list(port['shape'])}" for port in (*entry["inputs"], *entry["outputs"])]
    return "; ".join(texts).replace("*/", "* /") + " */"


def _parameters(entry: Mapping[str, Any]) -> str:
    names = iter(parameter_names(entry))
    inputs = [f"const {_TYPES[port['dtype']]} *{next(names)}" for port in entry["inputs"]]
    outputs = [f"{_TYPES[port['dtype']]} *{next(names)}" for port in entry["outputs"]]
    return ", ".join(["void *arena", "const void *weights", *inputs, *outputs])


def parameter_names(entry: Mapping[str, Any]) -> list[str]:
    """C names of the inputs and outputs, each once."""
    found: list[str] = []
    for port in (*entry["inputs"], *entry["outputs"]):
        name = identifier(port["name"])
        while name in found or name in _WORDS:
            name += "_"
        found.append(name)
    return found


def _example(manifest: Mapping[str, Any]) -> str:
    name, build = str(manifest["name"]), manifest["builds"][0]
    entry = next(iter(manifest["functions"].values()))["entries"][0]
    names = parameter_names(entry)
    ports = [*entry["inputs"], *entry["outputs"]]
    inputs, outputs = names[: len(entry["inputs"])], names[len(entry["inputs"]) :]
    buffers = [
        f"static _Alignas(64) {_TYPES[port['dtype']]} {buffer}[{_count(port)}]; /* {list(port['shape'])} */"
        for port, buffer in zip(ports, names, strict=True)
    ]
    usage = " ".join(f"{buffer}.bin" for buffer in inputs)
    body = [
        f"    if (!read_file(argv[{index + 1}], {buffer}, sizeof {buffer})) return 1;"
        for index, buffer in enumerate(inputs)
    ]
    weights, declared = f"{name}_weights()", []
    if build["weights"] is not None:
        weights = "weights"
        declared = [f"static _Alignas(64) unsigned char weights[{name.upper()}_WEIGHTS_BYTES + 1];"]
        body.append(f'    if (!read_file("{build["weights"]}", weights, {name.upper()}_WEIGHTS_BYTES)) return 1;')
    body.append(f"    {entry['symbol']}({', '.join(['arena', weights, *names])});")
    for port, buffer in zip(entry["outputs"], outputs, strict=True):
        shown = _FORMATS.get(port["dtype"], '"%d\\n", (int)')
        body.append(f"    for (size_t i = 0; i < {_count(port)}; i++) printf({shown}{buffer}[i]);")
    return _EXAMPLE.format(
        name=name,
        upper=name.upper(),
        usage=usage,
        count=len(inputs) + 1,
        buffers="\n".join([*buffers, *declared]),
        body="\n".join(body),
    )


def _count(port: Mapping[str, Any]) -> int:
    sizes: Sequence[int] = port["shape"]
    count = 1
    for size in sizes:
        count *= size
    return max(count, 1)


_EXAMPLE = """/* Runs {name} once: the inputs are files of raw values, the outputs are printed one value a line.
 *
 *   cc -O2 example.c -o example -L. -l{name} -Wl,-rpath,'$ORIGIN'
 *   ./example {usage}
 */
#include "{name}.h"
#include <stdio.h>

static _Alignas(64) unsigned char arena[{upper}_ARENA_BYTES + 1];
{buffers}

static int read_file(const char *path, void *data, size_t size) {{
    FILE *file = fopen(path, "rb");
    size_t got = file ? fread(data, 1, size, file) : 0;
    if (file) fclose(file);
    if (got != size) fprintf(stderr, "%s: expected %zu bytes, got %zu\\n", path, size, got);
    return got == size;
}}

int main(int argc, char **argv) {{
    if (argc != {count}) {{
        fprintf(stderr, "usage: %s {usage}\\n", argv[0]);
        return 2;
    }}
{body}
    return 0;
}}
"""
