"""Calibration data as data sets and tokenisers give them: dicts with more than the inputs, lists, rows, JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import fxopt
from fxopt.calibration import load
from fxopt.errors import InvalidInput
from fxopt.ir.graph import Graph
from tests.test_bad_input import IMAGE, Cli, assert_refused, graph_of, spec

IDS = graph_of(spec("input_ids", torch.int64, "batch", "seq"))
BERT = graph_of(spec("input_ids", torch.int32, "batch", "seq"), spec("attention_mask", torch.int64, "batch", "seq"))
TWO = graph_of(spec("input_ids", torch.int64, 2, "seq"))
FLAGS = graph_of(spec("mask", torch.bool, "batch", "seq"))


def loaded(source: Any, graph: Graph = BERT) -> tuple[list[dict[str, list[Any]]], list[str]]:
    """The batches as lists, and what was said."""
    said: list[str] = []
    found = load(source, graph, warn=said.append)
    for batch in found:
        assert [(value.dtype, name) for name, value in batch.items()] == [(s.dtype, s.name) for s in graph.inputs]
    return [{name: value.tolist() for name, value in batch.items()} for batch in found], said


ROW = {"input_ids": [[5, 6, 7]], "attention_mask": [[1, 1, 0]]}
OTHER = {"input_ids": [[8, 9, 7]], "attention_mask": [[1, 1, 1]]}
CONVERTED = "calibration: input 'input_ids' is converted from int64 to int32; every value fits"
ONE = "calibration: rows without a batch axis are taken as batches of one"


# ---- what is accepted


def test_lists_of_lists_and_what_is_converted() -> None:
    batches, said = loaded([ROW, OTHER])
    assert batches == [ROW, OTHER] and said == [CONVERTED]


@pytest.mark.parametrize(
    "name", ["label", "labels", "special_tokens_mask", "offset_mapping", "length", "overflow_to_sample_mapping", "idx"]
)
def test_by_products_are_left_out_and_said(name: str) -> None:
    batches, said = loaded([{**row, name: [[0, 1, 1]]} for row in (ROW, OTHER)])
    assert batches == [ROW, OTHER]
    assert said == [f"calibration: {name!r} is left out: the model does not take it", CONVERTED]


def test_a_by_product_that_is_an_input_is_one() -> None:
    graph = graph_of(spec("input_ids", torch.int64, "batch", "seq"), spec("labels", torch.int64, "batch"))
    batches, said = loaded([{"input_ids": [[1, 2]], "labels": [1]}], graph)
    assert batches == [{"input_ids": [[1, 2]], "labels": [1]}] and not said


def test_token_types_and_masks_that_say_nothing_are_left_out() -> None:
    row = {"input_ids": [[1, 2]], "token_type_ids": [[0, 0]], "attention_mask": torch.ones(1, 2)}
    batches, said = loaded([row], IDS)
    assert batches == [{"input_ids": [[1, 2]]}]
    assert said == [
        "calibration: 'token_type_ids' is left out: the model takes none, and it is 0 throughout",
        "calibration: 'attention_mask' is left out: the model takes none, and it is 1 throughout",
    ]


def test_rows_of_a_data_set_are_batches_of_one() -> None:
    rows = [{"input_ids": [1, 2], "attention_mask": [1, 1]}, {"input_ids": [3], "attention_mask": [1]}]
    batches, said = loaded(rows)
    assert [batch["input_ids"] for batch in batches] == [[[1, 2]], [[3]]]
    assert said == [ONE, CONVERTED]
    (image,), said = loaded([np.arange(3.0)], IMAGE)
    assert image == {"x": [[0.0, 1.0, 2.0]]} and said == [ONE]


def test_the_rows_of_one_dict_are_samples() -> None:
    batches, _ = loaded({"input_ids": np.array([[1, 2], [3, 4]]), "attention_mask": [[1, 1], [1, 0]], "labels": [0, 1]})
    assert [batch["input_ids"] for batch in batches] == [[[1, 2]], [[3, 4]]]
    batches, said = loaded({"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1]})
    assert batches == [{"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1, 1]]}] and ONE in said


@pytest.mark.parametrize("given", [[[0, 1]], np.array([[0, 1]], np.int32), torch.tensor([[False, True]])])
def test_zeros_and_ones_are_booleans(given: Any) -> None:
    batches, said = loaded([{"mask": given}], FLAGS)
    assert batches == [{"mask": [[False, True]]}]
    assert bool(said) == (not isinstance(given, torch.Tensor)) and all(
        "to bool; every value fits" in text for text in said
    )
    (batch,), _ = loaded([{"input_ids": torch.tensor([[True, False]])}], IDS)
    assert batch == {"input_ids": [[1, 0]]}


def test_a_tokeniser(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3, "c": 4}, unk_token="[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    texts = ["a b c", "b"]
    wanted = [[[2, 3, 4]], [[3, 0, 0]]]
    for kind in (None, "np", "pt"):
        whole = tokenizer(texts, padding=True, return_tensors=kind, return_special_tokens_mask=True)
        batches, _ = loaded(whole)  # a BatchEncoding: its rows
        assert [batch["input_ids"] for batch in batches] == wanted
        batches, _ = loaded([whole])  # one batch
        assert [batch["input_ids"] for batch in batches] == [[[2, 3, 4], [3, 0, 0]]]
    batches, said = loaded([tokenizer(text) for text in texts])
    assert [batch["input_ids"] for batch in batches] == [[[2, 3, 4]], [[3]]] and ONE in said
    with pytest.raises(InvalidInput, match=r"its rows have from 1 to 3 elements; pad them"):
        load([tokenizer(texts)], BERT)
    with pytest.raises(InvalidInput, match="the model takes no 'attention_mask', and it is not 1 throughout"):
        load([tokenizer(texts, padding=True)], IDS)


# ---- files


def written(path: Path, rows: list[Any]) -> Path:
    text = "\n\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_rows_of_json(tmp_path: Path, name: str) -> None:
    rows: list[Any] = [{**ROW, "labels": 1}, {"input_ids": [8], "attention_mask": [1]}]
    batches, said = loaded(written(tmp_path / name, rows))
    assert batches == [ROW, {"input_ids": [[8]], "attention_mask": [[1]]}]
    assert len(said) == 3 and len(loaded(tmp_path)[0]) == 2
    assert len(load(str(tmp_path / name), BERT, samples=1, warn=lambda _: None)) == 1


def test_columns_of_json(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps({"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [1, 1]]}))
    batches, _ = loaded(tmp_path / "d.json")
    assert [batch["input_ids"] for batch in batches] == [[[1, 2]], [[3, 4]]]


def test_a_folder_of_both(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", [{"x": [0.0, 1.0, 2.0]}])
    np.savez(tmp_path / "b.npz", x=np.zeros((2, 3), np.float32), labels=np.zeros(2))
    batches, said = loaded(tmp_path, IMAGE)
    assert len(batches) == 3 and said == [ONE, "calibration: 'labels' is left out: the model does not take it"]


def embedding(path: Path) -> Path:
    """Rows of a table that input_ids (int64[batch, seq]) name, times a matrix."""
    body = onnx.parser.parse_graph(
        "g (int64[batch, seq] input_ids) => (float[batch, seq, 4] y) { e = Gather(table, input_ids) y = MatMul(e, w) }"
    )
    for name, shape in (("table", (9, 4)), ("w", (4, 4))):
        values = np.random.default_rng(0).normal(size=shape).astype(np.float32).ravel()
        body.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, shape, values))
    onnx.save(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_on_the_command_line(cli: Cli, tmp_path: Path) -> None:
    model = embedding(tmp_path / "m.onnx")
    data = written(tmp_path / "d.jsonl", [{"input_ids": [1, 2, 3], "token_type_ids": [0, 0, 0], "label": 1}] * 4)
    ran = cli("explain", model, "--calibration", data)
    assert ran.code == 0, ran.err
    assert cli("compare", model, model, "--data", data, "--seconds", "0.1").code == 0
    result = fxopt.optimize(model, calibration=data, guard_seconds=0.1)
    assert "calibration: 'label' is left out: the model does not take it" in result.report.warnings
    written(data, [{"input_ids": [1, 2, 3], "token_type_ids": [0, 0, 1]}])
    assert_refused(cli("explain", model, "--calibration", data), "line 1: the model takes no 'token_type_ids'")


# ---- errors: what was given, what was expected, what to do


@pytest.mark.parametrize(
    ("source", "graph", "message"),
    [
        ([{"input_id": [[1]]}], IDS, "unknown model input 'input_id'; did you mean 'input_ids'.*leave out what"),
        ([{"text": "a b", "input_ids": [[1]]}], IDS, "unknown model input 'text'"),
        ([{"input_ids": [[1, 2], [3]]}], IDS, "its rows have from 1 to 2 elements; pad them to one length, as in tok"),
        ({"input_ids": [[1, 2], [3]]}, IDS, "calibration: input 'input_ids' is not an array: its rows have from 1 to 2"),
        ([{"input_ids": "a b"}], IDS, "input 'input_ids' has element type <U3: text; tokenise it first"),
        (["a b", "c"], IDS, "calibration batch 0 is text; tokenise it first, as in tokenizer"),
        ([{"input_ids": [[1, None]]}], IDS, "element type object, which is no tensor of numbers"),
        ([{"input_ids": [[1]], "token_type_ids": [[1]]}], IDS,
         "the model takes no 'token_type_ids', and it is not 0 throughout; .* return_token_type_ids=False"),
        ([{"input_ids": [[1, 0]], "attention_mask": [[1, 0]]}], IDS, "takes no 'attention_mask', .* counts padding as text"),
        ([{"input_ids": [[2**40]], "attention_mask": [[1]]}], BERT, "type int64, expected int32; some values do not fit"),
        ([{"mask": [[0, 2]]}], FLAGS, "element type int64, expected bool; some values do not fit"),
        ([{"input_ids": [1, 2]}], TWO,
         r"batch 0 has no batch axis, and the model takes input_ids: int64\[2, seq\]; stack 2 rows, or check the shape"),
        ([{"input_ids": [1], "attention_mask": [[1]]}], BERT, r"input 'input_ids' has shape \[1\], expected \[batch, seq\]"),
        ([{"attention_mask": [[1]]}], BERT, r"model input input_ids: int32\[batch, seq\] is missing; given: attention_mask"),
        ([{"labels": [1]}], IDS, r"model input input_ids: int64\[batch, seq\] is missing; given: none"),
        ([[1.5, 2.5]], IMAGE, "has 2 values, the model takes 1: .*leave labels out"),
    ],
)  # fmt: skip
def test_what_does_not_fit(source: Any, graph: Graph, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        load(source, graph, warn=lambda _: None)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.jsonl", '{"input_ids": [1]}\n{"input_ids": [1', r"d\.jsonl: line 2 is not JSON: "),
        ("d.jsonl", "\n\n", r"d\.jsonl holds no rows; expected objects {input name: numbers}"),
        ("d.jsonl", "[1, 2]", r"d\.jsonl: line 1 holds a list; expected an object {input name: numbers}"),
        (
            "d.jsonl",
            '{"input_ids": [[1, 2], [3]]}',
            r"line 1: input 'input_ids' is not an array: its rows have from 1 to 2",
        ),
        ("d.jsonl", '{"input_ids": "a b"}', "line 1: input 'input_ids' has element type <U3: text; tokenise it first"),
        ("d.jsonl", '\n{"input_ids": [1], "x": 1}', r"line 2: unknown model input 'x'"),
        ("d.jsonl", '{"input_ids": [1.5]}', "element type float64, expected int64; convert it first"),
        ("d.json", "[" * 100_000, r"d\.json is not JSON: "),
        ("d.json", "[]", "holds no rows"),
        ("d.json", "3", "holds no rows"),
        ("d.json", '[{"input_ids": [1]}, 2]', "row 1 holds a int; expected an object"),
        ("d.json", '{"input_ids": [[1], [2, 3]]}', "its rows have from 1 to 2 elements"),
        ("d.json", '{"architectures": ["Bert"]}', "unknown model input 'architectures'"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(InvalidInput, match=message):
        load(tmp_path / name, IDS, warn=lambda _: None)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_files_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe{}")
    with pytest.raises(InvalidInput, match=rf"{name} cannot be read: .*utf-8"):
        load(tmp_path / name, IDS)
    with pytest.raises(InvalidInput, match=r"no such file; expected an \.npz, \.npy, \.jsonl or \.json file"):
        load(tmp_path / f"no-{name}", IDS)


def test_numbers_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"x": [1.0, NaN, 2.0]}')
    with pytest.raises(InvalidInput, match="line 1: input 'x' holds NaN; leave such samples out"):
        load(tmp_path / "d.jsonl", IMAGE, warn=lambda _: None)
