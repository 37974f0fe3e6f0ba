"""A graph on a GPU with kernels, where one is here; everywhere else the reference."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxopt.backends.eager import EagerExecutable
from fxopt.backends.eager_cuda import register
from fxopt.backends.triton.bundle import Bundle, bundled
from fxopt.backends.triton.chips import LEAST
from fxopt.backends.triton.cuda_graphs import Replays
from fxopt.backends.triton.lower import lowered
from fxopt.backends.triton.lower.job import Job
from fxopt.errors import FxoptError, InvalidModel
from fxopt.ir.graph import Graph
from fxopt.ir.interpreter import Evaluator
from fxopt.ir.ledger import Verdict
from fxopt.ir.target import Target

_SWITCH = "FXOPT_TRITON"  # 0: the reference, also on a GPU


def usable_gpu() -> str:
    """The name of the GPU that kernels run on here; "" when there is none, or it is too old, or switched off."""
    if os.environ.get(_SWITCH) == "0" or not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    return str(torch.cuda.get_device_name()) if 10 * major + minor >= LEAST else ""


def placed(graph: Graph, device: torch.device) -> torch.fx.GraphModule:
    """A module with constants and new tensors on a device; the graph was captured on another one."""
    graph = graph.copy()
    for node in graph.calls():
        if isinstance(node.kwargs.get("device"), torch.device):
            node.kwargs = {**node.kwargs, "device": device}
    return graph.module.to(device)


class TritonExecutable(EagerExecutable):
    """The graph, lowered and compiled when it is first needed: by a call on a GPU, `verdicts` or `save_beside`."""

    def __init__(
        self, graph: Graph, target: Target, evaluator: Evaluator | None = None, saved: Path | None = None
    ) -> None:
        super().__init__(graph, evaluator)
        self.target = target
        self.saved = saved
        self._job: Job | None = None
        self._problem = ""  # why the graph cannot be lowered: the reference runs
        self._runners: dict[torch.device, Replays] = {}
        gpu = usable_gpu()
        if gpu:
            self.executed_on = f"triton on {gpu}"

    def job(self) -> Job | None:
        """The lowered graph with its kernels, compiled for the target; None where it cannot be lowered."""
        if self._job is None and not self._problem:
            try:
                graph = self.graph if self.graph.origin == "torch" else self.graph.lower()
                self._job = lowered(graph, self.target)
            except FxoptError as error:
                self._problem = str(error)
        return self._job

    def verdicts(self) -> Sequence[Verdict]:
        """What runs in which kernel, and what does not."""
        job = self.job()
        return () if job is None else job.verdicts

    def notes(self) -> Sequence[str]:
        """How many kernels there are for which chip, and that nothing was measured."""
        job = self.job()
        if job is None:
            return [f"there are no kernels, and the reference runs: {self._problem}"]
        kernels = job.kernels
        if not kernels.reports and not kernels.refused:
            return []
        return [
            f"{len(kernels.reports)} kernels compiled for {kernels.chip.sm}, {len(kernels.refused)} not used; nothing "
            "was run on the target. What torch.compile makes of the rest is compiled there"
        ]

    def save_beside(self, folder: Path) -> None:
        """Write the kernels and their static reports into a folder of their own."""
        job = self.job()
        if job is None:
            return
        kernels = job.kernels
        usable = [kernel for key, kernel in kernels.compiled.items() if key not in kernels.refused]
        bundled(usable, kernels.chip.sm).save(folder / "kernels")
        lines = [
            f"{report}; {100 * report.occupancy(kernels.chip):.0f} % of the threads of {kernels.chip.name}"
            for report in kernels.reports.values()
        ]
        text = "\n".join([*lines, *(f"not used: {reason}" for reason in kernels.refused.values()), ""])
        (folder / "kernels" / "reports.txt").write_text(text, encoding="utf-8")

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """The outputs on flat inputs; those on another device than the GPU come back there."""
        if not usable_gpu() or not all(isinstance(value, Tensor) for value in inputs):
            return super().run(inputs)
        if self._job is None:
            self._install(torch.device("cuda", torch.cuda.current_device()))
        job = self.job()
        if job is None:
            return super().run(inputs)
        here = torch.device("cuda", torch.cuda.current_device())
        device = next((value.device for value in inputs if value.is_cuda), here)
        results = self._runner(device, job)([value.to(device) for value in inputs])
        back = inputs[0].device if inputs else device
        return [result.to(back) for result in results]

    def _runner(self, device: torch.device, job: Job) -> Replays:
        if device not in self._runners:
            register()
            compiled = torch.compile(placed(job.graph, device), fullgraph=True)

            def call(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
                with torch.no_grad():
                    found: Sequence[Tensor] = compiled(*inputs)
                return found

            self._runners[device] = Replays(call)
        return self._runners[device]

    def _install(self, device: torch.device) -> None:
        """Give Triton the saved kernels, where they fit; it compiles others when they are first launched."""
        if self.saved is None:
            return
        major, minor = torch.cuda.get_device_capability(device)
        try:
            bundle = Bundle.load(self.saved)
            reason = bundle.misfit(f"sm_{major}{minor}")
            if not reason:
                bundle.install()
        except InvalidModel as error:
            reason = str(error)
        if reason:
            warnings.warn(f"fxopt: {reason}; kernels are compiled again at their first use", stacklevel=5)

    def close(self) -> None:
        """Drop what was captured and lowered."""
        self._runners.clear()
        self._job = None
