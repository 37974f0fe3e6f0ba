"""The work of one node: arithmetic operations and bytes, whatever the dialect. `node_cost(graph, node) -> Cost`."""

from fxopt.cost_model.work.node import node_cost

__all__ = ["node_cost"]
