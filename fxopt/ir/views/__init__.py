"""Semantic views: what a pass thinks in, recognised in the aten and the ONNX dialect alike, one file per view.

A view names its value (`node`), its inputs, its weight always as [out, in], and the inner nodes that it swallows.
"""
