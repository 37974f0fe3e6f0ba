"""Find components by name: passes, targets, backends and frontends, ours and those of plug-ins.

Nothing registers by being imported: a file's stem is its component's name, the file is imported when the component is
asked for, and it holds exactly one. Installed packages add more through the entry-point groups `fxopt.passes`,
`fxopt.targets`, `fxopt.backends` and `fxopt.frontends` (`name = "module:Object"`).
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from fxopt.errors import FxoptError, InvalidOption, MissingDependency, UnknownName, unknown

if TYPE_CHECKING:
    from fxopt.ir.target import Target
    from fxopt.passes.base import Pass

Kind = Literal["pass", "target", "backend", "frontend"]


@dataclass(frozen=True)
class _Place:
    """Where the components of one kind are: package, entry-point group, and the package's other modules."""

    package: str
    group: str
    others: frozenset[str] = frozenset()


_NO_PASSES = frozenset(
    {
        "base", "crossings", "histogram", "manager", "pipelines", "rules", "second_moments", "sequential", "stats",
        "stats_file",
    }
)  # fmt: skip
_NO_SOURCES = frozenset(
    {
        "capture", "comparison", "convert_graph", "convert_opset", "fxopt_nodes", "infer_types", "input_shapes",
        "onnx_import", "to_onnx",
    }
)  # fmt: skip
_PLACES: dict[Kind, _Place] = {
    "pass": _Place("fxopt.passes", "fxopt.passes", _NO_PASSES),
    "target": _Place("fxopt.cost_model.targets", "fxopt.targets"),
    "backend": _Place("fxopt.backends", "fxopt.backends", frozenset({"base", "eager_cpu", "eager_cuda", "partition"})),
    "frontend": _Place("fxopt.frontends", "fxopt.frontends", _NO_SOURCES),
}


# Other names of passes: short for a pass with these options.
ALIASES: dict[str, tuple[str, dict[str, str]]] = {"sparsify-24": ("sparsify", {"pattern": "2:4"})}


@dataclass(frozen=True)
class Entry:
    """A component that can be imported; `attribute` is None for ours, where the file's one definition counts."""

    kind: Kind
    name: str
    module: str
    attribute: str | None = None
    package: str = "fxopt"  # the distribution it comes from

    def load(self) -> Any:
        """Import it.

        Raises:
            MissingDependency: an import that it needs fails.
            InvalidOption: the module has no such definition.
        """
        try:
            module = importlib.import_module(self.module)
        except ImportError as error:
            raise MissingDependency(
                f"{self.kind} {self.name!r} of {self.package} cannot be imported: {error}"
            ) from error
        if self.attribute is None:
            return _definition(self.kind, module)
        value: Any = module
        for part in self.attribute.split("."):
            if not hasattr(value, part):
                raise InvalidOption(
                    f"{self.kind} {self.name!r} of {self.package}: {self.module} has no {self.attribute}"
                )
            value = getattr(value, part)
        return value


def entries(kind: Kind) -> dict[str, Entry]:
    """Every component of a kind by name, ours first.

    Raises:
        InvalidOption: two of them have one name.
    """
    place = _PLACES[kind]
    found = dict(_own(kind))
    for point in entry_points(group=place.group):
        entry = _entry(kind, point)
        known = found.get(entry.name)
        if known is not None and known != entry:
            raise InvalidOption(
                f"{kind} {entry.name!r} is defined twice, by {known.package} ({known.module}) and by {entry.package} "
                f"({entry.module}); uninstall one of them or rename its entry point in the group {place.group}"
            )
        found[entry.name] = entry
    return found


@cache
def _own(kind: Kind) -> dict[str, Entry]:
    place = _PLACES[kind]
    package = importlib.import_module(place.package)
    stems = [info.name for info in pkgutil.iter_modules(package.__path__)]
    return {
        _kebab(stem): Entry(kind, _kebab(stem), f"{place.package}.{stem}")
        for stem in stems
        if stem not in place.others and not stem.startswith("_")
    }


def _entry(kind: Kind, point: EntryPoint) -> Entry:
    package = point.dist.name if point.dist is not None else "an unknown package"
    return Entry(kind, _kebab(point.name), point.module, point.attr or None, package)


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def find(kind: Kind, name: str) -> Any:
    """The component of this name; dashes and underscores are the same.

    Raises:
        UnknownName: there is none; near names are suggested.
    """
    known = entries(kind)
    entry = known.get(canonical(name) if kind == "pass" else _kebab(name))
    if entry is None:
        raise unknown(kind, name, {*known, *ALIASES} if kind == "pass" else known)
    return entry.load()


def canonical(name: str) -> str:
    """The name of the pass that a name or another name of it stands for, with dashes."""
    kebab = _kebab(name)
    return ALIASES[kebab][0] if kebab in ALIASES else kebab


def pass_names() -> list[str]:
    """Every name by which a pass can be asked for."""
    return sorted({*entries("pass"), *ALIASES})


def find_pass(name: str) -> type[Pass]:
    """The class of a pass."""
    found: type[Pass] = _checked_pass(find("pass", name), canonical(name))
    return found


def all_passes() -> dict[str, type[Pass]]:
    """Every pass by name."""
    return {name: _checked_pass(entry.load(), name) for name, entry in entries("pass").items()}


def find_target(name: str) -> Target:
    """The target of this name, or of another name of it."""
    from fxopt.cost_model.targets import canonical
    from fxopt.ir.target import Target

    found = find("target", canonical(name))
    target = found() if callable(found) else found  # the host is detected
    if not isinstance(target, Target):
        raise InvalidOption(f"target {name!r}: {target!r} is not a fxopt.ir.target.Target")
    return target


def find_backend(name: str) -> Any:
    """The class of a backend."""
    return find("backend", name)


def read_by_plugin(model: Any) -> Any:
    """The `Graph` of a model that a plug-in's frontend accepts; any other model as it is.

    A frontend of a plug-in is a module or an object with `accepts(model) -> bool` and `load(model) -> Graph`; it is
    asked before ours, with what the user gave, such as a path.

    Raises:
        InvalidOption: a frontend lacks one of them, or loads something else than a graph.
    """
    from fxopt.ir.graph import Graph

    if isinstance(model, Graph):
        return model
    for name, entry in entries("frontend").items():
        if entry.package == "fxopt":
            continue
        source = entry.load()
        for part in ("accepts", "load"):
            if not callable(getattr(source, part, None)):
                raise InvalidOption(f"frontend {name!r} of {entry.package} has no function {part}(model)")
        if source.accepts(model):
            graph = source.load(model)
            if not isinstance(graph, Graph):
                raise InvalidOption(f"frontend {name!r} of {entry.package} loads a {type(graph).__name__}, not a Graph")
            return graph
    return model


def _checked_pass(value: Any, name: str) -> type[Pass]:
    from fxopt.passes.base import Pass, kebab

    if not (inspect.isclass(value) and issubclass(value, Pass)):
        raise InvalidOption(f"pass {name!r}: {value!r} is not a subclass of fxopt.passes.base.Pass")
    if kebab(value.__name__) != _kebab(name):
        raise InvalidOption(
            f"pass {name!r} is defined by the class {value.__name__}, whose name means {kebab(value.__name__)!r}; "
            "file stem (or entry point) and class name must agree"
        )
    return value


def _definition(kind: Kind, module: ModuleType) -> Any:
    """The one component that a file of ours defines."""
    if kind == "frontend":
        return module
    if kind == "target":
        return _attribute(module, "TARGET")
    base = importlib.import_module(f"{_PLACES[kind].package}.base")
    parent = base.Pass if kind == "pass" else base.Backend
    defined = [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, parent) and not name.startswith("_") and _is_of(value, module)
    ]
    if len(defined) != 1:
        names = ", ".join(value.__name__ for value in defined) or "none"
        raise InvalidOption(f"{module.__name__} must define exactly one {kind}; it defines {names}")
    return defined[0]


def _is_of(value: type, module: ModuleType) -> bool:
    """Whether the class was defined in this file, or in the files of this folder."""
    return value.__module__ == module.__name__ or value.__module__.startswith(f"{module.__name__}.")


def _attribute(module: ModuleType, name: str) -> Any:
    if not hasattr(module, name):
        raise InvalidOption(f"{module.__name__} must define {name}")
    return getattr(module, name)


# ---- components in files


_IN_FILE = re.compile(r"^(?P<file>.*\.py):(?P<name>[A-Za-z_]\w*)(?:\{(?P<options>.*)\})?\s*$", re.DOTALL)


def pass_from_text(text: str) -> Pass:
    """The pass that `name{option=value,...}` or `./file.py:Class{option=value,...}` describes.

    Raises:
        UnknownName: the file, class, pass or option does not exist.
        InvalidOption: the text or a value has the wrong form.
    """
    from fxopt.passes.base import Pass, make_pass, parse_options, parse_pass

    match = _IN_FILE.match(text.strip())
    if match is None:
        if ".py" in text.partition("{")[0]:
            raise InvalidOption(f"pass {text!r}: expected ./file.py:Class or ./file.py:Class{{option=value,...}}")
        return parse_pass(_spelled_out(text), find_pass)
    kind = object_from_file(Path(match["file"]), match["name"])
    if not (inspect.isclass(kind) and issubclass(kind, Pass)):
        raise InvalidOption(f"pass {text!r}: {match['name']} is not a subclass of fxopt.passes.base.Pass")
    return make_pass(kind, parse_options(match["options"] or "", text))


def _spelled_out(text: str) -> str:
    """The text with the pass itself in the place of another name of it."""
    from fxopt.passes.base import parse_options

    name, _, inside = text.strip().partition("{")
    alias = ALIASES.get(_kebab(name.strip()))
    if alias is None:
        return text
    plain, preset = alias
    given = parse_options(inside.strip().removesuffix("}"), text)
    twice = sorted(preset.keys() & given.keys())
    if twice:
        raise InvalidOption(f"pass {text!r}: {name.strip()} sets {twice[0]}={preset[twice[0]]}; write {plain}{{...}}")
    return f"{plain}{{{','.join(f'{key}={value}' for key, value in {**preset, **given}.items())}}}"


def function_from_text(text: str) -> Any:
    """The function that `file.py:function` names.

    Raises:
        UnknownName: the file or the function does not exist.
        InvalidOption: the text has another form, or names something that cannot be called.
    """
    file, colon, name = text.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise InvalidOption(f"{text!r}: expected file.py:function")
    found = object_from_file(Path(file), name)
    if not callable(found):
        raise InvalidOption(f"{text!r}: {name} is a {type(found).__name__}, not a function")
    return found


def object_from_file(path: Path, name: str) -> Any:
    """The top-level object `name` of a Python file, which may import its neighbours."""
    if not path.is_file():
        raise UnknownName(f"{path}: no such file")
    module = _module_from_file(path.resolve())
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        near = difflib.get_close_matches(name, own, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it defines {', '.join(own) or 'nothing'}"
        raise UnknownName(f"{path} defines no {name!r}; {hint}")
    return getattr(module, name)


_FILES: dict[Path, ModuleType] = {}


def _module_from_file(path: Path) -> ModuleType:
    if path in _FILES:
        return _FILES[path]
    name = f"_fxopt_file_{len(_FILES)}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        with _first_on_path(path.parent):
            spec.loader.exec_module(module)
    except FxoptError:
        raise
    except Exception as error:
        del sys.modules[name]
        raise InvalidOption(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    _FILES[path] = module
    return module


@contextlib.contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))
