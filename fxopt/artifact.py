"""Saving and loading results: `*.onnx`, or a folder with `manifest.json`, the graph and its constants. No pickles."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt.catalog import entries, find_backend
from fxopt.errors import FxoptError, InvalidModel, MissingDependency, OutputError, UnknownName, Unsupported
from fxopt.ir.folders import MANIFEST, write_folder
from fxopt.ir.graph import Graph
from fxopt.ir.ledger import Ledger
from fxopt.made_for import KEY, concern, recorded

if TYPE_CHECKING:
    from fxopt.backends.base import Executable
    from fxopt.backends.onnxruntime.providers import Provider
    from fxopt.request import Outcome

FORMAT = 1
_REPORT = "report.json"  # of a compiled result
_RUNTIME = "fxopt.runtime"  # in a file's metadata: which of ONNX Runtime's providers it was measured in


def save(outcome: Outcome, path: Path) -> None:
    """Write the result; see `Optimized.save`."""
    if path.suffix == ".onnx":
        _save_onnx(outcome, path)
    elif path.suffix:
        raise Unsupported(f"{path}: results are written as .onnx, or as a folder (a path without a suffix)")
    else:
        write_folder(path, lambda folder: _fill(outcome, folder))


def _save_onnx(outcome: Outcome, path: Path) -> None:
    from fxopt.backends.onnxruntime.forms import FORMS
    from fxopt.backends.onnxruntime.library import KEY as LIBRARY
    from fxopt.backends.onnxruntime.library import SUFFIX
    from fxopt.ir.onnx.export import save as save_graph

    graph = outcome.graph
    if graph.origin != "onnx":
        named = sorted({str(node.target) for node in graph.calls() if "fxopt" in str(node.target)})
        hint = f" (it holds {', '.join(named)})" if named else ""
        raise Unsupported(
            f"{path}: a PyTorch graph optimised for {outcome.report.target} has no ONNX form{hint}; "
            "save it as a folder, or optimise for target 'host'"
        )
    if _is_compiled(outcome):
        warnings.warn(
            f"{path} holds the graph alone, for ONNX Runtime; the code that was compiled for {outcome.report.target} "
            "is saved in a folder (a path without a suffix)",
            stacklevel=4,
        )
    library = _library_of(outcome)
    if library is not None:
        _copy(library, path.with_suffix(SUFFIX))
    save_graph(_signed(outcome, {} if library is None else {LIBRARY: path.with_suffix(SUFFIX).name}), path, FORMS)


def _is_compiled(outcome: Outcome) -> bool:
    """Whether there is code for the target, beside the graph."""
    name = outcome.report.backend
    known = name in entries("backend") and find_backend(name).is_compiler
    return known and outcome.report.outcome in ("optimized", "compiled")


def _library_of(outcome: Outcome) -> Path | None:
    """The library of own kernels that the result runs with."""
    from fxopt.backends.onnxruntime.session import OnnxExecutable

    return outcome.executable.library if isinstance(outcome.executable, OnnxExecutable) else None


def _copy(source: Path, path: Path) -> None:
    """Copy a file through a temporary name."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        if path.exists() and source.samefile(path):
            return
        shutil.copyfile(source, temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def _signed(outcome: Outcome, more: dict[str, str]) -> Graph:
    """The graph with what it was made for in the model's metadata; itself when nothing was changed."""
    graph = outcome.graph
    if (outcome.report.outcome != "optimized" and not more) or graph.model is None:
        return graph
    signed = graph.copy()
    assert signed.model is not None
    proto = type(signed.model.proto).FromString(signed.model.proto.SerializeToString())
    signed.model.proto = proto
    known = {entry.key: entry for entry in proto.metadata_props}
    signed_by = _metadata(outcome) if outcome.report.outcome == "optimized" else {}
    for key, value in {**signed_by, **more}.items():
        entry = known[key] if key in known else proto.metadata_props.add(key=key)
        entry.value = value
    return signed


def _metadata(outcome: Outcome) -> dict[str, str]:
    report = outcome.report
    applied = sorted({row.pass_name for row in outcome.ledger.select(outcome="applied")})
    return {
        "fxopt.version": report.versions.get("fxopt", ""),
        "fxopt.target": report.target,
        "fxopt.passes": ",".join(applied),
        KEY: recorded(frozenset(report.instruction_sets)),
        **({_RUNTIME: report.runtime} if report.runtime else {}),
    }


def _fill(outcome: Outcome, folder: Path) -> dict[str, Any]:
    """Write what the manifest, which is returned, describes."""
    graph = outcome.graph
    compiled = outcome.executable.write(folder)
    if compiled is not None:
        return with_reports(dict.fromkeys(compiled["functions"], outcome), folder, compiled)
    kind = "onnx" if graph.origin == "onnx" else "text"
    if kind == "onnx":
        _save_onnx(outcome, folder / "model.onnx")
    else:
        from fxopt.ir.text import save_text

        save_text(graph, folder / "graph")
    outcome.executable.save_beside(folder)
    call = graph.call_spec.to_json() if graph.call_spec is not None else None
    return {
        "call": call,
        "format": FORMAT,
        "graph": kind,
        "target": outcome.report.target,
        "backend": outcome.report.backend,
        "report": outcome.report.to_json(),
        "ledger": outcome.ledger.to_json(),
    }


def with_reports(outcomes: Mapping[str, Outcome], folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest of compiled functions; their reports, for which callers have no use, go to a file of their own."""
    known = {}
    for name, outcome in outcomes.items():
        spec = outcome.graph.call_spec
        known[name] = {
            "report": outcome.report.to_json(),
            "ledger": outcome.ledger.to_json(),
            "call": spec.to_json() if spec is not None else None,
        }
    if not (folder / _REPORT).exists():  # a loaded result brings its own
        (folder / _REPORT).write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    backend = next(iter(outcomes.values())).report.backend
    return {"format": FORMAT, "graph": "compiled", "backend": backend, **manifest}


def load(path: Path, threads: int | None = None, function: str | None = None) -> Outcome:
    """What `save` wrote; `function` is one of a compiled result with several."""
    if not path.exists():
        raise InvalidModel(f"{path}: no such file or folder; expected an .onnx file or a folder that fxopt saved")
    if path.is_file():
        return _load_onnx(path, threads, None)
    manifest_file = path / MANIFEST
    if not manifest_file.is_file():
        raise InvalidModel(f"{path} holds no {MANIFEST}; expected a folder that fxopt saved")
    try:
        manifest: Any = json.loads(manifest_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidModel(f"{manifest_file} is not JSON: {error}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise InvalidModel(f"{path} has format {found}; this version reads format {FORMAT}")
    if manifest.get("graph") == "compiled":
        return _load_compiled(path, manifest, function)
    lacking = [key for key in ("graph", "report", "ledger") if key not in manifest]
    if lacking:
        raise InvalidModel(f"{manifest_file} lacks {lacking[0]!r}; save the result again")
    if manifest["graph"] == "onnx":
        return _load_onnx(path / "model.onnx", threads, manifest)
    from fxopt.ir.text import load_text

    graph = load_text(path / "graph")
    return _outcome(graph, _in_torch(graph, manifest, path), manifest)


def _in_torch(graph: Graph, manifest: dict[str, Any], path: Path) -> Executable:
    """On a GPU, with the kernels that were saved beside the graph; else, or where Triton is not installed, as it is."""
    from fxopt.backends.eager import EagerExecutable
    from fxopt.backends.triton import Triton
    from fxopt.catalog import find_target

    if manifest.get("backend") != "triton":
        return EagerExecutable(graph)
    try:
        return Triton().open(graph, find_target(str(manifest.get("target"))), path / "kernels")
    except (MissingDependency, UnknownName) as error:
        warnings.warn(f"fxopt: {error}; the result runs in the reference", stacklevel=5)
        return EagerExecutable(graph)


def _load_compiled(path: Path, manifest: dict[str, Any], function: str | None) -> Outcome:
    from fxopt.backends.tvm.saved import open_saved

    try:
        executable = open_saved(path, manifest, function)
        known = json.loads((path / _REPORT).read_text(encoding="utf-8"))[executable.graph.name]
    except FxoptError:
        raise
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise InvalidModel(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    return _outcome(executable.graph, executable, known)


def _load_onnx(path: Path, threads: int | None, manifest: dict[str, Any] | None) -> Outcome:
    from fxopt.backends.onnxruntime.session import OnnxExecutable
    from fxopt.frontends.onnx import load as load_graph
    from fxopt.inputs import bind_sizes

    graph = load_graph(path)
    bind_sizes(graph, None)
    provider, lacking = _provider(graph, path.name)
    outcome = _outcome(graph, OnnxExecutable(path, threads, provider=provider), manifest)
    for text in filter(None, (concern_here(graph, path.name), lacking)):
        outcome.report.warnings.append(text)
        warnings.warn(f"fxopt: {text}", stacklevel=4)
    return outcome


def _provider(graph: Graph, name: str) -> tuple[Provider, str]:
    """The provider that the file was measured in, or ONNX Runtime's own with the reason."""
    from fxopt.backends.onnxruntime.providers import CPU, PROVIDERS

    metadata = {} if graph.model is None else {entry.key: entry.value for entry in graph.model.proto.metadata_props}
    wanted = metadata.get(_RUNTIME, CPU.name)
    known = PROVIDERS.get(wanted)
    if known is not None and not known.missing:
        return known, ""
    why = "which this version does not know" if known is None else f"which {known.missing}"
    return CPU, f"{name} was measured in the provider {wanted}, {why}; it runs in ONNX Runtime's own kernels"


def concern_here(graph: Graph, name: str) -> str:
    """What the user of a file should know on this machine; see `fxopt.made_for`."""
    from fxopt.cost_model.host import instruction_sets

    if graph.model is None:
        return ""
    metadata = {entry.key: entry.value for entry in graph.model.proto.metadata_props}
    return concern(metadata, instruction_sets(), name)


def _outcome(graph: Graph, executable: Any, manifest: dict[str, Any] | None) -> Outcome:
    from fxopt.report.report import Report, Summary
    from fxopt.request import Outcome

    if manifest is not None:
        from fxopt.frontends.capture.call_spec import CallSpec

        try:
            if manifest.get("call") is not None:
                graph.call_spec = CallSpec.from_json(manifest["call"])
            report = Report.from_json(manifest["report"])
            ledger = Ledger.from_json(manifest["ledger"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidModel(f"the report cannot be read: {type(error).__name__}: {error}") from error
        report.executed_on = executable.executed_on
        return Outcome(graph, executable, report, ledger)
    operators = sum(1 for _ in graph.calls())
    summary = Summary(operators, {}, graph.size_bytes(), 0)
    report = Report(
        target="host", backend="onnxruntime", executed_on=executable.executed_on, outcome="unchanged",
        why="loaded from a file", objective="latency", budget=None, before=summary, after=summary,
    )  # fmt: skip
    return Outcome(graph, executable, report, Ledger())
