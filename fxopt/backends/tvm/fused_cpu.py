"""Run `fxopt::linear_u8s8`, `quantize_u8` and `layer_norm_u8` in generated kernels of this machine, in this process.

    register()  # from now on CPU tensors go to the kernels

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
from fxopt.backends.tvm.kernels.rows_u8 import ROW_PARAMETERS, RowForm, rows_u8
from fxopt.backends.tvm.link import link
from fxopt.backends.tvm.load import HostLibrary
from fxopt.backends.tvm.lower import write_object
from fxopt.backends.tvm.machine import Machine, machine_for
from fxopt.cost_model.targets import get_target
from fxopt.errors import InvalidInput

_PACKED: Any = WeakTensorKeyDictionary()  # codes -> (version, zero, packed, starts)


@cache
def register() -> None:
    """Take over the operators' CPU tensors, once.

    Raises:
        MissingDependency: a package of fxopt[tvm] is not installed.
        Unsupported: this machine is no x86-64 with AVX2.
    """
    from fxopt.ir.ops import linear_u8s8 as family

    tile_for(64, _host())
    library = _library()
    library.impl(family.linear_u8s8.name, _linear, "CPU")
    library.impl(family.quantize_u8.name, _quantize, "CPU")
    library.impl(family.layer_norm_u8.name, _norm, "CPU")


@cache
def _library() -> Any:
    return torch.library.Library("fxopt", "IMPL", "CPU")  # type: ignore[no-untyped-call]


@cache
def _host() -> Machine:
    return machine_for(get_target("host"))


@cache
def _kernel(form: Form | RowForm) -> Any:
    """The compiled function of a form; the file is not needed once it is loaded."""
    function = fused_int8("run", form, _host()) if isinstance(form, Form) else rows_u8("run", form, _host())
    with tempfile.TemporaryDirectory() as folder:
        built = write_object([function], _host(), Path(folder) / "k.o")
        library = HostLibrary(link([built], ["run"], _host(), Path(folder) / "k.so"))
    return library.function("run", len(PARAMETERS if isinstance(form, Form) else ROW_PARAMETERS))


def _packed(codes: Tensor, zero: int) -> tuple[Any, Any]:
    found = _PACKED.get(codes)
    if found is None or found[:2] != (codes._version, zero):
        tile, array = tile_for(codes.shape[0], _host()), codes.contiguous().numpy()
        found = (codes._version, zero, pack(array, tile), starts_of(array, zero, tile))
        _PACKED[codes] = found
    return found[2], found[3]


def _run(form: Form, q: Tensor, zero: int, codes: Tensor, given: dict[str, Tensor]) -> Tensor:
    if q.dtype != torch.uint8 or codes.dtype != torch.int8 or q.shape[-1:] != codes.shape[1:]:
        raise InvalidInput(
            f"q is {q.dtype} {list(q.shape)}, the weight {codes.dtype} {list(codes.shape)}; "
            "expected uint8 [..., in] and int8 [out, in]"
        )
    y = torch.empty(*q.shape[:-1], form.outputs)
    sizes = {"residual": tuple(y.shape)}
    made = {name: _checked(name, value, sizes.get(name, (form.outputs,))) for name, value in given.items()}
    weight, starts = _packed(codes, zero)
    rows = np.array([q.numel() // form.inner], np.int32)
    addresses = {name: array.ctypes.data for name, array in (("rows", rows), ("w", weight), ("starts", starts))}
    made |= {"q": q.contiguous(), "y": y}
    addresses |= {name: value.data_ptr() for name, value in made.items()}
    _kernel(form)(*(addresses.get(name, 0) for name in PARAMETERS))
    return y


def _rows(form: RowForm, x: Tensor, zero: int, given: dict[str, Tensor]) -> Tensor:
    made = {name: _checked(name, value, (form.size,)) for name, value in given.items()}
    codes = torch.empty(x.shape, dtype=torch.uint8)
    made |= {"x": x.float().contiguous(), "codes": codes}
    arrays = {"rows": np.array([x.numel() // form.size], np.int32), "zero": np.array([zero], np.float32)}
    addresses = {name: array.ctypes.data for name, array in arrays.items()}
    addresses |= {name: value.data_ptr() for name, value in made.items()}
    _kernel(form)(*(addresses.get(name, 0) for name in ROW_PARAMETERS))
    return codes


def _checked(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(value.shape) != shape:
        raise InvalidInput(f"{name} has shape {list(value.shape)}; expected {list(shape)}")
    return value.float().contiguous()


def _linear(
    q: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor,
    zero: int,
    epilogue: Epilogue,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
) -> Tensor:
    form = Form(codes.shape[1], codes.shape[0], epilogue, eps=eps)
    given = {"scales": scales, "bias": bias, "residual": residual, "gamma": gamma, "beta": beta}
    return _run(form, q, zero, codes, {name: value for name, value in given.items() if value is not None})


def _quantize(x: Tensor, inverse: Tensor, zero: int) -> Tensor:
    return _rows(RowForm(x.shape[-1]), x, zero, {"inverse": inverse})


def _norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float, inverse: Tensor, zero: int) -> Tensor:
    return _rows(RowForm(x.shape[-1], eps), x, zero, {"inverse": inverse, "gamma": gamma, "beta": beta})
