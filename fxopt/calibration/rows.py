"""What iterables give as batches of a model: dicts of data sets and tokenisers, tuples, and single values.

Tokenisers and data sets give more than models take. What surely is no input (labels and the like) is left out, and said
once. `token_type_ids` of zeros and an `attention_mask` of ones say nothing, and are left out too where the model takes
none; with other values they would change the result, which is an error. Every other unknown name is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fxopt.calibration.checks import Sample, Warn, as_tensor, check, check_names
from fxopt.errors import InvalidInput
from fxopt.ir.graph import ValueSpec

_BY_PRODUCTS = frozenset(
    {
        "label", "labels", "label_ids", "idx", "special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping",
        "overflowing_tokens", "num_truncated_tokens", "length",
    }
)  # fmt: skip
_SAY_NOTHING = {"token_type_ids": 0, "attention_mask": 1}  # by name: the value that changes nothing
_INSTEAD = {
    "token_type_ids": "export the model with it, or call the tokenizer with return_token_type_ids=False",
    "attention_mask": "without it the model counts padding as text; give texts one by one, unpadded",
}


def batches(items: Iterable[tuple[str, Any]], inputs: Sequence[ValueSpec], say: Warn) -> Iterator[Sample]:
    """A batch per item; `items` are (where it comes from, item). Items without a batch axis are batches of one.

    Raises:
        InvalidInput: a name, element type or shape does not fit.
    """
    for where, item in items:
        named = taken(by_name(item, inputs, where), inputs, where, say)
        check_names(named, inputs, where)
        tensors = {name: as_tensor(value, f"{where}: input {name!r}") for name, value in named.items()}
        if lacks_batch_axis(tensors, inputs):
            _check_one(inputs, where)
            say("calibration: rows without a batch axis are taken as batches of one")
            tensors = {name: value.unsqueeze(0) for name, value in tensors.items()}
        yield check(tensors, inputs, where, say)


def by_name(item: Any, inputs: Sequence[ValueSpec], where: str) -> dict[str, Any]:
    """One item of an iterable as a dictionary."""
    if isinstance(item, Mapping):
        return dict(item)
    if isinstance(item, str):
        raise InvalidInput(f"{where} is text; tokenise it first, as in tokenizer(text, return_tensors='np')")
    values = list(item) if isinstance(item, (tuple, list)) else [item]
    if len(values) != len(inputs):
        expected = ", ".join(map(str, inputs))
        raise InvalidInput(
            f"{where} has {len(values)} values, the model takes {len(inputs)}: {expected}; leave labels out"
        )
    return dict(zip((spec.name for spec in inputs), values, strict=True))


def taken(given: Mapping[str, Any], inputs: Sequence[ValueSpec], where: str, say: Warn) -> dict[str, Any]:
    """Without what the model does not take and does not miss.

    Raises:
        InvalidInput: a mask or token types that the model does not take, and that are not neutral.
    """
    known = {spec.name for spec in inputs}
    kept: dict[str, Any] = {}
    for name, value in given.items():
        if name in known or name not in _BY_PRODUCTS | _SAY_NOTHING.keys():
            kept[name] = value
        elif name in _BY_PRODUCTS:
            say(f"calibration: {name!r} is left out: the model does not take it")
        elif bool((as_tensor(value, f"{where}: {name!r}") == _SAY_NOTHING[name]).all()):
            say(f"calibration: {name!r} is left out: the model takes none, and it is {_SAY_NOTHING[name]} throughout")
        else:
            raise InvalidInput(
                f"{where}: the model takes no {name!r}, and it is not {_SAY_NOTHING[name]} throughout; {_INSTEAD[name]}"
            )
    return kept


def lacks_batch_axis(tensors: Sample, inputs: Sequence[ValueSpec]) -> bool:
    """Whether every input has just one axis less than the model wants."""
    return all(spec.shape is not None and tensors[spec.name].dim() == len(spec.shape) - 1 for spec in inputs)


def _check_one(inputs: Sequence[ValueSpec], where: str) -> None:
    fixed = next(
        (spec for spec in inputs if spec.shape and isinstance(spec.shape[0], int) and spec.shape[0] != 1), None
    )
    if fixed is not None:
        assert fixed.shape is not None
        raise InvalidInput(
            f"{where} has no batch axis, and the model takes {fixed}; stack {fixed.shape[0]} rows, or check the shape"
        )
