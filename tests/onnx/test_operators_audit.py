"""Every operator of the installed onnx, at every version, against the references: none is forgotten silently.

A new version of onnx makes this test name what is new: an operator, an attribute, an input or another default.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import defs, helper

from fxopt.ir.onnx import registry

MISSING = Path(__file__).with_name("operators_missing.txt")
SCHEMAS = sorted(defs.get_all_schemas_with_history(), key=lambda s: (s.domain, s.name, s.since_version))
Parameters = dict[str, inspect.Parameter]

OTHER_DEFAULTS = {  # attributes whose default the function takes from the version, or has as another name of the same
    *(("Clip", name) for name in ("min", "max")),
    *(("Softmax", "axis"), ("LogSoftmax", "axis"), ("Hardmax", "axis"), ("Selu", "alpha"), ("Selu", "gamma")),
    *(("Dropout", "ratio"), ("Concat", "axis"), ("Split", "axis"), ("GridSample", "mode")),
    *(("MeanVarianceNormalization", "axes"), ("RoiAlign", "coordinate_transformation_mode")),
    *(("RotaryEmbedding", "num_heads"), ("SequenceEmpty", "dtype"), ("RegexFullMatch", "pattern")),
    *(("StringNormalizer", "locale"), ("TreeEnsemble", "n_targets")),
}


def key_of(schema: Any) -> str:
    return f"{schema.domain}::{schema.name}"


def listed() -> dict[str, list[int]]:
    found = {}
    for line in MISSING.read_text().splitlines():
        if line and not line.startswith("#"):
            names, _, reason = line.rpartition(": ")
            assert reason
            name, *versions = names.split()
            found[name] = [int(version) for version in versions]
    return found


def implementations(schema: Any) -> Iterator[Parameters]:
    reference = registry.lookup(schema.domain, schema.name)
    for function in (reference.torch, reference.host) if reference is not None else ():
        if function is not None:
            yield dict(inspect.signature(function).parameters)


def test_every_operator_has_a_reference_or_is_listed() -> None:
    missing: dict[str, list[int]] = {}
    for schema in SCHEMAS:
        if registry.lookup(schema.domain, schema.name) is None:
            missing.setdefault(key_of(schema), []).append(schema.since_version)
    assert missing == listed()


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: f"{key_of(schema)}-{schema.since_version}")
def test_references_take_every_attribute_and_input(schema: Any) -> None:
    for parameters in implementations(schema):
        kinds = [parameter.kind for parameter in parameters.values()]
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            assert set(schema.attributes) - set(parameters) == set()
        positional = [name for name, kind in zip(parameters, kinds) if kind == inspect.Parameter.POSITIONAL_OR_KEYWORD]
        if inspect.Parameter.VAR_POSITIONAL not in kinds:
            assert len(positional) - 1 >= schema.max_input
        needed = [name for name in parameters if _is_needed(parameters[name])]
        optional = {name for name, attribute in schema.attributes.items() if not attribute.required}
        assert set(needed) & optional == set()
        inputs = [name for name in needed if name not in schema.attributes][1:]
        assert len(inputs) <= schema.min_input


def _is_needed(parameter: inspect.Parameter) -> bool:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is inspect.Parameter.empty and parameter.kind not in variadic


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: f"{key_of(schema)}-{schema.since_version}")
def test_defaults_are_those_of_the_specification(schema: Any) -> None:
    reference = registry.lookup(schema.domain, schema.name)
    if reference is None:
        return
    parameters = inspect.signature(reference.torch).parameters
    for name, attribute in schema.attributes.items():
        ours = parameters[name].default if name in parameters else inspect.Parameter.empty
        if ours is inspect.Parameter.empty or attribute.required or (schema.name, name) in OTHER_DEFAULTS:
            continue
        expected = helper.get_attribute_value(attribute.default_value) if _has_default(attribute) else None
        expected = expected.decode() if isinstance(expected, bytes) else expected
        assert ours == (pytest.approx(expected, rel=1e-6) if isinstance(expected, float) else expected), name


def _has_default(attribute: Any) -> bool:
    return attribute.default_value.type != onnx.AttributeProto.UNDEFINED
