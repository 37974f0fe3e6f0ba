"""Operations per element of elementwise operators, normalisations and pools, for both dialects.

The numbers are *equivalents of one fused vector operation*: what the operator takes in ONNX Runtime's AVX2 kernels
relative to a multiplication that is not bound by memory (benchmarks/host_rates.py has rows for the common ones).
On a GPU nearly all of them are bound by memory and the numbers do not matter.
"""

from __future__ import annotations

_LIBRARY = 60.0  # a scalar call of the C library per element

_PER_ELEMENT = {
    # names as in ONNX and aten, in lower case, without underscores
    **dict.fromkeys(("div", "reciprocal", "mod", "fmod", "remainder"), 4.0),
    **dict.fromkeys(("sqrt", "rsqrt", "floor", "ceil", "round", "trunc"), 8.0),
    **dict.fromkeys(("exp", "exp2", "sigmoid", "tanh", "hardswish", "softmax", "softmaxbackwarddata"), 9.0),
    **dict.fromkeys(("silu", "swish", "quickgelu", "fastgelu", "elu", "celu", "selu"), 12.0),
    "erf": 18.0,
    **dict.fromkeys(("gelu", "biasgelu"), 24.0),
    **dict.fromkeys(("log", "log2", "log10", "log1p", "expm1", "sin", "cos", "tan", "softplus", "mish"), _LIBRARY),
    **dict.fromkeys(("asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "lgamma", "erfinv"), _LIBRARY),
    "pow": 2 * _LIBRARY,
}

NORMALISATION = 12.0  # mean, variance, scale and shift in several passes over the row
SOFTMAX = 9.0


def per_element(name: str) -> float:
    """Operations per result element of an elementwise operator; 1 when it is not listed."""
    return _PER_ELEMENT.get(name.lower().replace("_", ""), 1.0)
