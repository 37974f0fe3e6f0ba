"""The ai.onnx.ml domain against ONNX Runtime, on random models and on the files that it ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fxopt.errors import InvalidInput, InvalidModel, MissingReference
from fxopt.ir.onnx.op import OnnxOp
from tests.onnx.one_node import assert_same, by_runtime, by_torch, feeds_of, model_of

ML = "ai.onnx.ml"
TRANSFORMS = ["NONE", "LOGISTIC", "SOFTMAX", "SOFTMAX_ZERO"]  # the runtime's PROBIT is an approximation
F32 = np.float32


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(F32)


def words(*values: str) -> Any:
    return np.array(values, dtype=object)


def compare(
    op_type: str, inputs: list[Any], outputs: int = 1, version: int = 1, rtol: float = 0.0, **attributes: Any
) -> None:
    model = model_of(op_type, version, inputs, outputs, attributes, ML)
    feeds = feeds_of(inputs)
    assert_same(by_torch(model, feeds), by_runtime(model, feeds), rtol, rtol)


X = normal(5, 3)
CASES: list[tuple[str, list[Any], dict[str, Any]]] = [
    *(("ArrayFeatureExtractor", [x, np.array([[2, 0]])], {}) for x in (X, X[0], X.astype(np.float64), X.astype(np.int32))),
    ("ArrayFeatureExtractor", [words("a", "b", "c"), np.array([1])], {}),
    ("ArrayFeatureExtractor", [normal(2, 2, 3), np.array([1, 1, 0])], {}),
    ("Binarizer", [X], {"threshold": 0.25}),
    *(("FeatureVectorizer", [x, x], {"inputdimensions": [3, 3]}) for x in (X, X.astype(np.int64), X.astype(np.float64))),
    ("FeatureVectorizer", [X, X[:, :1]], {"inputdimensions": [2, 3]}),
    ("FeatureVectorizer", [X[0]], {"inputdimensions": [3]}),
    ("Imputer", [np.array([[1, np.nan], [np.nan, 2]], F32)], {"imputed_value_floats": [9.0, 8.0], "replaced_value_float": np.nan}),
    ("Imputer", [np.array([[1, 0], [0, 2]])], {"imputed_value_int64s": [7], "replaced_value_int64": 0}),
    *(("Normalizer", [x], {"norm": norm}) for norm in ("MAX", "L1", "L2") for x in (X, np.array([[0, 0], [-3, 4]]))),
    *(("Scaler", [x], {"offset": [0.5], "scale": [2.0]}) for x in (X, X.astype(np.int32), X.astype(np.float64))),
    ("Scaler", [X], {"offset": [1.0, 2.0, 3.0], "scale": [0.1, 0.2, 0.3]}),
    ("OneHotEncoder", [np.array([[1, 2], [3, 2]])], {"cats_int64s": [2, 1]}),
    ("OneHotEncoder", [np.array([1.9, 2.0, -2.5], F32)], {"cats_int64s": [2, 1, -2]}),
    ("OneHotEncoder", [words("b", "?")], {"cats_strings": ["a", "b"]}),
    ("CategoryMapper", [words("a", "?")], {"cats_strings": ["b", "a"], "cats_int64s": [5, 6]}),
    ("CategoryMapper", [np.array([[5, 0]])], {"cats_strings": ["b", "a"], "cats_int64s": [5, 6]}),
    ("LabelEncoder", [words("a", "?")], {"classes_strings": ["b", "a"], "default_int64": -7}),
    ("LabelEncoder", [np.array([1, 5])], {"classes_strings": ["b", "a"], "default_string": "no"}),
    *(
        ("LinearRegressor", [X], {"coefficients": normal(6).tolist(), "targets": 2, "intercepts": [1.0, 2.0], "post_transform": name})
        for name in TRANSFORMS
    ),
    *(
        ("LinearClassifier", [X], {"coefficients": normal(9).tolist(), "intercepts": [0.0, 1.0, 0.5], "post_transform": name, **labels})
        for name in TRANSFORMS
        for labels in ({"classlabels_ints": [4, 5, 6]}, {"classlabels_strings": ["x", "y", "z"]})
    ),
    *(
        ("LinearClassifier", [x], {"coefficients": [1.0, -2.0, 0.5], "intercepts": [0.1], "post_transform": name, **labels})
        for name in ("NONE", "LOGISTIC")
        for x in (X, (10 * X).astype(np.int64))
        for labels in ({"classlabels_ints": [4, 5]}, {"classlabels_strings": ["x", "y"]})
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_equals_onnxruntime(case: Any) -> None:
    op_type, inputs, attributes = case
    exact = op_type not in ("Normalizer", "Scaler", "LinearRegressor", "LinearClassifier")
    compare(op_type, inputs, 2 if op_type.endswith("Classifier") else 1, rtol=0.0 if exact else 1e-6, **attributes)


# ---- labels

TYPES = {
    "strings": (["a", "b", "a"], words("a", "b", "?")),
    "int64s": ([1, 2, 1], np.array([1, 2, 9])),
    "floats": ([1.5, float("nan"), 1.5], np.array([1.5, np.nan, 9.0], F32)),
}


@pytest.mark.parametrize("version", [2, 4])
@pytest.mark.parametrize("keys", TYPES)
@pytest.mark.parametrize("values", TYPES)
def test_label_encoder(keys: str, values: str, version: int) -> None:
    listed, x = TYPES[keys][0][:2], TYPES[keys][1]
    if keys == "floats":
        x = x[~np.isnan(x)]  # see the next test: the runtime finds NaN only for some types of values
    compare(
        "LabelEncoder",
        [x],
        1,
        version,
        **{f"keys_{keys}": listed, f"values_{values}": [*TYPES[values][0][:2]]},
    )


def test_nan_is_a_key() -> None:
    x = torch.tensor([1.5, float("nan"), float("-nan")])
    op = OnnxOp(ML, "LabelEncoder", 4)
    assert op(x, keys_floats=[1.5, float("nan")], values_int64s=[7, 8]).tolist() == [7, 8, 8]


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.int16, object])
def test_label_encoder_with_tensors(dtype: Any) -> None:
    keys, values = np.array([3, 4]).astype(str if dtype is object else dtype), np.array([7, 8]).astype(dtype)
    names = {"keys_tensor": keys.astype(dtype), "values_tensor": values if dtype is not object else words("7", "8")}
    tensors = {name: numpy_helper.from_array(value) for name, value in names.items()}
    default = numpy_helper.from_array(np.array(["no"] if dtype is object else [-5]).astype(dtype))
    x = names["keys_tensor"][[1, 0, 1]]
    for inputs in ([x], [np.array(["9"] if dtype is object else [9]).astype(dtype)]):
        model = model_of("LabelEncoder", 4, inputs, 1, {**tensors, "default_tensor": default}, ML)
        (result,) = by_torch(model, feeds_of(inputs))
        expected = values[[1, 0, 1]] if len(inputs[0]) == 3 else ["no"] if dtype is object else [-5]
        assert result.tolist() == [str(item) if dtype is object else item for item in expected]
        assert result.dtype == dtype


def test_the_last_of_equal_keys_counts() -> None:
    op = OnnxOp(ML, "LabelEncoder", 4)
    assert op(torch.tensor([1]), keys_int64s=[1, 1], values_int64s=[5, 6]).tolist() == [6]
    with pytest.raises(InvalidInput, match=r"exactly one of keys_\*; given: none"):
        op(torch.tensor([1]), values_int64s=[5])


# ---- maps


def map_model(op_type: str, key: int, value: int, output: int, attributes: dict[str, Any]) -> Any:
    kind = onnx.TypeProto()
    kind.map_type.key_type = key
    kind.map_type.value_type.tensor_type.elem_type = value
    node = helper.make_node(op_type, ["x"], ["y"], domain=ML, **attributes)
    graph = helper.make_graph(
        [node], "one", [onnx.ValueInfoProto(name="x", type=kind)], [helper.make_tensor_value_info("y", output, None)]
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(ML, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


@pytest.mark.parametrize(
    ("value", "vocabulary", "key", "kind"),
    [
        ({"a": 4.0, "c": 8.0}, {"string_vocabulary": ["a", "c", "b"]}, TensorProto.STRING, TensorProto.FLOAT),
        ({2: 0.5}, {"int64_vocabulary": [1, 2]}, TensorProto.INT64, TensorProto.FLOAT),
    ],
)
def test_dict_vectorizer(value: Any, vocabulary: Any, key: int, kind: int) -> None:
    model = map_model("DictVectorizer", key, kind, kind, vocabulary)
    assert_same(by_torch(model, {"x": value}), by_runtime(model, {"x": value}))


def test_dict_vectorizer_of_other_types() -> None:
    op = OnnxOp(ML, "DictVectorizer", 1)
    counts = op({"a": 4, "c": 8}, string_vocabulary=["c", "b", "a"])
    assert (counts.dtype, counts.tolist()) == (torch.int64, [[8, 0, 4]])
    assert op([{1: "x"}, {2: "y"}], int64_vocabulary=[2, 1]).tolist() == [["", "x"], ["y", ""]]


@pytest.mark.parametrize("form", [{}, {"map_form": "SPARSE", "max_map": 5}])
@pytest.mark.parametrize(("cast", "kind"), [("TO_FLOAT", 1), ("TO_INT64", 7), ("TO_STRING", 8)])
def test_cast_map(form: Any, cast: str, kind: int) -> None:
    model = map_model("CastMap", TensorProto.INT64, TensorProto.FLOAT, kind, {"cast_to": cast, **form})
    value = {3: 1.0, 0: 2.0}
    (result,) = by_torch(model, {"x": value})
    if cast == "TO_STRING":  # the runtime writes a float as "%f"
        assert [float(text) for text in result.reshape(-1) if text] == [2.0, 1.0]
        return
    assert_same([result], by_runtime(model, {"x": value}))


@pytest.mark.parametrize("labels", [{"classlabels_int64s": [3, 4, 9]}, {"classlabels_strings": ["a", "b", "c"]}])
@pytest.mark.parametrize("x", [X, X[0]], ids=["rows", "row"])
def test_zip_map(labels: Any, x: Any) -> None:
    model = model_of("ZipMap", 1, [x], 1, labels, ML)
    assert by_torch(model, feeds_of([x])) == by_runtime(model, feeds_of([x]))


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(InvalidInput, match="ZipMap has 1 labels for 2 columns"):
        OnnxOp(ML, "ZipMap", 1)(torch.zeros(1, 2), classlabels_int64s=[1])
    with pytest.raises(InvalidInput, match="5 is none of the 1 categories, and zeros=0"):
        OnnxOp(ML, "OneHotEncoder", 1)(torch.tensor([5]), cats_int64s=[1], zeros=0)
    with pytest.raises(InvalidInput, match="the key 5 is not below max_map=2"):
        OnnxOp(ML, "CastMap", 1)({5: 1.0}, map_form="SPARSE", max_map=2)
    with pytest.raises(InvalidInput, match="post_transform 'RELU' given; expected one of NONE"):
        OnnxOp(ML, "LinearRegressor", 1)(torch.zeros(1, 1), coefficients=[1.0], post_transform="RELU")


def test_probit_is_the_inverse_of_the_normal_distribution() -> None:
    p = torch.tensor([[0.1, 0.5, 0.975]])
    y = OnnxOp(ML, "LinearRegressor", 1)(
        p, coefficients=np.eye(3).reshape(-1).tolist(), targets=3, post_transform="PROBIT"
    )
    torch.testing.assert_close(y, torch.tensor([[-1.2815516, 0.0, 1.959964]]))


# ---- trees

COMPARISONS = ["BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ"]


def random_trees(
    seed: int, votes: str, targets: list[int], positive: bool, mixed: bool, trees: int = 4
) -> dict[str, Any]:
    """Attributes of a random ensemble over 3 features; every tree is full, of depth 2 or 3."""
    random = np.random.default_rng(seed)
    names = (
        "treeids",
        "nodeids",
        "modes",
        "featureids",
        "values",
        "truenodeids",
        "falsenodeids",
        "missing_value_tracks_true",
    )
    nodes: dict[str, list[Any]] = {f"nodes_{name}": [] for name in names}
    leaves: dict[str, list[Any]] = {f"{votes}_{name}": [] for name in ("treeids", "nodeids", "ids", "weights")}
    for tree in range(trees):
        depth = int(random.integers(2, 4))
        inner = 2**depth - 1
        for node in range(2 * inner + 1):
            leaf = node >= inner
            mode = "LEAF" if leaf else str(random.choice(COMPARISONS if mixed else COMPARISONS[:1]))
            row = [tree, node, mode, 0 if leaf else int(random.integers(3)), float(random.integers(-2, 3)) / 2]
            row += [0, 0, 0] if leaf else [2 * node + 1, 2 * node + 2, int(random.integers(2))]
            for name, value in zip(names, row, strict=True):
                nodes[f"nodes_{name}"].append(value)
            for target in targets if leaf else []:
                weight = float(F32(random.random() / trees if positive else random.standard_normal()))
                for name, value in zip(leaves, [tree, node, target, weight], strict=True):
                    leaves[name].append(value)
    return nodes | leaves


ROWS = np.random.default_rng(1).integers(-3, 4, (40, 3)).astype(F32) / 2
ROWS[3, 0] = ROWS[5, 1] = np.nan


@pytest.mark.parametrize("how", ["SUM", "AVERAGE", "MIN", "MAX"])
@pytest.mark.parametrize("targets", [[0], [0, 1], [0, 1, 2]], ids=len)
@pytest.mark.parametrize("mixed", [False, True])
def test_tree_regressor(how: str, targets: list[int], mixed: bool) -> None:
    attributes = random_trees(len(targets), "target", targets, False, mixed)
    base = {"base_values": [0.5, -1.0, 2.0][: len(targets)]} if mixed else {}
    x = np.nan_to_num(ROWS) if mixed else ROWS  # the runtime compares NaN as unequal before it asks for the branch
    compare(
        "TreeEnsembleRegressor", [x], 1, 3, 1e-6, **attributes, **base, aggregate_function=how, n_targets=len(targets)
    )


def test_tree_regressor_in_double() -> None:
    attributes = random_trees(3, "target", [0], False, False)
    values, weights = attributes.pop("nodes_values"), attributes.pop("target_weights")
    tensors = {
        "nodes_values_as_tensor": numpy_helper.from_array(np.array(values)),
        "target_weights_as_tensor": numpy_helper.from_array(np.array(weights)),
    }
    compare("TreeEnsembleRegressor", [ROWS.astype(np.float64)], 1, 3, 1e-6, **attributes, **tensors, n_targets=1)


@pytest.mark.parametrize("post_transform", TRANSFORMS)
@pytest.mark.parametrize("positive", [False, True])
def test_tree_classifier(post_transform: str, positive: bool) -> None:
    attributes = random_trees(7, "class", [0, 1, 2], positive, False)
    classes = {"classlabels_strings": ["x", "y", "z"]} if positive else {"classlabels_int64s": [5, 6, 7]}
    compare("TreeEnsembleClassifier", [ROWS], 2, 3, 1e-6, **attributes, **classes, post_transform=post_transform)


@pytest.mark.parametrize("post_transform", ["NONE", "LOGISTIC"])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("base", [{}, {"base_values": [0.25]}])
def test_tree_classifier_with_one_score(post_transform: str, positive: bool, base: Any) -> None:
    attributes = random_trees(7, "class", [0], positive, False) | base
    compare(
        *("TreeEnsembleClassifier", [ROWS], 2, 3, 1e-6), **attributes, classlabels_int64s=[5, 6],
        post_transform=post_transform,
    )  # fmt: skip


def test_what_the_evaluators_disagree_on_is_refused() -> None:
    def run(voted: list[int], labels: list[int], post_transform: str = "NONE") -> None:
        attributes = random_trees(7, "class", voted, True, False)
        OnnxOp(ML, "TreeEnsembleClassifier", 3)(
            torch.zeros(1, 3), **attributes, classlabels_int64s=labels, post_transform=post_transform
        )

    with pytest.raises(MissingReference, match="only the second has votes"):
        run([1], [0, 1])
    with pytest.raises(MissingReference, match="with one label"):
        run([0], [1])
    with pytest.raises(MissingReference, match="one score for two classes with SOFTMAX"):
        run([0], [0, 1], "SOFTMAX")


def test_two_classes_with_a_score_each_are_compared() -> None:
    attributes = random_trees(7, "class", [0, 1], False, False)
    op = OnnxOp(ML, "TreeEnsembleClassifier", 3)
    label, scores = op(torch.from_numpy(ROWS), **attributes, classlabels_int64s=[5, 6], _outputs=2)
    assert label.tolist() == [6 if row[1] > row[0] else 5 for row in scores.tolist()]
    assert len(set(label.tolist())) == 2


def test_base_values_of_a_tree_classifier() -> None:
    attributes = random_trees(9, "class", [0, 1, 2], False, False)
    compare(
        "TreeEnsembleClassifier",
        [ROWS],
        2,
        3,
        1e-6,
        **attributes,
        base_values=[0.5, -1.0, 2.0],
        classlabels_int64s=[1, 2, 3],
    )


@pytest.mark.parametrize("dtype", [F32, np.float64])
@pytest.mark.parametrize("how", [0, 1, 2, 3])
def test_tree_ensemble(dtype: Any, how: int) -> None:
    """Two trees: sets of members and comparisons; a tree that is one leaf."""
    attributes = {
        "n_targets": 2, "aggregate_function": how, "tree_roots": [0, 2, 3],
        "nodes_featureids": [0, 1, 2, 0], "nodes_modes": numpy_helper.from_array(np.uint8([0, 6, 6, 0])),
        "nodes_splits": numpy_helper.from_array(dtype([0.5, 0, 0, 0])),
        "membership_values": numpy_helper.from_array(dtype([1, 2, np.nan, 1, 3, np.nan])),
        "nodes_trueleafs": [0, 1, 1, 1], "nodes_truenodeids": [1, 0, 2, 5],
        "nodes_falseleafs": [1, 1, 1, 1], "nodes_falsenodeids": [4, 1, 3, 5],
        "leaf_targetids": [0, 1, 0, 0, 1, 0], "leaf_weights": numpy_helper.from_array(dtype([1, 2, 4, 8, 16, 32])),
    }  # fmt: skip
    compare("TreeEnsemble", [np.nan_to_num(2 * ROWS).astype(dtype)], 1, 5, 1e-6, **attributes)


def test_members_may_be_negative_or_fractions() -> None:
    """The runtime takes 1.5 for a member of {1, -1}."""
    result = OnnxOp(ML, "TreeEnsemble", 5)(
        torch.tensor([[-1.0], [0.5], [1.0], [1.5], [float("nan")]]), n_targets=1, tree_roots=[0], nodes_featureids=[0],
        nodes_modes=torch.tensor([6], dtype=torch.uint8), nodes_splits=torch.zeros(1), nodes_trueleafs=[1],
        nodes_falseleafs=[1], nodes_truenodeids=[0], nodes_falsenodeids=[1], leaf_targetids=[0, 0],
        leaf_weights=torch.tensor([1.0, 0.0]), membership_values=torch.tensor([1.0, -1.0, 0.5, float("nan")]),
    )  # fmt: skip
    assert result.reshape(-1).tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_broken_trees_are_refused() -> None:
    tree = random_trees(1, "target", [0], False, False, 1)
    loop = tree | {"nodes_truenodeids": [0, *tree["nodes_truenodeids"][1:]]}
    with pytest.raises(InvalidModel, match="among its own descendants"):
        OnnxOp(ML, "TreeEnsembleRegressor", 3)(torch.zeros(1, 3), **loop, n_targets=1)
    lost = tree | {"nodes_falsenodeids": [99, *tree["nodes_falsenodeids"][1:]]}
    with pytest.raises(InvalidModel, match="node 99 of tree 0, which does not exist"):
        OnnxOp(ML, "TreeEnsembleRegressor", 3)(torch.zeros(1, 3), **lost, n_targets=1)


# ---- support vector machines

KERNELS = [
    ("LINEAR", [0.0, 0.0, 0.0]),
    ("POLY", [0.5, 1.0, 3.0]),
    ("RBF", [0.7, 0.0, 0.0]),
    ("SIGMOID", [0.3, 0.1, 0.0]),
]


@pytest.mark.parametrize(("kind", "parameters"), KERNELS)
@pytest.mark.parametrize("one_class", [0, 1])
def test_svm_regressor(kind: str, parameters: list[float], one_class: int) -> None:
    vectors = normal(4, 3, seed=2)
    compare(
        *("SVMRegressor", [X], 1, 1, 1e-5), coefficients=normal(4, seed=3).tolist(), rho=[0.3], kernel_type=kind,
        kernel_params=parameters, n_supports=4, support_vectors=vectors.reshape(-1).tolist(), one_class=one_class,
    )  # fmt: skip


def test_linear_svm_regressor() -> None:
    compare(
        "SVMRegressor",
        [X],
        1,
        1,
        1e-6,
        coefficients=[1.0, -2.0, 0.5],
        rho=[0.3],
        kernel_type="LINEAR",
        kernel_params=[0.0, 0.0, 0.0],
    )


@pytest.mark.parametrize(("kind", "parameters"), KERNELS)
@pytest.mark.parametrize("counts", [[2, 3], [2, 1, 3], [1, 2, 1, 2]], ids=len)
@pytest.mark.parametrize("probability", [False, True])
def test_svm_classifier(kind: str, parameters: list[float], counts: list[int], probability: bool) -> None:
    classes, total = len(counts), sum(counts)
    pairs = classes * (classes - 1) // 2
    platt = {"prob_a": (-1 - normal(pairs, seed=5) ** 2).tolist(), "prob_b": normal(pairs, seed=6).tolist()}
    compare(
        *("SVMClassifier", [X], 2, 1, 1e-4 if probability else 1e-5), kernel_type=kind, kernel_params=parameters,
        coefficients=normal((classes - 1) * total, seed=3).tolist(), rho=normal(pairs, seed=4).tolist(),
        support_vectors=normal(total * 3, seed=2).tolist(), vectors_per_class=counts,
        classlabels_ints=list(range(10, 10 + classes)), **(platt if probability else {}),
    )  # fmt: skip


@pytest.mark.parametrize("post_transform", ["NONE", "LOGISTIC", "SOFTMAX"])
def test_linear_svm_classifier(post_transform: str) -> None:
    labels = ["x", "y", "z"]
    compare(
        *("SVMClassifier", [X], 2, 1, 1e-5), coefficients=normal(9).tolist(), rho=[0.1], classlabels_strings=labels,
        post_transform=post_transform, kernel_type="LINEAR", kernel_params=[0.0, 0.0, 0.0],
    )  # fmt: skip


# ---- files


def test_the_model_that_onnxruntime_ships() -> None:
    path = Path(onnxruntime.__file__).parent / "datasets" / "logreg_iris.onnx"
    model = onnx.load(path)
    x = np.random.default_rng(0).uniform(0, 8, (3, 4)).astype(F32)
    feeds = {model.graph.input[0].name: x}
    with pytest.raises(
        InvalidModel, match="12 coefficients for 3 scores of 2 features"
    ):  # the runtime ignores the last 6
        by_torch(model, {model.graph.input[0].name: x[:, :2]})
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4
    expected = by_runtime(model, feeds)
    label, scores = by_torch(model, feeds)
    assert label.tolist() == np.asarray(expected[0]).tolist()
    assert [list(row) for row in scores] == [list(row) for row in expected[1]]
    np.testing.assert_allclose(
        [[*row.values()] for row in scores], [[*row.values()] for row in expected[1]], 1e-6, 1e-7
    )
