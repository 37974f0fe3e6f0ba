"""What a backend is: which operators it takes, and how a graph becomes something that runs and can be saved."""

from __future__ import annotations

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import fx

from fxopt.cost_model.attention_patterns import price
from fxopt.errors import MissingDependency
from fxopt.ir.graph import Graph
from fxopt.ir.ledger import Verdict
from fxopt.ir.pattern_work import Price, Tile
from fxopt.ir.target import Cost, Prediction, Target


class Executable(ABC):
    """A compiled graph."""

    executed_on: str = ""  # what really ran: "onnxruntime CPU, 2 threads", "eager (reference)"

    runtime: str = ""  # which of the backend's runtimes it is, where there are several: "cpu", "openvino"

    is_timed: ClassVar[bool] = True  # False: it gives the results of what is saved, but not its time

    @abstractmethod
    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """The outputs on flat inputs."""

    def verify(self, samples: Sequence[Sequence[Any]]) -> str:
        """Run what `save` writes, on the samples or on made-up ones; says what was run, "" when that is `run` itself.

        Raises:
            VerificationError: it computes something else than the graph does in torch.
        """
        return ""

    def write(self, folder: Path) -> dict[str, Any] | None:
        """Write the artifact's files into an empty folder and return its manifest; None: the graph is the artifact."""
        return None

    @abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the artifact; nothing half-written is left when it fails."""

    def verdicts(self) -> Sequence[Verdict]:
        """What the backend decided about single nodes; asked for once, of the executable that goes out."""
        return ()

    def notes(self) -> Sequence[str]:
        """What the report should say of the backend's work."""
        return ()

    def save_beside(self, folder: Path) -> None:
        """Write what the backend made into the folder of a saved result, beside the graph."""

    def close(self) -> None:
        """Release threads and memory."""


class Backend(ABC):
    """A backend, described by capabilities that are declared beside the lowering."""

    needs: ClassVar[tuple[str, ...]] = ()  # modules that must be installed
    extra: ClassVar[str] = ""  # the extra of the package that installs them
    cores: ClassVar[int] = 0  # of a target that is not here, used at most; 0: all
    is_compiler: ClassVar[bool] = False  # what comes out is code for the target, also where no pass changed anything
    options: ClassVar[tuple[str, ...]] = ()  # what `name{option=value}` may set, keywords of the class
    target: Target | None = None  # what it is asked about, where it is known

    @property
    @abstractmethod
    def name(self) -> str:
        """The name on the command line."""

    def check(self, graph: Graph, target: Target) -> None:
        """Raise what is known to be wrong with the model or the options before any work.

        Raises:
            FxoptError: in its subclasses.
        """

    @abstractmethod
    def refuses(self, node: fx.Node, target: Target) -> str:
        """ "" when the backend runs the node, else the reason why not."""

    @abstractmethod
    def supports(self, op: str, dtype: str, pattern: str = "") -> str:
        """ "" when an operator that a pass wants to introduce runs fast here, else the reason why not."""

    @abstractmethod
    def compile(self, graph: Graph, target: Target, *, threads: int | None = None) -> Executable:
        """Turn the graph into something that runs."""

    def skips_zeros(self, target: Target, dtype: str, pattern: str, shape: tuple[int, int] | None = None) -> str:
        """ "" when a linear whose weight of this type has zeros of this pattern takes less time, else the reason.

        Args:
            shape: of the weight, (out, in); None: of any.
        """
        return f"{self.name} multiplies zeros like other numbers"

    def attention_tile(self, dtype: str, width: int, renumbered: bool = False) -> Tile | None:
        """What its kernel for attention with patterns multiplies at once; None: it takes slices of dense attention.

        Args:
            width: of a head.
            renumbered: the kernel for heads whose tokens are renumbered, where that is another one.
        """
        return None

    def attention_price(self, threads: int) -> Price:
        """What slices of dense attention cost on so many threads, as measured; the dearest where nothing was."""
        return price(self.name, threads)

    def with_sizes(self, sizes: Mapping[str, int], name: str) -> Backend:
        """The backend for a model of this name, of which the user fixed some dimensions."""
        return self

    def predicted(self, cost: Cost, target: Target) -> Prediction | None:
        """The time of an operator of this work and form, where the backend knows better than the roofline."""
        return None

    def prefers(self, op: str) -> str:
        """ "" when the backend's own fusion into `op` is fast, else the reason to avoid it (with what was measured)."""
        return ""

    def alternatives(self, executable: Executable) -> Iterator[Callable[[], Executable]]:
        """Other ways of running the same artifact on this machine; the engine measures whether one is faster."""
        yield from ()

    @classmethod
    def runtimes(cls) -> dict[str, str]:
        """The runtimes that an artifact may be run in, where there are several: "" when it is here, else what to do."""
        return {}

    @classmethod
    def require(cls) -> None:
        """Raise `MissingDependency` when a module is not installed."""
        for module in cls.needs:
            if importlib.util.find_spec(module) is None:
                install = f"fxopt[{cls.extra}]" if cls.extra else module
                raise MissingDependency(f"backend {cls.__name__} needs {module}; install it: pip install '{install}'")
