"""Run `fxopt::fused_linear_w8a8` and its family in generated kernels of this machine, in this process.

    register()                      # from now on CPU tensors go to the kernels
    torch.ops.fxopt.fused_linear_w8a8(x, 128, codes, scales, bias, "gelu")

A kernel is generated when its sizes are first seen, and a weight is packed when it is first used; both are kept (a
packed weight as long as its tensor lives and is not written to).
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fxopt.backends.tvm.kernels.fused_int8 import PARAMETERS, Epilogue, Form, fused_int8, pack, starts_of, tile_for
from fxopt.backends.tvm.link import link
from fxopt.backends.tvm.load import HostLibrary
from fxopt.backends.tvm.lower import write_object
from fxopt.backends.tvm.machine import Machine, machine_for
from fxopt.cost_model.targets import get_target
from fxopt.errors import InvalidInput

_PACKED: Any = WeakTensorKeyDictionary()  # codes -> (version, x_zero, packed, starts)


@cache
def register() -> None:
    """Take over the operators' CPU tensors, once.

    Raises:
        MissingDependency: a package of fxopt[tvm] is not installed.
        Unsupported: this machine is no x86-64 with AVX2.
    """
    from fxopt.ir.ops import fused_linear_w8a8 as family

    tile_for(64, _host())
    library = _library()
    library.impl(family.fused_linear_w8a8.name, _floats, "CPU")
    library.impl(family.fused_linear_w8a8_bytes.name, _bytes, "CPU")
    library.impl(family.fused_linear_norm_w8a8.name, _norm, "CPU")


@cache
def _library() -> Any:
    return torch.library.Library("fxopt", "IMPL", "CPU")  # type: ignore[no-untyped-call]


@cache
def _host() -> Machine:
    return machine_for(get_target("host"))


@cache
def _kernel(form: Form) -> Any:
    """The compiled function of a form; the file is not needed once it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        built = write_object([fused_int8("run", form, _host())], _host(), Path(folder) / "k.o")
        library = HostLibrary(link([built], ["run"], _host(), Path(folder) / f"{abs(hash(form))}.so"))
    return library.function("run", len(PARAMETERS))


def _packed(codes: Tensor, x_zero: int) -> tuple[Any, Any]:
    found = _PACKED.get(codes)
    if found is None or found[:2] != (codes._version, x_zero):
        tile, array = tile_for(codes.shape[0], _host()), codes.contiguous().numpy()
        found = (codes._version, x_zero, pack(array, tile), starts_of(array, x_zero, tile))
        _PACKED[codes] = found
    return found[2], found[3]


def _run(form: Form, x: Tensor, x_zero: int, codes: Tensor, given: dict[str, Tensor], y_zero: int = 0) -> list[Tensor]:
    """y and bytes, those that the form has."""
    if x.dtype != torch.uint8 or codes.dtype != torch.int8 or x.shape[-1:] != codes.shape[1:]:
        raise InvalidInput(
            f"x is {x.dtype} {list(x.shape)}, the weight {codes.dtype} {list(codes.shape)}; "
            "expected uint8 [..., in] and int8 [out, in]"
        )
    shape = (*x.shape[:-1], form.outputs)
    made = {key: value.float().contiguous() for key, value in given.items()}
    made["q"] = x.contiguous()
    for name, value in made.items():
        wanted = shape if name == "residual" else x.shape if name == "q" else (form.outputs,)
        if tuple(value.shape) != tuple(wanted):
            raise InvalidInput(f"{name} has shape {list(value.shape)}; expected {list(wanted)}")
    results = {"y": torch.empty(shape)} if form.floats else {}
    results |= {"codes": torch.empty(shape, dtype=torch.uint8)} if form.codes else {}
    rows, zero = np.array([x.numel() // form.inner], np.int32), np.array([y_zero], np.float32)
    weight, starts = _packed(codes, x_zero)
    arrays = {"rows": rows, "zero": zero, "w": weight, "starts": starts}
    addresses = {name: array.ctypes.data for name, array in arrays.items()}
    addresses |= {name: value.data_ptr() for name, value in (made | results).items()}
    _kernel(form)(*(addresses.get(name, 0) for name in PARAMETERS))
    return list(results.values())


def _floats(x: Tensor, x_zero: int, codes: Tensor, scales: Tensor, bias: Tensor, activation: Epilogue) -> Tensor:
    form = Form(codes.shape[1], codes.shape[0], activation)
    return _run(form, x, x_zero, codes, {"scales": scales, "bias": bias})[0]


def _bytes(
    x: Tensor,
    x_zero: int,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor,
    activation: Epilogue,
    inverse: Tensor,
    y_zero: int,
) -> Tensor:
    form = Form(codes.shape[1], codes.shape[0], activation, False, True)
    return _run(form, x, x_zero, codes, {"scales": scales, "bias": bias, "inverse": inverse}, y_zero)[0]


def _norm(
    x: Tensor,
    x_zero: int,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    shift: Tensor,
    eps: float,
    inverse: Tensor,
    y_zero: int,
) -> tuple[Tensor, Tensor]:
    form = Form(codes.shape[1], codes.shape[0], "layer_norm", True, True, eps)
    given = {"scales": scales, "bias": bias, "residual": residual, "gamma": weight, "beta": shift, "inverse": inverse}
    y, made = _run(form, x, x_zero, codes, given, y_zero)
    return y, made
