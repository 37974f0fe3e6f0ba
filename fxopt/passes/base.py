"""What a pass is. Exact passes change the graph; lossy passes offer candidates and never decide whether they pay.

Converting passes change the graph before all others, where the user names them.

A pass is a frozen dataclass; its fields are its options, in Python and on the command line:
`QuantizeLinear(bits=8)` and `quantize-linear{bits=8}` are the same.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import fx

from fxopt.errors import InvalidOption, unknown
from fxopt.ir.graph import Graph
from fxopt.ir.ledger import Ledger, Refusal
from fxopt.ir.pattern_work import Price, Tile
from fxopt.ir.target import Cost, Target

if TYPE_CHECKING:
    from fxopt.passes.stats import Stats

__all__ = [
    "Candidate",
    "Context",
    "ConvertingPass",
    "Declined",
    "Estimate",
    "ExactPass",
    "LossyPass",
    "Pass",
    "Refusal",
    "Setting",
    "parse_pass",
]

_UNKNOWN = 0.5  # break-even of attention with patterns, where no backend is known


class Capabilities(Protocol):
    """What a pass may ask about the backend that will run the graph."""

    @property
    def name(self) -> str:
        """The backend's name."""
        ...

    def supports(self, op: str, dtype: str, pattern: str = "") -> str:
        """ "" when the backend runs `op` in `dtype` faster than a naive kernel would, else the reason why not."""
        ...

    def skips_zeros(self, target: Target, dtype: str, pattern: str, shape: tuple[int, int] | None = None) -> str:
        """ "" when linears whose weights of this type have zeros of this pattern take less time, else the reason.

        Args:
            shape: of one weight, (out, in); None: of any.
        """
        ...

    def attention_tile(self, dtype: str, width: int, renumbered: bool = False) -> Tile | None:
        """What the backend's kernel for attention with patterns multiplies at once; None: it takes slices."""
        ...

    def attention_price(self, threads: int) -> Price:
        """What slices of dense attention cost on so many threads."""
        ...


@dataclass
class Context:
    """What a pass knows beside the graph."""

    target: Target
    ledger: Ledger = field(default_factory=Ledger)
    capabilities: Capabilities | None = None
    include: re.Pattern[str] | None = None
    exclude: re.Pattern[str] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    where: str = ""  # in a body: its path and a slash, which the names of its nodes begin with in the ledger
    objective: str = "latency"  # or "size"
    custom_ops: bool = False  # own kernels may be used
    later: tuple[str, ...] = ()  # lossy passes that are planned after this one, on what it makes

    def supports(self, op: str, dtype: str, pattern: str = "") -> str:
        """ "" when the backend has a kernel for it on the target, else the reason."""
        return "" if self.capabilities is None else self.capabilities.supports(op, dtype, pattern)

    def unskipped(self, dtype: str, pattern: str, shape: tuple[int, int] | None = None) -> str:
        """ "" when linears take less time for zeros of this pattern in a weight of this type, else the reason."""
        known = [kernel for kernel in self.target.sparse_kernels if (kernel.pattern, kernel.dtype) == (pattern, dtype)]
        if self.custom_ops and any(kernel.custom_ops for kernel in known):
            return ""
        backend = self.capabilities
        reason = "" if backend is None else backend.skips_zeros(self.target, dtype, pattern, shape)
        if reason or any(not kernel.custom_ops for kernel in known):
            return reason
        return f"{self.target.name} lists no kernel that skips {pattern} in {dtype}"

    def attention_tile(self, dtype: str, width: int, renumbered: bool = False) -> Tile | None:
        """The tile of the backend's kernel for attention with patterns; None: slices of dense attention."""
        backend = self.capabilities
        return None if backend is None else backend.attention_tile(dtype, width, renumbered)

    def attention_price(self) -> Price:
        """What slices of dense attention cost in the backend, on the cores of the target."""
        backend = self.capabilities
        return Price.of_break_even(_UNKNOWN) if backend is None else backend.attention_price(self.target.cores)

    def inside(self, path: str) -> Context:
        """The context of a pass in a body, with a ledger of its own (see `merge`)."""
        return dataclasses.replace(self, ledger=Ledger(), where=f"{path}/")

    def merge(self, inner: Context) -> None:
        """Take over the ledger of a body: rows that are not there yet, under the nodes' paths."""
        known = set(self.ledger.verdicts)
        for verdict in inner.ledger.verdicts:
            moved = dataclasses.replace(verdict, node=inner.where + verdict.node)
            if moved not in known:
                self.ledger.add(moved)
        for note in inner.ledger.notes:
            self.ledger.note(inner.where + note)

    def excluded(self, name: str) -> Refusal | None:
        """The refusal of a node that the user left out."""
        name = self.where + name
        if self.exclude is not None and self.exclude.search(name):
            return Refusal("excluded by --exclude {}", self.exclude.pattern)
        if self.include is not None and not self.include.search(name):
            return Refusal("not in --include {}", self.include.pattern)
        return None


@dataclass(frozen=True)
class Setting:
    """How one pass treats one view; printed like a pass: `quantize-linear{activations=dynamic}`."""

    pass_name: str
    values: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, pass_name: str, **values: Any) -> Setting:
        """A setting from keywords."""
        return cls(pass_name, tuple(values.items()))

    def __getitem__(self, key: str) -> Any:
        return dict(self.values)[key]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or the default."""
        return dict(self.values).get(key, default)

    def __str__(self) -> str:
        inner = ",".join(f"{key}={value}" for key, value in self.values)
        return f"{self.pass_name}{{{inner}}}" if inner else self.pass_name


@dataclass(frozen=True)
class Candidate:
    """One thing a lossy pass could do to one view, or the reason why it cannot.

    `node` is the fx name of the view's last node (stable under `Graph.copy`), `anchor` the name a user knows it by,
    `group` what the guard drops together (operator and shape).
    """

    pass_name: str
    node: str
    anchor: str
    setting: Setting
    refusal: Refusal | None = None
    group: str = ""


@dataclass(frozen=True)
class Estimate:
    """What a candidate would do: output noise to signal of the view, the work before and after, bytes saved.

    `refusal` says why the statistics rule the candidate out, where they do; `detail` what was found, for the ledger.
    """

    error: float
    before: Cost
    after: Cost
    saved_bytes: int = 0
    refusal: Refusal | None = None
    detail: str = ""


class Declined(Exception):
    """Raised by `LossyPass.apply` before it changes anything: the candidate cannot be done after all.

    It is refused with the reason, the others go on.
    """

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


def kebab(name: str) -> str:
    """`FoldBatchNorm` -> `fold-batch-norm`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()


@dataclass(frozen=True)
class Pass:
    """A named rewrite with options."""

    after: ClassVar[tuple[str, ...]] = ()  # passes that must run earlier when both run

    @property
    def name(self) -> str:
        """The class name in kebab case."""
        return kebab(type(self).__name__)

    def __str__(self) -> str:
        changed = [
            f"{spec.name}={getattr(self, spec.name)}"
            for spec in dataclasses.fields(self)
            if getattr(self, spec.name) != spec.default
        ]
        return f"{self.name}{{{','.join(changed)}}}" if changed else self.name


@dataclass(frozen=True)
class ExactPass(Pass):
    """Changes the graph in place without changing what it computes (up to rounding)."""

    enters_bodies: ClassVar[bool] = False  # the manager runs it on the bodies of If, Loop and the like too

    def opset(self, graph: Graph, ctx: Context) -> int:
        """The version of the ONNX standard that its rewrites of this graph need; 0: any."""
        return 0

    def run(self, graph: Graph, ctx: Context) -> int:
        """Rewrite; returns the number of changes (0 ends a fix-point loop)."""
        raise NotImplementedError(f"{type(self).__name__} must define run(graph, ctx) -> number of changes")


@dataclass(frozen=True)
class ConvertingPass(Pass):
    """Changes the graph in place, and its numbers too, before all other passes and only where it is asked for by name.

    What the others make of the converted graph is judged against the model that came in: error and time.
    """

    enters_bodies: ClassVar[bool] = False  # as in exact passes

    def run(self, graph: Graph, ctx: Context) -> int:
        """Rewrite, with a verdict per node in the ledger; returns the number of changes."""
        raise NotImplementedError(f"{type(self).__name__} must define run(graph, ctx) -> number of changes")


@dataclass(frozen=True)
class LossyPass(Pass):
    """Offers candidates; the planner chooses, the manager applies."""

    def candidates(self, graph: Graph, ctx: Context) -> Iterator[Candidate]:
        """Everything the pass could do, and what it cannot do with the reason."""
        raise NotImplementedError(f"{type(self).__name__} must define candidates(graph, ctx)")

    def clipped(self, graph: Graph, candidate: Candidate) -> tuple[fx.Node, ...]:
        """The observed nodes of which `estimate` and `apply` want histograms too."""
        return ()

    def work(self, graph: Graph, candidate: Candidate) -> tuple[Cost, Cost] | None:
        """Work before and after, when it is known without statistics: what does not pay is then not estimated."""
        return None

    def observed(self, graph: Graph, candidate: Candidate) -> tuple[fx.Node, ...]:
        """The nodes whose values `estimate` and `apply` want statistics of."""
        return ()

    def whole(self, graph: Graph, candidate: Candidate) -> tuple[fx.Node, ...]:
        """The observed nodes of which `estimate` and `apply` want whole items, `stats[node].items`."""
        return ()

    def fixed_levels(self, graph: Graph, candidate: Candidate) -> tuple[fx.Node, fx.Node | None] | None:
        """The value that is rounded to fixed 8-bit levels, and the one given on such levels; None without such."""
        return None

    def moments(self, graph: Graph, candidate: Candidate) -> fx.Node | None:
        """The node whose second moments `apply` wants in `stats.moments`, measured on the graph as rewritten so far."""
        return None

    def moment_rows(self, graph: Graph, candidate: Candidate) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """How a value of `moments` becomes rows [groups, rows, features]; None: it is [..., features] already."""
        return None

    def estimate(self, graph: Graph, candidate: Candidate, stats: Stats) -> Estimate:
        """Expected error and work, from calibration statistics."""
        raise NotImplementedError(f"{type(self).__name__} must define estimate(graph, candidate, stats)")

    def apply(self, graph: Graph, candidate: Candidate, stats: Stats) -> None:
        """Rewrite the candidate's view.

        Raises:
            Declined: what only shows now rules the candidate out; nothing was changed.
        """
        raise NotImplementedError(f"{type(self).__name__} must define apply(graph, candidate, stats)")


_PASS_TEXT = re.compile(r"^\s*([A-Za-z][\w-]*)\s*(?:\{(.*)\})?\s*$", re.DOTALL)


def parse_pass(text: str, find: Callable[[str], type[Pass]]) -> Pass:
    """The pass that `name{option=value,...}` describes; `find` maps a kebab-case name to its class.

    Raises:
        UnknownName: the pass or an option does not exist.
        InvalidOption: the text or a value has the wrong form.
    """
    match = _PASS_TEXT.match(text)
    if match is None:
        raise InvalidOption(f"pass {text!r}: expected name or name{{option=value,...}}")
    name, inside = match.groups()
    kind = find(name.replace("_", "-"))
    return make_pass(kind, parse_options(inside or "", text))


def parse_options(text: str, whole: str, kind: str = "pass") -> dict[str, str]:
    """`a=1,b=(2,3)` as a dictionary of texts; commas inside brackets and quotes do not split."""
    options: dict[str, str] = {}
    parts = re.findall(r"(?:[^,\[\](){}'\"]|\[[^\]]*\]|\([^)]*\)|'[^']*'|\"[^\"]*\")+", text)
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise InvalidOption(f"{kind} {whole!r}: {part.strip()!r} is not of the form option=value")
        options[key.strip().replace("-", "_")] = value.strip()
    return options


def make_pass(kind: type[Pass], options: Mapping[str, Any]) -> Pass:
    """An instance of `kind`; texts are converted to the type of the option's default."""
    fields = {spec.name: spec for spec in dataclasses.fields(kind)}
    for key in options:
        if key not in fields:
            raise unknown(f"option of {kebab(kind.__name__)}", key, fields)
    values = {key: _converted(kind, fields[key], value) for key, value in options.items()}
    return kind(**values)


def _converted(kind: type[Pass], spec: dataclasses.Field[Any], value: Any) -> Any:
    if not isinstance(value, str):
        return value
    default = spec.default
    if isinstance(default, str):
        return value.strip("'\"")
    if isinstance(default, bool) and value.lower() in ("true", "false", "yes", "no", "on", "off", "1", "0"):
        return value.lower() in ("true", "yes", "on", "1")
    try:
        parsed = None if value.lower() == "none" else ast.literal_eval(value)
    except (ValueError, SyntaxError):
        parsed = value
    expected = type(default)
    if default is None or parsed is None or isinstance(parsed, expected):
        return parsed
    if expected is float and isinstance(parsed, int):
        return float(parsed)
    raise InvalidOption(
        f"{kebab(kind.__name__)}: option {spec.name}={value} is not of type {expected.__name__} (default {default})"
    )
