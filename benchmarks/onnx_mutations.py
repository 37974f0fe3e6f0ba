"""Mutations of ONNX models for fuzzing: of the message's structure, and of its bytes."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

from onnx import AttributeProto, ModelProto, NodeProto, TensorProto

NUMBERS = (0, 1, -1, 2, 3, 7, 127, 128, 255, 1 << 15, 1 << 31, -(1 << 31), 1 << 40, 1 << 62, (1 << 63) - 1, -(1 << 63))
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 3e38, float("inf"), float("-inf"), float("nan"))
NAMES = ("", "x", "y", "\0", "a" * 3000, "../x", "ai.onnx", "com.microsoft", "é\u202e", "1")
Mutation = Callable[[ModelProto, random.Random], None]


def messages(message: Any) -> Iterator[Any]:
    """The message and every one inside it; without recursion."""
    waiting = [message]
    while waiting:
        current = waiting.pop()
        yield current
        for descriptor, value in current.ListFields():
            if descriptor.message_type is not None:
                waiting += list(value) if descriptor.is_repeated else [value]


def _nodes(model: ModelProto) -> list[NodeProto]:
    return [message for message in messages(model) if isinstance(message, NodeProto)]


def _tensors(model: ModelProto) -> list[TensorProto]:
    return [message for message in messages(model) if isinstance(message, TensorProto)]


def change_field(model: ModelProto, chance: random.Random) -> None:
    """Any field of any message: another value, nothing, an element twice, one less, or another order."""
    message = chance.choice(list(messages(model)))
    fields = [(descriptor, value) for descriptor, value in message.ListFields()]
    if not fields:
        return
    descriptor, value = chance.choice(fields)
    if descriptor.is_repeated and value:
        _change_repeated(value, descriptor, chance)
    elif chance.random() < 0.3 or descriptor.message_type is not None:
        message.ClearField(descriptor.name)
    else:
        _try(lambda: setattr(message, descriptor.name, other(descriptor, chance)))


def _change_repeated(value: Any, descriptor: Any, chance: random.Random) -> None:
    place, kind = chance.randrange(len(value)), chance.randrange(4)
    if kind == 0:
        del value[place]
    elif kind == 1:
        value.append(value[place])
    elif kind == 2:
        items = list(value)
        chance.shuffle(items)
        del value[:]
        value.extend(items)
    elif descriptor.message_type is None:
        _try(lambda: value.__setitem__(place, other(descriptor, chance)))


def other(descriptor: Any, chance: random.Random) -> Any:
    """A legal or illegal value of the field's type."""
    if descriptor.cpp_type == descriptor.CPPTYPE_STRING:
        name = chance.choice(NAMES)
        return name.encode() if descriptor.type == descriptor.TYPE_BYTES else name
    if descriptor.cpp_type in (descriptor.CPPTYPE_FLOAT, descriptor.CPPTYPE_DOUBLE):
        return chance.choice(FLOATS)
    return chance.choice(NUMBERS)


def _try(change: Callable[[], Any]) -> None:
    with contextlib.suppress(ValueError, TypeError):  # a number that the field cannot hold
        change()


def swap_names(model: ModelProto, chance: random.Random) -> None:
    """Two values change their names somewhere."""
    nodes = [node for node in _nodes(model) if node.input or node.output]
    if not nodes:
        return
    first, second = (
        chance.choice([part for part in (node.input, node.output) if part]) for node in chance.choices(nodes, k=2)
    )
    a, b = chance.randrange(len(first)), chance.randrange(len(second))
    first[a], second[b] = second[b], first[a]


def rewire(model: ModelProto, chance: random.Random) -> None:
    """One input comes from another value."""
    nodes = [node for node in _nodes(model) if node.input]
    known = [name for node in _nodes(model) for name in node.output] + [item.name for item in model.graph.initializer]
    known += [item.name for item in model.graph.input] + [""]
    if nodes:
        node = chance.choice(nodes)
        node.input[chance.randrange(len(node.input))] = chance.choice(known)


def change_dims(model: ModelProto, chance: random.Random) -> None:
    """A tensor or a declared type has another size or rank."""
    tensors = _tensors(model)
    if tensors and chance.random() < 0.6:
        tensor = chance.choice(tensors)
        dims = [*tensor.dims, chance.choice(NUMBERS)] if chance.random() < 0.3 else [*tensor.dims][::-1]
        if dims and chance.random() < 0.6:
            dims[chance.randrange(len(dims))] = chance.choice(NUMBERS)
        tensor.dims[:] = dims
        return
    shapes = [message for message in messages(model) if type(message).__name__ == "TensorShapeProto" and message.dim]
    if shapes:
        dim = chance.choice(chance.choice(shapes).dim)
        dim.dim_value = chance.choice(NUMBERS)


def change_dtype(model: ModelProto, chance: random.Random) -> None:
    """A tensor or a declared type has another element type, known or not."""
    kind = chance.choice([*TensorProto.DataType.values(), 99, -1])
    tensors = _tensors(model)
    if tensors and chance.random() < 0.6:
        chance.choice(tensors).data_type = kind
        return
    types = [message for message in messages(model) if hasattr(message, "elem_type") and hasattr(message, "shape")]
    if types:
        chance.choice(types).elem_type = kind


def change_attribute(model: ModelProto, chance: random.Random) -> None:
    """An attribute has another type, value or name; or a node gets one that it does not know."""
    nodes = _nodes(model)
    if not nodes:
        return
    node = chance.choice([node for node in nodes if node.attribute] or nodes)
    if not node.attribute or chance.random() < 0.2:
        node.attribute.add(name=chance.choice(["axis", "to", "value", "perm", "q"]), type=AttributeProto.INT).i = 1
        return
    attribute = chance.choice(node.attribute)
    name = attribute.name
    attribute.Clear()
    attribute.name = name
    kind = chance.randrange(5)
    if kind == 0:
        attribute.type, attribute.i = AttributeProto.INT, chance.choice(NUMBERS)
    elif kind == 1:
        attribute.type, attribute.f = AttributeProto.FLOAT, chance.choice(FLOATS)
    elif kind == 2:
        attribute.type, attribute.s = AttributeProto.STRING, chance.choice(NAMES).encode()
    elif kind == 3:
        attribute.type = AttributeProto.INTS
        attribute.ints.extend(chance.choices(NUMBERS, k=chance.randrange(5)))
    else:
        attribute.type = AttributeProto.TENSOR
        attribute.t.data_type, attribute.t.dims[:] = chance.choice([1, 6, 7, 8]), [chance.choice(NUMBERS)]


def change_operator(model: ModelProto, chance: random.Random) -> None:
    """A node becomes another node's operator."""
    nodes = _nodes(model)
    if nodes:
        first, second = chance.choices(nodes, k=2)
        first.op_type, first.domain = second.op_type, chance.choice([second.domain, "acme"])


def change_opset(model: ModelProto, chance: random.Random) -> None:
    """Another version, domain, or one more entry."""
    if model.opset_import and chance.random() < 0.8:
        chance.choice(model.opset_import).version = chance.choice(
            [1, 5, 6, 7, 9, 10, 11, 12, 13, 18, 21, 23, 26, 99, 0, -1]
        )
    else:
        model.opset_import.add(domain=chance.choice(NAMES[:8]), version=chance.choice([1, 13, 20]))


STRUCTURAL: tuple[Mutation, ...] = (
    change_field, change_field, change_field, swap_names, rewire, rewire, change_dims, change_dtype, change_attribute,
    change_attribute, change_operator, change_opset,
)  # fmt: skip


def mutated(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """The serialized model after one to three mutations, and their names."""
    model = ModelProto.FromString(content)
    names = []
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        mutation = chance.choice(STRUCTURAL)
        names.append(mutation.__name__)
        mutation(model, chance)
    data = model.SerializeToString() if chance.random() < 0.8 else content
    if data == content and data:
        mutation = chance.choice(BYTEWISE)
        return mutation(bytearray(data), chance), mutation.__name__
    return data, "+".join(names)


def truncate(data: bytearray, chance: random.Random) -> bytes:
    """The end is missing."""
    return bytes(data[: chance.randrange(len(data))])


def flip(data: bytearray, chance: random.Random) -> bytes:
    """Some bits are others."""
    for _ in range(chance.choice([1, 1, 4, 16])):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def break_text(data: bytearray, chance: random.Random) -> bytes:
    """A name or text of the model is no UTF-8 any more, wherever it occurs."""
    texts = [
        value.encode()
        for message in messages(ModelProto.FromString(bytes(data)))
        for descriptor, value in message.ListFields()
        if descriptor.cpp_type == descriptor.CPPTYPE_STRING and isinstance(value, str) and len(value) > 1
    ]
    if not texts:
        return bytes(data)
    text = chance.choice(texts)
    return bytes(data).replace(text, b"\xff" + text[1:])


BYTEWISE: tuple[Callable[[bytearray, random.Random], bytes], ...] = (truncate, flip, flip, break_text)
