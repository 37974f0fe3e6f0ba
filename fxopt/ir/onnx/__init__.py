"""The ONNX dialect: operators, their torch references, element types, import and export helpers."""
