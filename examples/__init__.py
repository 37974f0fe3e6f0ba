"""Example models: trained in this repository, exported to ONNX and evaluated by fxopt."""
