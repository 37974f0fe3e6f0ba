"""Small ONNX models whose times calibrate the cost model: `probes() -> Probe(name, group, held_out, model)`."""

from fxopt.cost_model.probes.rows import Probe, probes

__all__ = ["Probe", "probes"]
