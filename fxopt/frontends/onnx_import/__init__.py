"""From ONNX messages to graphs: one file per part of a model."""
