"""Element types that torch lacks: conversions by the specification's tables, and operators that move elements."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from fxopt.errors import InvalidInput, MissingReference
from fxopt.frontends.onnx import load
from fxopt.ir.onnx.convert import FLOAT_SIGN_BIT, INTEGER_RANGES, from_strings, to_e8m0, to_number, to_strings
from fxopt.ir.onnx.foreign import CODES, MOVING, NUMBERS, is_foreign, is_string
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.onnx.values import to_array
from fxopt.ir.verify import _differs

Array = np.ndarray[Any, Any]
SMALL_FLOATS = [dtype for dtype in NUMBERS.values() if dtype.name in FLOAT_SIGN_BIT]
SMALL_INTEGERS = [dtype for dtype in NUMBERS.values() if dtype.name in INTEGER_RANGES]
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)


def all_values(dtype: Any) -> Array:
    """Every value of a type, by code."""
    if dtype.name in INTEGER_RANGES:
        low, high = INTEGER_RANGES[dtype.name]
        return np.arange(low, high + 1).astype(dtype)
    count = 256 if dtype == E8M0 else 2 * FLOAT_SIGN_BIT[dtype.name]
    return np.arange(count, dtype=np.uint8).view(dtype)


# ---- conversions


@pytest.mark.parametrize("dtype", SMALL_FLOATS, ids=str)
def test_every_float16_rounds_to_small_floats_as_ml_dtypes(dtype: Any) -> None:
    x = np.arange(2**16, dtype=np.uint16).view(np.float16)
    assert to_number(x[np.isnan(x)], dtype).view(np.uint8).max() == 0
    x = x[~np.isnan(x)]
    expected = x.astype(np.float32).astype(dtype)
    assert np.array_equal(to_number(x, dtype).view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("dtype", SMALL_FLOATS, ids=str)
def test_midpoints_round_to_even_codes_in_float64(dtype: Any) -> None:
    values = all_values(dtype)[: FLOAT_SIGN_BIT[dtype.name]].astype(np.float64)
    middle = (values[1:] + values[:-1]) / 2
    tiny = np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)  # a step that float32 does not see
    codes = np.arange(len(middle))
    assert to_number(middle, dtype).view(np.uint8).tolist() == (codes + codes % 2).tolist()
    assert to_number(tiny[0], dtype).view(np.uint8).tolist() == (codes + 1).tolist()
    assert to_number(tiny[1], dtype).view(np.uint8).tolist() == codes.tolist()


@pytest.mark.parametrize("target", [*SMALL_FLOATS, *SMALL_INTEGERS], ids=str)
@pytest.mark.parametrize("source", NUMBERS.values(), ids=str)
def test_values_that_both_types_have_survive(source: Any, target: Any) -> None:
    x = all_values(source)
    wide = x.astype(np.float64)
    common = np.isin(wide, all_values(target).astype(np.float64))
    assert common.any()
    assert np.array_equal(to_number(x, target).astype(np.float64)[common], wide[common])


@given(st.integers(-(2**62), 2**62))
def test_integers_keep_their_low_bits(number: int) -> None:
    for dtype in SMALL_INTEGERS:
        low, high = INTEGER_RANGES[dtype.name]
        result = int(to_number(np.array([number]), dtype)[0])
        assert low <= result <= high
        assert (result - number) % (high - low + 1) == 0


def test_floats_are_truncated_towards_zero() -> None:
    x = np.array([-1.9, -0.5, 0.5, 1.9, np.nan], np.float32)
    assert to_number(x, NUMBERS[TensorProto.INT4]).astype(int).tolist() == [-1, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("saturate", "mode", "expected"),  # the specification's table; 255 is NaN
    [(True, "up", [0, 255, 254, 254, 0]), (False, "nearest", [255, 255, 255, 255, 255])],
)
def test_special_values_of_float8e8m0(saturate: bool, mode: str, expected: list[int]) -> None:
    x = np.array([0.0, np.nan, np.inf, 1e300, 1e-300])
    assert to_e8m0(x, saturate, mode).view(np.uint8).tolist() == expected


@given(st.floats(2.0**-127, 2.0**127), st.sampled_from(["up", "down", "nearest"]))
def test_float8e8m0_is_the_power_of_two_beside(x: float, mode: str) -> None:
    result = float(to_e8m0(np.array([x]), round_mode=mode)[0])
    low = 2.0 ** np.floor(np.log2(x))
    low = low / 2 if low > x else low * 2 if low * 2 <= x else low
    high = low if low == x else 2 * low
    assert result == {"up": high, "down": low, "nearest": high if x >= 1.5 * low else low}[mode]


def test_round_mode_is_checked() -> None:
    with pytest.raises(InvalidInput, match="'upwards' given; expected 'up'"):
        to_e8m0(np.ones(1), round_mode="upwards")


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_text_reads_back_as_the_same_float(number: float) -> None:
    text = to_strings(np.array([number], np.float32))
    assert "e" not in text[0]
    assert from_strings(text, torch.float32).astype(np.float32)[0] == np.float32(number)


def test_text_of_special_values_and_integers() -> None:
    special = np.array([np.inf, -np.inf, np.nan, 1.0], np.float32)
    assert to_strings(special).tolist() == ["INF", "-INF", "NaN", "1.0"]
    assert to_strings(np.array([2**63 - 1, -1])).tolist() == [str(2**63 - 1), "-1"]
    assert to_strings(np.empty((0, 2), np.float32)).shape == (0, 2)


def test_text_to_numbers() -> None:
    text = np.array(["+INF", "inf", "-Inf", "nan", "1e-5", "3.5"], dtype=object)
    result = OnnxOp("", "Cast", 21)(text, to=TensorProto.FLOAT)
    np.testing.assert_array_equal(result.numpy(), np.float32([np.inf, np.inf, -np.inf, np.nan, 1e-5, 3.5]))
    large = OnnxOp("", "Cast", 21)(np.array([str(2**63 - 1)], dtype=object), to=TensorProto.INT64)
    assert large.tolist() == [2**63 - 1]
    with pytest.raises(InvalidInput, match="'Hello World!': expected a number"):
        OnnxOp("", "Cast", 21)(np.array(["Hello World!"], dtype=object), to=TensorProto.FLOAT)


def test_cast_like_takes_the_type_of_an_array() -> None:
    x = torch.tensor([1.0, -1.0, 3.0])
    for dtype in (*SMALL_INTEGERS, *SMALL_FLOATS):
        result = OnnxOp("", "CastLike", 19)(x, np.zeros(1, dtype))
        assert result.dtype == dtype


@pytest.mark.parametrize("dtype", [*SMALL_INTEGERS, np.dtype(ml_dtypes.float4_e2m1fn)], ids=str)
def test_bit_cast_reads_the_same_bits(dtype: Any) -> None:
    width = 2 if "2" in dtype.name[:5] and "int" in dtype.name else 4
    for other in (*SMALL_INTEGERS, np.dtype(ml_dtypes.float4_e2m1fn)):
        x = all_values(dtype)
        if ("int2" in other.name) != (width == 2):
            with pytest.raises(MissingReference, match="changes the width"):
                OnnxOp("", "BitCast", 26)(x, to=CODES[other.name])
            continue
        back = OnnxOp("", "BitCast", 26)(OnnxOp("", "BitCast", 26)(x, to=CODES[other.name]), to=CODES[dtype.name])
        assert back.astype(np.float32).tolist() == x.astype(np.float32).tolist()
    assert OnnxOp("", "BitCast", 26)(all_values(np.dtype(ml_dtypes.int4))[:1], to=TensorProto.UINT4).tolist() == [8]


# ---- quantization


@pytest.mark.parametrize("dtype", SMALL_INTEGERS, ids=str)
def test_quantize_to_small_integers(dtype: Any) -> None:
    low, high = INTEGER_RANGES[dtype.name]
    x = torch.arange(-40, 40) / 4
    y = OnnxOp("", "QuantizeLinear", 25)(x, torch.tensor(0.5), np.array(1, dtype))
    assert y.dtype == dtype
    assert y.astype(int).tolist() == [min(max(round(value / 2) + 1, low), high) for value in range(-40, 40)]


@pytest.mark.parametrize("dtype", [*SMALL_FLOATS, *SMALL_INTEGERS], ids=str)
def test_blocks_of_small_numbers_come_back(dtype: Any) -> None:
    values = all_values(dtype)
    q = np.stack([values, values[::-1]])
    scale = torch.tensor([[0.5, 2.0], [4.0, 0.25]])
    block = values.size // 2
    x = OnnxOp("", "DequantizeLinear", 25)(q, scale, axis=1, block_size=block)
    expected = q.astype(np.float64) * scale.double().numpy().repeat(block, 1)
    assert x.numpy().astype(np.float64).tolist() == expected.tolist()
    again = OnnxOp("", "QuantizeLinear", 25)(x, scale, axis=1, block_size=block, output_dtype=CODES[dtype.name])
    assert again.astype(np.float64).tolist() == q.astype(np.float64).tolist()


def test_float8e8m0_scales() -> None:
    q = np.array([[1, -2], [3, 6]]).astype(ml_dtypes.float4_e2m1fn)
    scale = np.array([[2.0], [0.5]]).astype(E8M0)
    x = OnnxOp("", "DequantizeLinear", 28)(q, scale, axis=1, block_size=2, output_dtype=TensorProto.FLOAT16)
    assert x.dtype == torch.float16
    assert x.tolist() == [[2.0, -4.0], [1.5, 3.0]]


# ---- operators that move elements

WORDS = np.array([["b", "", "é"], ["a", "zz", "b"]], dtype=object)
INT4 = np.array([[-8, 7, 0], [1, -1, 3]]).astype(ml_dtypes.int4)
IMAGE = np.array([str(index) for index in range(16)], dtype=object).reshape(1, 4, 2, 2)
I64 = np.int64
MOVES: list[tuple[str, int, list[Any], dict[str, Any], int]] = [
    *(("Reshape", 25, [x, I64([3, -1])], {}, 1) for x in (WORDS, INT4)),
    *(("Flatten", 25, [x], {"axis": 0}, 1) for x in (WORDS, INT4)),
    *(("Transpose", 25, [x], {"perm": [1, 0]}, 1) for x in (WORDS, INT4)),
    *(("Squeeze", 25, [x[None], I64([0])], {}, 1) for x in (WORDS, INT4)),
    *(("Unsqueeze", 25, [x, I64([0, -1])], {}, 1) for x in (WORDS, INT4)),
    *(("Identity", 25, [x], {}, 1) for x in (WORDS, INT4)),
    *(("Shape", 25, [x], {"start": 1}, 1) for x in (WORDS, INT4)),
    *(("Size", 25, [x], {}, 1) for x in (WORDS, INT4)),
    ("Pad", 25, [WORDS, I64([0, 1, 1, 0]), np.array("pad", dtype=object)], {}, 1),
    ("Expand", 13, [WORDS[:, :1], I64([2, 1, 4])], {}, 1),
    ("Tile", 13, [WORDS, I64([2, 1])], {}, 1),
    ("Concat", 13, [WORDS, WORDS[:1]], {"axis": 0}, 1),
    ("Split", 18, [WORDS], {"axis": 1, "num_outputs": 3}, 3),
    ("Slice", 13, [WORDS, I64([2]), I64([-10]), I64([1]), I64([-1])], {}, 1),
    ("Gather", 13, [WORDS, I64([[0, 2]])], {"axis": 1}, 1),
    ("GatherElements", 13, [WORDS, I64([[2, -1], [0, 1]])], {"axis": 1}, 1),
    ("GatherND", 13, [WORDS, I64([[0, 2], [1, 0]])], {}, 1),
    ("Compress", 11, [WORDS, np.array([True, False, True])], {"axis": 1}, 1),
    ("ScatterElements", 18, [WORDS, I64([[1], [0]]), WORDS[:, 1:2]], {"axis": 1}, 1),
    ("ScatterND", 18, [WORDS, I64([[1]]), WORDS[:1]], {}, 1),
    ("Where", 16, [np.array([[True], [False]]), WORDS, np.array("no", dtype=object)], {}, 1),
    ("ReverseSequence", 10, [WORDS, I64([3, 2])], {"time_axis": 1, "batch_axis": 0}, 1),
    ("DepthToSpace", 13, [IMAGE], {"blocksize": 2}, 1),
    ("SpaceToDepth", 13, [IMAGE], {"blocksize": 2}, 1),
    ("Equal", 19, [WORDS, np.array(["b"], dtype=object)], {}, 1),
    ("Unique", 11, [WORDS], {}, 4),
]


def by_reference(op_type: str, opset: int, inputs: list[Any], attributes: dict[str, Any], outputs: int) -> Any:
    names, results = [f"x{index}" for index in range(len(inputs))], [f"y{index}" for index in range(outputs)]
    node = helper.make_node(op_type, names, results, **attributes)
    infos = [onnx.ValueInfoProto(name=name, type=onnx.TypeProto()) for name in (*names, *results)]
    graph = helper.make_graph([node], "one", infos[: len(names)], infos[len(names) :])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    return ReferenceEvaluator(model).run(None, dict(zip(names, inputs, strict=True)))


@pytest.mark.parametrize("case", MOVES, ids=lambda case: f"{case[0]}-{case[2][0].dtype}")
def test_moving_operators_equal_the_reference_evaluator(case: Any) -> None:
    op_type, opset, inputs, attributes, outputs = case
    op = OnnxOp("", op_type, onnx.defs.get_schema(op_type, opset).since_version)
    results = op(*inputs, **attributes, **({"_outputs": outputs} if outputs > 1 else {}))
    for result, expected in zip(results if outputs > 1 else (results,), by_reference(*case), strict=True):
        array = to_array(result)
        assert array.shape == np.shape(expected)
        assert [*map(str, array.reshape(-1))] == [*map(str, np.asarray(expected).reshape(-1))]
        assert is_string(array) == (np.asarray(expected).dtype.kind in "OU")


def test_sampling_strings_takes_the_nearest() -> None:
    y = OnnxOp("", "Resize", 19)(IMAGE[:, :1], None, torch.tensor([1.0, 1.0, 2.0, 1.0]), mode="nearest")
    assert y[0, 0, :, 0].tolist() == ["0", "0", "2", "2"]
    with pytest.raises(MissingReference, match="only has mode 'nearest', 'linear' given"):
        OnnxOp("", "Resize", 19)(IMAGE, None, torch.tensor([1.0, 1.0, 2.0, 1.0]), mode="linear")


def test_strings_beside_new_places() -> None:
    hot = OnnxOp("", "OneHot", 11)(I64([1, 0]), I64([2]), np.array(["off", "on"], dtype=object))
    assert hot.tolist() == [["off", "on"], ["on", "off"]]
    assert OnnxOp("", "Trilu", 14)(WORDS, upper=0).tolist() == [["b", "", ""], ["a", "zz", ""]]
    padded = OnnxOp("", "CenterCropPad", 18)(WORDS, I64([1, 5]))
    assert padded.tolist() == [["", "b", "", "é", ""]]


def test_sequences_of_strings() -> None:
    parts = OnnxOp("", "SplitToSequence", 11)(WORDS, axis=1, keepdims=0)
    assert [part.tolist() for part in parts] == WORDS.T.tolist()
    joined = OnnxOp("", "ConcatFromSequence", 11)(parts, axis=1, new_axis=1)
    assert joined.tolist() == WORDS.tolist()
    assert OnnxOp("", "SequenceAt", 11)(parts, np.int64(-1)).tolist() == ["é", "b"]


def test_empty_arrays_of_strings_stay_strings() -> None:
    empty = np.empty((2, 0), dtype=object)
    assert is_string(OnnxOp("", "Transpose", 13)(empty, perm=[1, 0]))
    assert OnnxOp("", "Concat", 13)(empty, WORDS, axis=1).tolist() == WORDS.tolist()


FOREIGN_TYPES = {"tensor(string)", *(f"tensor({name})" for name in ("int4", "uint4", "int2", "uint2", "float4e2m1"))}
COMPUTES = {  # take the arrays themselves, or any value
    *("Cast", "CastLike", "BitCast", "QuantizeLinear", "DequantizeLinear", "Constant", "ConstantOfShape", "Identity"),
    *("Shape", "Size", "Optional", "OptionalGetElement", "OptionalHasElement", "SequenceAt", "SequenceConstruct"),
    *("SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap", "If", "Loop", "Scan"),
    *("StringConcat", "StringSplit", "RegexFullMatch", "TfIdfVectorizer", "RandomNormalLike", "RandomUniformLike"),
    "Col2Im",  # adds its elements, which strings have no rule for
}


def test_every_operator_that_takes_such_types_is_known() -> None:
    taking = {
        schema.name
        for schema in onnx.defs.get_all_schemas_with_history()
        if schema.domain == ""
        for constraint in schema.type_constraints
        if FOREIGN_TYPES & set(constraint.allowed_type_strs)
    }
    assert taking - set(MOVING) - COMPUTES == set()


# ---- constants


def test_constants_become_arrays_and_are_written_back_as_they_were() -> None:
    weight = helper.make_tensor("w", TensorProto.INT4, [3], [-8, 7, 1])
    words = helper.make_tensor("s", TensorProto.STRING, [2], [b"yes", "né".encode()])
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale"], ["x"]),
        helper.make_node("Constant", [], ["pad"], value_string=b"pad"),
        helper.make_node("Concat", ["s", "t"], ["text"], axis=0),
        helper.make_node("Constant", [], ["t"], value_strings=[b"1", b"2"]),
    ]
    scale = numpy_helper.from_array(np.float32(0.5).reshape(()), "scale")
    outputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [3]),
        helper.make_tensor_value_info("text", TensorProto.STRING, [4]),
    ]
    graph = helper.make_graph([nodes[0], nodes[1], nodes[3], nodes[2]], "g", [], outputs, [weight, words, scale])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    x, text = load(model).run([])
    assert x.tolist() == [-4.0, 3.5, 0.5]
    assert text.tolist() == ["yes", "né", "1", "2"]


def test_sparse_constants_are_dense_in_a_run() -> None:
    values = numpy_helper.from_array(np.float32([5, 6]), "v")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.int64([[0, 1], [1, 0]]), "i"), [2, 2])
    node = helper.make_node("Constant", [], ["y"], sparse_value=sparse)
    graph = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    assert load(model).run([])[0].tolist() == [[0.0, 5.0], [6.0, 0.0]]


def test_is_foreign_tells_strings_from_sizes() -> None:
    assert is_foreign(WORDS) and is_foreign(INT4)
    assert not is_foreign(np.array([1, 2], dtype=object))
    assert not is_foreign(np.zeros(2, ml_dtypes.bfloat16))
    assert not is_foreign(torch.zeros(2))


def test_verification_compares_strings_sequences_and_maps() -> None:
    words, numbers = np.array(["a", "b"], dtype=object), [torch.ones(2), torch.zeros(1)]
    maps = [{"a": 0.5, "b": 1.0}]
    assert _differs(words, words, words.copy()) == ""
    assert "other elements" in _differs(words, words, words[::-1])
    assert _differs(numbers, numbers, [*numbers]) == ""
    assert "largest error" in _differs(numbers, numbers, [torch.ones(2) * 1.1, numbers[1]])
    assert "had 2 items and has 1" in _differs(numbers, numbers, numbers[:1])
    assert _differs(maps, maps, [{"a": 0.5, "b": 1.0}]) == ""
    assert "largest error" in _differs(maps, maps, [{"a": 0.25, "b": 1.0}])
    assert "other keys" in _differs(maps, maps, [{"a": 0.5, "c": 1.0}])
    assert "was ndarray and became list" in _differs(words, words, numbers)
    assert _differs([np.array([3])], [np.array([3])], [torch.tensor([3])]) == ""  # a size, in either lane
    assert _differs(3, 3, torch.tensor(3)) == ""
