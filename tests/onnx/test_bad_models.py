"""Damaged and hostile ONNX models: each is refused with a message that says what is wrong, quickly, in little memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from fxopt.errors import InvalidModel, MissingReference, OutputError
from fxopt.frontends.onnx import load
from fxopt.ir.onnx.export import save, to_model
from fxopt.ir.shapes import infer

SHAPE = [16, 16]
Damage = Callable[[ModelProto], Any]


@pytest.fixture(autouse=True)
def limited() -> Any:
    """No more than 4 GB of new address space: what is allocated by declared sizes fails loudly."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def model(external: str = "") -> ModelProto:
    """y = relu(x @ w) @ v; w may lie in an external file of 1024 bytes, at byte 0."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=SHAPE).astype(np.float32) for name in "wv"}
    weights = [numpy_helper.from_array(value, name) for name, value in arrays.items()]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="second"),
        helper.make_node("MatMul", ["b", "v"], ["y"], name="third"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 16]) for name in "xy"]
    body = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    made = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if external:
        refer(made.graph.initializer[0], location=external, offset=0, length=1024)
    return made


def refer(tensor: TensorProto, **entries: Any) -> None:
    for name in ("raw_data", "external_data"):
        tensor.ClearField(name)  # type: ignore[arg-type]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))


def written(folder: Path, made: ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(made.SerializeToString())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with a data file of 1024 bytes; another one lies outside."""
    inner = tmp_path / "models"
    inner.mkdir()
    for place in (inner / "w.bin", tmp_path / "outside.bin"):
        place.write_bytes(np.ones(256, np.float32).tobytes())
    return inner


def test_external_data_that_are_right(folder: Path) -> None:
    graph = load(written(folder, model("w.bin")))
    assert graph.model is not None and {file.name for file in graph.model.files} == {"w.bin"}
    values = [graph.constant(node) for node in graph.nodes if node.op == "get_attr"]
    assert values[0] is not None and values[0].shape == (16, 16) and bool((values[0] == 1).all())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "gone.bin"}, "'w'.*'gone.bin', which does not exist"),
        ({"location": "."}, "which is no file|not below"),
        ({"location": "../outside.bin"}, "not below the model's folder; put the file beside"),
        ({"location": "sub/../../outside.bin"}, "not below the model's folder"),
        ({"location": "link.bin"}, "'link.bin', which is not below the model's folder"),
        ({"location": "linked/outside.bin"}, "not below the model's folder"),
        ({"location": "loop.bin"}, "'loop.bin'"),
        ({"location": "x" * 5000}, "cannot be read|no file"),
        ({"location": "a\0b"}, "which no file can have"),
        ({}, "have no location"),
        ({"location": "w.bin", "offset": -4}, "the offset '-4'; expected a number from 0"),
        ({"location": "w.bin", "offset": 1 << 63}, "the offset '9223372036854775808'"),
        ({"location": "w.bin", "offset": "9" * 5000}, "the offset '9999"),
        ({"location": "w.bin", "offset": "0x10"}, "the offset '0x10'"),
        ({"location": "w.bin", "offset": (1 << 63) - 1}, "1024 bytes at 9223372036854775807, but w.bin is too short"),
        ({"location": "w.bin", "offset": 4}, "too short: it holds 1024 bytes"),
        ({"location": "w.bin", "length": -1}, "the length '-1'"),
        ({"location": "w.bin", "length": 1000}, r"length 1000; FLOAT\[16, 16\] needs 1024 bytes"),
        ({"location": "w.bin", "length": 4096}, "length 4096"),
    ],
)
def test_external_data(folder: Path, entries: dict[str, Any], message: str) -> None:
    (folder / "link.bin").symlink_to(folder.parent / "outside.bin")
    (folder / "linked").symlink_to(folder.parent)
    (folder / "loop.bin").symlink_to(folder / "loop.bin")
    made = model()
    refer(made.graph.initializer[0], **entries)
    with pytest.raises(InvalidModel, match=message) as caught:
        load(written(folder, made))
    assert str(caught.value).startswith(f"{folder / 'model.onnx'}: tensor 'w'")


def test_an_absolute_location(folder: Path) -> None:
    made = model(str(folder / "w.bin"))
    with pytest.raises(InvalidModel, match="not below the model's folder"):
        load(written(folder, made))


def test_external_data_in_a_sub_graph_or_attribute(folder: Path) -> None:
    made = model()
    made.graph.node.add(op_type="Constant", name="c", output=["c"]).attribute.add(
        name="value", type=onnx.AttributeProto.TENSOR
    ).t.CopyFrom(TensorProto(name="t", data_type=1, dims=[4]))
    refer(made.graph.node[-1].attribute[0].t, location="../outside.bin")
    with pytest.raises(InvalidModel, match="tensor 't'.*not below"):
        load(written(folder, made))


def test_external_data_of_a_message() -> None:
    with pytest.raises(InvalidModel, match="give the model's path"):
        load(model("w.bin"))


def test_external_dimensions_are_compared_before_anything_is_allocated(folder: Path) -> None:
    made = model("w.bin")
    made.graph.initializer[0].dims[:] = [1 << 31, 1 << 20]
    del made.graph.initializer[0].external_data[2]
    with pytest.raises(InvalidModel, match="too short"):
        load(written(folder, made))


def weight(made: ModelProto) -> TensorProto:
    return made.graph.initializer[0]


def dims(*sizes: int) -> Damage:
    return lambda made: weight(made).dims.__setitem__(slice(None), sizes)


def _typed(made: ModelProto) -> None:
    weight(made).ClearField("raw_data")
    weight(made).float_data.extend([1.0, 2.0])


def _twice(made: ModelProto) -> None:
    weight(made).float_data.extend([1.0, 2.0])


def _cycle(made: ModelProto) -> None:
    made.graph.node[0].input[0] = "b"


def _function(calls: str) -> Damage:
    def damage(made: ModelProto) -> None:
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("f", 1)]
        for name, called in (("A", calls), ("B", "A")):
            node = helper.make_node(called, ["x"], ["y"], domain="f")
            made.functions.append(helper.make_function("f", name, ["x"], ["y"], [node], opsets))
        made.opset_import.append(opsets[1])

    return damage


def _deep(levels: int) -> Damage:
    def damage(made: ModelProto) -> None:
        graph = made.graph
        for level in range(levels):
            node = graph.node.add(op_type="If", name=f"if{level}", input=["c"], output=[f"d{level}"])
            graph = node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g
            graph.name = "g"

    return damage


def _opset(version: int, domain: str = "") -> Damage:
    return lambda made: made.opset_import.append(helper.make_opsetid(domain, version))


def _replaced_opset(version: int) -> Damage:
    return lambda made: setattr(made.opset_import[0], "version", version)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (dims(1 << 62), r"'w' holds 1024 bytes; FLOAT\[4611686018427387904\]|more than 2\^63 bytes"),
        (dims(1 << 62, 1 << 62), r"'w'.*more than 2\^63 bytes"),
        (dims(1 << 31, 1 << 20), "'w' holds 1024 bytes"),
        (dims(1 << 32, 1 << 32, 16, 16), r"more than 2\^63"),  # the product is 0 modulo 2^64
        (dims(-16, -16), r"'w' has the shape \[-16, -16\]; dimensions are 0 or more"),
        (dims(0, 16), r"'w' holds 1024 bytes; FLOAT\[0, 16\] needs 0"),
        (lambda made: setattr(weight(made), "raw_data", b"123"), r"'w' holds 3 bytes; FLOAT\[16, 16\] needs 1024"),
        (lambda made: weight(made).ClearField("raw_data"), "'w' holds 0 values; .* needs 256"),
        (lambda made: setattr(weight(made), "data_type", 0), "element type 0, which ONNX does not define"),
        (lambda made: setattr(weight(made), "data_type", 77), "element type 77"),
        (lambda made: setattr(weight(made), "data_type", TensorProto.DOUBLE), "1024 bytes; DOUBLE.* needs 2048"),
        (lambda made: weight(made).segment.CopyFrom(TensorProto.Segment(begin=0, end=4)), "one segment of several"),
        (_typed, "'w' holds 2 values"),
        (_twice, r"holds data twice: \['float_data', 'raw_data'\]"),
        (lambda made: setattr(weight(made), "name", "v"), "the graph 'g' has the initializer 'v' twice"),
        (lambda made: setattr(weight(made), "name", ""), "has the initializer without a name"),
        (lambda made: made.graph.input.append(made.graph.input[0]), "has the input 'x' twice"),
        (lambda made: made.graph.node[1].output.__setitem__(0, "a"), "'second' of the graph 'g' computes 'a', which"),
        (lambda made: made.graph.node[1].output.__setitem__(0, "w"), "computes 'w', which exists already"),
        (lambda made: made.graph.initializer.pop(0), "'first' .* uses the value 'w', which nothing before it computes"),
        (_cycle, "'first' of the graph 'g' uses the value 'b', which depends on it: the graph has a cycle"),
        (lambda made: made.graph.node.reverse(), "'third' .* but 'second' after it; nodes must be sorted"),
        (lambda made: setattr(made.graph.output[0], "name", "q"), "the output 'q', which is not computed by any node"),
        (lambda made: made.opset_import.pop(), "imports only the operator sets .*; add it to opset_import"),
        (_replaced_opset(0), "version 0 of the operator set 'ai.onnx'; expected 1 to"),
        (_replaced_opset(-3), "version -3"),
        (_replaced_opset(999), "version 999 of the operator set 'ai.onnx'; expected 1 to 2., the newest .*; install a newer one"),
        (_opset(13), "imports the operator set 'ai.onnx' twice: 20 and 13"),
        (_opset(13, "ai.onnx"), "'ai.onnx' twice: 20 and 13"),
        (lambda made: setattr(made.graph.node[1], "domain", "acme"), "'second' is a Relu of the domain 'acme'"),
        (lambda made: setattr(made.graph.node[1], "op_type", ""), "'second' of the graph 'g' has no operator"),
        (lambda made: made.ClearField("graph"), "holds no graph"),
        (lambda made: made.graph.output.pop(), "the graph 'g' has no outputs, so it computes nothing"),
        (
            lambda made: setattr(made.graph.input[0].type.tensor_type, "elem_type", 77),
            "the value 'x' has the element type 77, which ONNX does not define",
        ),
        (_function("A"), "the function f::A calls itself: f::A -> f::A"),
        (_function("B"), "f::A -> f::B -> f::A|f::B -> f::A -> f::B"),
        (_deep(40), "is inside 30 nested sub-graphs; at most 30 are supported"),
        (_deep(1000), "is inside 30 nested sub-graphs"),
        (lambda made: made.graph.node[1].attribute.add(name="q"), "'second': the attribute 'q' has no known type"),
        (
            lambda made: made.graph.node[1].attribute.add(name="q", type=onnx.AttributeProto.INT, f=1.0),
            "'q' is a INT, but holds \\['f'\\]",
        ),
        (
            lambda made: made.graph.node[1].attribute.extend([helper.make_attribute("q", 1)] * 2),
            "attribute 'q' twice",
        ),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_messages(damage: Damage, message: str, check: bool) -> None:
    made = model()
    damage(made)
    with pytest.raises(InvalidModel, match=message):
        load(made, check=check)


def test_what_is_no_model_is_not_read_whole(folder: Path) -> None:
    with pytest.raises(InvalidModel, match="/dev/zero is a device; expected an ONNX model file"):
        load("/dev/zero")
    path = folder / "huge.onnx"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InvalidModel, match="huge.onnx holds 1099511627776 bytes, and a protobuf message at most"):
        load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "model.onnx is not an ONNX model: the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "but a pointer of Git LFS; fetch .*`git lfs pull`"),
        (b"PK\x03\x04\x14\0\0\0", "a zip archive; .*, if PyTorch saved it"),
        (b"<!DOCTYPE html>", "perhaps the page of a failed download"),
        (b"\x18\0\0\0TFL3", "a TensorFlow Lite model; convert it to ONNX with tf2onnx"),
        (b"hello", r"is not an ONNX model, or is truncated \(5 bytes\)"),
        (model().SerializeToString()[:900], r"is not an ONNX model, or is truncated \(900 bytes\)"),
    ],
)
def test_files_of_other_kinds(folder: Path, content: bytes, message: str) -> None:
    """The error says what it is, and what to do."""
    path = folder / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InvalidModel, match=message):
        load(path)


def test_a_name_that_no_file_has() -> None:
    with pytest.raises(InvalidModel, match=r"'a\\x00b.onnx' holds a zero byte"):
        load("a\0b.onnx")


@pytest.mark.parametrize(
    ("op_type", "message"),
    [
        ("Rellu", "No Op registered for Rellu .* Did you mean Relu"),
        ("RotaryEmbedding", "RotaryEmbedding is an operator since version 23 of its operator set"),
    ],
)
def test_operators_that_the_standard_lacks(op_type: str, message: str) -> None:
    made = model()
    made.graph.node[1].op_type = op_type
    with pytest.raises(InvalidModel, match=message):
        load(made)


@pytest.mark.parametrize("levels", [40, 1000])
def test_a_file_that_is_nested_too_deeply(folder: Path, levels: int) -> None:
    """Protobuf does not read such a file; writing it by hand shows it."""

    def number(value: int) -> bytes:
        found = bytearray()
        while value > 127:
            found.append(value & 127 | 128)
            value >>= 7
        return bytes([*found, value])

    def field(tag: int, content: bytes) -> bytes:
        return number(tag << 3 | 2) + number(len(content)) + content

    graph = b""
    for _ in range(levels):  # graph.node(1).attribute(5).g(6)
        graph = field(1, field(4, b"If") + field(5, field(6, graph)))
    path = folder / "deep.onnx"
    path.write_bytes(b"\x08\x0a" + field(7, graph))
    with pytest.raises(InvalidModel, match="nested|MaxDepth|too deeply"):
        load(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("first", "the graph 'g': the name"),
        ("Relu", "the graph 'g': the name"),
        ("acme", "the model: the name"),
        ("hidden", "the graph 'g': the name"),
        ("size", "node 'second': the name"),
        ("rows", "the type of 'x': the name"),
        ("weight", "has the initializer: the name"),
        ("typed", "the graph 'g': the name"),
        ("Twice", "a function: the name"),
        ("value", "has the input: the name"),
    ],
)
def test_names_that_are_not_utf8(folder: Path, name: str, message: str) -> None:
    """Protobuf reads them as bytes."""
    made = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20, "acme" : 1]>
        g (float[rows, 2] x) => (float[rows, 2] y) <float[2] weight = {1, 2}, float[rows, 2] typed> {
            [first] hidden = Relu (x)
            [second] typed = acme.Twice <size = 2> (hidden)
            y = Mul (typed, weight)
        }
        <domain: "acme", opset_import: ["" : 20]> Twice <size> (value) => (sum) { sum = Add (value, value) }
    """)
    content = made.SerializeToString()
    assert name.encode() in content
    path = folder / "model.onnx"
    path.write_bytes(content.replace(name.encode(), b"\xff" + name[1:].encode()))
    with pytest.raises(InvalidModel, match=message + r" b'\\xff\w+' is not UTF-8"):
        load(path)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_sequence_of_declared_length_is_not_made(axis: int) -> None:
    """Its type stays unknown, as behind an operator without a reference."""
    graph = load(onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 20]> g (float[3, 2147483648] x) => (int64 n) {{
            s = SplitToSequence <axis = {axis}> (x)
            n = SequenceLength (s)
        }}
    """))  # fmt: skip
    began = time.perf_counter()
    infer(graph, {})
    assert time.perf_counter() - began < 5
    split = next(node for node in graph.calls())
    assert len(split.meta.get("val", ())) == (3 if axis == 0 else 0)


@pytest.mark.parametrize(("keys", "values"), [(0, 3), (0, 0), (1, 0)])
def test_attention_without_heads(keys: int, values: int) -> None:
    """torch divides by their number, which ends the process; here the operator has no reference then."""
    graph = load(onnx.parser.parse_model(f"""
        <ir_version: 11, opset_import: ["" : 24]>
        g (float[2, 3, 4, 8] q, float[2, {keys}, 6, 8] k, float[2, {values}, 6, 8] v) => (float[2, 3, 4, 8] y) {{
            y = Attention <is_causal = 1> (q, k, v)
        }}
    """), check=False)  # fmt: skip
    infer(graph, {})
    inputs = [torch.ones(2, heads, length, 8) for heads, length in ((3, 4), (keys, 6), (values, 6))]
    with pytest.raises(MissingReference, match="no heads of keys or values"):
        graph.run(inputs)


def test_an_unknown_domain_is_kept() -> None:
    made = model()
    made.opset_import.append(helper.make_opsetid("acme", 3))
    made.graph.node[1].domain, made.graph.node[1].op_type = "acme", "Sparkle"
    assert to_model(load(made)) == made


def test_a_shared_input_and_initializer_is_no_duplicate() -> None:
    made = model()
    made.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, SHAPE))
    assert to_model(load(made)) == made


# ---- writing


def test_external_data_of_the_input_are_not_overwritten(folder: Path) -> None:
    made = model("w.bin")
    refer(made.graph.initializer[0], location="out.onnx.data", offset=0, length=1024)
    data = (folder / "w.bin").rename(folder / "out.onnx.data")
    graph = load(written(folder, made))
    before = data.read_bytes()
    with pytest.raises(OutputError, match=r"out.onnx.data holds the weights of the model that came in"):
        save(graph, folder / "out.onnx")
    with pytest.raises(OutputError, match="would be overwritten"):
        save(graph.copy(), data, external=False)
    assert data.read_bytes() == before and not (folder / "out.onnx").exists()
    save(graph, folder / "other.onnx")
    assert load(folder / "other.onnx").size_bytes() == graph.size_bytes()


def test_the_data_file_holds_shared_bytes_once(folder: Path) -> None:
    graph = load(written(folder, model("w.bin")))
    first = next(node for node in graph.nodes if node.op == "get_attr")
    value = graph.constant(first)
    assert value is not None
    third = graph.find("third")
    assert third is not None
    third.replace_input_with(third.args[1], graph.add_constant(value, "again"))  # type: ignore[arg-type]
    graph.prune()
    save(graph, folder / "out.onnx", external=True)
    assert (folder / "out.onnx.data").stat().st_size == 1024
    stored = onnx.load(folder / "out.onnx")
    arrays = [numpy_helper.to_array(tensor) for tensor in stored.graph.initializer]
    assert len(arrays) == 2 and all((array == 1).all() for array in arrays)
