"""Torch references of ONNX operators, one small file per operator family (see `fxopt.ir.onnx.registry`)."""
