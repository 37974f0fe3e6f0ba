"""`fxopt passes | targets | backends | ops`: what there is, with options."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from fxopt.cli import options
from fxopt.cli.output import Output


def passes(json: options.Json = None, debug: options.Debug = False) -> None:
    """List the passes and their options."""
    from fxopt.catalog import ALIASES, all_passes, entries
    from fxopt.passes.base import ConvertingPass, ExactPass

    origin = entries("pass")
    kinds: dict[type, str] = {ExactPass: "exact", ConvertingPass: "converting"}
    found = []
    for name, kind in all_passes().items():
        settings = {spec.name: _default(spec) for spec in dataclasses.fields(kind)}
        found.append(
            {
                "name": name,
                "kind": next((text for base, text in kinds.items() if issubclass(kind, base)), "lossy"),
                "options": settings,
                "does": _first_line(kind),
                "package": origin[name].package,
            }
        )
    for name, (plain, preset) in ALIASES.items():
        whole = next(row for row in found if row["name"] == plain)
        options = ",".join(f"{key}={value}" for key, value in preset.items())
        found.append({**whole, "name": name, "options": preset, "does": f"Short for {plain}{{{options}}}."})
    _list(found, ("name", "kind", "options", "does"), json)


def targets(json: options.Json = None, debug: options.Debug = False) -> None:
    """List the targets, and how well predictions for them are known to hold."""
    from fxopt.catalog import entries, find_target

    found = []
    for name in entries("target"):
        target = find_target(name)
        found.append(
            {
                "name": name,
                "kind": target.kind,
                "arch": target.arch,
                "backend": target.backend,
                "predictions": target.error,
                "source": target.source,
                "features": sorted(target.features),
            }
        )
    _list(found, ("name", "kind", "arch", "backend", "predictions"), json)


def backends(json: options.Json = None, debug: options.Debug = False) -> None:
    """List the backends, and whether what they need is installed."""
    from importlib.util import find_spec

    from fxopt.catalog import entries, find_backend
    from fxopt.errors import MissingDependency

    found = []
    for name in entries("backend"):
        try:
            kind = find_backend(name)
        except MissingDependency as error:
            found.append({"name": name, "ready": str(error), "runtimes": {}, "does": ""})
            continue
        missing = [library for library in getattr(kind, "needs", ()) if find_spec(library) is None]
        ready = f"needs {', '.join(missing)}" if missing else "yes"
        runtimes = {} if missing else {key: text or "yes" for key, text in kind.runtimes().items()}
        found.append({"name": name, "ready": ready, "runtimes": runtimes, "does": _first_line(kind)})
    _list(found, ("name", "ready", "runtimes", "does"), json)


def ops(
    onnx: Annotated[bool, typer.Option("--onnx", help="List the ONNX operators that run in torch instead.")] = False,
    json: options.Json = None,
    debug: options.Debug = False,
) -> None:
    """List the operators that passes introduce."""
    if onnx:
        from fxopt.ir.onnx.registry import table

        rows = [{"domain": domain or "ai.onnx", "name": name} for domain, name in sorted(table())]
        _list(rows, ("domain", "name"), json)
        return
    from fxopt.ir.op import all_ops

    found = [
        {"name": name, "computes": _first_line(declared), "signature": str(declared.target._schema)}
        for name, declared in sorted(all_ops().items())
    ]
    _list(found, ("name", "computes", "signature"), json)


def _list(rows: Sequence[dict[str, Any]], columns: Sequence[str], json: str | None) -> None:
    from fxopt.report.text import table

    out = Output(json)
    out.json(list(rows))
    out.print(table(columns, [[_cell(row[column]) for column in columns] for row in rows]))


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    return str(value)


def _default(spec: dataclasses.Field[Any]) -> Any:
    if spec.default is not dataclasses.MISSING:
        return spec.default
    return spec.default_factory() if spec.default_factory is not dataclasses.MISSING else "required"


def _first_line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().partition("\n")[0]
