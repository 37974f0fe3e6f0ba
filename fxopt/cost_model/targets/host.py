"""The machine this process runs on: a function, since it is detected when asked for."""

from fxopt.cost_model.host import detect_host as TARGET

__all__ = ["TARGET"]
