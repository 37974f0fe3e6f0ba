"""Kernels, one per file: Triton's language, compiled for a GPU or run by Triton's interpreter.

Rules that the interpreter asks for: 16-bit floats only where values are loaded, stored and multiplied (it computes
bfloat16 wrongly, without an error), assembly with a plain twin, no `autotune`.
"""
